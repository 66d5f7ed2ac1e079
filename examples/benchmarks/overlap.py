"""How much communication eight H200s hide, read from the schedules that XLA makes for them: a Markdown table.

Four layers of DeepSeek-V3's, attention and experts, are a pipeline stage: 4 experts a device and layer as with 64
devices, 4096 tokens a microbatch, bfloat16. Three programs:

* body: DualPipe's steady state by hand; a step of the scan is F of one microbatch, I and W of another, both sends;
* steady: the same as the library makes it, a pipelined step cut to the ticks in which every rank runs a pair;
* whole: a pipelined step as it is; its pairs are counted, and all its sends.

No GPU is needed: everything is compiled for a topology, and nothing runs. Times are estimates, from rates that a
training step of four such layers reached on one H100, and from links that reach so many GB/s.

    JAX_PLATFORMS=cpu python examples/benchmarks/overlap.py [--quick] [--variants REGEX] [--meshes 2x4,4x2] [--layers 4]

needs a CUDA build of JAX: pip install "jax[cuda13]". Without --variants each program is compiled as it is;
`docs/measured/overlap.md` has all of them. A program takes a minute or a few to compile, a whole step more.
"""

from __future__ import annotations

import dataclasses
import gzip
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from overlap_programs import BODY_STEPS, Job, Variant, lower_body, lower_step
from record import Recorder, make_parser

from eplb_jax import MoEConfig, RouterConfig
from jaxpipe.planning.chips import Achieved, Chip, chip
from jaxpipe.runtime.program import Program
from profiling.hlo.hiding import CompiledOverlap, overlap
from profiling.hlo.text import Instruction, parse
from profiling.hlo.timeline import ProgramTimeline, Settings, play
from profiling.hlo.topologies import topology
from profiling.read.pipeline import loop_trips
from profiling.workloads import SIZES

MEASURED = Achieved(matmul=0.70, memory=0.81, interconnect=1.0)
"""One H100: 692 TFLOP/s over all products, grouped and dense; fusions at 2.7 TB/s. Links are given as reached."""

ATTENTION_US = {"attention_forward": 1565.0, "attention_backward": 8170.0}
"""cuDNN 9 on one H100: a causal sequence of 4096, 128 heads of width 192, values padded."""

Row = dict[str, Any]

LOOP = "/while/body/"
OPT_LEVEL = "xla_gpu_experimental_pipeline_parallelism_opt_level"
PROFILE = "xla_gpu_pgle_profile_file_or_directory_path"
LIMIT = "xla_gpu_experimental_parallel_collective_overlap_limit"


VARIANTS = (
    Variant("body"),
    Variant("body", "order I F W", order="IFW"),
    Variant("body", "order I W F", order="IWF"),
    Variant("body", "barrier around what a step hands on", barrier="end"),
    Variant("body", "the same, sends before W", barrier="sends"),
    Variant("body", "unroll=2", unroll=2),
    Variant("body", "opt level ENABLE", options={OPT_LEVEL: "PIPELINE_PARALLELISM_OPT_LEVEL_ENABLE"}),
    Variant("body", "overlap limit 4", options={LIMIT: 4}),
    Variant("body", "no collective-permute-motion", options={"xla_disable_hlo_passes": "collective-permute-motion"}),
    Variant("body", "no latency hiding", options={"xla_gpu_enable_latency_hiding_scheduler": False}),
    Variant("steady"),
    Variant("steady", "overlap limit 4", options={LIMIT: 4}),
    Variant("steady", "inflation factor 4", options={"xla_gpu_collective_inflation_factor": 4}),
    Variant("steady", "guided by a profile", profile=True),
    Variant("steady", "W beside the sends", executor="w_beside_sends"),
    Variant("steady", "without a switch", executor="without_switch"),
    Variant("whole"),
)


def kernel_times() -> list[tuple[str, Callable[[Instruction], float]]]:
    """Attention's times; what only passes its results on takes none."""
    return [
        (name, lambda instruction, us=us: us if instruction.opcode == "custom-call" else 0.0)
        for name, us in ATTENTION_US.items()
    ]


def in_loop(found: CompiledOverlap, program: Program | None) -> CompiledOverlap:
    """Its collectives in the steady state: those of the scan; of a whole step, those of pairs, and sends."""
    pairs = [i for i, branch in enumerate(program.branches) if len(branch) == 2] if program else []
    return found.select(label=f"{LOOP}.*(branch_({'|'.join(map(str, pairs))})/|/send/)" if pairs else LOOP)


