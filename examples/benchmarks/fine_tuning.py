"""Fine-tuning of a model on one GPU: a step that trains low-rank adapters, beside the plan of one that trains all.

    python examples/benchmarks/fine_tuning.py [--config moe-16b] [--lora 16] [--microbatches 4] [--dry] [--tiny]

The step is that of `examples/pretrain.py --lora`: frozen matrices in bfloat16, adapters, their gradients and moments in
float32. Weights are random, and tokens too. "planned" is `jaxpipe.plan`; "peak" is what the allocator had in use at
most in the steps, "compiled" arguments and temporaries by the compiler. Training all of a large model fits no single
GPU, so of that there is the plan alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # nothing but the step is on the GPU

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from record import Recorder, machine, make_parser, medians_ms

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from pretraining import flags, trainer
from pretraining import plan as planning

import jaxpipe
from jaxpipe.deepseek import DeepSeekModel, ModelConfig, build_model
from jaxpipe.deepseek.model import names
from jaxpipe.planning.chips import chip

GIGA = 1e9
NOTHING: dict[str, Any] = dict.fromkeys(("peak GB", "compiled GB", "step ms", "tokens/s"), float("nan"))
"""In place of figures of a step that does not run."""


def planned(name: str, config: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """What the plan says of a step: the first columns of a line."""
    found = planning.plan(
        config, {"pp": 1, "ep": 1}, schedules=[args.schedule], microbatches=args.microbatches,
        microbatch_size=args.microbatch_size, chip=chip(args.chip), dtype=jnp.dtype(args.dtype), cpu=args.tiny,
    )  # fmt: skip
    (row,) = found.rows
    assert row.memory is not None, row.reason
    m = row.memory
    return {
        "trained": name,
        "parameters GB": m.masters / GIGA,
        "moments and gradients GB": (m.optimizer + m.gradients) / GIGA,
        "working copies GB": m.working / GIGA,
        "planned GB": m.total / GIGA,
        "planned tokens/s": row.tokens,
    }


def measured(config: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """The other columns: of a step that runs, or with --dry, is lowered alone."""
    mesh = jaxpipe.make_mesh(pp=1, ep=1)
    schedule = jaxpipe.schedule.build(args.schedule, 1, args.microbatches)
    model = build_model(config, schedule, 0, axis="ep", dtype=jnp.dtype(args.dtype), abstract=True)
    optimizer = trainer.make_optimizer(trainer.TrainConfig(steps=100), model)
    step = trainer.make_step(trainer.pipelined(model, schedule, mesh), model, optimizer, mesh)
    rows, rng = args.microbatches * args.microbatch_size, jax.random.key(0)
    begin = time.perf_counter()
    lowered = step.lower(
        trainer.abstract_state(model, optimizer, mesh),
        trainer.abstract_batch(config, rows),
        jax.eval_shape(lambda: rng),
    )
    print(f"lowered in {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    if args.dry:
        return dict(NOTHING)
    begin = time.perf_counter()
    program = lowered.compile()
    print(f"compiled in {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    tokens = np.random.default_rng(0).integers(0, config.vocab, (rows, config.sequence + 1)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((rows, config.sequence), np.float32)}
    batch = jax.device_put(batch, NamedSharding(mesh, P("ep")))
    states = [trainer.state_from(random_params(model, mesh), model, optimizer, mesh)]

    def call() -> Any:
        state, metrics = program(states.pop(), batch, rng)
        states.append(state)
        return metrics

    metrics = call()
    (ms,) = medians_ms([call], args.repeats)
    assert bool(metrics["finite"]), float(metrics["loss"])
    analysis: Any = program.memory_analysis()
    used = jax.devices()[0].memory_stats()
    return {
        "peak GB": used["peak_bytes_in_use"] / GIGA if used else float("nan"),
        "compiled GB": (analysis.argument_size_in_bytes + analysis.temp_size_in_bytes) / GIGA,
        "step ms": ms,
        "tokens/s": rows * config.sequence / ms * 1e3,
    }


def random_params(model: DeepSeekModel, mesh: Any) -> jaxpipe.Params:
    """Parameters made one by one: all of a stack at once, in float32, need far more memory than they have at last."""
    make = jax.jit(
        lambda key, shape, dtype: jax.random.normal(key, shape, dtype) * 0.02, static_argnums=(1, 2),
        out_shardings=NamedSharding(mesh, P()),
    )  # fmt: skip

    def one(path: Any, leaf: jax.ShapeDtypeStruct, spec: P) -> jax.Array:
        name = names(path)[-1]
        if name in ("scale", "bias") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            made = jnp.ones(leaf.shape, leaf.dtype) if name == "scale" else jnp.zeros(leaf.shape, leaf.dtype)
        else:
            made = make(jax.random.key(sum(map(ord, "/".join(names(path))))), leaf.shape, leaf.dtype)
        return jax.device_put(made, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(one, model.params, model.specs)


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    flags.add_sizes(parser, "moe-16b")
    parser.add_argument("--schedule", default="1f1b", help="a name that jaxpipe.schedule.build knows")
    parser.add_argument("--microbatches", type=int, default=4, help="of a step")
    parser.add_argument("--microbatch-size", type=int, default=2, help="sequences of a microbatch")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of the computation")
    parser.add_argument("--chip", default="H200", help="of the plan")
    parser.add_argument("--repeats", type=int, default=3, help="steps of which the median counts")
    parser.add_argument("--dry", action="store_true", help="plan and lower alone")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args()
    args.lora = args.lora or 16
    if args.tiny:
        args.config, args.layers, args.sequence, args.lora, args.microbatches = "tiny", 2, 16, 2, 2
        args.dtype = "float32"
    adapted = dataclasses.replace(flags.sized_config(args, 1), redundant=0)
    whole = dataclasses.replace(adapted, lora=None)
    report = Recorder.begin(
        args, machine(), f"{args.config}: {whole.layers} layers, {whole.total / GIGA:.2f}G parameters", args.schedule,
        f"{args.microbatches} microbatches of {args.microbatch_size} x {whole.sequence} tokens",
    )  # fmt: skip

    def rows() -> Iterator[dict[str, Any]]:
        yield {**planned(f"adapters of rank {args.lora}", adapted, args), **measured(adapted, args)}
        yield {**planned("all", whole, args), **NOTHING}

    report.table(rows(), formats={"planned tokens/s": ".0f", "tokens/s": ".0f", "step ms": ".0f"})


if __name__ == "__main__":
    main()
