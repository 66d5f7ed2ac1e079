"""What a reader of profiles must do. `profiling.read.trace.READERS` lists the readers."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Protocol

from profiling.classify.rules import Rule
from profiling.event import Trace


class Reader(Protocol):
    """Reads the files of one profiler. Give your own to `read_trace`, before those of `READERS`.

    Attributes:
      profiler: name of the profiler, such as "PyTorch".
      files: what its files are, with an article: "a PyTorch trace (.json, packed or not)".
    """

    profiler: str
    files: str

    def sniff(self, head: bytes, name: str) -> str:
        """Says what a file is, in words that fit after "this is"; "" if it is not one of this profiler's.

        Args:
          head: the first 64 KiB of the file, unpacked.
          name: name of the file, without a ".gz" at its end.
        """
        ...

    def find(self, folder: pathlib.Path) -> str:
        """Finds one of this profiler's files in a folder or below it and returns its name; "" if there is none."""
        ...

    def read(self, paths: Sequence[pathlib.Path], rules: Sequence[Rule]) -> Trace:
        """Reads all files and folders as one trace, and classifies its events.

        Args:
          paths: at least one file or folder; each exists.
          rules: the user's rules, tried before the reader's own; see `profiling.classify.classifier.classify`.

        Raises:
          ValueError: a file is damaged or is not one of this profiler's; the message names it and says what to do.
        """
        ...
