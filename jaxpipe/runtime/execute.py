"""Runs a Program on one rank: one scan over its steps, inside shard_map."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpipe.params import Params
from jaxpipe.runtime.buffers import (
    SUMS,
    Buffers,
    Zeros,
    accumulation_dtype,
    accumulator,
    allocate,
    allocate_named,
    put,
    sum_dtype,
    take,
    uninitialised_array,
)
from jaxpipe.runtime.by_rank import as_dispatched, begun_chunks, code_in_stretches
from jaxpipe.runtime.collective_checks import check_alone, check_gradients_of_ends, check_weight
from jaxpipe.runtime.copies import Returned, cast, gather_grads, return_grads, working_copies
from jaxpipe.runtime.evaluate import EvaluationStep
from jaxpipe.runtime.forward_only import ForwardStep, run_outputs
from jaxpipe.runtime.fsdp import Reduction
from jaxpipe.runtime.loss_weights import Shares, mean_shares
from jaxpipe.runtime.model import Context, Model
from jaxpipe.runtime.offload import allocate_on_host, choose_offloaded
from jaxpipe.runtime.operations import (
    Operation,
    Pools,
    TrainStep,
    make_context,
    partition,
    run_branch,
    run_sequential,
)
from jaxpipe.runtime.options import COPY_NOTHING, Axes, Options
from jaxpipe.runtime.outputs import shape_texts
from jaxpipe.runtime.prepared_outer import pull_back_prepare, run_prepare, trainable_of_prepared
from jaxpipe.runtime.program import Op, Program
from jaxpipe.runtime.rounds import make_bodies, run_stretches
from jaxpipe.runtime.shared_ends import shape_of_end, share_ends, sum_exactly
from jaxpipe.runtime.stash import divide_stages, slots_of
from jaxpipe.runtime.unrolled import run_unrolled, unrolled_table
from jaxpipe.stage import SplitStage
from jaxpipe.stage.axes import collectives_of_jaxpr
from jaxpipe.stage.split import Divisible


class _Local(NamedTuple):
    """What a rank starts a step with.

    Attributes:
      model: the user's functions as this rank calls them.
      chunks: the parameters of every local chunk, in compute dtype.
      given: the outer parameters, in compute dtype.
      outer: what embed and head get of them.
      batch: leaves ``[num_microbatches, microbatch, ...]``.
      rng: a key that differs between data-parallel devices, or None.
      ctx: a context, for the shapes of what takes one.
      x: the input of a stage, as shapes and dtypes.
    """

    model: Model
    chunks: tuple[Any, ...]
    given: Any
    outer: Any
    batch: Any
    rng: jax.Array | None
    ctx: Context
    x: Any


def train(
    program: Program,
    model: Model,
    options: Options,
    reductions: Params,
    trainable: Params,
    params: Params,
    batch: Any,
    rng: jax.Array | None,
    step_inputs: Any,
    tables: Any,
) -> tuple[tuple[jax.Array, dict[str, Any]], Params]:
    """((loss, aux), gradients) of one step on one rank; everything but ``tables`` is this rank's shard.

    For every leaf of params ``reductions`` holds the `Reduction` of its gradient, and ``trainable`` a bool, whether it
    has one. Gradients are None for the others: nothing is computed, summed or moved for those.
    """
    local = _start(program, model, options, params, batch, rng, step_inputs, outputs=False)
    given = trainable.outer
    trainable = trainable._replace(outer=trainable_of_prepared(local.model, local.given, given))
    splits = _split_stages(program, options, local, trainable.stages)
    crosses = options.stash is None or program.num_cross_slots > 0
    slots = slots_of(as_dispatched(program, options.dispatch))
    offloaded = [choose_offloaded(split, options.offload, slots) for split in splits]
    pools = Pools.of(splits, program.parts, offloaded, crosses=crosses, flat=options.axes.complete)
    split = splits[0]
    head = _head_shapes(program, options, split.out[1], local)
    check_gradients_of_ends(
        program, options.axes.pipeline, local.model, local.outer, trainable.outer, local.x, local.ctx
    )
    shares = _shares(options, local, (head[0], split.out[1]))
    with jax.named_scope("prepare"):
        # Behind barriers, or kernels outside of loops would read rows of whole leaves and those inside their copies.
        # Each leaf is behind its own, so that a step may begin before all copies have arrived.
        # What several kinds make of a chunk is there once.
        prepared: Any = []
        made: dict[Any, Any] = {}
        for number, (chunk, kind) in enumerate(program.parts):
            with jax.named_scope(f"part_{number}"):
                prepared.append(splits[kind].prepare((local.chunks[chunk], step_inputs), made))
        barriers = {id(leaf): lax.optimization_barrier(leaf) for leaf in jax.tree.leaves(prepared)}
        prepared = tuple(jax.tree.map(lambda leaf: barriers[id(leaf)], prepared))
    step = TrainStep(
        model=local.model,
        splits=splits,
        pools=pools,
        parts=program.parts,
        prepared=prepared,
        outer=local.outer,
        trainable=trainable,
        batch=batch,
        shares=shares,
        rng=local.rng,
        step_inputs=step_inputs,
        num_stages=program.schedule.num_stages,
        gathers=bool(options.fsdp_axes),
        wide_products=options.wide_products,
    )
    buffers = _train_buffers(program, options, local, split, pools, head, trainable)
    axis, done = options.axes.pipeline, dict[int, Any]()
    where = program.schedule, options.order, axis

    def grads_of(chunk: int, sums: tuple[jax.Array, ...]) -> Any:
        return _grads_of_chunk(program, options, step, partition(local.chunks[chunk], trainable.stages)[0], chunk, sums)

    def finish(chunks: Sequence[int], buffers: Buffers) -> list[Returned]:
        """Sends gradients home while ranks compute others, unless they are scaled first."""
        if shares.scale is not None:
            return []
        with jax.named_scope("reduce"):
            mine = {chunk: grads_of(chunk, buffers.grads[chunk]) for chunk in chunks}
            done.update(mine)
            return return_grads(mine, *where)

    returned = []
    if options.dispatch == "unrolled":
        buffers, returned = run_unrolled(program, step.operation, axis, buffers, tables[0][:, 0], finish)
    else:
        buffers = run_steps(program, step.operation, axis, options.dispatch, buffers, tables)
    with jax.named_scope("reduce"):
        sums, outer_grads = _scale(shares, (buffers.grads, buffers.outer_grads))
        outer_grads = pull_back_prepare(local.model, local.given, given, trainable.outer, outer_grads)
        rest = {chunk: grads_of(chunk, each) for chunk, each in enumerate(sums) if chunk not in done}
        returned = [*returned, *return_grads(rest, *where)]
        done |= rest
        stages = gather_grads(tuple(done[chunk] for chunk in range(len(sums))), *where, returned)
        grads = jax.tree.map(
            functools.partial(_reduce_grad, options.axes), params, Params(stages, outer_grads), reductions
        )
        losses, aux = _sum_losses(options.axes, buffers, shares)
        return (_total(losses), aux), grads


def _start(
    program: Program,
    model: Model,
    options: Options,
    params: Params,
    batch: Any,
    rng: jax.Array | None,
    step_inputs: Any,
    *,
    outputs: bool,
) -> _Local:
    axes = options.axes
    rng = _fold_axes(rng, axes)
    with jax.named_scope("prepare"):
        if model.whole is not None:
            params = model.whole(cast(params, options.compute_dtype))
        chunks = working_copies(params.stages, program.schedule, options.order, axes.pipeline, options.compute_dtype)
        given = cast(params.outer, options.compute_dtype)
        outer = run_prepare(model, given)
    model = _prepare_model(program, model, options, outputs=outputs)
    ctx = make_context(batch, rng, step_inputs, 0, 0)
    x = shape_of_end(program, axes.pipeline, "embed", model.run_embed, outer, ctx)
    return _Local(model, chunks, given, outer, batch, rng, ctx, x)


def _split_stages(program: Program, options: Options, local: _Local, trainable: Any) -> tuple[SplitStage, ...]:
    """Each kind of stage in its parts, after checks."""
    step_inputs = local.ctx.step_inputs

    def stage(kind: int, given: Any, x: Any, ctx: Context) -> Any:
        params, step_inputs = given  # both are there all the step long, so neither is stashed for a microbatch
        return local.model.run_kind(kind, params, x, ctx._replace(step_inputs=step_inputs))

    kinds = [
        Divisible(
            functools.partial(stage, kind),
            (local.chunks[0], step_inputs),
            local.x,
            local.ctx._replace(step_inputs=None),
            has_aux=True,
            trainable=(trainable, jax.tree.map(lambda _: False, step_inputs)),
            max_growth=options.max_growth,
        )
        for kind in range(len(local.model.stages))
    ]
    sized = as_dispatched(program, options.dispatch)
    copied, flat = options.dispatch not in COPY_NOTHING, options.axes.complete
    splits = divide_stages(kinds, sized, options.stash, copied=copied, flat=flat, kind_of=local.model.kind_of)
    for split in splits:
        check_alone("stage", program, options.axes.pipeline, split.collectives)
        _check_boundary(local.x, split.out[0])
    _check_same_returns([(split.out[1], split.aux) for split in splits])
    return splits


def _head_shapes(program: Program, options: Options, aux_loss: Any, local: _Local) -> tuple[Any, Any]:
    """(loss, metrics) of the head as shapes and dtypes, (None, {}) without a head; weights checked."""
    model, outer, x, ctx, axis = local.model, local.outer, local.x, local.ctx, options.axes.pipeline
    loss, metrics = None, {}
    if model.head is not None:
        loss, metrics = shape_of_end(program, axis, "head", model.run_head, outer, x, ctx)
    if loss is None and aux_loss is None:
        raise ValueError("neither is there a head nor does the stage return an aux_loss: nothing to differentiate")
    check_weight(model.weight, axis, local.batch)
    return loss, metrics


def _shares(options: Options, local: _Local, losses: Any) -> Shares:
    """Each microbatch's share in the mean of losses, given as shapes and dtypes."""
    model, outer, x, ctx, axes = local.model, local.outer, local.x, local.ctx, options.axes
    calls = {"embed": (model.run_embed, (outer, ctx)), "stage": (model.run_stage, (local.chunks[0], x, ctx))}
    if model.head is not None:
        calls["head"] = (model.run_head, (outer, x, ctx))
    return mean_shares(model, local.batch, (*axes.data, *axes.replicated), losses, calls)


