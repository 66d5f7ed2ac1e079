"""The state of a run in a form that knows neither mesh nor schedule: named arrays, layers in the model's order."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.arguments import entry_axes

LAYERS = frozenset({"layers", "outer"})
"""Keys of parameters, or of moments, in the order of layers."""

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """How the state of one mesh and schedule and its canonical form become each other.

    Attributes:
      to_layers: of one tree of parameters (or of moments, which look like them) in stages: a dict with "layers",
        leading axis the layers in the order of the model, and "outer".
      from_layers: its inverse.
      mesh: of the state.
      template: the state's shapes, dtypes and shardings; see `describe`.

    >>> mesh = jaxpipe.make_mesh(pp=1)
    >>> state = {"params": jaxpipe.Params({"w": jnp.ones((2, 3))}, jnp.zeros(2)), "step": jnp.int32(4)}
    >>> to_layers = lambda params: {"layers": params.stages, "outer": params.outer}
    >>> from_layers = lambda tree: jaxpipe.Params(tree["layers"], tree["outer"])
    >>> layout = Layout(to_layers, from_layers, mesh, describe(state))
    >>> arrays, sums = layout.pack(state)
    >>> sorted(arrays), sorted(sums) == sorted(arrays)
    (['params/layers/w', 'params/outer', 'step'], True)
    >>> jax.tree.all(jax.tree.map(jnp.array_equal, layout.unpack(arrays), state))
    True
    """

    to_layers: Callable[[Any], Mapping[str, Any]]
    from_layers: Callable[[Any], Any]
    mesh: Mesh
    template: Any

    def pack(self, state: Any) -> tuple[Arrays, dict[str, int]]:
        """The canonical arrays of a state by name, and `fingerprint` of each."""
        arrays, sums = self._pack(state)
        return arrays, dict(zip(sorted(arrays), np.asarray(sums).tolist(), strict=True))

    def unpack(self, arrays: Arrays) -> Any:
        """The state of canonical arrays, sharded as the template."""
        return self._unpack(arrays)

    def fingerprints(self, arrays: Arrays) -> dict[str, int]:
        """`fingerprint` of each array."""
        sums = jax.jit(_fingerprints, out_shardings=NamedSharding(self.mesh, P()))(arrays)
        return dict(zip(sorted(arrays), np.asarray(sums).tolist(), strict=True))

    @functools.cached_property
    def canonical(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, dtype and sharding of each canonical array, by name."""

        def placed(x: Any) -> Any:
            if not _is_layers(x):
                return self._divided(x, divided_evenly)
            layers = jax.tree.map(functools.partial(self._divided, divide=divided_within), x["layers"])
            return {**x, "layers": layers, "outer": jax.tree.map(placed, x["outer"])}

        tree = jax.tree.map(placed, self._canonical, is_leaf=_is_layers)
        return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    def _divided(self, leaf: Any, divide: Callable[[Sequence[int], Mesh], NamedSharding]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=divide(leaf.shape, self.mesh))

    def _moved(self, state: Any, *, to_rows: bool) -> Any:
        """The state with stages divided as the template is, or, to change their order, within rows and not among them.

        Mesh axes move one at a time. XLA makes each move an all-to-all; several at once, or rows that change their
        order while devices have some of them each, it may do with whole arrays on every device.
        """

        def move(leaf: jax.Array, like: Any) -> jax.Array:
            if not isinstance(like.sharding, NamedSharding):
                return leaf
            within = divided_within(leaf.shape, self.mesh).spec
            start, end = (within, like.sharding.spec) if to_rows else (like.sharding.spec, within)
            for spec in (start, *moves(start, end, leaf.ndim, self.mesh)):
                leaf = jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec))
            return leaf

        def of_params(x: Any, like: Any) -> Any:
            return x._replace(stages=jax.tree.map(move, x.stages, like.stages)) if _is_params(x) else x

        return jax.tree.map(of_params, state, self.template, is_leaf=_is_params)

    @functools.cached_property
    def _canonical(self) -> Any:
        return jax.eval_shape(self._to_canonical, self.template)

    def _to_canonical(self, state: Any) -> Any:
        return jax.tree.map(lambda x: self.to_layers(x) if _is_params(x) else x, state, is_leaf=_is_params)

    @functools.cached_property
    def _unpack(self) -> Callable[[Arrays], Any]:
        replicated = NamedSharding(self.mesh, P())
        shardings = jax.tree.map(
            lambda leaf: leaf.sharding if isinstance(leaf.sharding, NamedSharding) else replicated, self.template
        )
        structure = jax.tree.structure(self._canonical)

        def from_canonical(arrays: Arrays) -> Any:
            tree = jax.tree.unflatten(structure, [arrays[name] for name in self.canonical])
            state = jax.tree.map(lambda x: self.from_layers(x) if _is_layers(x) else x, tree, is_leaf=_is_layers)
            return self._moved(state, to_rows=True)

        return jax.jit(from_canonical, out_shardings=shardings)

    @functools.cached_property
    def _pack(self) -> Callable[[Any], tuple[Arrays, jax.Array]]:
        def pack(state: Any) -> tuple[Arrays, jax.Array]:
            tree = self._to_canonical(self._moved(state, to_rows=False))
            arrays = dict(zip(self.canonical, jax.tree.leaves(tree), strict=True))
            return arrays, _fingerprints(arrays)

        shardings = {name: leaf.sharding for name, leaf in self.canonical.items()}
        return jax.jit(pack, out_shardings=(shardings, NamedSharding(self.mesh, P())))


