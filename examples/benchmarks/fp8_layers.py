"""FP8 beside bfloat16 on one GPU, casts included: a training pair, an MoE layer, prefill and decode.

    python examples/benchmarks/fp8_layers.py [--only pair,layer] [--layers 4] [--repeats 7] [--tiny]

"pair", "prefill" and "decode" are the workloads of `python -m profiling run`: layers of DeepSeek-V3 with the experts of
one device of 64, 32 and 128. A pair's time is half of what two more pairs in a call take: its matrices are quantised
once a call, as in a step of many microbatches, and inference is given them in 8 bits. "layer" is one MoE layer of 32
experts, 8 a token, forward and backward: of a microbatch, by what two more of them in a call take, and "in one call",
where its matrices are quantised for one microbatch. Both precisions take turns; times are medians. Peak is arguments
and temporaries of the longer program, as the compiler counts them. The last table has what a stage of such layers keeps
for its backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from chunks import compile_all, gib, nbytes, tiny_fp8
from record import Recorder, command_line, machine, make_parser, medians_ms, write_records

from eplb_jax import ExpertParams, MoEConfig, MoEParams, RouterConfig, init_moe, moe_layer
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
    return Timed(calls, _half_the_difference if kind == "pair" else float, peak_of(programs[-1]))


def _half_the_difference(one: float, three: float) -> float:
    return (three - one) / 2


def layer(config: MoEConfig, tokens: int, precision: str, *, alone: bool) -> Timed:
    """An MoE layer, forward and backward, of one of several microbatches; or ``alone``, matrices quantised for it."""
    config = dataclasses.replace(config, precision=precision)
    params = init_moe(jax.random.key(0), config, jnp.bfloat16)
    count = 1 if alone else 3
    shape = count, tokens, config.width
    x, ct = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(1)))
    given = [(ct[:n], params, x[:n]) for n in ((1,) if alone else (1, count))]

    def gradients(ct: jax.Array, params: Any, x: jax.Array) -> Any:
        def all_of(params: Any, x: jax.Array) -> jax.Array:
            params = quantised(params, config)
            return jnp.stack([moe_layer(params, part, config)[0] for part in x])

        value, pull = jax.vjp(all_of, params, x)
        return value, pull(ct)

    programs = compile_all([jax.jit(gradients).lower(*arguments) for arguments in given])
    calls = [functools.partial(program, *arguments) for program, arguments in zip(programs, given, strict=True)]
    return Timed(calls, float if alone else _half_the_difference, peak_of(programs[-1]))


def quantised(params: MoEParams, config: MoEConfig) -> MoEParams:
    """The parameters with experts' matrices in 8 bits, if the layer multiplies such."""
    if config.recipe.arithmetic is None:
        return params
    quantise = functools.partial(quantise_experts, products=Products(config.recipe.arithmetic, config.backend))
    assert isinstance(params.experts, ExpertParams) and isinstance(params.shared, ExpertParams)
    return params._replace(experts=quantise(params.experts), shared=quantise(params.shared))


def cases(sizes: Sizes, tiny: bool) -> dict[str, tuple[str, Callable[[str], Timed]]]:
    """Figure -> (its kind, what makes it in a precision)."""
    config = MoEConfig(router=RouterConfig(32, 8, 1, 1))
    if tiny:
        config = dataclasses.replace(config, width=128, hidden=128)
    found: dict[str, Any] = {
        kind: (kind, functools.partial(workload, kind, sizes)) for kind in KINDS if kind != "layer"
    }
    for tokens in (256,) if tiny else (4096, 16384):
        for alone in (False, True):
            title = f"layer{' in one call' * alone}, {tokens} tokens"
            found[title] = "layer", functools.partial(layer, config, tokens, alone=alone)
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
    title: str, make: Callable[[str], Timed], repeats: int, speeds: dict[str, float], kind: str
) -> Iterator[Any]:
    """The two rows of a figure; its speed is remembered as its kind's, the best of several numbers of tokens."""
    timed = {precision: make(precision) for precision in PRECISIONS}
    calls = [call for each in timed.values() for call in each.calls]
    taken = iter(medians_ms(calls, repeats, inner=0.2, warm=2))
    ms = {precision: each.ms(*(next(taken) for _ in each.calls)) for precision, each in timed.items()}
    speed = ms["bf16"] / ms["fp8"]
    if "one call" not in title:
        speeds[kind] = max(speeds.get(kind, speed), speed)
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
        sizes = dataclasses.replace(tiny_fp8(), layers=args.layers)
    wanted = args.only.split(",") if args.only else KINDS
    chosen = {title: case for title, case in cases(sizes, args.tiny).items() if case[0] in wanted}
    report = Recorder.begin(args, machine(), f"{args.layers} layers")
    speeds: dict[str, float] = {}
    report.table(
        (row for title, (kind, make) in chosen.items() for row in measure(title, make, args.repeats, speeds, kind)),
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
        figures = {f"fp8_{kind}_speedup": (value, "") for kind, value in speeds.items()}
        figures["fp8_stash_ratio"] = kept["fp8"]["stash"] / kept["bf16"]["stash"], ""
        write_records(report.file, figures, command=command_line(), machine=report.machine)


if __name__ == "__main__":
    main()
