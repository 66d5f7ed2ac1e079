"""Writes traces in the format that the ending of a file names. The writers are registered here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from profiling.event import Trace
from profiling.write.chrome import write_chrome
from profiling.write.perfetto import write_perfetto
from profiling.write.tracks import PhaseLink
from profiling.write.writer import Writer

WRITERS: Mapping[str, Writer] = {".pftrace": write_perfetto, ".json": write_chrome, ".json.gz": write_chrome}
"""The writers by the endings of their files. If several endings fit, the longest counts."""


def write_trace(
    path: str | os.PathLike[str],
    traces: Trace | Sequence[Trace],
    *,
    links: Iterable[PhaseLink] = (),
    counted: bool = True,
    writers: Mapping[str, Writer] = WRITERS,
) -> None:
    """Writes one trace, or several side by side, in the format that the file's ending names.

    Args:
      path: path that ends in ".pftrace" for Perfetto, in ".json" or ".json.gz" for Chrome.
      traces, links, counted: as in `write_perfetto`.
      writers: writers by ending; add your own as ``{**WRITERS, ".csv": write_csv}``.

    Raises:
      ValueError: no writer has the ending, there are no traces, or an event ends before it starts.
      OSError: the file cannot be written.

    >>> import pathlib, tempfile
    >>> from profiling.event import Event
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "step.pftrace"
    >>> write_trace(path, Trace("", "simulated", (Event(3, "gpu", 1.0, 2.5, "a kernel"),)))
    >>> b"a kernel" in path.read_bytes()
    True
    """
    name = os.fspath(path)
    fitting = [ending for ending in writers if name.endswith(ending)]
    if not fitting:
        raise ValueError(f"{name!r} has an ending that no writer has: choose one of {', '.join(writers)}")
    writers[max(fitting, key=len)](path, traces, links=links, counted=counted)
