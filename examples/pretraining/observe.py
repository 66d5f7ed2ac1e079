"""What a run shows and leaves behind: a progress bar, metrics as JSON lines, and as TensorBoard's events."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Mapping

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

METRICS = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What tokens cost.

    Attributes:
      tokens: of a step, on all devices.
      flops: of a token, forward and backward, of matrix products that the model needs (no recomputation).
      peak: FLOP/s of all devices together at best; None: not known, and there is no MFU.

    >>> Throughput(tokens=100, flops=6e9, peak=1e13).mfu(tokens_per_second=500)
    0.3
    """

    tokens: int
    flops: float
    peak: float | None

    def mfu(self, tokens_per_second: float) -> float | None:
        """Share of the peak that the model's FLOPs make up."""
        return None if self.peak is None else tokens_per_second * self.flops / self.peak


class Observer:
    """Shows and writes metrics; on every process but the first it does neither.

    Use it in ``with``. A line of the metrics' file is written whole and at once, so that it survives the process; a
    resumed run first drops the lines after the step that it begins with.
    """

    def __init__(self, out: pathlib.Path | None, steps: int, start: int, throughput: Throughput, *, every: int = 10):
        """Opens files and bar.

        Args:
          out: folder for `METRICS` and ``tensorboard/``; None: this process shows and writes nothing.
          steps: of the whole run.
          start: steps done already.
          throughput: of the run.
          every: steps between lines where the output is no terminal.

        Raises:
          OSError: the folder cannot be written.
        """
        self._out, self._steps, self._start, self._throughput, self._every = out, steps, start, throughput, every
        self._since: tuple[float, int] | None = None
        self._progress: Progress | None = None

    def __enter__(self) -> Observer:
        """Opens files and bar."""
        if self._out is None:
            return self
        self._out.mkdir(parents=True, exist_ok=True)
        keep_until(self._out / METRICS, self._start)
        self._lines = (self._out / METRICS).open("a", encoding="utf-8", buffering=1)
        (self._out / "tensorboard").mkdir(exist_ok=True)
        # Its synchronous part: a writing thread would die of a full disk unseen.
        self._events = EventsWriter(str(self._out / "tensorboard" / "events"))
        self._events.write_event(Event(step=self._start, session_log=SessionLog(status=SessionLog.START)))
        counter, text = TextColumn("{task.completed}/{task.total}"), TextColumn("{task.description}")
        self._progress = Progress(counter, BarColumn(), text, TimeRemainingColumn())
        self._task = self._progress.add_task("compiling", total=self._steps, completed=self._start)
        self._progress.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Closes them."""
        if self._progress is None:
            return
        self._progress.stop()
        # What ended the run may be a full disk: that error is the one to be seen.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self._events.close()
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self._lines.close()

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def pause(self) -> None:
        """Begins to measure throughput anew, after something that is no training."""
        self._since = None

    def step(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Takes the metrics of the step that was the ``step``-th to end, counted from 1.

        Raises:
          OSError: they cannot be written.
        """
        if self._progress is None:
            return
        now = time.perf_counter()
        rate = None
        if self._since is None:
            # What came before, compiling or saving, is no training.
            self._since = (now, step)
        elif now > self._since[0]:
            rate = (step - self._since[1]) * self._throughput.tokens / (now - self._since[0])
        mfu = None if rate is None else self._throughput.mfu(rate)
        found = {**metrics, "tokens_per_second": rate, "mfu": mfu}
        self._write(step, found)
        text = describe(found)
        self._progress.update(self._task, completed=step, description=text)
        first, last = step == self._start + 1, step == self._steps
        if not self._progress.console.is_terminal and (step % self._every == 0 or first or last):
            self.note(f"step {step}/{self._steps}  {text}")

    def evaluation(self, step: int, loss: float) -> None:
        """Takes the loss on held-out data."""
        if self._progress is not None:
            self._write(step, {"held_out_loss": loss})
            self.note(f"step {step}/{self._steps}  held-out loss {loss:.3f}")

    def _write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        known = {name: value for name, value in metrics.items() if value is not None}
        self._lines.write(json.dumps({"step": step, **known}) + "\n")
        now = time.time()
        for name, value in known.items():
            self._events.write_event(Event(step=step, wall_time=now, summary=summary.scalar(name, value)))
        self._events.flush()


def describe(metrics: Mapping[str, float | None]) -> str:
    """The metrics that a line shows.

    >>> describe({"loss": 2.5, "tokens_per_second": 1200.0, "mfu": 0.41, "balancedness": 0.9, "dropped": 3})
    'loss 2.500  1,200 tokens/s  MFU 41.0%  balance 0.90  dropped 3'
    """
    parts = {
        "loss": "loss {:.3f}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu": "MFU {:.1%}",
        "balancedness": "balance {:.2f}",
        "dropped": "dropped {:,.0f}",
        "grad_norm": "grad norm {:.2f}",
    }
    return "  ".join(text.format(metrics[name]) for name, text in parts.items() if metrics.get(name) is not None)


def read_metrics(path: pathlib.Path) -> list[dict[str, float]]:
    """The lines of a metrics' file, without one that a killed process left unfinished."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def keep_until(path: pathlib.Path, step: int) -> None:
    """Drops the lines of a metrics' file that are of later steps, if there is such a file."""
    if path.exists():
        lines = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(lines), encoding="utf-8")
        os.replace(fresh, path)
