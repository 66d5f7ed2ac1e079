"""Readers of tokens: the example's own beside grain's, by tokens per second, memory, and what going on elsewhere costs.

    python examples/benchmarks/readers.py [--tokens 200000000] [--batch 64] [--sequence 4096] [--threads 16] [--tiny]

All read the same file of uint16 tokens, mapped into memory, in random windows of a sequence and one token more, as
`examples/pretrain.py` trains on it. "grain" is its MapDataset, shuffled, repeated and batched; with "threads" it reads
ahead. "first batch ms" is from nothing to the batch of a later step, as after an interruption; "state bytes" is what a
checkpoint has to hold for that. "same after" says whether batches after it are those of a run without one. Memory is
what the process has grown by, the mapped file left out. Where grain is not installed, its rows are left out.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from record import Recorder, machine, make_parser

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from pretraining import data

MB = 1e6


class TimedReader(NamedTuple):
    """A way to read.

    Attributes:
      name: for the table.
      open: from a saved state, or None, what makes the batches from there, one a call.
      state: what a checkpoint after so many steps has to hold.
    """

    name: str
    open: Callable[[Any], Callable[[], Any]]
    state: Callable[[int], Any]


def own(part: data.Part, batch: int, sequence: int) -> TimedReader:
    """The example's: a batch follows from the number of its step."""

    def begin(state: Any) -> Callable[[], Any]:
        steps = iter(range(state or 0, sys.maxsize))
        return lambda: data.make_batch(part, 0, next(steps), batch, sequence)

    return TimedReader("pretrain.py", begin, lambda steps: steps)


class Windows:
    """What grain reads from: windows of the same tokens."""

    def __init__(self, part: data.Part, sequence: int) -> None:
        self.part, self.sequence = part, sequence

    def __len__(self) -> int:
        """Windows."""
        return (len(self.part) - 1) // self.sequence

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """A sequence, as the example's own has them."""
        start = index * self.sequence
        tokens = self.part.read(start, start + self.sequence + 1)
        mask = (tokens[1:] != self.part.separator).astype(np.float32)
        return {"tokens": tokens[:-1], "targets": tokens[1:], "mask": mask}


def of_grain(grain: Any, part: data.Part, batch: int, sequence: int, threads: int) -> TimedReader:
    """grain's, reading ahead in so many threads, or where it is asked."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)

    def iterator() -> Any:
        shuffled = grain.MapDataset.source(Windows(part, sequence)).shuffle(seed=0).repeat()
        return iter(shuffled.to_iter_dataset(options).batch(batch))

    def begin(state: Any) -> Callable[[], Any]:
        found = iterator()
        if state is not None:
            found.set_state(state)
        return lambda: next(found)

    def state(steps: int) -> Any:
        found = iterator()
        for _ in range(steps):
            next(found)
        return found.get_state()

    return TimedReader(f"grain, {threads} threads" if threads else "grain", begin, state)


def measure(reader: TimedReader, args: argparse.Namespace) -> dict[str, Any]:
    """A line of the table."""
    before, read = resident(), reader.open(None)
    first = [read() for _ in range(args.skip + 2)]
    start = time.perf_counter()
    for _ in range(args.steps):
        read()
    seconds = time.perf_counter() - start
    grown = resident() - before
    saved = reader.state(args.skip)
    start = time.perf_counter()
    again = reader.open(saved)
    found = again()
    ready = time.perf_counter() - start
    pairs = zip((found, again()), first[args.skip :], strict=True)
    same = all(np.array_equal(a[name], b[name]) for a, b in pairs for name in ("tokens", "targets", "mask"))
    return {
        "reader": reader.name,
        "M tokens/s": args.steps * args.batch * args.sequence / seconds / 1e6,
        "a batch ms": seconds / args.steps * 1e3,
        "memory MB": grown / MB,
        "first batch ms": ready * 1e3,
        "state bytes": len(json.dumps(saved, default=str)),
        "same after": str(same),
    }


def resident() -> int:
    """Bytes of this process' memory that are of no file; 0 where the system does not tell."""
    path = pathlib.Path("/proc/self/status")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=200_000_000, help="of the file")
    parser.add_argument("--batch", type=int, default=64, help="sequences of a batch")
    parser.add_argument("--sequence", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=100, help="batches that are timed")
    parser.add_argument("--skip", type=int, default=20, help="batches before the interruption")
    parser.add_argument("--threads", type=int, default=16, help="that grain reads ahead in; its default is 16")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args()
    if args.tiny:
        args.tokens, args.batch, args.sequence, args.steps, args.skip = 300_000, 2, 16, 4, 3
    try:
        import grain  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    except ImportError:
        grain = None
    report = Recorder.begin(
        args, machine(), f"{args.tokens / 1e6:.0f}M tokens, batches of {args.batch} x {args.sequence}",
        "no grain" if grain is None else f"grain {grain.__version__}",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "tokens.bin"
        np.random.default_rng(0).integers(0, 50_000, args.tokens, dtype=np.uint16).tofile(path)
        part = data.Part((np.memmap(path, np.uint16, mode="r"),), held_out=False, separator=0, vocab=50_000)

        def rows() -> Iterator[dict[str, Any]]:
            yield measure(own(part, args.batch, args.sequence), args)
            for threads in () if grain is None else (0, args.threads):
                yield measure(of_grain(grain, part, args.batch, args.sequence, threads), args)

        report.table(rows(), formats={"M tokens/s": ".1f", "memory MB": ".1f"})


if __name__ == "__main__":
    main()
