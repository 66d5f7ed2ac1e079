"""Where a step of a schedule on the GPUs of one host spends its time: milliseconds of each kind of work, on each rank.

The model is the dense one of schedules.py and peers_gpu.py. The step is profiled without command buffers, since
operations in them have no names. "idle" is when nothing runs, "gaps" how often; kinds may run beside each other. The
largest operations that are no products follow the table.

    python examples/benchmarks/step_profile.py [--schedule dualpipev] [--microbatches 8] [--dispatch by_rank] [--tiny]
"""

from __future__ import annotations

import collections
import functools
import os
import tempfile
from collections.abc import Iterator
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="

import jax
import jax.numpy as jnp
from chunks import dense_chunk
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from record import Recorder, machine, make_parser, medians_ms
from schedules import CUBLAS, HALVED, Layers, make_step, masters

import jaxpipe
import profiling
from jaxpipe.runtime.options import DISPATCHERS
from jaxpipe.schedule import BUILDERS, Costs, build

LAYER = Costs(3.84, 4.56, 4.21, 8.51, 12.14, 0.27)
"""Milliseconds of a layer of 4096 on an H200: the schedule is packed for these."""


def costs_of(layers: int) -> Costs:
    """Of so many layers."""
    forward, backward_input, weight = LAYER.forward, LAYER.backward_input, LAYER.weight
    whole, pair = LAYER.backward or 0.0, LAYER.overlapped or 0.0
    return Costs(layers * forward, layers * backward_input, layers * weight, layers * whole, layers * pair, LAYER.p2p)


def idle_and_gaps(events: list[profiling.Event]) -> tuple[float, int]:
    """(microseconds in which nothing runs between the first event and the last, in how many gaps)."""
    idle, gaps, end = 0.0, 0, events[0].start
    for event in events:
        if event.start > end:
            idle, gaps = idle + event.start - end, gaps + 1
        end = max(end, event.end)
    return idle, gaps


def rows(trace: profiling.Trace, ranks: dict[int, int]) -> Iterator[dict[str, Any]]:
    """The table's, by rank; the longest kinds first."""
    by_rank: dict[int, list[profiling.Event]] = collections.defaultdict(list)
    for event in sorted(trace.events, key=lambda event: event.start):
        by_rank[ranks[event.device]].append(event)
    for rank, events in sorted(by_rank.items()):
        idle, gaps = idle_and_gaps(events)
        yield {"rank": rank, "work": "idle", "ms": idle / 1e3, "times": gaps}
        kinds: dict[str, list[float]] = collections.defaultdict(list)
        for event in events:
            kinds[event.kind].append(event.duration)
        for kind, spent in sorted(kinds.items(), key=lambda item: -sum(item[1])):
            yield {"rank": rank, "work": kind, "ms": sum(spent) / 1e3, "times": len(spent)}


def largest(trace: profiling.Trace, top: int) -> Iterator[str]:
    """Lines of the operations that take longest and are no products."""
    spent: dict[tuple[int, str, str, str], float] = collections.defaultdict(float)
    for event in trace.events:
        if not any(word in event.kind.lower() for word in ("product", "gemm", "attention")):
            scope = "/".join(event.scope.split("/")[-3:])
            spent[event.device, event.kind, event.name, scope] += event.duration
    for (device, kind, name, scope), time in sorted(spent.items(), key=lambda item: -item[1])[:top]:
        yield f"{time / 1e3:8.2f} ms on device {device}: {kind}, {name[:60]}, {scope}"


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--schedule", choices=BUILDERS, default="dualpipev", help="which")
    parser.add_argument("--ranks", type=int, default=2, help="GPUs, of one host")
    parser.add_argument("--microbatches", type=int, default=8, help="of a step")
    parser.add_argument("--layers", type=int, default=4, help="of a rank's share; even, as two stages halve it")
    parser.add_argument("--dispatch", choices=DISPATCHERS, help="default: the pipeline's")
    parser.add_argument("--largest", type=int, default=30, help="how many operations to list")
    parser.add_argument("--repeats", type=int, default=5, help="of the step that is timed, a median")
    parser.add_argument("--hlo", metavar="FILE", help="write the compiled program there")
    parser.add_argument("--tiny", action="store_true", help="a model for CPUs")
    args = parser.parse_args()
    mesh = jaxpipe.make_mesh(pp=args.ranks, ep=1)
    width, tokens = (128, 64) if args.tiny else (4096, 4096)
    model = Layers(dense_chunk(1, width, tokens), mesh)
    layers = args.layers // (2 if args.schedule in HALVED else 1)
    schedule = build(args.schedule, args.ranks, args.microbatches)
    options = {"dispatch": args.dispatch} if args.dispatch else {}
    step, lowered = make_step(model, schedule, layers, costs_of(layers), **options)
    compiled = lowered.compile(CUBLAS)
    if args.hlo:
        with open(args.hlo, "w", encoding="utf-8") as file:
            file.write(compiled.as_text() or "")
    held = jaxpipe.Params(masters(model, layers, schedule.storage_order, mesh)())
    normal = functools.partial(jax.random.normal, shape=(args.microbatches, tokens, width), dtype=jnp.bfloat16)
    batch = jax.jit(normal, out_shardings=NamedSharding(mesh, P("ep")))(jax.random.key(2))
    (ms,) = medians_ms([lambda: compiled(held, batch)], args.repeats)
    ranks = profiling.pipeline_ranks(mesh)
    with tempfile.TemporaryDirectory() as folder:
        with profiling.capture(folder, ranks=ranks), profiling.annotate_step(0):
            jax.block_until_ready(compiled(held, batch))
        trace = profiling.read_xplane(folder)
    text = f"{args.schedule}, {args.microbatches} microbatches, {step.dispatch}: {ms:.1f} ms without command buffers"
    formats = {"ms": ".2f", "times": "d"}
    Recorder.begin(args, machine(args.ranks), text).table(rows(trace, ranks), labels=2, formats=formats)
    print(*largest(trace, args.largest), sep="\n")


if __name__ == "__main__":
    main()
