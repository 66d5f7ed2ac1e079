"""FP8 beside bfloat16 on one GPU, casts included: a training pair, an MoE layer, prefill and decode.

    python examples/benchmarks/fp8_layers.py [--only pair,layer] [--layers 4] [--repeats 7] [--tiny]

"pair", "prefill" and "decode" are the workloads of `python -m profiling run`: layers of DeepSeek-V3 with the experts of
one device of 64, 32 and 128. A pair's time is half of what two more pairs in a call take: its matrices are quantised
once a call, as in a step of many microbatches, and inference is given them in 8 bits. "layer" is one MoE layer of 32
experts, 8 a token, forward and backward; its matrices are quantised in every call, and in "layer, matrices kept" they
come in 8 bits. Both precisions take turns; times are medians. Peak is arguments and temporaries of the longer program,
as the compiler counts them. The last table has what a stage of such layers keeps for its backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from chunks import compile_all, gib, nbytes
from moe_layer import with_gradient
from record import Recorder, command_line, machine, make_parser, medians_ms, write_records

from eplb_jax import MoEConfig, RouterConfig, init_moe, moe_layer
from eplb_jax.moe.carried import Products
from eplb_jax.moe.fp8_experts import quantise_experts
from jaxpipe.deepseek import attend
from jaxpipe.stage import split_stage
from profiling.workloads import SIZES, Sizes
from profiling.workloads.layer import apply_layer
from profiling.workloads.run import make_mesh, prepare

PRECISIONS = ("bf16", "fp8")
KINDS = ("pair", "layer", "prefill", "decode")


class Timed(NamedTuple):
    """What takes turns for one figure, in one precision.

    Attributes:
      calls: the programs' calls.
      ms: their times -> the figure.
      peak: bytes.
    """

    calls: list[Callable[[], Any]]
    ms: Callable[..., float]
    peak: int


def peak_of(compiled: Any) -> int:
    """Bytes of arguments and temporaries."""
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def workload(kind: str, sizes: Sizes, precision: str) -> Timed:
    """A workload; of training the time of a pair."""
    mesh, counts = make_mesh(1), (1, 3) if kind == "pair" else (2,)
    name = "train" if kind == "pair" else kind
    made = [prepare(name, sizes, mesh, jnp.bfloat16, pairs=pairs, precision=precision) for pairs in counts]
    programs = compile_all([function.lower(*arguments) for function, arguments in made])

    def call(program: Any, arguments: list[Any]) -> Any:
        result = program(*arguments)
        if kind == "decode":  # its caches are donated, and come back
            arguments[2] = result[1]
        return result

    calls = [functools.partial(call, program, list(given)) for program, (_, given) in zip(programs, made, strict=True)]
    return Timed(calls, _of_pair if kind == "pair" else float, peak_of(programs[-1]))


def _of_pair(one: float, three: float) -> float:
    return (three - one) / 2


def layer(config: MoEConfig, tokens: int, precision: str, *, kept: bool) -> Timed:
    """An MoE layer, forward and backward; with ``kept`` the matrices come in 8 bits where those are multiplied."""
    config = dataclasses.replace(config, precision=precision)
    params = init_moe(jax.random.key(0), config, jnp.bfloat16)
    x, ct = (
        jax.random.normal(key, (tokens, config.width), jnp.bfloat16) for key in jax.random.split(jax.random.key(1))
    )
    if kept and config.recipe.arithmetic is not None:
        products = Products(config.recipe.arithmetic, config.backend)
        quantise = jax.jit(lambda experts: quantise_experts(experts, products))
        params = params._replace(experts=quantise(params.experts), shared=quantise(params.shared))
    function = with_gradient(lambda params, x: moe_layer(params, x, config)[0])
    (program,) = compile_all([jax.jit(function).lower(ct, params, x)])
    return Timed([functools.partial(program, ct, params, x)], float, peak_of(program))


def cases(sizes: Sizes, tiny: bool) -> dict[str, tuple[str, Callable[[str], Timed]]]:
    """Figure -> (its kind, what makes it in a precision)."""
    config = MoEConfig(router=RouterConfig(32, 8, 1, 1))
    if tiny:
        config = dataclasses.replace(config, width=128, hidden=128)
    found: dict[str, Any] = {
        kind: (kind, functools.partial(workload, kind, sizes)) for kind in KINDS if kind != "layer"
    }
    for tokens in (256,) if tiny else (4096, 16384):
        for kept in (False, True):
            title = f"layer{', matrices kept' * kept}, {tokens} tokens"
            found[title] = "layer", functools.partial(layer, config, tokens, kept=kept)
    return found


def kept_by_stage(sizes: Sizes, precision: str) -> dict[str, int]:
    """Bytes that a stage of all layers keeps of a microbatch, and hands from I to W."""
    sizes = sizes.in_precision(precision)
    mesh = make_mesh(1)

    def attention(params: Any, x: jax.Array) -> tuple[jax.Array, None]:
        return attend(params, x[None], sizes)[0][0], None

    def stage(layers: Any, x: jax.Array) -> jax.Array:
        for params in layers:
            x, _, _ = apply_layer(params, x, sizes, attention)
        return x

    shapes: dict[str, Any] = {}

    def device(layers: Any, x: jax.Array) -> jax.Array:
        split = split_stage(stage, layers, x)
        shapes.update(stash=nbytes(split.residuals), crossing=nbytes(split.crossing))
        return x

    function, (layers, x) = prepare("train", sizes, mesh, jnp.bfloat16, pairs=1)
    del function
    specs: Any = jax.tree.map(lambda _: jax.P(), layers)
    body = jax.shard_map(device, mesh=mesh, in_specs=(specs, jax.P()), out_specs=jax.P(), check_vma=False)
    jax.eval_shape(body, layers, jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    return shapes


def measure(
    title: str, make: Callable[[str], Timed], repeats: int, least: dict[str, float], kind: str
) -> Iterator[Any]:
    """The two rows of a figure; its speed is remembered as its kind's where it is the least of it."""
    timed = {precision: make(precision) for precision in PRECISIONS}
    calls = [call for each in timed.values() for call in each.calls]
    taken = iter(medians_ms(calls, repeats, inner=0.05, warm=2))
    ms = {precision: each.ms(*(next(taken) for _ in each.calls)) for precision, each in timed.items()}
    speed = ms["bf16"] / ms["fp8"]
    if "kept" not in title:
        least[kind] = min(least.get(kind, speed), speed)
    for precision in PRECISIONS:
        yield {
            "what": title,
            "precision": precision,
            "ms": ms[precision],
            "times bf16": ms["bf16"] / ms[precision],
            "peak GiB": gib(timed[precision].peak),
        }


