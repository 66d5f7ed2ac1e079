"""Any trace by what is in it: PyTorch's files, or a profile of `jax.profiler`."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from profiling.classify.rules import Rule
from profiling.event import Trace
from profiling.read.kineto import folder, read_kineto
from profiling.read.trace_files import Source, is_xspace, sources
from profiling.read.xplane import read_xplane


def read_trace(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], rules: Sequence[Rule] = ()) -> Trace:
    """A trace, whatever wrote it and whatever its name: content decides.

    Args:
      path: a file of PyTorch's or several, one a rank; an ``.xplane.pb`` file; or a folder of either. See `read_kineto`
        and `read_xplane`.
      rules: of your own, tried before the tables of this package; see `profiling.classify.rules`.

    Raises:
      ValueError: no such file or folder, none that can be read, or both kinds at once; the file is named.
    """
    paths = [pathlib.Path(each) for each in ([path] if isinstance(path, (str, os.PathLike)) else path)]
    for each in paths:
        if not each.exists():
            raise ValueError(f"{each}: there is no such file or folder")
    profiles = {each: found for each in paths if (found := _profile(each))}
    traces = {each: found for each in paths if (found := _torch(each))}
    if profiles and traces:
        raise ValueError(
            f"{next(iter(profiles))}: of jax.profiler ({next(iter(profiles.values()))}), but there are traces of "
            f"PyTorch as well ({next(iter(traces.values()))}): name the files or the folder of one of them"
        )
    if profiles:
        if len(paths) > 1:
            raise ValueError(f"{paths[0]} and {len(paths) - 1} more: of jax.profiler; name one folder with all of them")
        return read_xplane(paths[0], rules=rules)
    if not traces and paths and all(each.is_dir() for each in paths):
        raise ValueError(
            f"{paths[0]}: there is neither a PyTorch trace (.json, packed or not) nor a profile of jax.profiler "
            "(.xplane.pb) in it; name the folder that was profiled into"
        )
    return read_kineto(paths, rules)


def _profile(path: pathlib.Path) -> str | None:
    """The name of a profile of `jax.profiler` at or below a path."""
    if path.is_dir():
        return next((file.name for file in sorted(path.rglob("*.xplane.pb*"))), None)
    source = Source(path, str(path))
    return path.name if is_xspace(source.head(), path.name.removesuffix(".gz")) else None


def _torch(path: pathlib.Path) -> str | None:
    """The name of a trace that may be PyTorch's at a path or in its folder; JAX writes one beside its profile."""
    if path.is_dir():
        found = folder(path)[0]
        beside = {file.parent for file in path.rglob("*.xplane.pb*")}
        found = [source for source in found if source.path.parent not in beside]
        if beside:
            # Notes of runs and programs lie in such folders, too.
            found = [source for source in found if b'"traceEvents"' in source.head()]
        return next((source.label for source in found), None)
    return None if _profile(path) else next((source.label for source in sources(path)), None)
