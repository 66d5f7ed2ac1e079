"""The command line: ``python -m profiling report TRACE``, ``compare A B``, ``overlap HLO``, ``run``, ``predict``."""

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

from profiling.classify.rules import Rule, load_rules
from profiling.event import Trace
from profiling.hlo.chips import Chip, chip
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
from profiling.write.trace import write_trace


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; bad input ends it with a message and status 2."""
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

    show = commands.add_parser("report", help="what a trace amounts to")
    show.add_argument(
        "trace", nargs="+", help="a folder or .xplane.pb of jax.profiler, or a folder or .json of PyTorch's, one a rank"
    )
    show.add_argument("--predicted", metavar="TRACE", help="lay this one beside it")
    show.add_argument("--hlo", metavar="FILE", type=pathlib.Path, help="the compiled program, for its overlap")
    show.add_argument("--pair", action="store_true", help="predict DualPipe's overlapped pair from the phases' times")
    _rules(show)
    _window(show)
    _chip(show)
    _outputs(show)
    show.set_defaults(run=_report)

    versus = commands.add_parser("compare", help="one trace against another")
    versus.add_argument("a")
    versus.add_argument("b")
    _rules(versus)
    _window(versus)
    versus.set_defaults(run=_compare)

    hidden = commands.add_parser("overlap", help="which communication a compiled program hides; no device is needed")
    hidden.add_argument("hlo", type=pathlib.Path, help="text of a scheduled module, or .gz, or a folder of XLA's dumps")
    _chip(hidden)
    _links(hidden)
    hidden.set_defaults(run=_overlap)

    execute = commands.add_parser("run", help="run a workload of DeepSeek's, profile it and report")
    execute.add_argument("workload", choices=WORKLOADS)
    execute.add_argument("--size", choices=tuple(SIZES), help="default: dsv3 on a GPU, tiny elsewhere")
    execute.add_argument("--mesh", metavar="ep=N", help="devices; default: all")
    execute.add_argument("--cpu-devices", type=int, default=8, help="fake devices where there is no GPU")
    execute.add_argument("--layers", type=int, help="instead of the size's own")
    execute.add_argument("--experts", type=int, help="instead of the size's own: in all")
    execute.add_argument("--split-prompts", action="store_true", help="prefill: both microbatches share every prompt")
    execute.add_argument("--calls", type=int, default=2, help="profiled calls")
    execute.add_argument("--out", type=pathlib.Path, default=pathlib.Path("profile"))
    _chip(execute)
    execute.set_defaults(run=_run)

    cluster = commands.add_parser("predict", help="a workload on a cluster, from its profile on one device")
    cluster.add_argument("workload", choices=WORKLOADS)
    cluster.add_argument("trace", help="the folder that `run` wrote on one device")
    cluster.add_argument("--size", choices=tuple(SIZES), default="dsv3")
    _links(cluster)
    cluster.add_argument("--latency", type=float, metavar="US")
    cluster.add_argument("--sms", type=int, help="that exchanges occupy")
    _rules(cluster)
    _outputs(cluster)
    cluster.set_defaults(run=_predict)
    return parser


def _outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--html", metavar="FILE", type=pathlib.Path, help="write a page for a browser")
    parser.add_argument("--markdown", metavar="FILE", type=pathlib.Path)
    parser.add_argument("--perfetto", metavar="FILE", type=pathlib.Path, help=".pftrace, or .json(.gz) for Chrome")


def _rules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rules",
        metavar="FILE",
        type=pathlib.Path,
        help='what kernels of your own do: [{"pattern": "^my_exchange", "kind": "all-to-all", "group": "transfer"}]',
    )


def _window(parser: argparse.ArgumentParser) -> None:
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--step", metavar="N", type=int, help="only the step of this number")
    part.add_argument("--window", metavar="A:B", help="only from A to B, in us or with a unit: 12ms:30ms")


def _links(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--internode", type=float, metavar="GB/s", help="that a device gets between nodes")
    parser.add_argument("--intranode", type=float, metavar="GB/s", help="likewise within a node")
    parser.add_argument("--per-node", type=int, default=8, metavar="N", help="devices of a node; default: 8")


def _chip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chip", default="H200", help="for estimates of a compiled program's overlap")


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
    """The trace, or what of it lies in the window that was asked for."""
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
    """The overlap of the program in a file or folder; of a folder, a note says which file."""
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
        axis, _, count = args.mesh.partition("=")
        if axis != "ep" or not count.isdigit():
            raise ValueError(f"--mesh {args.mesh}: workloads run on one axis; write ep=N")
        devices = int(count)
    ran = run(
        args.workload,
        sizes,
        args.out,
        mesh=make_mesh(devices),
        dtype=jnp.bfloat16 if on_gpu else jnp.float32,
        calls=args.calls,
        split_prompts=args.split_prompts,
    )
    _write(report(ran.trace, schedule=overlap(ran.hlo, chip(args.chip))), _files(args, "report"))
    if len(ran.trace.devices) == 1:  # one call on a cluster: not what was measured, so not beside it
        _write(report(predict(ran.trace, args.workload, sizes)), _files(args, "predicted"))
    print(f"choices of experts dropped: {ran.dropped}; temporary memory: {ran.temp_bytes / 1e9:.2f} GB a device")


def _files(args: argparse.Namespace, name: str) -> argparse.Namespace:
    """The arguments, with files of a name in the folder of a run."""
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