def describe(state: Any) -> Any:
    """The state's shapes, dtypes and shardings, without its arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def divided_evenly(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """A sharding over as many axes of the mesh as divide some dimension, whatever the array is.

    >>> mesh = jax.make_mesh((1, 1), ("pp", "ep"), devices=jax.devices()[:1])
    >>> tuple(divided_evenly((8, 3), mesh).spec), tuple(divided_evenly((), mesh).spec)
    ((('pp', 'ep'), None), ())
    """
    return _divided_at(range(len(shape)), shape, mesh)


def divided_within(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The same, but for the first axis, which is whole on every device: its rows can then change their order.

    >>> mesh = jax.make_mesh((1, 1), ("pp", "ep"), devices=jax.devices()[:1])
    >>> tuple(divided_within((8, 4, 3), mesh).spec)
    (None, None, ('pp', 'ep'))
    """
    return _divided_at(range(len(shape) - 1, 0, -1), shape, mesh)


def _divided_at(places: Sequence[int], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    axes: list[tuple[str, ...]] = [() for _ in shape]
    for axis, size in mesh.shape.items():
        for place in places:
            if shape[place] % (size * math.prod(mesh.shape[name] for name in axes[place])) == 0:
                axes[place] += (axis,)
                break
    return NamedSharding(mesh, P(*(names or None for names in axes)))


def moves(start: P, end: P, ndim: int, mesh: Mesh) -> list[P]:
    """Specs from start, which is not among them, to end, of which each has one mesh axis elsewhere than the one before.

    >>> mesh = jax.make_mesh((1, 1), ("pp", "ep"), devices=jax.devices()[:1])
    >>> moves(P("pp", "ep"), P(None, None, ("pp", "ep")), 3, mesh)
    [P(None, 'ep', 'pp'), P(None, None, ('pp', 'ep'))]
    """
    now, then = ([set(entry_axes(entry)) for entry in (*spec, *(None,) * (ndim - len(spec)))] for spec in (start, end))
    found = []
    for axis in mesh.axis_names:
        before, place = (next((i for i, names in enumerate(spec) if axis in names), None) for spec in (now, then))
        if before == place:
            continue
        now = [names - {axis} | ({axis} if i == place else set()) for i, names in enumerate(now)]
        ordered = (tuple(name for name in mesh.axis_names if name in names) for names in now)
        found.append(P(*(names[0] if len(names) == 1 else names or None for names in ordered)))
    return found


def fingerprint(array: jax.Array) -> jax.Array:
    """A checksum of an array's bits and their places, uint32; the same on every mesh, as integers add up in any order.

    >>> a = jnp.arange(6.0).reshape(2, 3)
    >>> int(fingerprint(a)) == int(fingerprint(a)), int(fingerprint(a)) == int(fingerprint(a[:, ::-1]))
    (True, False)
    """
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    width = array.dtype.itemsize
    # Words of eight bytes become two of four, along a new last axis.
    bits = jax.lax.bitcast_convert_type(array, {1: jnp.uint8, 2: jnp.uint16}.get(width, jnp.uint32)).astype(jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % (1 << 32))
        stride *= bits.shape[axis]
    # Odd factors, so that no bit's change is lost modulo 2**32, and scattered ones, so that a swap is seen.
    factors = (place * jnp.uint32(0x9E3779B1)) ^ (place >> 15) * jnp.uint32(0x85EBCA77)
    return (bits * (factors | jnp.uint32(1))).sum(dtype=jnp.uint32)


def _fingerprints(arrays: Arrays) -> jax.Array:
    # By name: dicts leave jit in another order than they entered it.
    return jnp.stack([fingerprint(arrays[name]) for name in sorted(arrays)])


def _is_params(node: Any) -> bool:
    return isinstance(node, jaxpipe.Params)


def _is_layers(node: Any) -> bool:
    return isinstance(node, dict) and node.keys() == LAYERS


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
