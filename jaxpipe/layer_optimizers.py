"""Optimizers that see one layer at a time: Muon, LAMB, Adafactor and whatever else treats a leaf as one parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxpipe.optimizer_state import map_params, shardings_of_state
from jaxpipe.params import Params
from jaxpipe.stacking import Stacking, dotted
from jaxpipe.trainable import is_floating

if TYPE_CHECKING:
    import optax


Axes = int | Sequence[int]
"""Dimensions of a parameter."""


def per_layer(transformation: optax.GradientTransformation, stacking: Stacking) -> optax.GradientTransformation:
    """The optimizer for each layer by itself, with parameters of the shapes that they have in the plain model.

    An optimizer that treats a leaf as one parameter takes the stacked rows of all layers for one: Muon would see no
    matrices, LAMB and LARS one norm of all layers, Adafactor other dimensions to factor, and a mask of "ndim >= 2" one
    dimension too many. Within this they see a `jaxpipe.Params` whose stages are one layer's, so all that is written for
    the plain model holds: masks, labels by name, ``muon_weight_dimension_numbers``. It is one `jax.vmap` for each
    stacked dimension, so a layer is updated where it is stored, and nothing of it travels over the pipeline axis.

    What couples layers, `optax.clip_by_global_norm` say, stays outside::

        optax.chain(optax.clip_by_global_norm(1.0), per_layer(optax.contrib.muon(2e-2), stacking))

    Layers of several kinds are updated together; a leaf that only some of them have repeats one layer meanwhile, so
    that all leaves have as many slots. A path then ends in ``kind_0``, ``kind_1``, ... where kinds have parameters of
    different shapes in one place, as `jaxpipe.flax.layered_stages` says.

    The state has leaves ``[stages, ...]`` as the parameters have, and scalars (counts) once. Made outside of `jax.jit`
    it is sharded as the parameters are.

    Args:
      transformation: sees floating and other leaves alike; see `jaxpipe.floating_only`, which goes outermost.
      stacking: of the parameters, `jaxpipe.flax.PipelinedModel.stacking` say.

    Raises:
      ValueError: parameters that are not stacked so; when called, a transformation that couples layers.

    >>> import jaxpipe, optax
    >>> import jax.numpy as jnp
    >>> stacking = Stacking(jaxpipe.schedule.build("1f1b", 2, 4))
    >>> params = Params({"w": jnp.ones((2, 3, 3))})
    >>> optimizer = per_layer(optax.contrib.muon(1e-2), stacking)
    >>> with jax.numpy_dtype_promotion("standard"):  # JAX's default, which optax counts on
    ...     updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> updates.stages["w"].shape
    (2, 3, 3)
    """

    def even(params: Params) -> Params:
        return _with_slots(params, stacking, even=True)

    def cut(params: Params) -> Params:
        return _with_slots(params, stacking, even=False)

    def over_layers(function: Callable[..., Any], ins: Any, outs: Any) -> Callable[..., Any]:
        for _ in range(stacking.depth):
            function = jax.vmap(function, in_axes=ins, out_axes=outs)
        return function

    def start(params: Any) -> Any:
        params = even(params)
        row = Params(*jax.eval_shape(lambda tree: tree, params))
        row = row._replace(stages=jax.tree.map(lambda leaf: _own_shape(leaf, stacking.depth), row.stages))
        outs = _axes(jax.eval_shape(transformation.init, row))
        return map_params(cut, over_layers(transformation.init, (Params(0, None),), outs)(params))

    def init(params: Any) -> Any:
        stacking.check(params)
        shardings = shardings_of_state(start, params)
        return start(params) if shardings is None else jax.jit(start, out_shardings=shardings)(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        stacking.check(updates)
        axes = _axes(state)
        given = None if params is None else Params(0, None)

        def of_layer(updates: Any, state: Any, params: Any) -> Any:
            return transformation.update(updates, state, params, **extra)

        run = over_layers(of_layer, (Params(0, None), axes, given), (Params(0, None), axes))
        try:
            found = run(even(updates), map_params(even, state), None if params is None else even(params))
            return map_params(cut, found)
        except ValueError as error:
            if "out_axes" not in str(error):
                raise
            raise ValueError(
                "the optimizer within per_layer couples layers with each other or with what is outside of them, as "
                "clipping by a global norm does: chain that part before or after per_layer instead"
            ) from error

    return type(transformation)(init, update)


def muon(
    learning_rate: Any,
    stacking: Stacking,
    *,
    dimensions: Mapping[str, tuple[Axes, Axes] | None] = MappingProxyType({}),
    **options: Any,
) -> optax.GradientTransformation:
    """Muon for the layers' matrices, Adam for all else, as `optax.contrib.muon` of the plain model.

    Stages are whole on their ranks, so the Newton-Schulz iteration of a layer runs where the layer is stored: no weight
    is gathered, which FSDP has to do. Experts that are sharded over a mesh axis stay where they are, too.

    Args:
      learning_rate: a number or an optax schedule.
      stacking: of the parameters, `jaxpipe.flax.PipelinedModel.stacking` say.
      dimensions: for parameters by the end of their path ("w_in", "query.kernel", "outer.head.kernel"):
        (reduction axes, output axes) within the layer's own dimensions, all other axes being batch dimensions; None for
        Adam. Needed for parameters of layers with more than two dimensions: ``(1, 2)`` for experts
        ``[experts, in, out]``, ``(0, (1, 2))`` for a projection ``[width, heads, head_dim]``. Those not listed are
        matrices ``(0, 1)`` where they have two dimensions, and Adam's where they have fewer; what is outside of the
        layers (embeddings, heads) is Adam's.
      **options: further arguments of `optax.contrib.muon` (optax 0.2.6 or newer).

    Raises:
      ValueError: a name that no parameter has; a layer's parameter of more than two dimensions that is not listed.

    >>> import jaxpipe, optax
    >>> import jax.numpy as jnp
    >>> stacking = Stacking(jaxpipe.schedule.build("1f1b", 2, 4))
    >>> params = Params({"kernel": jnp.ones((2, 3, 5)), "w_in": jnp.ones((2, 4, 3, 5)), "scale": jnp.ones((2, 3))})
    >>> optimizer = muon(1e-2, stacking, dimensions={"w_in": (1, 2)})
    >>> with jax.numpy_dtype_promotion("standard"):  # JAX's default, which optax counts on
    ...     updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    """
    from optax.contrib import MuonDimensionNumbers  # noqa: PLC0415  (optax is for those who use it)
    from optax.contrib import muon as of_layer  # noqa: PLC0415

    def of_leaf(path: Any, leaf: Any) -> Any:
        text = dotted(path)
        names = [name for name in dimensions if f".{text}".endswith(f".{name}")]
        listed = dimensions[max(names, key=len)] if names else None
        if names:
            return None if listed is None else MuonDimensionNumbers(*listed)
        if not text.startswith("stages.") or leaf.ndim < 2 or not is_floating(leaf):
            return None
        if leaf.ndim > 2:
            raise ValueError(
                f"{text} has shape {leaf.shape} in a layer: say in dimensions={{{text.rsplit('.', 1)[-1]!r}: ...}} "
                "which of its axes are a matrix's, (1, 2) for experts [experts, in, out], or None for Adam"
            )
        return MuonDimensionNumbers(0, 1)

    def numbers(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(of_leaf, params)

    found = per_layer(of_layer(learning_rate, muon_weight_dimension_numbers=numbers, **options), stacking)

    def init(params: Any) -> Any:
        texts = [f".{dotted(path)}" for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        unknown = [name for name in dimensions if not any(text.endswith(f".{name}") for text in texts)]
        if unknown:
            raise ValueError(f"dimensions names {unknown}, but no parameter's path ends so: there are {texts}")
        return found.init(params)

    return type(found)(init, found.update)


def _axes(state: Any) -> Any:
    """Of an optimizer's state what `jax.vmap` maps: all that has the form of the parameters, by its rows."""
    return map_params(lambda _: Params(0, None), state, lambda _: None)


def _with_slots(params: Params, stacking: Stacking, *, even: bool) -> Params:
    """Leaves of layers of several kinds with as many slots as each other, or as each has of its own."""
    if not stacking.mixed:
        return params
    leaves, structure = jax.tree.flatten(params.stages)
    sizes = [table.shape[1] for table in stacking.leaf_tables(params.stages)]
    slots = [np.minimum(np.arange(len(stacking.slots[0]) if even else size), size - 1) for size in sizes]
    return Params(
        jax.tree.unflatten(structure, [leaf[:, at] for leaf, at in zip(leaves, slots, strict=True)]), params.outer
    )


def _own_shape(leaf: Any, depth: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape[depth:], leaf.dtype)