def _train_buffers(
    program: Program,
    options: Options,
    local: _Local,
    split: SplitStage,
    pools: Pools,
    head: tuple[Any, Any],
    trainable: Params,
) -> Buffers:
    """Empty slots, and sums of zero."""
    apart = options.dispatch == "unrolled"
    pool = functools.partial(allocate, apart=apart)
    fills = _fills(options)
    kept = (pools.stash.device.avals, pools.weight_stash.device.avals, pools.cross.avals)
    sized = as_dispatched(program, options.dispatch)
    counts = (sized.num_stash_slots, sized.num_weight_stash_slots, sized.num_cross_slots)
    if options.dispatch == "by_rank":
        residuals = [allocate_named(avals, count, fills) for avals, count in zip(kept, counts, strict=True)]
    else:
        # No operation of these writes into a dummy slot, which is large: only values apart have one.
        residuals = [pool(avals, count + apart) for avals, count in zip(kept, counts, strict=True)]
    on_host = [
        () if apart else allocate_on_host(placed.host.avals, count, i * len(pools.stash.host.avals))
        for i, (placed, count) in enumerate(zip((pools.stash, pools.weight_stash), counts, strict=False))
    ]
    loss, head_metrics = head
    grad = functools.partial(accumulator, dtype=options.grad_dtype)

    written = begun_chunks(program) if options.dispatch == "by_rank" and options.uninitialised else frozenset[int]()
    summed = tuple(pool.avals for pool in pools.sums), partition(local.outer, trainable.outer)[0]
    chunks, outer = jax.eval_shape(functools.partial(jax.tree.map, grad), summed)
    # Behind barriers: XLA would make these zeros and the gradients of what a stage does not use once, which are needed
    # before the first step and after the last, and keep them all the time.
    dtypes = dict.fromkeys(leaf.dtype for leaf in jax.tree.leaves((chunks, outer)))
    zeros = {dtype: lax.optimization_barrier(jnp.zeros((), dtype)) for dtype in dtypes}

    def begin(aval: Any) -> jax.Array:
        return lax.broadcast(zeros[aval.dtype], aval.shape)

    def begin_stage(chunk: int, aval: Any) -> Any:
        """Where code is unrolled, and in code by rank, the first gradients are the sums."""
        if chunk in written:
            return uninitialised_array(aval)
        return Zeros(begin(aval)) if apart else begin(aval)

    with jax.named_scope(SUMS):
        grads = tuple(jax.tree.map(functools.partial(begin_stage, i), avals) for i, avals in enumerate(chunks))
        outer_grads = jax.tree.map(begin, outer)
    return Buffers(
        in_flight=_messages(program, options, local.x, fills),
        stash=residuals[0],
        weight_stash=residuals[1],
        cross=residuals[2],
        host_stash=on_host[0],
        host_weight_stash=on_host[1],
        grads=grads,
        outer_grads=outer_grads,
        loss=jax.tree.map(accumulator, loss),
        aux_loss=jax.tree.map(accumulator, split.out[1]),
        stage_metrics=jax.tree.map(accumulator, split.aux),
        head_metrics=jax.tree.map(accumulator, head_metrics),
    )


