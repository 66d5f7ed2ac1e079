"""A training step of a whole model on one GPU: DualPipeV with one rank beside plain gradient accumulation.

    python examples/benchmarks/pretrain_step.py [--config moe-1b] [--microbatches 8] [--microbatch-size 4] [--fp8]
        [--tiny]

Both are the model, optimizer and step of `examples/pretrain.py`, float32 masters and bfloat16 products; "plain" is a
loop over microbatches in one jitted step, as one writes it without a pipeline. MFU is of the chip's published dense
bfloat16 peak, six FLOPs for each parameter that a token meets, and causal attention's. With --fp8 a third program is
the first one with Linears and experts in 8 bits. The second table compares the memory that `pretrain.py plan` foresees
with what the compiler allocates.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
from chunks import compile_all, gib
from record import Recorder, command_line, machine, make_parser, medians_ms, write_records

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from pretraining import data, trainer
from pretraining import plan as planning
from pretraining.flags import train_parser
from pretraining.run import Setup, set_up

from jaxpipe.planning.chips import chip_of


def accumulate(setup: Setup) -> Any:
    """Loss and gradients as of `trainer.pipelined`: a loop over microbatches, sums in float32."""
    count, loss_of = setup.schedule.num_microbatches, trainer.microbatch_loss(setup.model)

    def loss(params: Any, part: Any, index: jax.Array, rng: jax.Array, total: jax.Array) -> Any:
        value, (aux_loss, _, metrics) = loss_of(params, part, index, rng)
        return value / total, {**metrics, "aux_loss": aux_loss / total}

    def device(params: Any, batch: Any, rng: jax.Array) -> Any:
        total = setup.model.weight(batch)
        parts = jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), batch)
        grad = jax.value_and_grad(loss, has_aux=True, allow_int=True)

        def one(carry: Any, inputs: Any) -> tuple[Any, None]:
            index, part = inputs
            (value, aux), grads = grad(params, part, index, rng, total)
            return jax.tree.map(add, carry, ((value, aux), grads)), None

        shapes = jax.eval_shape(lambda: grad(params, jax.tree.map(lambda leaf: leaf[0], parts), 0, rng, total))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(one, zeros, (jnp.arange(count, dtype=jnp.int32), parts))[0]

    def add(a: jax.Array, b: jax.Array) -> jax.Array:
        return a if a.dtype == jax.dtypes.float0 else a + b

    return jax.shard_map(device, mesh=setup.mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)


def measure(args: argparse.Namespace, parsed: argparse.Namespace) -> None:
    """Prints both tables."""
    setup = set_up(args)
    setups = {"DualPipeV, one rank": setup, "plain gradient accumulation": setup}
    if parsed.fp8:
        setups["DualPipeV, one rank, fp8"] = set_up(argparse.Namespace(**{**vars(args), "precision": "fp8"}))
    batch = data.make_batch(setup.corpus.train, args.seed, 0, setup.batch, setup.config.sequence)
    batch = jax.device_put(batch, setup.sharding)
    rng = jax.random.key(args.seed)
    size = f"{setup.batch} sequences of {setup.config.sequence} tokens a step"
    report = Recorder.begin(parsed, machine(), args.config, size)

    def lowered(name: str, setup: Setup) -> Any:
        gradient = accumulate(setup) if name.startswith("plain") else setup.pipeline
        step = trainer.make_step(gradient, setup.model, setup.optimizer, setup.mesh)
        return step.lower(trainer.abstract_state(setup.model, setup.optimizer, setup.mesh), batch, rng)

    programs = compile_all([lowered(name, setup) for name, setup in setups.items()])
    compiled = dict(zip(setups, programs, strict=True))
    states: dict[str, Any] = {}
    times, found = {}, {}
    for name, step in compiled.items():  # one state at a time, as a step takes it over
        own = setups[name]
        states[name] = trainer.init_state(own.model, own.optimizer, own.mesh)

        def call(name: str = name, step: Any = step) -> Any:
            states[name], metrics = step(states[name], batch, rng)
            return metrics

        found[name] = call()
        (times[name],) = medians_ms([call], parsed.repeats)
        del states[name]
    plain = times["plain gradient accumulation"]
    tokens = setup.batch * setup.config.sequence
    chip = chip_of(jax.devices()[0].device_kind)
    table = []
    for name, ms in times.items():
        mfu = setup.config.flops_per_token * tokens / ms * 1e3 / chip.flops("bf16") if chip else float("nan")
        temp: Any = compiled[name].memory_analysis()
        table.append(
            {
                "program": name,
                "step ms": ms,
                "tokens/s": round(tokens / ms * 1e3),
                "MFU %": 100 * mfu,
                "speed / plain": plain / ms,
                "temporaries GiB": gib(temp.temp_size_in_bytes),
                "first loss": float(found[name]["loss"]),
                "choices dropped": int(found[name]["dropped"]),
            }
        )
    report.table(table)
    losses = [float(metrics["loss"]) for metrics in found.values()]
    assert max(losses) - min(losses) < 2e-2 * min(losses), losses
    if parsed.fp8 and report.file:
        speed = times["DualPipeV, one rank"] / times["DualPipeV, one rank, fp8"]
        write_records(report.file, {"fp8_step_speedup": (speed, "")}, command=command_line(), machine=report.machine)
    memory = memory_row(args, setup, compiled["DualPipeV, one rank"].memory_analysis())
    report.table([memory], labels=0, title="memory")


def memory_row(args: argparse.Namespace, setup: Setup, found: Any) -> dict[str, Any]:
    """The plan beside the compiler's figures."""
    plan = planning.plan(
        setup.config,
        {"pp": setup.mesh.shape["pp"], "ep": setup.mesh.shape.get("ep", 1)},
        schedules=[args.schedule],
        microbatches=setup.schedule.num_microbatches,
        microbatch_size=args.microbatch_size,
        dtype=jnp.dtype(args.dtype),
        cpu=jax.default_backend() == "cpu",
    )
    (row,) = plan.rows
    assert row.memory is not None, row.reason
    actual = found.argument_size_in_bytes + found.temp_size_in_bytes
    return {
        "planned arguments GiB": gib(row.memory.arguments),
        "arguments GiB": gib(found.argument_size_in_bytes),
        "planned temporaries GiB": gib(row.memory.temporary),
        "temporaries GiB": gib(found.temp_size_in_bytes),
        "planned / actual temporaries": row.memory.temporary / found.temp_size_in_bytes,
        "planned / actual": row.memory.total / actual,
    }


def main() -> None:
    """Measures."""
    parser = make_parser(__doc__)
    parser.add_argument("--config", default="moe-1b", help="of examples/pretrain.py")
    parser.add_argument("--microbatches", type=int, default=8, help="of a step")
    parser.add_argument("--microbatch-size", type=int, default=4, help="sequences")
    parser.add_argument("--fp8", action="store_true", help="the step in FP8 beside them")
    parser.add_argument("--repeats", type=int, default=7, help="runs of which the median counts")
    parser.add_argument("--tiny", action="store_true", help="the tiny model, to see that the script runs")
    parsed = parser.parse_args()
    flags = [
        "--config",
        ("tiny-128" if parsed.fp8 else "tiny") if parsed.tiny else parsed.config,
        "--mesh",
        "pp=1,ep=1",
    ]
    flags += ["--dtype", "float32" if parsed.tiny else "bfloat16", "--microbatches", str(parsed.microbatches)]
    measure(train_parser().parse_args([*flags, "--microbatch-size", str(parsed.microbatch_size)]), parsed)


if __name__ == "__main__":
    main()
