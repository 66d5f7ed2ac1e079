"""What the pipeline's executor costs: DualPipeV on one rank beside plain gradient accumulation of the same model.

    python examples/benchmarks/executor_overhead.py [--microbatches 8,16,32,64] [--tiny]

Both hold float32 masters, compute in bfloat16 and add up gradients in float32. One rank runs both stages of DualPipeV,
so that every action, slot and loop of the executor is there and no waiting is. "slots" is what the schedule says is
held at once: slots times their size, gradients and working copies; "temporaries" is what the compiler allocates.
Slots in pools (``--dispatch loops``) are one more in each pool than are alive; unrolled code frees what a backward
has read while the forward beside it writes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from chunks import Chunk, chunks, compile_all, gib, nbytes
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from record import Recorder, machine, make_parser, medians_ms

import jaxpipe
from jaxpipe.runtime.model import Context, Model
from jaxpipe.stage import split_stage


def loss_of(y: jax.Array) -> jax.Array:
    """Mean square."""
    return jnp.mean(y.astype(jnp.float32) ** 2)


def head(outer: Any, y: jax.Array, data: jax.Array, ctx: jaxpipe.Context) -> jax.Array:
    """`loss_of`, as a pipeline's head."""
    return loss_of(y)


def embed(outer: Any, data: jax.Array, ctx: jaxpipe.Context) -> jax.Array:
    """The batch is already activations."""
    return data


def plain_step(chunk: Chunk, stages: int, mesh: Any) -> Any:
    """Gradient accumulation: a loop over microbatches of the whole model's forward and backward."""

    def device(masters: Any, batch: jax.Array) -> Any:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), masters)
        ctx = jaxpipe.Context(jnp.int32(0), jnp.int32(0), None, None)

        def loss(params: Any, x: jax.Array) -> jax.Array:
            for stage in range(stages):
                x = chunk.stage(jax.tree.map(lambda leaf, stage=stage: leaf[stage], params), x, ctx)
            return loss_of(x)

        def one(carry: Any, x: jax.Array) -> tuple[Any, None]:
            total, grads = carry
            value, more = jax.value_and_grad(loss)(params, x[None])
            return (total + value, jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, more)), None

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), masters)
        (total, grads), _ = jax.lax.scan(one, (jnp.float32(0), zeros), batch)
        return total / len(batch), jax.tree.map(lambda grad: grad / len(batch), grads)

    return jax.jit(jax.shard_map(device, mesh=mesh, in_specs=(P(), P()), out_specs=(P(), P()), check_vma=False))


def stash_bytes(chunk: Chunk, step: jaxpipe.Pipeline, masters: Any, mesh: Any) -> int:
    """What the schedule holds at once: all slots, the gradients, and the working copies."""
    program, pools = step.program, step.dispatch != "unrolled"
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], jnp.bfloat16), masters)
    x = jax.ShapeDtypeStruct((1, chunk.tokens, chunk.width), jnp.bfloat16)
    found: list[Any] = []

    def inspect(params: Any, x: jax.Array) -> jax.Array:
        index = jax.ShapeDtypeStruct((), jnp.int32)
        ctx = Context(index, index, None, x)
        found.append(split_stage(Model(chunk.stage).run_stage, params, x, ctx, has_aux=True, recompute=pools))
        return x

    jax.eval_shape(jax.shard_map(inspect, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False), one, x)
    split = found[0]
    slots = (
        (program.num_stash_slots + pools) * nbytes(split.residuals.input)
        + (program.num_weight_stash_slots + pools) * nbytes(split.residuals.weight)
        + (program.num_cross_slots + pools) * nbytes(split.crossing)
        + (program.num_message_slots + pools) * nbytes(x)
    )
    return slots + 3 * nbytes(masters) // 2  # float32 sums and bfloat16 copies


def measure(chunk: Chunk, microbatches: int, repeats: int, dispatch: str | None) -> dict[str, Any]:
    """One row of the table."""
    mesh, schedule = jaxpipe.make_mesh(pp=1, ep=1), jaxpipe.schedule.build("dualpipev", 1, microbatches)
    step = jaxpipe.value_and_grad(
        chunk.stage,
        schedule,
        mesh,
        embed=embed,
        head=head,
        data_axes=("ep",),
        specs=jaxpipe.Params(
            jax.tree.map(lambda spec: P("pp", *spec), chunk.specs, is_leaf=lambda leaf: isinstance(leaf, P)), P()
        ),
        compute_dtype=jnp.bfloat16,
        dispatch=dispatch,
    )
    stages = [chunk.init(key) for key in jax.random.split(jax.random.key(0), schedule.num_stages)]
    masters = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stages)
    del stages
    masters = jax.device_put(masters, NamedSharding(mesh, P()))
    batch = jax.random.normal(jax.random.key(1), (microbatches, chunk.tokens, chunk.width), jnp.bfloat16)
    lowered = (
        jax.jit(step).lower(jaxpipe.Params(masters), batch),
        plain_step(chunk, schedule.num_stages, mesh).lower(masters, batch),
    )
    piped, plain = compile_all(lowered)
    (loss, _), _ = piped(jaxpipe.Params(masters), batch)
    expected, _ = plain(masters, batch)
    assert abs(float(loss) - float(expected)) < 2e-2 * abs(float(expected)), (float(loss), float(expected))
    ours, theirs = medians_ms([lambda: piped(jaxpipe.Params(masters), batch), lambda: plain(masters, batch)], repeats)
    memory: Any = piped.memory_analysis()
    other: Any = plain.memory_analysis()
    stash = stash_bytes(chunk, step, masters, mesh)
    return {
        "model": f"2 stages of {chunk.name}",
        "microbatches": microbatches,
        "code": step.dispatch,
        "DualPipeV ms": ours,
        "plain ms": theirs,
        "ratio": ours / theirs,
        "temporaries GiB": gib(memory.temp_size_in_bytes),
        "slots GiB": gib(stash),
        "temporaries / slots": memory.temp_size_in_bytes / stash,
        "plain temporaries GiB": gib(other.temp_size_in_bytes),
    }


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--microbatches", default="8,16,32,64", help="of a step")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median counts")
    parser.add_argument("--model", choices=["moe", "dense", "both"], default="both", help="the layers")
    parser.add_argument("--dispatch", choices=["unrolled", "loops"], help="default: unrolled")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args()
    moe, dense = chunks(args.tiny)
    models = {"moe": [moe], "dense": [dense], "both": [moe, dense]}[args.model]
    counts = [int(count) for count in args.microbatches.split(",")]
    rows = (measure(chunk, count, args.repeats, args.dispatch) for chunk in models for count in counts)
    Recorder.begin(args, machine(), "bfloat16, one microbatch is one sequence").table(rows, labels=3)


if __name__ == "__main__":
    main()
