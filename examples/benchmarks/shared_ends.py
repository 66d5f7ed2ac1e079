"""Embedding and head of a large vocabulary, run by one rank or by all ranks together: a Markdown table.

DualPipeV over two GPUs, residual MLP layers, an untied embedding and head of 129,280 tokens, bfloat16 with float32
masters; the step without an optimizer. "lone": the rank with the first and the last stage runs embedding and head, and
every rank has a copy of their parameters. "shared": ``shared_ends=True``, each rank holds and runs its part. Bytes are
of one GPU, as the compiler says; both programs take turns.

    python examples/benchmarks/shared_ends.py [--ranks 2] [--microbatches 8] [--tiny]
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from chunks import compile_all
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from record import Recorder, machine, make_parser, medians_ms

import jaxpipe
from jaxpipe.vocabulary import cross_entropy, embed_tokens


def stage(params: Any, x: jax.Array, ctx: jaxpipe.Context) -> jax.Array:
    """Residual MLP layers."""
    for up, down in zip(params["up"], params["down"], strict=True):
        x = x + jax.nn.gelu(x @ up) @ down
    return x


def embed(outer: Any, data: Any, ctx: jaxpipe.Context) -> jax.Array:
    """Looks tokens up in the whole table."""
    return outer["embedding"][data["tokens"]]


def head(outer: Any, y: jax.Array, data: Any, ctx: jaxpipe.Context) -> jax.Array:
    """Cross-entropy over the whole vocabulary."""
    logits = jnp.matmul(y, outer["head"].T, preferred_element_type=jnp.float32)
    target = jnp.take_along_axis(logits, data["targets"][..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - target).mean()


def shared_embed(outer: Any, data: Any, ctx: jaxpipe.Context) -> jax.Array:
    """Looks tokens up in this rank's rows."""
    return embed_tokens(outer["embedding"], data["tokens"], "pp")


def shared_head(outer: Any, y: jax.Array, data: Any, ctx: jaxpipe.Context) -> jax.Array:
    """Cross-entropy, this rank's part of the vocabulary."""
    return cross_entropy(y, outer["head"], data["targets"], "pp").mean()


def make_step(mesh: Mesh, schedule: Any, shared: bool) -> tuple[Any, Any]:
    """The step, and the sharding of its parameters."""
    specs = jaxpipe.Params(P("pp"), P("pp") if shared else P())
    step = jaxpipe.value_and_grad(
        stage,
        schedule,
        mesh,
        embed=shared_embed if shared else embed,
        head=shared_head if shared else head,
        specs=specs,
        shared_ends=shared,
        compute_dtype=jnp.bfloat16,
        order="storage",
    )
    return jax.jit(step), jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="of the pipeline")
    parser.add_argument("--microbatches", type=int, default=8, help="of 4096 tokens each")
    parser.add_argument("--layers", type=int, default=3, help="of a stage, two stages a rank")
    parser.add_argument("--repeats", type=int, default=9, help="steps of which the median counts")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args()
    width, hidden, tokens, vocabulary = (32, 64, 16, 256) if args.tiny else (2048, 8192, 4096, 129280)
    mesh = jaxpipe.make_mesh(pp=args.ranks)
    schedule = jaxpipe.schedule.build("dualpipev", args.ranks, args.microbatches)
    report = Recorder.begin(
        args, machine(args.ranks), f"dualpipev, {args.microbatches} microbatches of {tokens} tokens"
    )

    @jax.jit
    def init() -> jaxpipe.Params:
        keys = jax.random.split(jax.random.key(0), 4)
        shape = (schedule.num_stages, args.layers, width, hidden)
        up = jax.random.normal(keys[0], shape) * width**-0.5
        down = jax.random.normal(keys[1], (*shape[:2], hidden, width)) * hidden**-0.5
        embedding, unembedding = (jax.random.normal(key, (vocabulary, width)) * width**-0.5 for key in keys[2:])
        return jaxpipe.Params({"up": up, "down": down}, {"embedding": embedding, "head": unembedding})

    ids = jax.random.randint(jax.random.key(1), (args.microbatches, tokens + 1), 0, vocabulary)
    batch = jax.device_put({"tokens": ids[:, :-1], "targets": ids[:, 1:]}, NamedSharding(mesh, P()))
    steps = {name: make_step(mesh, schedule, name == "shared") for name in ("lone", "shared")}
    arguments = []
    for _, shardings in steps.values():
        masters = init()
        arguments.append(
            jaxpipe.Params(
                jax.device_put(masters.stages, shardings.stages), jax.device_put(masters.outer, shardings.outer)
            )
        )
        del masters
    lowered = [step.lower(params, batch) for (step, _), params in zip(steps.values(), arguments, strict=True)]
    programs = compile_all(lowered)
    losses = [float(program(params, batch)[0][0]) for program, params in zip(programs, arguments, strict=True)]
    assert abs(losses[0] - losses[1]) < 1e-2 * abs(losses[0]), losses
    calls = [lambda p=p, params=params: p(params, batch) for p, params in zip(programs, arguments, strict=True)]
    times = medians_ms(calls, args.repeats)
    memory = [program.memory_analysis() for program in programs]
    report.table(
        {
            "embedding and head": name,
            "step ms": ms,
            "parameters MiB": found.argument_size_in_bytes / 2**20,
            "temporaries MiB": found.temp_size_in_bytes / 2**20,
            "loss": loss,
        }
        for name, ms, found, loss in zip(steps, times, memory, losses, strict=True)
    )


if __name__ == "__main__":
    main()