def measure(job: Job, variant: Variant, schedule: str, links: tuple[float, ...], out: pathlib.Path | None) -> Row:
    """A row of the table; links in GB/s."""
    by_hand = variant.program == "body"
    program, lowered = (None, lower_body(job, variant)) if by_hand else lower_step(job, variant, schedule)
    steps = program.num_steps if program else BODY_STEPS
    trips = loop_trips(program, dispatch="loops") if program else ()
    given = [Settings(h200(link), MEASURED, kernel_times(), trips) for link in links]
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=dict(variant.options) or None)
    if variant.profile:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "costs.pbtxt")
            path.write_text(costs(play(parse(compiled.as_text()), given[0])))
            compiled = lowered.compile(compiler_options={**variant.options, PROFILE: str(path)})
    program_name = variant.program if by_hand else f"{variant.program} {schedule}"
    row: Row = {"program, layers": f"{program_name}, {job.sizes.layers}", "variant": variant.name}
    seconds = time.perf_counter() - start
    text = compiled.as_text() or ""
    if out:
        name = re.sub(r"\W+", "_", f"{variant.program}_{variant.name}_{dict(job.mesh.shape)}").strip("_")
        (out / f"{name}.hlo.gz").write_bytes(gzip.compress(text.encode()))
    module = parse(text)
    for link, settings in zip(links, given, strict=True):
        found = overlap(module, settings.chip, achieved=MEASURED, times=settings.times, trips=settings.trips)
        steady = in_loop(found, program if variant.program == "whole" else None)
        for kind, title in (("all-to-all", "all-to-all"), ("collective-permute", "permutes")):
            share = steady.hidden_share(kind)
            row[f"at {link:.0f}: {title}"] = "-" if share is None else share
        exposed = steady.exposed_us() / steps
        row[f"at {link:.0f}: exposed us"] = round(exposed)
        if link == links[0]:
            us = loop_us(play(module, settings)) / steps + exposed
            row |= {"synchronous": len(steady.synchronous), "a step ms": round(us / 1e3, 1)}
    memory = compiled.memory_analysis()
    return row | {"temporaries GB": round(memory.temp_size_in_bytes / 1e9, 1), "compiled in s": round(seconds)}


def h200(link: float) -> Chip:
    """The chip with links that reach so many GB/s."""
    return dataclasses.replace(chip("H200"), interconnect=link * 1e9)


def costs(timeline: ProgramTimeline) -> str:
    """Microseconds of each instruction, as the compiler reads them (tensorflow.profiler.ProfiledInstructionsProto)."""
    found: dict[str, float] = {}
    for run in timeline.runs:
        for one, us in zip(run.computation.instructions, run.us, strict=True):
            if one.opcode != "while":
                found[one.name] = us
        found |= {run.computation.instructions[one.start].name: one.us for one in run.transfers}
    return "".join(f'costs {{ name: "{name}" cost_us: {us:.3f} }}\n' for name, us in found.items() if us)


def loop_us(timeline: ProgramTimeline) -> float:
    """Microseconds that the longest loop of the program computes."""
    entry = timeline.runs[-1]
    return max(us for us, one in zip(entry.us, entry.computation.instructions, strict=True) if one.opcode == "while")


def make_job(mesh: tuple[int, int], layers: int, tokens: int) -> Job:
    """The model on eight H200s, ranks x devices of an expert group."""
    devices = mesh[1]
    axes = Mesh(np.array(topology("H200", 8).devices).reshape(mesh), ("pp", "ep"), axis_types=(AxisType.Auto,) * 2)
    moe = MoEConfig(router=RouterConfig(4 * devices, 8, 4, 4, balanced=True), capacity_factor=1.25)
    return Job(axes, dataclasses.replace(SIZES["dsv3"], layers=layers, moe=moe, expert_parallel={}), tokens)


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one layer, the body alone, one mesh")
    parser.add_argument("--variants", default="(body|steady) as it is", help='regular expression for "PROGRAM NAME"')
    parser.add_argument("--meshes", default="2x4,4x2", help="pipeline ranks x devices of an expert group")
    parser.add_argument("--layers", type=int, default=4, help="of a stage")
    parser.add_argument("--tokens", type=int, default=4096, help="of a microbatch on each device")
    parser.add_argument("--schedule", default="dualpipe", help="of the library's programs; or dualpipev")
    parser.add_argument("--links", default="400,50", help="GB/s that links reach, in each direction")
    parser.add_argument("--out", type=pathlib.Path, help="an existing folder for the programs, to be read with "
                        "`python -m profiling overlap`")  # fmt: skip
    args = parser.parse_args()
    if args.quick:
        args.variants, args.meshes, args.layers = "body as it is", "2x4", 1
    chosen = [variant for variant in VARIANTS if re.search(args.variants, f"{variant.program} {variant.name}")]
    if not chosen:
        parser.error(f"--variants {args.variants!r} matches none of {[f'{v.program} {v.name}' for v in VARIANTS]}")
    links = tuple(map(float, args.links.split(",")))
    try:
        jobs = {mesh: make_job(_mesh(mesh), args.layers, args.tokens) for mesh in args.meshes.split(",")}
    except RuntimeError as error:
        sys.exit(str(error))
    device = next(iter(jobs.values())).mesh.devices.flat[0]
    size = f"{args.layers} layers a stage, {args.tokens} tokens, {args.schedule}"

    def rows() -> Iterator[Row]:
        for mesh, job in jobs.items():
            for variant in chosen:
                yield {"pp x ep": mesh, **measure(job, variant, args.schedule, links, args.out)}

    machine = f"compiled for 8 {device.device_kind}, jax {jax.__version__}; nothing ran"
    formats = {"a step ms": ".1f", "temporaries GB": ".1f"}
    Recorder.begin(args, machine, size).table(rows(), labels=3, formats=formats)


def _mesh(text: str) -> tuple[int, int]:
    ranks, devices = map(int, text.split("x"))
    return ranks, devices


if __name__ == "__main__":
    main()