def _fills(options: Options) -> Iterator[int] | None:
    """The fills of `allocate_named`."""
    return None if options.uninitialised else itertools.count()


def _messages(program: Program, options: Options, aval: Any, fills: Iterator[int] | None) -> Any:
    """Empty slots for messages; ``fills`` as of `allocate_named`."""
    if options.dispatch == "by_rank":
        return allocate_named(aval, as_dispatched(program, options.dispatch).num_message_slots, fills)
    return allocate(aval, program.num_message_slots + 1, apart=options.dispatch == "unrolled")


def _scale(shares: Shares, sums: Any) -> Any:
    """Sums of gradients times what a mean needs."""
    return sums if shares.scale is None else jax.tree.map(functools.partial(_scaled, shares.scale), sums)


def _grads_of_chunk(
    program: Program, options: Options, step: TrainStep, params: Any, chunk: int, sums: tuple[jax.Array, ...]
) -> Any:
    """The gradients of a chunk's params, of what this rank has summed for its stage's kind; in the sums' dtypes."""
    kind_of = step.model.kind_of or (0,) * program.schedule.num_stages
    kinds = [kind_of[stages[chunk]] if chunk < len(stages) else -1 for stages in program.schedule.rank_stages]
    here = jnp.asarray(np.asarray(kinds, np.int32))[lax.axis_index(options.axes.pipeline)]
    found: dict[int, Any] = {}
    for part, (of_chunk, kind) in enumerate(step.parts):
        if of_chunk == chunk:
            mine = step.pools.sums[chunk].of_kind(sums, kind)
            of_params, _ = step.splits[kind].gradients(step.prepared[part], mine)  # and None of step_inputs
            found[kind] = partition(of_params)[0]

    def choose(param: jax.Array, *leaves: jax.Array) -> jax.Array:
        chosen, *others = leaves
        dtype = sum_dtype(param.dtype, options.grad_dtype)
        for kind, other in zip(list(found)[1:], others, strict=True):
            if other is not chosen:  # which all kinds have summed alike
                chosen = jnp.where(here == kind, other.astype(dtype), chosen.astype(dtype))
        return chosen.astype(dtype)

    return jax.tree.map(choose, params, *found.values())


