"""How far a run is, on the terminal: a bar where rich is installed, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Protocol

from pretraining.optional import MissingPackage, need


class Progress(Protocol):
    """Where a run is shown. What cannot be shown raises OSError."""

    is_live: bool
    """Whether `update` shows anything."""

    def note(self, text: str) -> None:
        """Prints a line."""

    def update(self, step: int, text: str) -> None:
        """Shows that so many steps are done."""

    def stop(self) -> None:
        """Leaves the terminal as it was."""


class Bar:
    """rich's progress bar, with lines above it."""

    def __init__(self, steps: int, start: int):
        """Begins to draw.

        Raises:
          MissingPackage: rich is not installed.
        """
        rich = need("rich.progress", "progress bars", "rich")
        columns = rich.TextColumn("{task.completed}/{task.total}"), rich.BarColumn()
        self._bar = rich.Progress(*columns, rich.TextColumn("{task.description}"), rich.TimeRemainingColumn())
        self._task = self._bar.add_task("compiling", total=steps, completed=start)
        self.is_live = self._bar.console.is_terminal
        self._bar.start()

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, step: int, text: str) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step, description=text)

    def stop(self) -> None:
        """Ends drawing."""
        self._bar.stop()


class PlainLines:
    """Lines alone."""

    is_live = False

    def note(self, text: str) -> None:
        """Prints a line."""
        print(text, file=sys.stdout, flush=True)

    def update(self, step: int, text: str) -> None:
        """Shows nothing."""

    def stop(self) -> None:
        """Has nothing to end."""


def progress(steps: int, start: int) -> Progress:
    """What this machine can show of a run of ``steps``, of which ``start`` are done."""
    try:
        return Bar(steps, start)
    except MissingPackage:
        return PlainLines()


def amount(what: str, every: float = 2.0) -> Callable[[int, int], None]:
    """A function of bytes that are done and of all, which shows them: on a terminal in one line, elsewhere in several.

    Args:
      what: is being done.
      every: seconds between lines.
    """
    start = shown = time.perf_counter()

    def show(done: int, total: int) -> None:
        nonlocal shown
        now = time.perf_counter()
        live, ends = sys.stderr.isatty(), done >= total
        if not ends and now - shown < (0.1 if live else every):
            return
        shown = now
        speed = done / 1e9 / max(now - start, 1e-9)
        text = f"{what}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {speed:.2f} GB/s"
        print(f"\r{text}" if live else text, end="\n" if ends or not live else "", file=sys.stderr, flush=True)

    return show
