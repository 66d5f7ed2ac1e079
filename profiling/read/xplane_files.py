"""Finds the files of one profile of `jax.profiler` and reads their bytes, clocks and notes.

Every process writes one file, LOG/plugins/profile/SESSION/HOST.xplane.pb. SESSION is the second in which it began, or a
session's id.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any

from profiling.read.file_kinds import file_kind
from profiling.read.trace_files import read_unpacked
from profiling.read.wire import messages
from profiling.read.xspace import plane_name, read_plane

SIDECAR = "capture.json"
"""The file that `profiling.capture` writes beside a profile: its devices and their pipeline ranks."""

SUFFIXES = (".xplane.pb", ".xplane.pb.gz")
ONE_JOB = 60
"""Seconds within which sessions of one job's processes begin, if each process has only one."""

_TIME = re.compile(r"\d{4}(_\d\d){5}")
_TASK = "Task Environment"


@dataclasses.dataclass(frozen=True)
class Clock:
    """When a process profiled, in nanoseconds of the epoch; None if the file does not say."""

    start_ns: int | None = None
    stop_ns: int | None = None


def find_profile(path: pathlib.Path) -> tuple[list[pathlib.Path], list[str]]:
    """Finds the files of the newest profile below a folder, one of every process, and notes on other profiles.

    The files are in the order of the names of their log folders and hosts; node9 comes before node10.

    Raises:
      ValueError: there is no profile.
    """
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    if path.is_file():
        is_session = path.parent.parent.name == "profile"
        others = [file for file in _profiles(path.parent.iterdir()) if file != path] if is_session else []
        return [path], [f"{path.name} alone was read; its session has {_count(others, 'more file')}"] if others else []
    files = _profiles(path.rglob("*"))
    if not files:
        raise ValueError(f"{path}: there is no *.xplane.pb file here or below{_instead(path)}")
    sessions: dict[str, list[pathlib.Path]] = collections.defaultdict(list)
    for file in files:
        sessions[file.parent.name].append(file)
    names = sorted(sessions, reverse=True)
    chosen, taken = sessions[names[0]], [names[0]]
    for name in names[1:]:
        if not _began_together(name, names[0]) or not all(_fits(file, chosen) for file in sessions[name]):
            break
        chosen = chosen + sessions[name]
        taken.append(name)
    notes = []
    if len(taken) > 1:
        notes.append(f"sessions {', '.join(sorted(taken))} began within {ONE_JOB} s and are read as one job's")
    if left := [name for name in names if name not in taken]:
        shown = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        notes.append(
            f"the newest of {len(left) + 1} profiles was read, {', '.join(sorted(taken))}, and not {shown}: to read "
            "another give its own folder"
        )
    return sorted(chosen, key=_order), notes


def read_bytes(file: pathlib.Path) -> bytes:
    """The bytes of a profile, unpacked if they are compressed with gzip.

    Raises:
      ValueError: the file is empty, is no profile or cannot be unpacked; the message names it and says what to do.
    """
    data = read_unpacked(file)
    try:
        names = [plane_name(plane) for plane in messages(data, 1)]
    except ValueError as error:
        names, why = [], f"damaged or cut short: {error}"
    else:
        why = "without a plane: the profiler wrote nothing into it"
    if any(names):
        return data
    kind = file_kind(data)
    if kind == "empty":
        raise ValueError(
            f"{file}: this is no profile, the file is empty: let the program end its trace, and copy again"
        )
    if kind == "a Chrome trace in JSON":
        raise ValueError(
            f"{file}: this is no profile of jax.profiler but {kind}: PyTorch's is read by profiling.read_kineto; "
            "beside one of JAX stands the *.xplane.pb to give"
        )
    if kind != "binary data":
        raise ValueError(f"{file}: this is no profile of jax.profiler but {kind}: give a *.xplane.pb or its folder")
    raise ValueError(f"{file}: this is no profile of jax.profiler, or it is {why}; copy or record it again")


def clock(data: bytes) -> Clock:
    """When the process profiled."""
    for found in messages(data, 1):
        if plane_name(found) == _TASK:
            plane = read_plane(found, collections.Counter())
            start, stop = (plane.stats.get(f"profile_{edge}_time") for edge in ("start", "stop"))
            return Clock(start if isinstance(start, int) else None, stop if isinstance(stop, int) else None)
    return Clock()


def sidecar(file: pathlib.Path) -> dict[str, Any]:
    """What the capture noted in the folder of the session or in the log folder; empty if there is no note.

    Raises:
      ValueError: the note is damaged.
    """
    for folder in file.parents[:4]:
        note = folder / SIDECAR
        if note.is_file():
            try:
                known = json.loads(note.read_text(encoding="utf-8"))
                parts = [known.get(part, {}) for part in ("devices", "ranks", "metadata")]
                [int(a) + int(b) for part in parts[:2] for a, b in part.items()]
                dict(parts[2])
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{note}: damaged ({error}): mend or remove what profiling.capture wrote") from None
            return known
    return {}


def host_of(file: pathlib.Path) -> str:
    """The name of the host in the name of the file."""
    return re.sub(r"(?i)\.xplane\.pb(\.gz)?$", "", file.name)


def _is_profile(file: pathlib.Path) -> bool:
    return file.name.lower().endswith(SUFFIXES)


def _profiles(files: Any) -> list[pathlib.Path]:
    """The profiles among files. Of one that lies there both packed and unpacked, the unpacked file counts."""
    found = sorted(file for file in files if _is_profile(file) and file.is_file())
    return [file for file in found if not (file.suffix.lower() == ".gz" and file.with_suffix("") in found)]


def _log(file: pathlib.Path) -> pathlib.Path:
    """The log folder, which the profiler was given."""
    session = file.parent
    is_usual = session.parent.name == "profile" and session.parent.parent.name == "plugins"
    return session.parent.parent.parent if is_usual else session


def _order(file: pathlib.Path) -> tuple[Any, ...]:
    return _natural(str(_log(file))), _natural(host_of(file)), str(file)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _began_together(a: str, b: str) -> bool:
    if not (_TIME.fullmatch(a) and _TIME.fullmatch(b)):
        return False
    try:
        times = [time.mktime(time.strptime(name, "%Y_%m_%d_%H_%M_%S")) for name in (a, b)]
    except ValueError:
        return False
    return abs(times[0] - times[1]) <= ONE_JOB


def _fits(file: pathlib.Path, chosen: Sequence[pathlib.Path]) -> bool:
    """Whether a file may be of the same job as others: it is of another host, or was written at the same time."""
    return all(_at_once(file, other) for other in chosen if host_of(other) == host_of(file))


def _at_once(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Whether two profiles of one host were taken at once. If they do not say when, separate log folders tell."""
    first, second = (clock(read_bytes(file)) for file in (a, b))
    if None in (first.start_ns, first.stop_ns, second.start_ns, second.stop_ns):
        return _log(a) != _log(b)
    return max(first.start_ns or 0, second.start_ns or 0) < min(first.stop_ns or 0, second.stop_ns or 0)


def _instead(path: pathlib.Path) -> str:
    traces = [file.name for file in path.iterdir() if file.is_file() and re.search(r"(?i)\.json(\.\w+)?$", file.name)]
    if traces:
        return f", but {traces[0]}: Chrome traces are read by profiling.read_kineto"
    return "; give the folder that jax.profiler.start_trace was given, after the trace has ended"


def _count(found: Sequence[Any], noun: str) -> str:
    return f"{len(found)} {noun}{'s' * (len(found) != 1)}"