def _scaled(scale: jax.Array, grad: jax.Array) -> jax.Array:
    """A gradient times a scale, rounded once."""
    wide = accumulation_dtype(grad.dtype)
    return (grad.astype(wide) * scale.astype(wide)).astype(grad.dtype)


def _sum_losses(axes: Axes, buffers: Buffers, shares: Shares) -> tuple[list[jax.Array], dict[str, Any]]:
    """(the objective's parts, metrics with the part that arose in stages), of what every rank has summed."""
    everywhere = (axes.pipeline, *axes.data, *axes.replicated)
    loss, aux_loss = (
        jax.tree.map(lambda leaf: leaf * shares.unit.astype(leaf.dtype), lax.psum(value, everywhere))
        for value in (buffers.loss, buffers.aux_loss)
    )
    losses = [value for value in (loss, aux_loss) if value is not None]
    aux = _sum_metrics(buffers, axes)
    if aux_loss is not None:
        aux["aux_loss"] = aux_loss
    return losses, aux


def _total(losses: Sequence[jax.Array]) -> jax.Array:
    """The sum in the widest dtype."""
    dtype = functools.reduce(jnp.promote_types, (value.dtype for value in losses))
    return functools.reduce(jnp.add, (value.astype(dtype) for value in losses))


def finish_grad(constrain: Callable[[Any, Any], jax.Array], param: Any, grad: jax.Array | None, spec: Any) -> Any:
    """One gradient of `train` with its sharding; of what is not differentiated, JAX's zeros of dtype float0."""
    return np.zeros(np.shape(param), jax.dtypes.float0) if grad is None else constrain(grad, spec)