def main() -> None:
    """Prints the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", help=f"of {', '.join(KINDS)}, with commas between")
    parser.add_argument("--layers", type=int, default=4, help="of the workloads")
    parser.add_argument("--repeats", type=int, default=7, help="runs of which the median counts")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args()
    sizes = dataclasses.replace(SIZES["dsv3"], layers=args.layers)
    if args.tiny:
        moe = MoEConfig(
            width=128, hidden=128, router=RouterConfig(16, 4, 4, 2, balanced=True), capacity_factor=1.25, backend="xla"
        )
        sizes = dataclasses.replace(SIZES["tiny"], layers=args.layers, moe=moe, sequence=128)
    wanted = args.only.split(",") if args.only else KINDS
    chosen = {title: case for title, case in cases(sizes, args.tiny).items() if case[0] in wanted}
    report = Recorder.begin(args, machine(), f"{args.layers} layers")
    least: dict[str, float] = {}
    report.table(
        (row for title, (kind, make) in chosen.items() for row in measure(title, make, args.repeats, least, kind)),
        labels=2,
    )
    kept = {precision: kept_by_stage(sizes, precision) for precision in PRECISIONS}
    report.table(
        [
            {"precision": precision, "stash GiB": gib(found["stash"]), "from I to W GiB": gib(found["crossing"])}
            for precision, found in kept.items()
        ],
        title="kept",
    )
    if report.file and not args.tiny:
        figures = {f"fp8_{kind}_speedup": (value, "") for kind, value in least.items()}
        figures["fp8_stash_ratio"] = kept["fp8"]["stash"] / kept["bf16"]["stash"], ""
        write_records(report.file, figures, command=command_line(), machine=report.machine)


if __name__ == "__main__":
    main()
