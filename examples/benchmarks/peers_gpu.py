"""Schedules of this library beside PyTorch's and DeepSeek's own on the GPUs of one host: the same model, one table.

    python examples/benchmarks/peers_gpu.py [--ranks 2] [--microbatches 8,16] [--dualpipe FOLDER] [--tiny]

The model is the dense one of schedules.py, eight layers of 4096 on two GPUs, with the same weights and batch on all
sides: losses or norms of the gradients that differ by more than 1% are an error. Beside ours stand the schedules of
torch.distributed.pipelining, where PyTorch is installed, and DualPipe and DualPipeV of
github.com/deepseek-ai/DualPipe, where the package `dualpipe` is found, in FOLDER or installed. Sides take turns, each
in processes of its own.

All compute in bfloat16 and add up weight gradients in float32 (``--grad-dtype``). A step begins with clearing the sums;
ours also makes bfloat16 copies of float32 masters, which PyTorch's side is spared. There weight gradients are put off
as the packages provide (`dw_builder`, `WeightGradStore`), and one product adds each to its sum, or, where PyTorch has
no such product, a product in bfloat16 and an addition: "how" says which, "fused" or "added", and of ours the dispatch.
Where a stage has two copies, as in DualPipe, a step takes weights from their owner to the copy and the copy's gradients
to the owner, on both sides; "ends" is what this takes by itself on DeepSeek's. PyTorch's sides keep all that their
backward reads; ours keeps what saves time (``--stash``). "memory" is the largest of a GPU, the batch included.

The ratios below the table are of tokens/s: above 1 ours is faster. "best" is the best schedule of each.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from peers_model import numbers, seed, shapes, spread
from record import Recorder, command_line, make_parser, medians_ms, write_records

OURS = ("1f1b", "zbv", "dualpipe", "dualpipev")
TORCH = (
    "Schedule1F1B", "ScheduleInterleaved1F1B", "ScheduleInterleavedZeroBubble", "ScheduleZBVZeroBubble",
    "ScheduleDualPipeV",
)  # fmt: skip
DEEPSEEK = ("DualPipe", "DualPipeV")
SIDES = {"ours": "{}", "torch": "torch {}", "deepseek": "DeepSeek's {}"}
EVERYTHING = 10**12
"""More bytes than a stage can keep of a microbatch."""
Job = tuple[str, str, int]
"""Side, schedule, microbatches."""


def ours(args: argparse.Namespace, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """Answers to jobs on our side, after all of them are compiled: ``{"job": index, "row" or "error": ..}``."""
    import jax  # noqa: PLC0415  the process that starts the others leaves the GPUs alone
    import jax.numpy as jnp  # noqa: PLC0415
    import schedules  # noqa: PLC0415
    from chunks import dense_chunk  # noqa: PLC0415
    from jax.sharding import NamedSharding  # noqa: PLC0415
    from jax.sharding import PartitionSpec as P  # noqa: PLC0415

    import jaxpipe  # noqa: PLC0415

    jax.config.update("jax_disable_most_optimizations", args.tiny)
    mesh = jaxpipe.make_mesh(pp=args.ranks, ep=1)
    model = schedules.Layers(dense_chunk(1, args.width, args.tokens), mesh)
    options = {name: value for name in ("dispatch", "grad_dtype") if (value := getattr(args, name)) != "float32"}
    options["stash"] = None if args.stash == "least" else EVERYTHING
    sharding = functools.partial(NamedSharding, mesh)

    def numbers_of(size: int, seed: Any, scale: float) -> jax.Array:
        return numbers(jax.lax.iota(np.uint32, size), seed, scale)

    sizes = shapes(args.width)

    @functools.cache
    def stages(layers: int) -> Callable[[jax.Array], Any]:
        """Makes stages of so many layers, from seeds of each stage, layer and matrix."""

        def stage(seeds: jax.Array) -> Any:
            return tuple(
                {
                    name: numbers_of(inputs * outputs, seeds[i, k], spread(inputs)).reshape(1, inputs, outputs)
                    for k, (name, (inputs, outputs)) in enumerate(sizes.items())
                }
                for i in range(layers)
            )

        return jax.jit(jax.vmap(stage), out_shardings=jax.tree.map(sharding, model.specs(layers)))

    def masters(order: Sequence[int], layers: int) -> Any:
        """Rows of stages in some order."""
        seeds = np.array([[seed(i, name) for name in sizes] for i in range(len(order) * layers)], np.uint32)
        rows = seeds.reshape(len(order), layers, -1)[np.asarray(order)]
        return stages(layers)(jax.device_put(rows, sharding(P("pp"))))

    @functools.partial(jax.jit, static_argnums=0, out_shardings=sharding(P("ep")))
    def batch(count: int) -> jax.Array:
        shape = (count, args.tokens, args.width)
        return numbers_of(math.prod(shape), np.uint32(seed(0, "batch")), 3**0.5).reshape(shape).astype(jnp.bfloat16)

    @jax.jit
    def norm(grads: Any) -> jax.Array:
        return jnp.sqrt(sum(jnp.square(grad.astype(jnp.float32)).sum() for grad in jax.tree.leaves(grads)))

    layers_of = {name: args.layers // (2 if name in schedules.HALVED else 1) for _, name, _ in jobs}
    with ThreadPoolExecutor(8) as pool:
        costs = {n: schedules.measure_stage(model, n, pool, args.repeats)[0] for n in {*layers_of.values()}}
        programs: list[Any] = []
        for _, name, count in jobs:
            try:
                layers = layers_of[name]
                schedule = jaxpipe.schedule.build(name, args.ranks, count)
                step, lowered = schedules.make_step(model, schedule, layers, costs[layers], **options)
                programs.append((step, schedules.start(pool, f"{name} of {count}", lowered)))
            except Exception as error:
                programs.append(error)
    for index, (job, program) in enumerate(zip(jobs, programs, strict=True)):
        yield {"job": index}
        try:
            if isinstance(program, Exception):
                raise program
            step, compiled = program[0], program[1].result()
            held = jaxpipe.Params(masters(step.program.schedule.storage_order, layers_of[job[1]]))
            data, memory = batch(job[2]), compiled.memory_analysis()
            (loss, _), grads = compiled(held, data)
            checks = {"loss": float(loss), "norm": float(norm(grads.stages))}
            del grads
            (ms,) = medians_ms([lambda: compiled(held, data)], args.repeats)  # noqa: B023  called here
            peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
            peak -= memory.alias_size_in_bytes
            yield {"job": index, "row": {"step": ms / 1e3, **checks, "how": step.dispatch, "peak": peak}}
            del held, data
        except Exception as error:
            yield {"job": index, "error": f"{type(error).__name__}: {error}".splitlines()[0]}


@dataclasses.dataclass(frozen=True)
class Workers:
    """Processes that work on the same jobs, and what they say.

    Attributes:
      processes: as many as there are ranks, or one.
      lines: (process, line of its output, or None at the end).
      readers: the threads that read them.
    """

    processes: list[subprocess.Popen[str]]
    lines: queue.Queue[tuple[int, str | None]]
    readers: list[threading.Thread] = dataclasses.field(default_factory=list)

    @classmethod
    def start(cls, commands: Iterable[tuple[list[str], dict[str, str]]]) -> Workers:
        """Starts commands, each with its environment."""
        processes = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            for command, environment in commands
        ]
        workers = cls(processes, queue.Queue())
        for index, process in enumerate(processes):
            workers.readers.append(threading.Thread(target=workers._read, args=(index, process), daemon=True))
            workers.readers[-1].start()
        return workers

    def _read(self, index: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        with process.stdout:
            for line in process.stdout:
                self.lines.put((index, line))
        self.lines.put((index, None))

    def messages(self, patience: float) -> Iterator[dict[str, Any]]:
        """What they say in JSON, until all have ended, one has failed, or nothing was said for so many seconds."""
        running = set(range(len(self.processes)))
        while running:
            try:
                index, line = self.lines.get(timeout=patience)
            except queue.Empty:
                yield {"error": f"said nothing for {patience:.0f} s"}
                return
            if line is None:
                running.discard(index)
                if code := self.processes[index].wait():
                    yield {"error": f"process {index} ended with {code}"}
                    return
            elif line.startswith("{"):
                yield json.loads(line)
            else:
                print(line, end="", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Ends what still runs."""
        for process, reader in zip(self.processes, self.readers, strict=True):
            process.kill()
            process.wait()
            reader.join(10)