def infer(
    program: Program,
    model: Model,
    options: Options,
    params: Params,
    batch: Any,
    rng: jax.Array | None,
    step_inputs: Any,
    tables: Any,
) -> tuple[Any, dict[str, Any]]:
    """(outputs with leaves ``[local batch, ...]``, metrics) of a forward-only program on one rank."""
    local = _start(program, model, options, params, batch, rng, step_inputs, outputs=True)
    axes = options.axes
    model, ctx = local.model, local.ctx
    (y, _), metrics = _stage_shapes(program, options, local)
    run_head = functools.partial(run_outputs, model)
    outputs = shape_of_end(program, axes.pipeline, "head", run_head, local.outer, y, ctx)
    _check_outputs(outputs, jax.tree.leaves(batch)[0].shape[1])
    buffers = Buffers(
        in_flight=_messages(program, options, local.x, _fills(options)),
        stage_metrics=jax.tree.map(accumulator, metrics),
        outputs=allocate(outputs, program.schedule.num_microbatches),
    )
    step = ForwardStep(**_forward_fields(program, options, local, step_inputs))
    buffers = run_steps(program, step.operation, axes.pipeline, options.dispatch, buffers, tables)
    # Only the ranks with the last stage hold outputs; all others hold zeros, so the sum is exact.
    outputs = jax.tree.map(lambda leaf: sum_exactly(leaf, axes.pipeline), buffers.outputs)
    outputs = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)
    return outputs, _sum_metrics(buffers, axes)


def evaluate(
    program: Program,
    model: Model,
    options: Options,
    params: Params,
    batch: Any,
    rng: jax.Array | None,
    step_inputs: Any,
    tables: Any,
) -> tuple[jax.Array, dict[str, Any]]:
    """(loss, aux) as `train` returns them, of a forward-only program on one rank."""
    local = _start(program, model, options, params, batch, rng, step_inputs, outputs=False)
    (y, aux_loss), metrics = _stage_shapes(program, options, local)
    loss, head_metrics = _head_shapes(program, options, aux_loss, local)
    shares = _shares(options, local, (loss, aux_loss))
    buffers = Buffers(
        in_flight=_messages(program, options, y, _fills(options)),
        loss=jax.tree.map(accumulator, loss),
        aux_loss=jax.tree.map(accumulator, aux_loss),
        stage_metrics=jax.tree.map(accumulator, metrics),
        head_metrics=jax.tree.map(accumulator, head_metrics),
    )
    step = EvaluationStep(**_forward_fields(program, options, local, step_inputs), shares=shares)
    buffers = run_steps(program, step.operation, options.axes.pipeline, options.dispatch, buffers, tables)
    losses, aux = _sum_losses(options.axes, buffers, shares)
    return _total(losses), aux


def _forward_fields(program: Program, options: Options, local: _Local, step_inputs: Any) -> dict[str, Any]:
    """The fields of a `ForwardStep`."""
    return {
        "model": local.model,
        "parts": program.parts,
        "chunks": local.chunks,
        "outer": local.outer,
        "batch": local.batch,
        "rng": local.rng,
        "step_inputs": step_inputs,
        "num_stages": program.schedule.num_stages,
        "gathers": bool(options.fsdp_axes),
    }


