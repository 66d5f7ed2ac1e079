"""One stage of a model as five functions, made from one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.stage.axes import Collectives, collectives_of_nodes
from jaxpipe.stage.divide import closure, count_heavy, divide, hoist, light_results
from jaxpipe.stage.effects import effects_of, without_repeated
from jaxpipe.stage.graph import Node, Value, evaluate, read
from jaxpipe.stage.keep import minimum_cut
from jaxpipe.stage.order import as_soon_as_possible, in_time
from jaxpipe.stage.rewrite import before_casts, eliminate_common_subexpressions
from jaxpipe.stage.trace import inexact, shape_of, trace


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
    """A stage's forward, and its backward in two halves; made by `split_stage`.

    Attributes:
      out: shapes and dtypes of the stage's output.
      aux: those of its auxiliary output; None without one.
      residuals: those of what `forward` keeps.
      crossing: those of what `backward_input` hands to `backward_weight`.
      opaque: names of primitives (cond, while, shard_map, ...) that make weight gradients inside the input half,
        because they are not divided.
    """

    out: Any
    aux: Any
    residuals: Residuals
    crossing: tuple[Any, ...]
    opaque: tuple[str, ...]
    _parts: _Parts

    def prepare(self, params: Any) -> tuple[jax.Array, ...]:
        """What the other functions need of the parameters, computed once a step."""
        env = dict(zip(self._parts.params, _leaves(params), strict=True))
        evaluate(self._parts.once, env)
        return tuple(env[value] for value in self._parts.prepared)

    def forward(self, prepared: Sequence[jax.Array], x: Any, *args: Any) -> tuple[Any, ...]:
        """``(out, residuals)``, or ``(out, aux, residuals)`` for a stage with auxiliary output."""
        parts = self._parts
        env = dict(zip(parts.prepared, prepared, strict=True))
        env.update(zip(parts.arguments, _leaves((x, args)), strict=True))
        evaluate(parts.forward, env)
        outs = [read(env, value) for value in parts.outputs]
        count = len(jax.tree.leaves(self.out))
        out = jax.tree.unflatten(jax.tree.structure(self.out), outs[:count])
        aux = jax.tree.unflatten(jax.tree.structure(self.aux), outs[count:])
        kept = Residuals(*(tuple(_pack(env[value]) for value in values) for values in parts.kept))
        return (out, kept) if self.aux is None else (out, aux, kept)

    def backward_input(
        self, prepared: Sequence[jax.Array], residuals: Residuals, out_ct: Any
    ) -> tuple[Any, tuple[jax.Array, ...]]:
        """``(x's cotangent, crossing)``: the half that the stage before waits for."""
        parts = self._parts
        env = self._restore(prepared, residuals.input, residuals.weight)
        self._seed(env, out_ct)
        evaluate(parts.first, env)
        return self._x_ct(env), tuple(_pack(env[value]) for value in parts.crossing)

    def backward_weight(
        self,
        prepared: Sequence[jax.Array],
        weight_residuals: Sequence[jax.Array],
        crossing: Sequence[jax.Array],
        *,
        narrow: bool = False,
    ) -> Any:
        """The parameters' cotangent: the half that nobody waits for.

        With ``narrow``, for who adds it to sums in the parameters' dtype: where its last step is to be cast to that, it
        is returned as it was before.
        """
        parts = self._parts
        env = self._restore(prepared, (), weight_residuals)
        env.update(_unpack_all(parts.crossing, crossing))
        evaluate(parts.second, env)
        return self._params_ct(env, narrow)

    def backward(
        self, prepared: Sequence[jax.Array], residuals: Residuals, out_ct: Any, *, narrow: bool = False
    ) -> tuple[Any, Any]:
        """``(parameters' cotangent, x's cotangent)``, both halves at once; ``narrow`` as in `backward_weight`."""
        env = self._restore(prepared, residuals.input, residuals.weight)
        self._seed(env, out_ct)
        evaluate(self._parts.whole, env)
        return self._params_ct(env, narrow), self._x_ct(env)

    @property
    def collectives(self) -> Collectives:
        """The collectives in any of the parts, each with its mesh axis."""
        return collectives_of_nodes((*self._parts.once, *self._parts.forward, *self._parts.whole))

    def _restore(self, prepared: Any, input_residuals: Any, weight_residuals: Any) -> dict[Value, Any]:
        parts = self._parts
        env = dict(zip(parts.prepared, prepared, strict=True))
        if input_residuals:
            env.update(_unpack_all(parts.kept.input, input_residuals))
        env.update(_unpack_all(parts.kept.weight, weight_residuals))
        return env

    def _seed(self, env: dict[Value, Any], out_ct: Any) -> None:
        cts = [ct for ct, aval in zip(_leaves(out_ct), jax.tree.leaves(self.out), strict=True) if inexact(aval)]
        env.update(zip(self._parts.cts, cts, strict=True))

    def _params_ct(self, env: dict[Value, Any], narrow: bool) -> Any:
        values = self._parts.params_ct_narrow if narrow else self._parts.params_ct
        return _cotangents(env, values, self._parts.params_like)

    def _x_ct(self, env: dict[Value, Any]) -> Any:
        return _cotangents(env, self._parts.x_ct, self._parts.x_like)


class _Parts(NamedTuple):
    """The divided graphs of a stage."""

    params: tuple[Value, ...]
    arguments: tuple[Value, ...]
    once: tuple[Node, ...]
    prepared: tuple[Value, ...]
    forward: tuple[Node, ...]
    outputs: tuple[Value, ...]
    kept: Residuals
    cts: tuple[Value, ...]
    first: tuple[Node, ...]
    second: tuple[Node, ...]
    whole: tuple[Node, ...]
    crossing: tuple[Value, ...]
    params_ct: tuple[Value, ...]
    params_ct_narrow: tuple[Value, ...]
    x_ct: tuple[Value, ...]
    params_like: Any
    x_like: Any


def split_stage(
    stage: Callable[..., Any], params: Any, x: Any, *args: Any, has_aux: bool = False, again: bool = True
) -> SplitStage:
    """Divides a stage's backward pass into input and weight gradients.

    The backward pass that JAX derives is traced; the equations that the input's cotangent needs are one half, the
    rest is the other. No annotation is needed: jit, custom derivative rules and `jax.checkpoint` are inlined (what is
    recomputed is recomputed once), scans are divided into two loops. ``stage`` may use collectives over mesh axes if
    this is called where they are bound, inside `jax.shard_map`.

    As few bytes are kept between the parts as light work can make the rest from (`jaxpipe.stage.keep`): elementwise
    operations, moves and sums over axes are done again where they are read, and so is, with ``again``, what makes a
    value that `jax.ad_checkpoint.checkpoint_name` names "recompute", back to its last operation that is not light.

    Side effects, such as `jax.debug.print`, are part of the forward and of no other function: not of what a backward
    computes again, nor of `SplitStage.prepare`. Those that a custom derivative has run once, in one of the halves. Refs
    that the stage makes (`jax.new_ref`) become values.

    Args:
      stage: ``stage(params, x, *args) -> out``; ``(out, aux)`` with ``has_aux``.
      params: pytree of arrays or of anything with shape and dtype; only these are read. Floating and complex leaves
        are differentiated.
      x: like params; where it has no floating leaf, there is no input half.
      *args: pytrees of arrays, not differentiated.
      has_aux: whether the stage also returns values that are not differentiated.
      again: False where memory is there for what is named "recompute".

    Raises:
      ValueError: a leaf that is not an array; a ref made elsewhere, or used within a function that JAX cannot turn into
        one of values; an ordered debug callback on a mesh of several devices.

    Source: the division is zero-bubble pipelining's, arXiv 2401.10241.

    >>> import jax, jax.numpy as jnp
    >>> w, x = jnp.ones((4, 4)), jnp.ones((2, 4))
    >>> split = split_stage(lambda w, x: jnp.tanh(x @ w), w, x)
    >>> prepared = split.prepare(w)
    >>> y, residuals = split.forward(prepared, x)
    >>> x_ct, crossing = split.backward_input(prepared, residuals, jnp.ones_like(y))
    >>> split.backward_weight(prepared, residuals.weight, crossing).shape
    (4, 4)
    """
    params, x, args = jax.tree.map(shape_of, (params, x, args))
    traced = trace(stage, params, x, args, has_aux)
    forward, backward = traced.forward, traced.backward

    counts = [len(jax.tree.leaves(tree)) for tree in (params, (x, args), (traced.out, traced.aux))]
    param_values, arguments = forward.inputs[: counts[0]], forward.inputs[counts[0] :]
    outputs, residuals = forward.outputs[: counts[2]], forward.outputs[counts[2] :]

    once, rest, sources = hoist(forward.nodes, param_values)
    known = set(sources)
    cts = backward.inputs[len(residuals) :]
    # Backward reads the forward's own values: what parameters or constants give is made there, the rest is kept.
    alias = dict(zip(backward.inputs, residuals, strict=False))
    nodes = eliminate_common_subexpressions(without_repeated(backward.nodes, forward.nodes, cts), once, known, alias)
    params_ct, x_ct = (
        tuple(alias.get(value, value) for value in values)
        for values in _cut(backward.outputs, [traced.num_params, traced.num_x])
    )
    x_effects, params_effects = _side_of_effects(nodes, x_ct, params_ct)
    parts = divide(nodes, (*x_ct, *x_effects), (*params_ct, *params_effects))
    needed = _reads(parts.first, x_ct) | _reads(parts.second, params_ct)
    # What the backward reads of the forward. Light work on parameters and constants costs nothing to do again; of the
    # rest the first cut keeps as few bytes as make all of it.
    shared = [value for value in dict.fromkeys(residuals) if value in needed and value not in known]
    free = light_results(rest, known)
    chosen = minimum_cut([value for value in shared if closure([value], rest, known) is None], rest, free, again=again)
    kept = [value for value in dict.fromkeys((*arguments, *_results(rest))) if value in chosen]
    remade = [value for value in shared if value not in chosen]
    first, second = (
        in_time(_recompute([value for value in remade if value in reads], rest, known | chosen), part)
        for part, reads in ((parts.first, _reads(parts.first, x_ct)), (parts.second, _reads(parts.second, params_ct)))
    )

    # What the weights' half reads of the input's half, or of what only that knows. The second cut may go through kept
    # values, too: one that the weights' half then reads is stashed for it from the start and not handed over. That
    # takes the same bytes at any time, and no copy.
    order = dict.fromkeys((*cts, *_results(first)))
    reads = _reads(second, params_ct) - {*_results(second)}
    between = [value for value in order if value in reads]
    at_hand = known | (chosen & reads)
    handed = minimum_cut(between, first, at_hand | light_results(first, known), again=again)
    second = in_time(_recompute([value for value in between if value not in handed], first, at_hand | handed), second)
    for_first, for_second = _reads(first, x_ct), _reads(second, params_ct)
    weight = tuple(value for value in kept if value in for_second)
    inputs = tuple(value for value in kept if value in for_first and value not in for_second)
    crossing = tuple(value for value in order if value in handed and value not in chosen)

    rest = divide(rest, (*outputs, *weight, *inputs, *effects_of(rest)), ()).first
    used = _reads(rest, outputs) | for_first | for_second
    prepared = tuple(value for value in sources if value in used)
    once = divide(once, prepared, ()).first
    return SplitStage(
        out=traced.out,
        aux=traced.aux,
        residuals=Residuals(*(tuple(_packed(value.aval) for value in values) for values in (inputs, weight))),
        crossing=tuple(_packed(value.aval) for value in crossing),
        opaque=parts.opaque,
        _parts=_Parts(
            params=param_values,
            arguments=arguments,
            once=once,
            prepared=prepared,
            forward=rest,
            outputs=outputs,
            kept=Residuals(inputs, weight),
            cts=cts,
            first=first,
            second=second,
            whole=in_time((*first, *second), as_soon_as_possible(parts.second, parts.first)),
            crossing=crossing,
            params_ct=params_ct,
            params_ct_narrow=before_casts(params_ct, second),
            x_ct=x_ct,
            params_like=params,
            x_like=x,
        ),
    )


def _side_of_effects(
    nodes: Sequence[Node], x_ct: Sequence[Value], params_ct: Sequence[Value]
) -> tuple[list[Value], list[Value]]:
    """(effects for the input's half, effects for the weights'): in the input's half what takes no heavy work more."""
    sides: tuple[list[Value], list[Value]] = [], []
    for effect in effects_of(nodes):
        without, within = (divide(nodes, (*x_ct, *more), params_ct).first for more in ((), (effect,)))
        sides[count_heavy(without) < count_heavy(within)].append(effect)
    return sides


def _reads(nodes: Sequence[Node], results: Sequence[Value]) -> set[Value]:
    """What nodes and results read, made among the nodes or not."""
    return {value for node in nodes for value in node.ins} | set(results)


def _results(nodes: Sequence[Node]) -> list[Value]:
    return [value for node in nodes for value in node.outs]


def _recompute(values: Sequence[Value], nodes: Sequence[Node], given: set[Value]) -> tuple[Node, ...]:
    """The nodes that make values again from given ones; a cut has seen to it that light ones do."""
    found = closure(values, nodes, given)
    assert found is not None
    return found


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree)


def _cut(values: Sequence[Value], counts: Sequence[int]) -> list[tuple[Value, ...]]:
    stops = list(itertools.accumulate(counts))
    assert stops[-1] == len(values)
    return [tuple(values[stop - count : stop]) for stop, count in zip(stops, counts, strict=True)]


def _cotangents(env: dict[Value, Any], values: Sequence[Value], like: Any) -> Any:
    """Cotangents in the structure of ``like``, zeros for leaves that are not differentiable."""
    found = iter(values)
    return jax.tree.map(
        lambda leaf: read(env, next(found)) if inexact(leaf) else jnp.zeros(leaf.shape, leaf.dtype), like
    )


def _is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _pack(array: Any) -> Any:
    """The array as plain numbers, which any buffer can hold: random keys become their data."""
    return jax.random.key_data(array) if _is_key(array.dtype) else array


def _packed(aval: Any) -> jax.ShapeDtypeStruct:
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
