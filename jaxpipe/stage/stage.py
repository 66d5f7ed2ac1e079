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
from jaxpipe.stage.divide import closure, divide, hoist
from jaxpipe.stage.graph import Graph, Node, Value, evaluate, make_graph, read
from jaxpipe.stage.keep import fewest_bytes
from jaxpipe.stage.order import as_soon_as_possible, in_time
from jaxpipe.stage.rewrite import before_casts, without_twins


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
        cts = [ct for ct, aval in zip(_leaves(out_ct), jax.tree.leaves(self.out), strict=True) if _inexact(aval)]
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
    operations, moves and sums over axes are done again where they are read, and so is, with ``again``, whatever a
    function does that is jitted under the name ``made_again``.

    Args:
      stage: ``stage(params, x, *args) -> out``, pure; ``(out, aux)`` with ``has_aux``.
      params: pytree of arrays or of anything with shape and dtype; only these are read. Floating and complex leaves
        are differentiated.
      x: like params; where it has no floating leaf, there is no input half.
      *args: pytrees of arrays, not differentiated.
      has_aux: whether the stage also returns values that are not differentiated.
      again: False where memory is there for what ``made_again`` would save.

    Raises:
      ValueError: a leaf that is not an array.

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
    params, x, args = jax.tree.map(_shape, (params, x, args))
    forward, backward, traced = _trace(stage, params, x, args, has_aux)

    counts = [len(jax.tree.leaves(tree)) for tree in (params, (x, args), (traced.out, traced.aux))]
    param_values, arguments = forward.inputs[: counts[0]], forward.inputs[counts[0] :]
    outputs, residuals = forward.outputs[: counts[2]], forward.outputs[counts[2] :]

    once, rest, sources = hoist(forward.nodes, param_values)
    known = set(sources)
    # Backward reads the forward's own values: what parameters or constants give is made there, the rest is kept.
    alias = dict(zip(backward.inputs, residuals, strict=False))
    nodes = without_twins(backward.nodes, once, known, alias)
    params_ct, x_ct = (
        tuple(alias.get(value, value) for value in values)
        for values in _cut(backward.outputs, [traced.num_params, traced.num_x])
    )
    kept = [value for value in dict.fromkeys(residuals) if value not in known and value.const is None]
    # Light work on parameters and constants is done again in each half rather than stashed or handed over.
    remade = [value for value in kept if closure([value], rest, known) is not None]
    chosen = fewest_bytes([value for value in kept if value not in remade], rest, known, again=again)
    remade = [value for value in kept if value not in chosen]
    kept = [value for value in (*arguments, *(out for node in rest for out in node.outs)) if value in chosen]

    parts = divide(nodes, x_ct, params_ct)
    first, second = (
        in_time(closure([value for value in remade if value in reads], rest, known | chosen) or (), part)
        for part, reads in ((parts.first, _reads(parts.first, x_ct)), (parts.second, _reads(parts.second, params_ct)))
    )
    for_second = _reads(second, params_ct)
    for_first = _reads(first, x_ct)
    cts = backward.inputs[len(residuals) :]
    made_first = {value for node in first for value in node.outs} | set(cts)
    made_second = {value for node in second for value in node.outs}
    order = [*cts, *(value for node in first for value in node.outs)]
    crossing = tuple(value for value in order if value in (for_second & made_first) - made_second)
    weight = tuple(value for value in kept if value in for_second)
    given = known | {*weight}
    handed = fewest_bytes(crossing, first, given, again=again)
    more = closure([value for value in crossing if value not in handed], first, given | handed) or ()
    second = in_time(more, second)
    for_second = _reads(second, params_ct)
    crossing = tuple(value for value in (*kept, *order) if value in handed)
    inputs = tuple(value for value in kept if value in for_first and value not in for_second)

    used = {value for node in rest for value in node.ins} | for_first | for_second | {*outputs}
    prepared = tuple(value for value in sources if value in used)
    once = divide(once, prepared, ()).first
    rest = divide(rest, (*outputs, *weight, *inputs), ()).first
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


class _Traced(NamedTuple):
    out: Any
    aux: Any
    num_params: int
    num_x: int


def _trace(stage: Callable[..., Any], params: Any, x: Any, args: Any, has_aux: bool) -> tuple[Graph, Graph, _Traced]:
    """(params, x, args -> out, aux, residuals; residuals, cotangents -> params' and x's cotangents; shapes)."""
    param_leaves, param_tree = jax.tree.flatten(params)
    x_leaves, x_tree = jax.tree.flatten(x)
    vjp_tree: Any = None

    def forward(params: Any, x: Any, args: Any) -> Any:
        nonlocal vjp_tree
        p_diff, p_rest = _divide_leaves(jax.tree.leaves(params))
        x_diff, x_rest = _divide_leaves(jax.tree.leaves(x))

        def differentiable(p_diff: Any, x_diff: Any) -> Any:
            p = jax.tree.unflatten(param_tree, _join_leaves(p_diff, p_rest))
            result = stage(p, jax.tree.unflatten(x_tree, _join_leaves(x_diff, x_rest)), *args)
            out, aux = result if has_aux else (result, None)
            return [leaf for leaf in jax.tree.leaves(out) if _inexact(leaf)], (out, aux)

        _, vjp, (out, aux) = jax.vjp(differentiable, p_diff, x_diff, has_aux=True)
        residuals, vjp_tree = jax.tree.flatten(vjp)
        return out, aux, residuals

    closed, (out, aux, residuals) = jax.make_jaxpr(forward, return_shape=True)(params, x, args)
    cts = [leaf for leaf in jax.tree.leaves(out) if _inexact(leaf)]

    def backward(residuals: Any, cts: Any) -> Any:
        p_ct, x_ct = jax.tree.unflatten(vjp_tree, residuals)(cts)
        return [leaf for leaf in p_ct if leaf is not None], [leaf for leaf in x_ct if leaf is not None]

    num_params, num_x = (sum(map(_inexact, leaves)) for leaves in (param_leaves, x_leaves))
    backward_closed = jax.make_jaxpr(backward)(residuals, cts)
    return make_graph(closed), make_graph(backward_closed), _Traced(out, aux if has_aux else None, num_params, num_x)


def _reads(nodes: Sequence[Node], results: Sequence[Value]) -> set[Value]:
    """What nodes and results read, made among the nodes or not."""
    return {value for node in nodes for value in node.ins} | set(results)


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise ValueError(
            f"{leaf!r} of type {type(leaf).__name__} is not an array: params, x and args of a stage are pytrees of "
            "arrays; bind other values with functools.partial"
        )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _divide_leaves(leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(differentiable leaves, others), None in the other's places."""
    return [leaf if _inexact(leaf) else None for leaf in leaves], [None if _inexact(leaf) else leaf for leaf in leaves]


def _join_leaves(diff: Sequence[Any], rest: Sequence[Any]) -> list[Any]:
    return [r if d is None else d for d, r in zip(diff, rest, strict=True)]


def _cut(values: Sequence[Value], counts: Sequence[int]) -> list[tuple[Value, ...]]:
    stops = list(itertools.accumulate(counts))
    assert stops[-1] == len(values)
    return [tuple(values[stop - count : stop]) for stop, count in zip(stops, counts, strict=True)]


def _cotangents(env: dict[Value, Any], values: Sequence[Value], like: Any) -> Any:
    """Cotangents in the structure of ``like``, zeros for leaves that are not differentiable."""
    found = iter(values)
    return jax.tree.map(
        lambda leaf: read(env, next(found)) if _inexact(leaf) else jnp.zeros(leaf.shape, leaf.dtype), like
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
