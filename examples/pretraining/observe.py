"""What a run shows and leaves behind: a progress bar, metrics as JSON lines, and as TensorBoard's events."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pretraining.load_report import LOADS, PAGE, record_of, write_page
from pretraining.optional import need
from pretraining.progress import Progress, progress

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
    resumed run first drops the lines after the step that it begins with. What cannot be shown or written once the run
    has begun is a warning: training is worth more than what is said about it.
    """

    def __init__(self, out: pathlib.Path | None, steps: int, start: int, throughput: Throughput, *, every: int = 10):
        """Remembers what to do; ``with`` opens files and bar.

        Args:
          out: folder for `METRICS`, `LOADS`, its `PAGE` and ``tensorboard/``; None: this process shows and writes
            nothing.
          steps: of the whole run.
          start: steps done already.
          throughput: of the run.
          every: steps between lines where the output is no terminal.
        """
        self._out, self._steps, self._start, self._throughput, self._every = out, steps, start, throughput, every
        self._since: tuple[float, int] | None = None
        self._lines: JsonLines | None = None
        self._loads: JsonLines | None = None
        self._events: Events | None = None
        self._progress: Progress | None = None

    def __enter__(self) -> Observer:
        """Opens files and bar.

        Raises:
          OSError: the folder cannot be written.
        """
        if self._out is None:
            return self
        self._out.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, LOADS):
            keep_until(self._out / name, self._start)
        self._lines, self._loads = JsonLines(self._out / METRICS), JsonLines(self._out / LOADS)
        self._progress = progress(self._steps, self._start)
        try:
            self._events = Events(self._out / "tensorboard", self._start)
        except Exception as error:
            # Not only a missing package: an old one may not fit the others.
            self.note(f"no TensorBoard events: {error}; {self._out / METRICS} holds the metrics")
        return self

    def __exit__(self, *_: object) -> None:
        """Closes them."""
        self._try("the progress bar is left as it is", lambda: self._progress and self._progress.stop())
        self._try("TensorBoard's events may be incomplete", lambda: self._events and self._events.close())
        for file in (self._lines, self._loads):
            if file is not None:
                file.close()
        self._try(f"no {PAGE}", self._draw_loads)
        self._lines = self._loads = self._events = self._progress = None

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._progress is not None and not self._try("nothing more is shown", self._progress.note, text):
            self._progress = None

    def pause(self) -> None:
        """Begins to measure throughput anew, after something that is no training."""
        self._since = None

    def step(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Takes the metrics of the step that was the ``step``-th to end, counted from 1."""
        if self._lines is None:
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
        if self._progress is None:
            return
        text = describe(found)
        self._progress.update(step, text)
        first, last = step == self._start + 1, step == self._steps
        if not self._progress.is_live and (step % self._every == 0 or first or last):
            self.note(f"step {step}/{self._steps}  {text}")

    def loads(self, step: int, ratios: np.ndarray) -> None:
        """Takes the heaviest device over the mean ``[microbatches, layers]`` of a step."""
        if self._loads is not None:
            self._loads.write(record_of(step, ratios))

    def evaluation(self, step: int, loss: float) -> None:
        """Takes the loss on held-out data."""
        if self._lines is not None:
            self._write(step, {"held_out_loss": loss})
            self.note(f"step {step}/{self._steps}  held-out loss {loss:.3f}")

    def _write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        known = {name: value for name, value in metrics.items() if value is not None}
        if self._lines is not None:
            self._lines.write({"step": step, **known})
        if self._events is not None and not self._try("no more TensorBoard events", self._events.write, step, known):
            with contextlib.suppress(Exception):
                self._events.close()
            self._events = None

    def _draw_loads(self) -> None:
        """Writes the page of what `LOADS` holds, if it holds anything."""
        if self._out is None or not (lines := read_metrics(self._out / LOADS)):
            return
        metrics = read_metrics(self._out / METRICS)
        write_page(self._out / PAGE, lines, [line["step"] for line in metrics if line.get("layers_moved")])

    def _try(self, otherwise: str, act: Callable[..., object], *args: object) -> bool:
        """Whether it went well; if not, there is a warning."""
        try:
            act(*args)
        except Exception as error:
            warnings.warn(f"{otherwise}: {type(error).__name__}: {error}; the run goes on", stacklevel=4)
            return False
        return True


class JsonLines:
    """A file of JSON lines, appended to.

    Where a line cannot be written, a warning says so once, and again when the file can be written.
    """

    def __init__(self, path: pathlib.Path):
        """Opens the file.

        Raises:
          OSError: it cannot be opened.
        """
        self._path, self._lost, self._is_torn = path, 0, False
        self._file = io.FileIO(path, "a")

    def write(self, line: Mapping[str, object]) -> None:
        """Appends a line."""
        # After half a line a new one, or two would be lost.
        text = b"\n" * self._is_torn + json.dumps(line).encode() + b"\n"
        try:
            written = self._file.write(text) or 0
            self._is_torn = written < len(text) and (written > 0 or self._is_torn)
            if written < len(text):
                raise OSError(f"{written} of {len(text)} bytes written")
        except OSError as error:
            self._lost += 1
            if self._lost == 1:
                warnings.warn(f"no metrics in {self._path}: {error}; the run goes on, and tries again", stacklevel=4)
            return
        if self._lost:
            warnings.warn(f"{self._path} can be written again; {self._lost} lines are missing", stacklevel=4)
            self._lost = 0

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):
            self._file.close()


class Events:
    """TensorBoard's events in a folder."""

    def __init__(self, folder: pathlib.Path, start: int):
        """Opens a new file.

        Raises:
          MissingPackage: tensorboardX is not installed.
          OSError: the folder cannot be written.
        """
        what = "TensorBoard's events", "tensorboardX"
        self._protocol: Any = need("tensorboardX.proto.event_pb2", *what)
        self._summary: Any = need("tensorboardX.summary", *what)
        folder.mkdir(exist_ok=True)
        # Its synchronous part: a writing thread would die of a full disk unseen.
        self._file = need("tensorboardX.event_file_writer", *what).EventsWriter(str(folder / "events"))
        log = self._protocol.SessionLog(status=self._protocol.SessionLog.START)
        self._file.write_event(self._protocol.Event(step=start, session_log=log))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes an event for each metric."""
        now = time.time()
        for name, value in metrics.items():
            scalar = self._summary.scalar(name, value)
            self._file.write_event(self._protocol.Event(step=step, wall_time=now, summary=scalar))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def describe(metrics: Mapping[str, float | None]) -> str:
    """The metrics that a line shows.

    >>> describe({"loss": 2.5, "tokens_per_second": 1200.0, "mfu": 0.41, "balancedness": 0.9, "dropped": 3})
    'loss 2.500  1,200 tokens/s  MFU 41.0%  balance 0.90  dropped 3'

    In FP8 also how many blocks of numbers were not finite.

    >>> describe({"loss": 2.5, "not_finite_blocks": 0}), describe({"not_finite_blocks": 7.0})
    ('loss 2.500  not finite 0 blocks', 'not finite 7 blocks')
    """
    parts = {
        "loss": "loss {:.3f}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu": "MFU {:.1%}",
        "balancedness": "balance {:.2f}",
        "layers_moved": "moved experts of {:,.0f} layers",
        "saved_seconds": "to save {:.2g} s",
        "move_seconds": "for {:.2g} s",
        "gathered_layers": "gathering {:,.0f} layers",
        "dropped": "dropped {:,.0f}",
        "not_finite_blocks": "not finite {:,.0f} blocks",
        "grad_norm": "grad norm {:.2f}",
    }
    return "  ".join(text.format(metrics[name]) for name, text in parts.items() if metrics.get(name) is not None)


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
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
