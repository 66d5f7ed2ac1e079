"""What a reader of profiles must do; `profiling.read.trace.READERS` lists those that there are."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Protocol

from profiling.classify.rules import Rule
from profiling.event import Trace


class Reader(Protocol):
    """Reads what one profiler writes. Give your own to `read_trace`, before those of `READERS`.

    Attributes:
      profiler: whose files it reads, "PyTorch" for instance.
      files: what they look like, with an article: "a PyTorch trace (.json, packed or not)".
    """

    profiler: str
    files: str

    def sniff(self, head: bytes, name: str) -> str:
        """What a file is, in words that fit behind "this is"; "" if it is not one of this profiler's.

        Args:
          head: the first bytes of what is inside, unpacked: 64 KiB, or all that there are.
          name: of the file, without a ".gz" at its end.
        """
        ...

    def find(self, folder: pathlib.Path) -> str:
        """The name of one of this profiler's files in a folder or below it; "" if there is none."""
        ...

    def read(self, paths: Sequence[pathlib.Path], rules: Sequence[Rule]) -> Trace:
        """All files and folders as one trace whose events are classified.

        Args:
          paths: at least one; each exists.
          rules: of the user, tried before the reader's own tables; see `profiling.classify.classifier.classify`.

        Raises:
          ValueError: a file is damaged or is another profiler's; the message names it and says what to do.
        """
        ...