def answers(start: Callable[[list[Job]], Workers], jobs: list[Job], patience: float) -> Iterator[tuple[Job, Any]]:
    """(job, its row or error) of jobs; processes that die are started anew, on the jobs that are left."""
    while jobs:
        workers, begun, answered = start(jobs), -1, -1
        try:
            for message in workers.messages(patience):
                index = message.get("job", begun)
                if "error" in message and answered < begun:
                    answered = index
                    yield jobs[index], message["error"]
                elif "row" in message:
                    answered = index
                    yield jobs[index], message["row"]
                else:
                    begun = index
        finally:
            workers.stop()
        if begun < 0:
            yield from ((job, "did not start") for job in jobs)
            return
        jobs = jobs[begun + 1 :]


def starter(args: argparse.Namespace, side: str) -> Callable[[list[Job]], Workers]:
    """Starts the processes of one side on jobs."""
    folder = pathlib.Path(__file__).parent
    environment = dict(os.environ, PYTHONUNBUFFERED="1")

    def start(jobs: list[Job]) -> Workers:
        given = json.dumps({"args": vars(args) | {"record": None}, "jobs": jobs})
        if side == "ours":
            environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
            if os.environ.get("JAX_PLATFORMS") == "cpu":
                flag = f" --xla_force_host_platform_device_count={args.ranks}"
                environment["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flag
            return Workers.start([([sys.executable, str(folder / "peers_gpu.py"), "--jobs", given], environment)])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = environment | {"WORLD_SIZE": str(args.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared["PYTHONPATH"] = os.pathsep.join(filter(None, [args.dualpipe, os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, str(folder / "peers_torch.py"), given]
        return Workers.start([(command, shared | {"RANK": str(rank)}) for rank in range(args.ranks)])

    return start


def missing(side: str, args: argparse.Namespace) -> str | None:
    """Why a side cannot run."""
    if side != "ours" and importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    if side == "deepseek" and not (
        (pathlib.Path(args.dualpipe) / "dualpipe" / "__init__.py").exists() or importlib.util.find_spec("dualpipe")
    ):
        return "no package dualpipe: name a checkout of github.com/deepseek-ai/DualPipe with --dualpipe FOLDER"
    return None


def ratios(speeds: dict[Job, float], grad_dtype: str) -> dict[str, float]:
    """What is recorded: key -> our tokens/s over theirs, for each number of microbatches.

    >>> ratios({("ours", "zbv", 8): 3.0, ("torch", "ScheduleDualPipeV", 8): 2.0}, "float32")
    {'best_over_torch_8': 1.5}
    """
    found: dict[str, float] = {}
    short = {"float32": "_fp32", "bfloat16": "_bf16"}[grad_dtype]
    for count in sorted({count for _, _, count in speeds}):
        for name in DEEPSEEK:
            mine, theirs = (speeds.get((s, n, count)) for s, n in (("ours", name.lower()), ("deepseek", name)))
            if mine and theirs:
                found[f"{name.lower()}_over_deepseek{short}_{count}"] = mine / theirs
        best = {
            side: max((v for (s, _, n), v in speeds.items() if (s, n) == (side, count)), default=0) for side in SIDES
        }
        if best["ours"] and best["torch"]:
            found[f"best_over_torch{short.replace('_fp32', '')}_{count}"] = best["ours"] / best["torch"]
    return found


def parse() -> argparse.Namespace:
    """The options."""
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="GPUs, of one host")
    parser.add_argument("--microbatches", default="8,16", help="of a step")
    parser.add_argument("--sides", default=",".join(SIDES), help="which, in this order")
    parser.add_argument("--schedules", default=",".join(OURS), help="ours; any that jaxpipe has")
    parser.add_argument("--torch", default=",".join(TORCH), help="PyTorch's")
    parser.add_argument(
        "--dualpipe", default="", metavar="FOLDER", help="a checkout of github.com/deepseek-ai/DualPipe"
    )
    parser.add_argument(
        "--dispatch",
        choices=["by_rank", "loops", "stretches", "sequential", "switch"],
        help="ours; default: unrolled for DualPipe, by_rank for others",
    )
    parser.add_argument(
        "--grad-dtype", choices=["float32", "bfloat16"], default="float32", help="of sums, on all sides"
    )
    parser.add_argument(
        "--stash", choices=["time", "least"], default="time",
        help="what ours keeps for the backward: whatever saves time, as PyTorch's keeps all, or the fewest bytes",
    )  # fmt: skip
    parser.add_argument("--sums", choices=["best", "fused", "added"], default="best", help="how PyTorch's side adds up")
    parser.add_argument("--layers", type=int, default=4, help="of a rank's share; even, as two stages halve it")
    parser.add_argument("--width", type=int, default=4096, help="of the activations")
    parser.add_argument("--tokens", type=int, default=4096, help="of a microbatch")
    parser.add_argument("--repeats", type=int, default=5, help="steps of which the median counts")
    parser.add_argument("--patience", type=float, default=300, help="seconds until silent processes are stopped")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no side after so many")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    parser.add_argument("--jobs", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.layers < 2 or args.layers % 2:
        parser.error(f"--layers {args.layers}: two stages of a rank halve it, so take an even number")
    if unknown := set(args.sides.split(",")) - set(SIDES):
        parser.error(f"--sides {args.sides}: there is no {sorted(unknown)}, but {', '.join(SIDES)}")
    if args.tiny:
        args.width, args.tokens = 64, 64
    return args


def main() -> None:
    """Prints the table, or in a process of its own the answers of our side."""
    args, begin = parse(), time.monotonic()
    if args.jobs:
        given = json.loads(args.jobs)
        for message in ours(argparse.Namespace(**given["args"]), given["jobs"]):
            print(json.dumps(message), flush=True)
        return
    if args.grad_dtype != "float32":
        args.record_as = args.record_as or f"peers_gpu {args.grad_dtype}"
    names = {"ours": args.schedules, "torch": args.torch, "deepseek": ",".join(DEEPSEEK)}
    counts = [int(count) for count in args.microbatches.split(",")]
    size = f"{args.ranks * args.layers} dense layers of {args.width}, {args.tokens} tokens of a microbatch"
    software = [f"torch {importlib.metadata.version('torch')}"] if importlib.util.find_spec("torch") else []
    speeds: dict[Job, float] = {}
    checks: dict[tuple[str, int], float] = {}

    def row(job: Job, found: Any) -> dict[str, Any]:
        """The table's, of a row or of what is in the way."""
        side, name, count = job
        cells = {"program": SIDES[side].format(name), "microbatches": count, "how": "", "step ms": str(found)}
        cells |= dict.fromkeys(("tokens/s", "ends ms", "memory GiB", "loss", "gradients' norm"), "")
        if isinstance(found, str):
            return cells
        for what in ("loss", "norm"):
            expected = checks.setdefault((what, count), found[what])
            if not abs(found[what] - expected) <= 1e-2 * abs(expected):
                return cells | {"step ms": f"{what} {found[what]}, of the first {expected}"}
        speeds[job] = count * args.tokens / found["step"]
        return cells | {
            "how": found["how"],
            "step ms": found["step"] * 1e3,
            "tokens/s": round(speeds[job]),
            "ends ms": found["ends"] * 1e3 if "ends" in found else "",
            "memory GiB": found["peak"] / 2**30,
            "loss": f"{found['loss']:.5f}",
            "gradients' norm": f"{found['norm']:.5g}",
        }

    def rows(side: str) -> Iterator[tuple[Job, Any]]:
        jobs = [(side, name, count) for count in counts for name in names[side].split(",")]
        reason = missing(side, args)
        if time.monotonic() - begin > args.seconds:
            reason = f"not begun after {args.seconds:.0f} s"
        if reason:
            return iter([(job, reason) for job in jobs])
        return answers(starter(args, side), jobs, args.patience)

    def table() -> Iterator[dict[str, Any]]:
        for side in args.sides.split(","):
            for job, found in rows(side):
                yield row(job, found)

    devices = subprocess.run(
        [sys.executable, "-c", f"import record; print(record.machine({args.ranks}))"],
        cwd=pathlib.Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    report = Recorder.begin(args, ", ".join([devices.stdout.strip(), *software]), size, f"sums in {args.grad_dtype}")
    report.table(table(), labels=2, formats={"step ms": ".1f", "ends ms": ".1f", "memory GiB": ".1f"})
    found = ratios(speeds, args.grad_dtype)
    for key, value in found.items():
        print(f"{key}: {value:.3f}")
    if report.file and found and not args.tiny:
        write_records(report.file, {key: (value, "") for key, value in found.items()},
                      command=command_line(), machine=report.machine)  # fmt: skip


if __name__ == "__main__":
    main()