def _stage_shapes(program: Program, options: Options, local: _Local) -> Any:
    """What a stage returns in a forward-only program, as shapes and dtypes, each kind of stage checked."""
    returned = []
    for kind in range(len(local.model.stages)):
        run = functools.partial(local.model.run_kind, kind)
        jaxpr, shapes = jax.make_jaxpr(run, return_shape=True)(local.chunks[0], local.x, local.ctx)
        check_alone("stage", program, options.axes.pipeline, collectives_of_jaxpr(jaxpr))
        _check_boundary(local.x, shapes[0][0])
        returned.append(shapes)
    _check_same_returns([(aux_loss, metrics) for (_, aux_loss), metrics in returned])
    return returned[0]


def _check_same_returns(returned: Sequence[tuple[Any, Any]]) -> None:
    """Raises ValueError unless all kinds of stages return the same auxiliary loss and metrics, as shapes and dtypes."""
    texts = [tuple(map(shape_texts, each)) for each in returned]
    for kind, text in enumerate(texts):
        if text != texts[0]:
            raise ValueError(
                f"stages of kind {kind} return aux_loss {text[0]} and metrics {text[1]}, those of kind 0 "
                f"{texts[0][0]} and {texts[0][1]}: all return the same, zeros for what a kind does not have"
            )


def _check_outputs(outputs: Any, size: int) -> None:
    """Raises ValueError unless all outputs are per example of a microbatch of some size."""
    for leaf in jax.tree.leaves(outputs):
        if leaf.shape[:1] != (size,):
            raise ValueError(
                f"the head returned an output of shape {leaf.shape} for a microbatch of {size}: a forward-only "
                f"program returns per-example outputs, so make its leading dimension {size}"
            )


def make_tables(program: Program, dispatch: str) -> tuple[Any, Any]:
    """(tables of each rank ``[steps or rounds, ranks, ...]``, tables common to all ranks ``[steps]``)."""
    if dispatch == "unrolled":
        return unrolled_table(program), ()
    if dispatch in ("stretches", "by_rank"):
        return [body.table for body in make_bodies(*code_in_stretches(program, dispatch))], ()
    _, patterns = _patterns(program)
    per_rank = {
        "branch": program.branch,
        "operands": program.operands,
        "send": program.send,
        "receive": program.receive,
    }
    return per_rank, patterns


def run_steps(
    program: Program,
    operation: Callable[[Op, int], Operation],
    axis: str,
    dispatch: str,
    buffers: Buffers,
    tables: Any,
) -> Buffers:
    """All steps. A scan over them runs a branch, then moves messages where the step says so."""
    if dispatch == "unrolled":
        return run_unrolled(program, operation, axis, buffers, tables[0][:, 0])[0]
    if dispatch in ("stretches", "by_rank"):
        mine, code = [table[:, 0] for table in tables[0]], code_in_stretches(program, dispatch)
        return run_stretches(*code, operation, axis, buffers, mine, by_rank=dispatch == "by_rank")
    per_rank, patterns = tables
    per_rank = {name: table[:, 0] for name, table in per_rank.items()}
    if dispatch == "sequential":
        branches = [run_sequential(branch, operation) for branch in program.branches]
    else:
        branches = [(run_branch(branch, operation),) for branch in program.branches]
    scopes = [f"branch_{i}{'/together' * program.together(branch)}" for i, branch in enumerate(program.branches)]
    branches = [tuple(map(jax.named_scope(scope), parts)) for scope, parts in zip(scopes, branches, strict=True)]
    flags, _ = _patterns(program)
    exchanges = [(functools.partial(_exchange, program.channels, pattern, axis),) for pattern in flags]

    def body(buffers: Buffers, row: Any) -> tuple[Buffers, None]:
        mine, pattern = row
        buffers = _dispatch(dispatch, mine["branch"], branches, buffers, mine["operands"])
        in_flight = _dispatch(dispatch, pattern, exchanges, buffers.in_flight, mine["send"], mine["receive"])
        return buffers._replace(in_flight=in_flight), None

    return lax.scan(body, buffers, (per_rank, patterns))[0]


def _patterns(program: Program) -> tuple[list[tuple[bool, ...]], np.ndarray]:
    """(distinct rows of ``communicate``, silence first; ``int32[steps]`` which of them a step has)."""
    silence = np.zeros_like(program.communicate[:1])
    distinct, which = np.unique(np.concatenate([silence, program.communicate]), axis=0, return_inverse=True)
    return list(map(tuple, distinct.tolist())), which.reshape(-1)[1:].astype(np.int32)


