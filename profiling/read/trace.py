"""Reads any trace by its content. The readers are registered here."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from profiling.classify.rules import Rule
from profiling.event import Trace
from profiling.read.kineto import KinetoReader
from profiling.read.reader import Reader
from profiling.read.trace_files import Source, sources
from profiling.read.xplane import XplaneReader

READERS: tuple[Reader, ...] = (XplaneReader(), KinetoReader())
"""The readers in the order in which they are asked. The last one gets files that none knows, and says what they are."""


def read_trace(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    rules: Sequence[Rule] = (),
    *,
    readers: Sequence[Reader] = READERS,
) -> Trace:
    """Reads a trace. Its content decides which reader does, not its name.

    Args:
      path: a file of PyTorch or several, one for each rank; an ``.xplane.pb`` file; or a folder of either. See
        `read_kineto` and `read_xplane`.
      rules: your own rules, tried before the tables of this package; see `load_rules`.
      readers: readers to ask, in this order; the last one gets files that none knows. Put your own before `READERS`.

    Raises:
      ValueError: a file or folder does not exist or cannot be read, or the files are of two profilers; the message
        names it.
    """
    paths = [pathlib.Path(each) for each in ([path] if isinstance(path, (str, os.PathLike)) else path)]
    for each in paths:
        if not each.exists():
            raise ValueError(f"{each}: there is no such file or folder")
    found: dict[int, tuple[pathlib.Path, str]] = {}
    for each in paths:
        for number, name in _found(each, readers).items():
            found.setdefault(number, (each, name))
    if len(found) > 1:
        (one, (first, name)), (other, (_, another)) = sorted(found.items())[:2]
        raise ValueError(
            f"{first}: of {readers[one].profiler} ({name}), but there are traces of {readers[other].profiler} as well "
            f"({another}): name the files or the folder of one of them"
        )
    if not found and paths:
        *others, last = (reader.files for reader in reversed(readers))
        neither = f"neither {' nor '.join((*others, last))}" if others else f"no {last}"
        raise ValueError(f"{paths[0]}: there is {neither} in it; name the folder that was profiled into")
    return readers[next(iter(found), -1)].read(paths, rules)


def _found(path: pathlib.Path, readers: Sequence[Reader]) -> dict[int, str]:
    """``{number of a reader: name of one of its files}`` for a file or a folder."""
    if path.is_dir():
        return {number: name for number, reader in enumerate(readers) if (name := reader.find(path))}
    head, name = Source(path, str(path)).head(), path.name.removesuffix(".gz")
    for number, reader in enumerate(readers):
        if reader.sniff(head, name):
            return {number: path.name}
    # An archive is named after the first file in it.
    return {len(readers) - 1: sources(path)[0].label}
