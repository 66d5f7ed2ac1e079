"""The programs whose overlap `overlap.py` reads: DualPipe's steady state by hand, and as the library makes it.

The model is DeepSeek-V3's: layers of multi-head latent attention and experts. Attention is a kernel of cuDNN's shapes
that computes nothing, as cuDNN compiles only where there is a GPU: these programs are compiled, never run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpipe
from eplb_jax import init_moe, moe_layer
from jaxpipe.deepseek import apply_block, attend, init_mla, rms_norm, stand_in
from jaxpipe.deepseek.block import Part
from jaxpipe.inputs import is_spec
from jaxpipe.runtime import execute
from jaxpipe.runtime.buffers import Buffers, put, take
from jaxpipe.runtime.execute import run_steps
from jaxpipe.runtime.operations import run_branch
from jaxpipe.runtime.program import Op, Program
from jaxpipe.stage import split_stage
from profiling.workloads.layer import LayerParams, layer_specs
from profiling.workloads.sizes import Sizes

BODY_STEPS = 8
"""Of the scan of the body written by hand."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to write, or to compile, a program.

    Attributes:
      program: "body", "steady" or "whole".
      name: for the table.
      order: of the body's parts, as they are traced.
      barrier: of the body: "" for none; "end", around what a step hands on; "sends", that and sends traced before W.
      unroll: steps of the body in one iteration.
      executor: of the steady state, one of `EXECUTORS`.
      options: of the compiler.
      profile: whether to compile a second time, guided by the times that the first is estimated to take.
    """

    program: str
    name: str = "as it is"
    order: str = "FIW"
    barrier: str = ""
    unroll: int = 1
    executor: str = "library"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    profile: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A model on a mesh of axes "pp" and "ep".

    Attributes:
      mesh: of eight devices.
      sizes: of a stage.
      tokens: of a microbatch on each device.
    """

    mesh: Mesh
    sizes: Sizes
    tokens: int

    def stage(self, layers: Any, x: jax.Array) -> jax.Array:
        """One stage on this device's tokens."""
        for i, layer in enumerate(layers):
            with jax.named_scope(f"layer_{i}"):
                x = apply_block(x, rms_norm, self.attention(layer), rms_norm, self.experts(layer))[0]
        return x

    def attention(self, layer: LayerParams) -> Part:
        """A layer's attention, with a kernel that computes nothing."""

        def attention(x: jax.Array) -> tuple[jax.Array, None]:
            return attend(layer.attention, x[None], self.sizes, core=stand_in.attention)[0][0], None

        return attention

    def experts(self, layer: LayerParams) -> Part:
        """A layer's experts."""
        return lambda x: moe_layer(layer.moe, x, self.sizes.moe, axis="ep")

    def specs(self, *front: str | None) -> list[Any]:
        """PartitionSpecs of the layers, after those of the leading dimensions."""
        layer = layer_specs(self.sizes)[0]
        return [jax.tree.map(lambda spec: P(*front, *spec), layer, is_leaf=is_spec)] * self.sizes.layers

    def params(self, *front: int, specs: Any) -> Any:
        """Shapes of the layers on the mesh, after the leading dimensions."""

        def layer(key: jax.Array) -> LayerParams:
            return LayerParams(
                init_mla(nnx.Rngs(key), self.sizes, jnp.bfloat16, scales=False),
                init_moe(key, self.sizes.moe, jnp.bfloat16),
            )

        shapes = [jax.eval_shape(layer, jax.random.key(0))] * self.sizes.layers
        return jax.tree.map(lambda leaf, spec: self.at((*front, *leaf.shape), spec, leaf.dtype), shapes, specs)

    def at(self, shape: tuple[int, ...], spec: P, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        """An array on the mesh."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))


def device_body(stage: Callable[[Any, Any], Any], swap: Sequence[tuple[int, int]], variant: Variant) -> Callable:
    """The steady state by hand, on one device. A rank holds two stages: one runs forward, one backward.

    Args:
      stage: ``(layers, x) -> y``.
      swap: pairs of ranks that send to each other.
      variant: how it is written.

    Returns:
      ``(params [rank, chunk, ...], x, dy) -> (x, dy, gradients [rank, ...])`` after `BODY_STEPS` steps.
    """

    def device(params: Any, x: jax.Array, dy: jax.Array) -> Any:
        here, there = ([jax.tree.map(lambda leaf, c=c: leaf[0, c], layer) for layer in params] for c in range(2))
        split = split_stage(stage, here, x)
        forward, backward = split.prepare(here), split.prepare(there)

        def step(carry: Any, _: None) -> tuple[Any, None]:
            x, dy, residuals, grads = carry
            y = dx = kept = None
            crossing, sent = (), ()
            parts = variant.order.replace("W", "SW") if variant.barrier == "sends" else variant.order + "S"
            for part in parts:
                with jax.named_scope({"S": "send"}.get(part, part)):
                    if part == "F":
                        y, kept = split.forward(forward, x)
                    elif part == "I":
                        dx, crossing = split.backward_input(backward, residuals, dy)
                    elif part == "W":
                        more = split.backward_weight(backward, residuals.weight, crossing)
                        grads = jax.tree.map(lambda total, ct: total + ct.astype(total.dtype), grads, more)
                    else:
                        sent = lax.ppermute(y, "pp", swap), lax.ppermute(dx, "pp", swap)
            if variant.barrier:
                sent, grads = lax.optimization_barrier((sent, grads))
            return (*sent, kept, grads), None

        grads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), there)
        carry = (x, dy, split.forward(backward, x)[1], grads)
        x, dy, _, grads = lax.scan(step, carry, None, length=BODY_STEPS, unroll=variant.unroll)[0]
        return x, dy, jax.tree.map(lambda leaf: leaf[None], grads)

    return device


def lower_body(job: Job, variant: Variant) -> Any:
    """`device_body` on the job's mesh."""
    ranks = job.mesh.shape["pp"]
    device = device_body(job.stage, [(rank, rank ^ 1) for rank in range(ranks)], variant)
    rows, specs = P(("pp", "ep")), job.specs("pp", None)
    mapped = jax.shard_map(
        device, mesh=job.mesh, in_specs=(specs, rows, rows), out_specs=(rows, rows, job.specs("pp")), check_vma=False
    )
    x = job.at((8 * job.tokens, job.sizes.width), rows)
    return jax.jit(mapped).lower(job.params(ranks, 2, specs=specs), x, x)


def lower_step(job: Job, variant: Variant, schedule: str) -> tuple[Program, Any]:
    """A pipelined step of the library and its tables, whole or its steady state."""
    ranks, devices = job.mesh.shape["pp"], job.mesh.shape["ep"]
    built = jaxpipe.schedule.build(schedule, ranks, 4 * ranks)
    specs = job.specs("pp")
    pipeline = jaxpipe.value_and_grad(
        lambda layers, x, ctx: job.stage(layers, x),
        built,
        job.mesh,
        head=lambda outer, y, data, ctx: jnp.mean(jnp.square(y.astype(jnp.float32))),
        data_axes=("ep",),
        specs=jaxpipe.Params(specs, P()),
        compute_dtype=jnp.bfloat16,
        dispatch="loops",  # a scan over all steps, as the executors by hand are
        order="storage",
    )
    if variant.program == "steady":
        pipeline = dataclasses.replace(pipeline, program=steady_state(pipeline.program))
    params = jaxpipe.Params(job.params(built.num_stages, specs=specs), ())
    batch = job.at((built.num_microbatches * devices * job.tokens, job.sizes.width), P("ep"))
    with mock.patch.object(execute, "run_steps", EXECUTORS[variant.executor]):
        return pipeline.program, jax.jit(pipeline).lower(params, batch)


def steady_state(program: Program) -> Program:
    """The program's ticks in which every rank runs as many pairs, and nothing of them but pairs and sends."""
    ranks, last = range(program.num_ranks), {int(tick): step for step, tick in enumerate(program.ticks)}
    rows = []  # (step of each rank's pair, whether the tick ends with it)
    for tick, end in last.items():
        steps = [s for s in range(end + 1) if program.ticks[s] == tick]
        pairs = [[s for s in steps if len(program.branches[program.branch[s, rank]]) == 2] for rank in ranks]
        if len({len(mine) for mine in pairs}) == 1:
            rows += [(list(at), end, i == len(pairs[0]) - 1) for i, at in enumerate(zip(*pairs, strict=True))]
    rows = rows[: len(rows) // 2 * 2]
    steps, ends, talks = (np.asarray(column) for column in zip(*rows, strict=True))
    kinds = np.unique(program.branch[steps, ranks])
    return dataclasses.replace(
        program,
        branches=((), *(program.branches[kind] for kind in kinds)),
        branch=(np.searchsorted(kinds, program.branch[steps, ranks]) + 1).astype(np.int32),
        operands=program.operands[steps, ranks],
        communicate=program.communicate[ends] & talks[:, None],
        send=program.send[ends],
        receive=program.receive[ends],
        ticks=np.arange(len(rows), dtype=np.int32),
    )


def send_messages(program: Program, channels: list[int], axis: str, in_flight: Any, row: Any) -> list[Any]:
    """What arrives on these channels."""
    with jax.named_scope("send"):
        return [lax.ppermute(take(in_flight, row["send"][i]), axis, program.channels[i]) for i in channels]


def receive_messages(channels: list[int], buffers: Buffers, row: Any, arrived: list[Any]) -> Buffers:
    """Puts them into their slots."""
    in_flight = buffers.in_flight
    for i, message in zip(channels, arrived, strict=True):
        in_flight = put(in_flight, row["receive"][i], message)
    return buffers._replace(in_flight=in_flight)


def without_switch(program: Program, operation: Any, axis: str, dispatch: str, buffers: Any, tables: Any) -> Any:
    """Prototype: an iteration is two ticks, in which every rank runs a pair and then sends, with no condition.

    Even ranks run F0 and B1, then F1 and B0, odd ones the other way round: they swap their chunks, once a step.
    """
    rank = np.arange(program.num_ranks)
    assert (program.branch == program.branch[0, (np.arange(program.num_steps)[:, None] + rank) % 2]).all()
    assert (program.communicate == program.communicate[np.arange(program.num_steps) % 2]).all()
    odd = lax.axis_index(axis) % 2 == 1

    def swapped(pair: tuple[Any, Any]) -> tuple[Any, Any]:
        def choose(even: Any, uneven: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(odd, b, a), even, uneven)

        return choose(*pair), choose(*reversed(pair))

    step = operation.__self__
    operation = dataclasses.replace(step, prepared=swapped(step.prepared)).operation
    rows = {name: table[:, 0].reshape(-1, 2, *table.shape[2:]) for name, table in tables[0].items()}

    def iteration(buffers: Any, rows: Any) -> tuple[Any, None]:
        for tick in range(2):
            row = {name: value[tick] for name, value in rows.items()}
            channels = np.flatnonzero(program.communicate[tick]).tolist()
            buffers = run_branch(program.branches[program.branch[tick, 0]], operation)(buffers, row["operands"])
            arrived = send_messages(program, channels, axis, buffers.in_flight, row)
            buffers = receive_messages(channels, buffers, row, arrived)
        return buffers, None

    buffers = lax.scan(iteration, buffers, rows)[0]
    return buffers._replace(grads=swapped(buffers.grads))


def w_beside_sends(program: Program, operation: Any, axis: str, dispatch: str, buffers: Any, tables: Any) -> Any:
    """Prototype: F and I in a loop of no or one trip, then the sends, beside them W in a loop of its own."""
    channels = list(range(len(program.channels)))

    def loops(part: Callable[[Any], Any]) -> list[Any]:
        branches = [part(branch) for branch in program.branches[1:]]
        runs = [jax.named_scope(f"branch_{i}")(run_branch(b, operation)) for i, b in enumerate(branches, start=1)]
        return [(None,), *((run,) for run in runs)]

    before = loops(lambda branch: (branch[0], (Op.I, branch[1][1])))
    beside = loops(lambda branch: ((Op.W, branch[1][1]),))

    def iteration(buffers: Any, row: Any) -> tuple[Any, None]:
        buffers = execute._dispatch("loops", row["branch"], before, buffers, row["operands"])
        arrived = send_messages(program, channels, axis, buffers.in_flight, row)
        buffers = execute._dispatch("loops", row["branch"], beside, buffers, row["operands"][1:])
        return receive_messages(channels, buffers, row, arrived), None

    return lax.scan(iteration, buffers, {name: table[:, 0] for name, table in tables[0].items()})[0]


EXECUTORS = {
    "library": run_steps,
    "w_beside_sends": w_beside_sends,
    "without_switch": without_switch,
}