def _exchange(
    channels: Sequence[Any], pattern: tuple[bool, ...], axis: str, in_flight: Any, send: jax.Array, receive: jax.Array
) -> Any:
    """Moves one message on each channel of a pattern: all sends are read before any arrival is written."""
    with jax.named_scope("send"):
        arrived = [
            (i, lax.ppermute(take(in_flight, send[i]), axis, channels[i])) for i, flag in enumerate(pattern) if flag
        ]
    for i, message in arrived:
        in_flight = put(in_flight, receive[i], message)
    return in_flight


def _dispatch(
    how: str, index: jax.Array, branches: Sequence[Sequence[Callable[..., Any]]], carry: Any, *operands: Any
) -> Any:
    """Runs the functions of ``branches[index]``, each ``(carry, *operands) -> carry``; branch 0 does nothing.

    "switch" is one conditional between branches of one function each. XLA copies every carried buffer at a
    conditional (always on CPU, in some programs on GPU) but not at a loop, so the other ways run each function in a
    loop of no or one trip. A barrier keeps the function in its loop: without it XLA takes out what does not change
    from trip to trip, such as all products of a W, and runs that in every step.
    """
    if how == "switch":
        functions = [lambda carry, *_: carry, *(function for (function,) in branches[1:])]
        return lax.switch(index, functions, carry, *operands)
    for i, functions in enumerate(branches[1:], start=1):
        trips = (index == i).astype(jnp.int32)
        for function in functions:
            carry = lax.fori_loop(0, trips, functools.partial(_trip, function, operands), carry)
    return carry


def _trip(function: Callable[..., Any], operands: Any, trip: jax.Array, carry: Any) -> Any:
    carry, operands, _ = lax.optimization_barrier((carry, operands, trip))
    return function(carry, *operands)


def _prepare_model(program: Program, model: Model, options: Options, *, outputs: bool) -> Model:
    """The model with inputs in compute dtype where the batch itself is the first stage's input; its ends shared.

    ``outputs``: whether the head returns outputs of examples, and no loss.
    """
    dtype = options.compute_dtype
    if model.embed is None and dtype is not None:
        model = dataclasses.replace(model, embed=lambda outer, data, ctx: cast(data, dtype))
    if not program.shared_ends:
        return model
    return share_ends(model, program.schedule, options.axes.pipeline, forward_only=outputs)


def _fold_axes(rng: jax.Array | None, axes: Axes) -> jax.Array | None:
    """Keys that differ between data-parallel devices."""
    if rng is None or all(axes.sizes[axis] == 1 for axis in axes.data):
        return rng
    return jax.random.fold_in(rng, lax.axis_index(axes.data))


def _check_boundary(x: Any, y: Any) -> None:
    """Every stage boundary carries the same shapes, since all of them share buffers and permutes."""
    given, returned = shape_texts(x), shape_texts(y)
    if given != returned:
        raise ValueError(
            f"the stage maps {given} to {returned}: input and output of a stage must have the same structure, "
            "shapes and dtypes; move what changes them into embed (before the first stage) or head (after the last), "
            "and return auxiliary losses and metrics as jaxpipe.Output(y, aux_loss, metrics)"
        )


def _sum_metrics(buffers: Buffers, axes: Axes) -> dict[str, Any]:
    """Stage and head metrics summed over pipeline ranks and data-parallel devices."""
    head_metrics = buffers.head_metrics or {}
    both = set(buffers.stage_metrics) & set(head_metrics)
    if both:
        raise ValueError(f"metrics {sorted(both)} are reported by both the stage and the head: rename one")
    if "aux_loss" in {*buffers.stage_metrics, *head_metrics}:
        raise ValueError("a metric is named 'aux_loss', as the sum of auxiliary losses is: rename it")
    return lax.psum({**buffers.stage_metrics, **head_metrics}, (axes.pipeline, *axes.data))


def _reduce_grad(axes: Axes, param: jax.Array, grad: jax.Array | None, reduction: Reduction) -> jax.Array | None:
    """Sums a gradient over the manual axes on which its parameter is replicated; in the parameter's dtype."""
    if grad is None:
        return None
    return reduction.run(grad, axes.names).astype(param.dtype)
