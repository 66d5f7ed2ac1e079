"""An NNX module as a pure function of its parameters, with random streams of a context's key."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpipe._jax import Tracer
from jaxpipe.jaxpr_equality import returns_input
from jaxpipe.runtime.model import Context

MUTABLE = (nnx.BatchStat, nnx.Cache, nnx.Intermediate)
"""Kinds of variables that a call changes."""


@dataclasses.dataclass(frozen=True)
class Keys:
    """An array of a random stream's state: one key, or many where `nnx.vmap` and the like made layers.

    Attributes:
      shape: of the array.
      distinct: for each of its keys the index of the first that it equals; None for counts of draws.
    """

    shape: tuple[int, ...]
    distinct: tuple[int, ...] | None

    def row(self) -> Keys:
        """Of one of many layers, whose keys differ anyway."""
        shape = self.shape[1:]
        return Keys(shape, None if self.distinct is None else tuple(range(math.prod(shape))))


@dataclasses.dataclass(frozen=True, eq=False)
class NNXFunction:
    """An NNX module as a pure function ``(params, *args) -> result``; made by `nnx_function`.

    Attributes:
      graphdef: the module's static part.
      params: its parameters, a pure dict of arrays.
      constants: its other arrays and variables, the same in every call, an `nnx.State`.
      streams: the state of its random streams, by path.
    """

    graphdef: Any
    params: Any
    constants: Any
    streams: dict[tuple[Any, ...], Keys]
    _variables: Any

    @property
    def name(self) -> str:
        """The module's class."""
        return self.graphdef.nodes[0].type.__name__

    def __call__(
        self, params: Any, *args: Any, ctx: Context | None = None, rngs: nnx.Rngs | None = None, **kwargs: Any
    ) -> Any:
        """Calls the module with these parameters.

        Args:
          params: like ``self.params``.
          *args: the module's.
          ctx: seeds the module's own random streams (``nnx.Dropout(rate, rngs=rngs)``) for this place and microbatch.
            Without it, or without a key in it, random numbers are refused; a module in ``eval()`` draws none.
          rngs: passed to the module.
          **kwargs: the module's.

        Raises:
          ValueError: the module draws random numbers without a key, or changes a variable.
        """
        if rngs is not None:
            kwargs["rngs"] = rngs
        return self.run(params, ctx, args, kwargs)

    def run(self, params: Any, ctx: Context | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """`__call__` of a module whose own arguments may have any name."""
        return self.apply(params, ctx, lambda module: module(*args, **kwargs))

    def apply(self, params: Any, ctx: Context | None, use: Callable[[Any], Any]) -> Any:
        """What ``use(module)`` returns of the module with these parameters, which must not change it."""

        def call(function: NNXFunction) -> tuple[Any, dict[Any, Any], dict[Any, Any]]:
            module = function.merge(params, ctx)
            before = _values(module)
            result = use(module)
            return result, before, _values(module)

        result, before, after = call(self)
        changed = [path for path in after if path not in before or after[path] is not before[path]]
        if changed and all(path in before for path in changed):
            # Transforms (nnx.jit, nnx.remat) return all variables as new arrays; the jaxpr tells which are as before.
            changed = self._changed(lambda function: call(function)[2], before)
        if changed:
            raise ValueError(
                f"{self.name} changes or makes variables {sorted(map(dotted, changed))} when it is called: a pipeline "
                "stage is a pure function, so return what it records as metrics of a jaxpipe.Output"
            )
        return result

    def merge(self, params: Any, ctx: Context | None = None) -> Any:
        """The module with these parameters, its random streams seeded as in a call."""
        key = None if ctx is None else ctx.rng
        random = nnx.from_flat_state({path: _seed(path, keys, key) for path, keys in self.streams.items()})
        module = self.with_random(params, random)
        return module if key is not None else _without_key(module, self.name)

    def with_random(self, params: Any, random: Any) -> Any:
        """The module with these parameters and random streams in this state."""
        leaves, structure = jax.tree.flatten(params)
        if structure != jax.tree.structure(self.params):
            raise ValueError(
                f"parameters of structure {structure} for {self.name}, whose parameters have structure "
                f"{jax.tree.structure(self.params)}: give a tree like function.params"
            )
        constants = jax.tree.map(lambda leaf: leaf, self.constants)  # new variables, which the module will own
        return nnx.merge(self.graphdef, jax.tree.unflatten(self._variables, leaves), constants, random)

    def state_of(self, tree: Any) -> Any:
        """The `nnx.State` whose variables hold what a tree like ``self.params`` has in their places."""
        return jax.tree.unflatten(self._variables, jax.tree.structure(self.params).flatten_up_to(tree))

    def _changed(self, after: Callable[[NNXFunction], Mapping[Any, Any]], before: Mapping[Any, Any]) -> list[Any]:
        """Paths of variables that a call changes."""
        paths, flat = list(before), dict(nnx.to_flat_state(self.constants))

        def values(*before: Any) -> list[Any]:
            given = {path: flat[path].copy(value) for path, value in zip(paths, before, strict=True)}
            found = after(dataclasses.replace(self, constants=nnx.from_flat_state({**flat, **given})))
            return [found[path] for path in paths]

        jaxpr = jax.make_jaxpr(values)(*before.values()).jaxpr
        leaves = [path for path, value in before.items() for _ in jax.tree.leaves(value)]
        return [path for i, path in enumerate(leaves) if not returns_input(jaxpr, i, i)]


def nnx_function(module: nnx.Module) -> NNXFunction:
    """Splits an NNX module into parameters and a pure function of them.

    Parameters are `nnx.Param` and its subclasses, and variables whose class says ``pipeline_parameter = True``: arrays
    that nothing trains but that change between steps, such as a placement. Other arrays and variables are constants.
    Random streams that the module holds are seeded in each call: an embedding with dropout is called as
    ``function(outer, tokens, ctx=ctx)``.

    Raises:
      ValueError: if the module holds state that a call would change (batch statistics, caches): a pipeline runs
        microbatches in an order of its own, so nothing may pass from one to the next.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> function = nnx_function(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> sorted(function.params), function(function.params, jnp.ones((5, 2))).shape
    (['bias', 'kernel'], (5, 3))
    """
    graphdef, params, random, constants = nnx.split(module, is_parameter, nnx.RngState, ...)
    kinds = sorted({type(leaf).__name__ for _, leaf in nnx.to_flat_state(constants) if isinstance(leaf, MUTABLE)})
    if kinds:
        raise ValueError(
            f"{type(module).__name__} holds variables of kinds {kinds} besides nnx.Param: a pipeline stage is a pure "
            "function, so remove them, make them nnx.Param, or return their updates as metrics"
        )
    streams = {path: _keys(variable) for path, variable in nnx.to_flat_state(random)}
    return NNXFunction(graphdef, nnx.to_pure_dict(params), constants, streams, jax.tree.structure(params))


def parameters_of(module: nnx.Module) -> Any:
    """The parameters of a module, as `nnx_function` has them."""
    return nnx.to_pure_dict(nnx.state(module, is_parameter))


def is_parameter(path: Any, leaf: Any) -> bool:
    """A filter of NNX: what `nnx_function` takes for a parameter."""
    return isinstance(leaf, nnx.Param) or getattr(type(leaf), "pipeline_parameter", False) is True


def fold_name(key: jax.Array, name: str) -> jax.Array:
    """The key of a name: 64 bits of a hash folded into another key."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    for word in np.frombuffer(digest, "<u4"):
        key = jax.random.fold_in(key, word)
    return key


def make_rngs(ctx: Context, names: Iterable[str], owner: str) -> nnx.Rngs:
    """Streams of these names, each with a key of its own; without a key they refuse to draw."""
    if ctx.rng is None:
        return _without_key(nnx.Rngs(dict.fromkeys(names, 0)), owner)
    return nnx.Rngs({name: fold_name(ctx.rng, f"rngs:{name}") for name in names})


class StreamWithoutKey(nnx.RngStream):
    """A random stream that refuses to draw."""

    owner: str = ""

    def __call__(self) -> jax.Array:
        """Raises a ValueError."""
        raise ValueError(
            f"{self.owner} draws from its random stream {self.tag!r} without a key: call step(params, batch, rng), "
            "hand the context on where you call the module yourself (function(params, x, ctx=ctx), "
            "function.merge(params, ctx)), or turn randomness off with module.eval()"
        )


def _without_key(module: Any, owner: str) -> Any:
    """The module, its random streams refusing to draw."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.RngStream):
            stream: Any = node
            stream.__class__ = StreamWithoutKey
            stream.owner = owner
    return module


def _keys(variable: Any) -> Keys:
    """What `_seed` needs to know of a variable of a random stream."""
    value = variable.get_value()
    if not isinstance(variable, nnx.RngKey):
        return Keys(value.shape, None)
    if isinstance(value, jax.Array) and not isinstance(value, Tracer):
        rows = [row.tobytes() for row in np.asarray(jax.random.key_data(value)).reshape(value.size, -1)]
        return Keys(value.shape, tuple(map(rows.index, rows)))
    return Keys(value.shape, tuple(range(math.prod(value.shape))))


def _seed(path: tuple[Any, ...], keys: Keys, key: jax.Array | None) -> jax.Array:
    """New values for a variable of a random stream: counts of 0, and keys made of one key and the stream's path."""
    if keys.distinct is None:
        return jnp.zeros(keys.shape, jnp.uint32)
    if key is not None and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # of jax.random.PRNGKey
    key = jax.random.key(0) if key is None else fold_name(key, dotted(path))
    if not keys.shape:
        return key
    return jax.random.split(key, len(keys.distinct))[np.asarray(keys.distinct)].reshape(keys.shape)


def _values(module: Any) -> dict[tuple[Any, ...], Any]:
    """The value of each variable that is neither a parameter nor of a random stream, by path."""
    state = nnx.state(module, nnx.Not(nnx.Any(is_parameter, nnx.RngState)))
    found = nnx.to_flat_state(state)
    return {path: leaf.get_raw_value() for path, leaf in found if isinstance(leaf, nnx.Variable)}


def dotted(path: Iterable[Any]) -> str:
    """A variable's path as text, with dots."""
    return ".".join(map(str, path))
