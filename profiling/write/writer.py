"""What a writer of traces must do. `profiling.write.trace.WRITERS` lists the writers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Protocol

from profiling.event import Trace
from profiling.write.tracks import PhaseLink


class Writer(Protocol):
    """Writes files of one kind. Give your own to `write_trace`, beside those of `WRITERS`.

    `profiling.write.tracks` has what most viewers need: `side_by_side` puts traces on one clock, `panels` divides one
    into rows in which events nest, and `flows` finds the ends of arrows.
    """

    def __call__(
        self,
        path: str | os.PathLike[str],
        traces: Trace | Sequence[Trace],
        *,
        links: Iterable[PhaseLink] = (),
        counted: bool = True,
    ) -> None:
        """Writes one trace, or several side by side with their first events at the same time.

        Args:
          path: path of the file; its ending is one that the writer is registered for.
          traces: traces of any reader; several are told apart by their titles.
          links: phases to join by arrows.
          counted: whether to add the counters of `profiling.write.tracks.counters`.

        Raises:
          ValueError: the path has another ending, there are no traces, or an event ends before it starts.
          OSError: the file cannot be written.
        """
        ...
