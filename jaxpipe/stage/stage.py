"""One stage of a model as five functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.stage.addend import Addend, find_addends
from jaxpipe.stage.axes import Collectives, collectives_of_nodes
from jaxpipe.stage.graph import Node, Value, evaluate, evaluate_shared, read
from jaxpipe.stage.rewrite import widen_products
from jaxpipe.stage.trace import inexact
from jaxpipe.stage.wide import evaluate_wide


class Residuals(NamedTuple):
    """What a stage keeps of a microbatch between its forward and its backward.

    Attributes:
      input: arrays that only the input gradient needs; free after it.
      weight: arrays that the weight gradient needs (the input gradient may need them too).
    """

    input: tuple[Any, ...]
    weight: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class SplitStage:
    """A stage's forward, and its backward in two halves; made by `jaxpipe.stage.split_stage`.

    Attributes:
      out: shapes and dtypes of the stage's output.
      aux: those of its auxiliary output; None without one.
      residuals: those of what `forward` keeps.
      crossing: those of what `backward_input` hands to `backward_weight`.
      summands: those of what is summed over microbatches for the parameters' gradients: these, but for zeros, or what
        collectives make them of at the end of a step.
      opaque: names of primitives (shard_map, while, cond of `jax.lax.platform_dependent`, ...) that make weight
        gradients inside the input half, because they are not divided.
    """

    out: Any
    aux: Any
    residuals: Residuals
    crossing: tuple[Any, ...]
    summands: tuple[Any, ...]
    opaque: tuple[str, ...]
    _graphs: Graphs

    def prepare(self, params: Any, made: dict[Any, Any] | None = None) -> tuple[jax.Array, ...]:
        """What the other functions need of the parameters, computed once a step.

        What ``made`` has of the same arrays is taken from there, and what is computed is put there: a dict that stages
        of several kinds share while one program is traced.
        """
        env = dict(zip(self._graphs.params, jax.tree.leaves(params), strict=True))
        evaluate_shared(self._graphs.once, env, {} if made is None else made)
        return tuple(env[value] for value in self._graphs.prepared)

    def forward(self, prepared: Sequence[jax.Array], x: Any, *args: Any) -> tuple[Any, ...]:
        """``(out, residuals)``, or ``(out, aux, residuals)`` for a stage with auxiliary output."""
        graphs = self._graphs
        env = dict(zip(graphs.prepared, prepared, strict=True))
        env.update(zip(graphs.arguments, jax.tree.leaves((x, args)), strict=True))
        evaluate(graphs.forward, env)
        outs = [read(env, value) for value in graphs.outputs]
        count = len(jax.tree.leaves(self.out))
        out = jax.tree.unflatten(jax.tree.structure(self.out), outs[:count])
        aux = jax.tree.unflatten(jax.tree.structure(self.aux), outs[count:])
        kept = Residuals(*(tuple(_pack(env[value]) for value in values) for values in graphs.kept))
        return (out, kept) if self.aux is None else (out, aux, kept)

    def backward_input(
        self, prepared: Sequence[jax.Array], residuals: Residuals, out_ct: Any
    ) -> tuple[Any, tuple[jax.Array, ...]]:
        """``(x's cotangent, crossing)``: the half that the previous stage waits for."""
        graphs = self._graphs
        env = self._restore(prepared, residuals.input, residuals.weight)
        self._seed(env, out_ct)
        evaluate(graphs.first, env)
        return self._x_ct(env), tuple(_pack(env[value]) for value in graphs.crossing)

    def backward_weight(
        self,
        prepared: Sequence[jax.Array],
        weight_residuals: Sequence[jax.Array],
        crossing: Sequence[jax.Array],
        *,
        summands: bool = False,
        wide_products: bool = False,
        addends: bool = False,
    ) -> Any:
        """The parameters' cotangent, None for frozen ones: the half that no other stage waits for.

        With ``summands``, what is to be summed over microbatches in its place, `SplitStage.summands`: `gradients` makes
        the cotangent of the sums. They are as they are before a last cast to a wider dtype; with ``wide_products`` as
        well, those that are products are float32, as matrix units sum them: for a caller with float32 sums nothing is
        rounded on the way, and on GPUs XLA makes product and sum one kernel. With ``addends``, those that are products
        which can be added in place come as `jaxpipe.stage.addend.Addend`, and are not made here.
        """
        graphs = self._graphs
        env = self._restore(prepared, (), weight_residuals)
        env.update(_unpack_all(graphs.crossing, crossing))
        if summands:
            return self._summands(env, graphs.second, (), wide_products, addends)
        evaluate(graphs.second, env)
        return self._params_ct(env)

    def backward(
        self,
        prepared: Sequence[jax.Array],
        residuals: Residuals,
        out_ct: Any,
        *,
        summands: bool = False,
        wide_products: bool = False,
        addends: bool = False,
    ) -> tuple[Any, Any]:
        """``(parameters' cotangent, x's cotangent)``, both halves at once; options as of `backward_weight`."""
        graphs = self._graphs
        env = self._restore(prepared, residuals.input, residuals.weight)
        self._seed(env, out_ct)
        if summands:
            return self._summands(env, graphs.whole, graphs.x_ct, wide_products, addends), self._x_ct(env)
        evaluate(graphs.whole, env)
        return self._params_ct(env), self._x_ct(env)

    def gradients(self, prepared: Sequence[jax.Array], sums: Sequence[jax.Array]) -> Any:
        """The parameters' cotangent, None for frozen ones, of sums of `summands`: what is done once a step.

        It is in the dtypes of the sums or in wider ones; zeros that were not summed are in their own.
        """
        graphs = self._graphs
        summed = dict(zip(graphs.summands, sums, strict=True))
        # A parameter may be a gradient, too: what is made of parameters reads it, and not its sum.
        env = summed | dict(zip(graphs.prepared, prepared, strict=True))
        evaluate_wide(graphs.late, env, summed.keys() - set(graphs.prepared))
        found = [summed[value] if value in summed else jnp.asarray(read(env, value)) for value in graphs.params_ct]
        return _cotangents(found, graphs.params_like)

    @property
    def gradient_of(self) -> tuple[int | None, ...]:
        """Of each of the summands, which of the parameters with a gradient it is the gradient of; None: of none."""
        places = {value: place for place, value in enumerate(self._graphs.params_ct)}
        return tuple(places.get(value) for value in self._graphs.summands)

    @property
    def collectives(self) -> Collectives:
        """The collectives in any of the parts, each with its mesh axis."""
        graphs = self._graphs
        return collectives_of_nodes((*graphs.once, *graphs.forward, *graphs.whole, *graphs.late))

    def _restore(self, prepared: Any, input_residuals: Any, weight_residuals: Any) -> dict[Value, Any]:
        graphs = self._graphs
        env = dict(zip(graphs.prepared, prepared, strict=True))
        if input_residuals:
            env.update(_unpack_all(graphs.kept.input, input_residuals))
        env.update(_unpack_all(graphs.kept.weight, weight_residuals))
        return env

    def _seed(self, env: dict[Value, Any], out_ct: Any) -> None:
        cts = [ct for ct, aval in zip(jax.tree.leaves(out_ct), jax.tree.leaves(self.out), strict=True) if inexact(aval)]
        env.update(zip(self._graphs.cotangents, cts, strict=True))

    def _summands(
        self, env: dict[Value, Any], nodes: Sequence[Node], also: Sequence[Value], wide_products: bool, addends: bool
    ) -> tuple[Any, ...]:
        """What is summed, which nodes make beside ``also``."""
        values = self._graphs.summands_narrow
        unread = set(self._graphs.summands).difference(values, also, *(node.ins for node in nodes))
        nodes = [node for node in nodes if unread.isdisjoint(node.outs)]
        products, nodes = find_addends(values, nodes, also) if addends else ({}, nodes)
        if wide_products:
            values, nodes = widen_products(values, nodes, also)
        evaluate(nodes, env)
        return tuple(
            Addend(node, tuple(read(env, operand) for operand in node.ins))
            if (node := products.get(value))
            else read(env, value)
            for value in values
        )

    def _params_ct(self, env: dict[Value, Any]) -> Any:
        graphs = self._graphs
        evaluate(graphs.late, env)
        return _cotangents([read(env, value) for value in graphs.params_ct], graphs.params_like)

    def _x_ct(self, env: dict[Value, Any]) -> Any:
        return _cotangents([read(env, value) for value in self._graphs.x_ct], self._graphs.x_like)


class Graphs(NamedTuple):
    """The parts of a divided stage: nodes in an order in which they can run, and the values that they read and make.

    Attributes:
      params, arguments: the leaves of the stage's parameters and of its other arguments.
      once: what depends on parameters alone and runs once a step; it makes ``prepared``.
      forward: what makes ``outputs``, the leaves of out and aux, and ``kept``.
      cotangents: those of the floating leaves of out.
      first: the half that makes ``x_ct`` and ``crossing``.
      second: the half that makes ``summands``.
      whole: both halves in one order.
      summands: what is summed over microbatches; ``summands_narrow`` before last casts to wider dtypes.
      late: what makes ``params_ct`` of summands or of their sums, and zeros of nothing.
      params_like, x_like: shapes and dtypes of the parameters, None for frozen ones, and of x.
    """

    params: tuple[Value, ...]
    arguments: tuple[Value, ...]
    once: tuple[Node, ...]
    prepared: tuple[Value, ...]
    forward: tuple[Node, ...]
    outputs: tuple[Value, ...]
    kept: Residuals
    cotangents: tuple[Value, ...]
    first: tuple[Node, ...]
    second: tuple[Node, ...]
    whole: tuple[Node, ...]
    crossing: tuple[Value, ...]
    summands: tuple[Value, ...]
    summands_narrow: tuple[Value, ...]
    late: tuple[Node, ...]
    params_ct: tuple[Value, ...]
    x_ct: tuple[Value, ...]
    params_like: Any
    x_like: Any


def _cotangents(arrays: Sequence[Any], like: Any) -> Any:
    """Cotangents in the structure of ``like``, zeros for leaves that are not differentiable."""
    found = iter(arrays)
    return jax.tree.map(lambda leaf: next(found) if inexact(leaf) else jnp.zeros(leaf.shape, leaf.dtype), like)


def _is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _pack(array: Any) -> Any:
    """The array as plain numbers, which any buffer can hold: random keys become their data."""
    return jax.random.key_data(array) if _is_key(array.dtype) else array


def packed_shape(aval: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a value as it is kept: random keys are kept as their data."""
    shaped = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    return jax.eval_shape(jax.random.key_data, shaped) if _is_key(aval.dtype) else shaped


def _unpack_all(values: Sequence[Value], arrays: Sequence[Any]) -> dict[Value, Any]:
    return {value: _unpack(value.aval, array) for value, array in zip(values, arrays, strict=True)}


def _unpack(aval: Any, array: Any) -> Any:
    if not _is_key(aval.dtype):
        return array
    impl: list[Any] = []

    def note(key: Any) -> Any:
        impl.append(jax.random.key_impl(key))
        return np.int32(0)

    jax.eval_shape(note, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    return jax.random.wrap_key_data(array, impl=impl[0])
