"""Measures, compares, draws and predicts timelines of training steps."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.planning.chips import Chip, chip
from jaxpipe.planning.mesh import mesh_sizes
from profiling.classify.rules import Rule, load_rules
from profiling.event import Trace
from profiling.hlo.hiding import CompiledOverlap, overlap
from profiling.hlo.lines import find_text
from profiling.hlo.text import read
from profiling.metrics import parse_window, phase_durations, window_in, window_of_step
from profiling.predict import changes
from profiling.predict.replaying import overlapped_pair_tasks, replay
from profiling.read.trace import read_trace
from profiling.recording import COMMAND_BUFFERS
from profiling.reports.html import write_html
from profiling.reports.making import Report, report
from profiling.workloads import SIZES, Sizes
from profiling.workloads.predict import NETWORKS, predict
from profiling.workloads.run import WORKLOADS, make_mesh, run
from profiling.write.trace import WRITERS, write_trace


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 2 with a message where the input is bad."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m profiling", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_report(commands.add_parser("report", help="measure a trace and draw it"))
    _add_compare(commands.add_parser("compare", help="show what became faster and slower between two traces"))
    hides = "show which communication a compiled program hides; no device is needed"
    _add_overlap(commands.add_parser("overlap", help=hides))
    _add_run(commands.add_parser("run", help="run one of DeepSeek's workloads, profile it and report"))
    elsewhere = "predict a workload on a cluster from its profile on one device"
    _add_predict(commands.add_parser("predict", help=elsewhere))
    return parser


def _add_report(parser: argparse.ArgumentParser) -> None:
    files = "a folder or an .xplane.pb file of jax.profiler; PyTorch's .json files, one for each rank, or their folder"
    parser.add_argument("trace", nargs="+", help=files)
    parser.add_argument("--predicted", metavar="TRACE", help="a prediction to compare the trace with")
    parser.add_argument(
        "--hlo",
        metavar="FILE",
        type=pathlib.Path,
        help="text of the compiled program, to report what its schedule hides",
    )
    parser.add_argument(
        "--pair", action="store_true", help="predict DualPipe's overlapped pair from the times of the phases"
    )
    _add_rules(parser)
    _add_window(parser)
    _add_chip(parser)
    _add_outputs(parser)
    parser.set_defaults(run=_report)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", help="the trace before")
    parser.add_argument("b", help="the trace after")
    _add_rules(parser)
    _add_window(parser)
    parser.set_defaults(run=_compare)


def _add_overlap(parser: argparse.ArgumentParser) -> None:
    text = "text of a scheduled module, .gz or not, or a folder of XLA's dumps"
    parser.add_argument("hlo", type=pathlib.Path, help=text)
    _add_chip(parser)
    _add_links(parser)
    parser.set_defaults(run=_overlap)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--size", choices=tuple(SIZES), help="default: dsv3 on a GPU, tiny elsewhere")
    parser.add_argument("--mesh", metavar="ep=N", help="number of devices; default: all")
    fake = "number of fake devices where there is no GPU; default: 8"
    parser.add_argument("--cpu-devices", type=int, default=8, help=fake)
    parser.add_argument("--layers", type=int, help="number of layers; default: the size's own")
    parser.add_argument("--experts", type=int, help="number of experts in all; default: the size's own")
    parser.add_argument("--split-prompts", action="store_true", help="prefill: both microbatches share every prompt")
    parser.add_argument("--precision", choices=("bf16", "fp8"), help="of Linears and experts; default: bf16")
    parser.add_argument("--calls", type=int, default=2, help="number of calls to profile; default: 2")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("profile"), help="folder; default: profile")
    _add_chip(parser)
    parser.set_defaults(run=_run)


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("trace", help="the folder that `run` wrote on one device")
    parser.add_argument("--size", choices=tuple(SIZES), default="dsv3", help="default: dsv3")
    _add_links(parser)
    parser.add_argument("--latency", type=float, metavar="US", help="microseconds that the smallest exchange takes")
    parser.add_argument("--sms", type=int, help="number of SMs that exchanges occupy")
    _add_rules(parser)
    _add_outputs(parser)
    parser.set_defaults(run=_predict)


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    timeline = f"write the timeline for a viewer: {', '.join(WRITERS)}"
    parser.add_argument("--html", metavar="FILE", type=pathlib.Path, help="write the report as a page for a browser")
    parser.add_argument("--markdown", metavar="FILE", type=pathlib.Path, help="write the report as Markdown")
    parser.add_argument("--perfetto", metavar="FILE", type=pathlib.Path, help=timeline)


def _add_rules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rules",
        metavar="FILE",
        type=pathlib.Path,
        help="a file that says what kernels of your own do: "
        '[{"pattern": "^my_exchange", "kind": "all-to-all", "group": "transfer"}]',
    )


def _add_window(parser: argparse.ArgumentParser) -> None:
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--step", metavar="N", type=int, help="look only at the step of this number")
    part.add_argument("--window", metavar="A:B", help="look only at the time from A to B, in us or as in 12ms:30ms")


def _add_links(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--internode", type=float, metavar="GB/s", help="rate that a device gets between nodes")
    parser.add_argument("--intranode", type=float, metavar="GB/s", help="rate that a device gets within a node")
    parser.add_argument("--per-node", type=int, default=8, metavar="N", help="number of devices in a node; default: 8")


def _add_chip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chip", default="H200", help="chip whose times are estimated; default: H200")


def _report(args: argparse.Namespace) -> None:
    rules = _own(args)
    trace = read_trace(args.trace, rules)
    predicted = read_trace(args.predicted, rules) if args.predicted else None
    if args.pair:
        predicted = replay(overlapped_pair_tasks(phase_durations(_part(trace, args).events)))
    schedule = _schedule(args.hlo, chip(args.chip)) if args.hlo else None
    window = parse_window(args.window) if args.window else None
    _write(report(trace, predicted, schedule, window=window, step=args.step), args)


def _part(trace: Trace, args: argparse.Namespace) -> Trace:
    """The trace, or the part of it in the window that was asked for."""
    if args.step is not None:
        return trace.clip(*window_in(trace, *window_of_step(trace, args.step)))
    return trace.clip(*window_in(trace, *parse_window(args.window))) if args.window else trace


def _compare(args: argparse.Namespace) -> None:
    rules = _own(args)
    print(changes(_part(read_trace(args.a, rules), args), _part(read_trace(args.b, rules), args)).table())


def _overlap(args: argparse.Namespace) -> None:
    rates = {name: 1e9 * rate for name in ("internode", "intranode") if (rate := getattr(args, name)) is not None}
    print(_schedule(args.hlo, chip(args.chip), node_size=args.per_node, **rates).table())


def _schedule(path: pathlib.Path, on: Chip, **options: Any) -> CompiledOverlap:
    """The overlap of the program in a file or folder. A note says which file of a folder was read."""
    file, why = find_text(path)
    module = read(file)
    try:
        found = overlap(module, on, **options)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return dataclasses.replace(found, notes=(*found.notes, *filter(None, [why])))


def _run(args: argparse.Namespace) -> None:
    flags = [COMMAND_BUFFERS, f"--xla_force_host_platform_device_count={args.cpu_devices}"]
    known = os.environ.get("XLA_FLAGS", "").split()
    added = [flag for flag in flags if not any(flag.split("=")[0] == other.split("=")[0] for other in known)]
    os.environ["XLA_FLAGS"] = " ".join([*known, *added])
    print(f"XLA_FLAGS={os.environ['XLA_FLAGS']}")
    on_gpu = jax.default_backend() == "gpu"
    sizes = _sizes(args.size or ("dsv3" if on_gpu else "tiny"), args.layers, args.experts)
    devices = None
    if args.mesh:
        axes = mesh_sizes(args.mesh)
        if set(axes) != {"ep"}:
            raise ValueError(f"--mesh {args.mesh}: workloads run on one axis; write ep=N")
        devices = axes["ep"]
    ran = run(
        args.workload,
        sizes,
        args.out,
        mesh=make_mesh(devices),
        dtype=jnp.bfloat16 if on_gpu else jnp.float32,
        calls=args.calls,
        split_prompts=args.split_prompts,
        precision=args.precision,
    )
    _write(report(ran.trace, schedule=overlap(ran.hlo, chip(args.chip))), _files(args, "report"))
    if len(ran.trace.devices) == 1:  # one call on a cluster: not what was measured, so not beside it
        _write(report(predict(ran.trace, args.workload, sizes)), _files(args, "predicted"))
    print(f"choices of experts dropped: {ran.dropped}; temporary memory: {ran.temp_bytes / 1e9:.2f} GB a device")


def _files(args: argparse.Namespace, name: str) -> argparse.Namespace:
    """The arguments, with report files of this name in the folder of the run."""
    made = {"html": f"{name}.html", "markdown": f"{name}.md", "perfetto": f"{name}.pftrace"}
    return argparse.Namespace(**{**vars(args), **{key: args.out / file for key, file in made.items()}})


def _predict(args: argparse.Namespace) -> None:
    given = {
        "internode": args.internode and args.internode * 1e9,
        "intranode": args.intranode and args.intranode * 1e9,
        "latency_us": args.latency,
        "sms": args.sms,
        "node_size": args.per_node,
    }
    network = dataclasses.replace(NETWORKS[args.workload], **{name: v for name, v in given.items() if v is not None})
    trace = read_trace(args.trace, _own(args))
    _write(report(predict(trace, args.workload, _sizes(args.size), network)), args)


def _sizes(name: str, layers: int | None = None, experts: int | None = None) -> Sizes:
    sizes = SIZES[name]
    if layers is not None:
        sizes = dataclasses.replace(sizes, layers=layers)
    if experts is not None:
        router = dataclasses.replace(sizes.moe.router, num_experts=experts)
        spread = {workload: min(experts, devices) for workload, devices in sizes.expert_parallel.items()}
        moe = dataclasses.replace(sizes.moe, router=router)
        sizes = dataclasses.replace(sizes, moe=moe, expert_parallel=spread)
    return sizes


def _own(args: argparse.Namespace) -> tuple[Rule, ...]:
    return load_rules(args.rules) if args.rules else ()


def _write(found: Report, args: argparse.Namespace) -> None:
    """Prints the report and writes the files that were asked for."""
    print(found.text(width=shutil.get_terminal_size((120, 24)).columns))
    if args.html:
        write_html(args.html, found)
    if args.markdown:
        args.markdown.write_text(found.markdown() + "\n", encoding="utf-8")
    if args.perfetto:
        write_trace(args.perfetto, [found.trace, found.predicted] if found.predicted else found.trace)
    for path in filter(None, (args.html, args.markdown, args.perfetto)):
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
