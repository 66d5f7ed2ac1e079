"""Finds the file of a compiled program and joins its lines into statements."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

from profiling.read.file_kinds import file_kind
from profiling.read.trace_files import read_unpacked

INSTRUCTION = re.compile(r"\s+(ROOT )?%?([^\s=]+) = ")
COMPUTATION = re.compile(r"(ENTRY )?%?([^\s(]+) (?:\(.*)?\{\s*$", re.DOTALL)
END = re.compile(r"\}(, [a-z_]+=.*)?\s*(//.*)?$")
_HEADER = re.compile(r"(ENTRY )?%?[^\s(=,]+ ?(\(|\{\s*$)")
_PAIRS = ("()", "[]", "{}")
_PAIR_OF = {closing: opening for opening, closing in _PAIRS}
_MARK = re.compile(r'\\.|["()\[\]{}]')

_DUMPED = "after_optimizations.txt"
_REMEDY = "give what compiled.as_text() returns, or *after_optimizations.txt of XLA's dumps"
_REMEDIES = {
    "MLIR text, StableHLO for instance": "that is what lowered.as_text() returns, which no schedule is made of yet: "
    "give compiled.as_text(), as in jax.jit(f).lower(...).compile().as_text()",
    "binary data": "if it is a dump such as *.hlo.pb, " + _REMEDY,
    "a Chrome trace in JSON": "traces are for `python -m profiling report`; " + _REMEDY,
}


def find_text(path: str | os.PathLike[str]) -> tuple[pathlib.Path, str]:
    """The file of a program, and why it was chosen: the largest compiled program in a folder of XLA's dumps.

    XLA_FLAGS=--xla_dump_to=FOLDER makes such a folder; programs are the files ``*after_optimizations.txt``, or .gz.

    Raises:
      ValueError: the file does not exist, or the folder has no program.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    if not path.is_dir():
        return path, ""
    found = [file for file in path.iterdir() if file.name.lower().removesuffix(".gz").endswith(_DUMPED)]
    if not found:
        raise ValueError(
            f"{path}: the folder has no *{_DUMPED}: dump the compiled program with "
            "XLA_FLAGS='--xla_dump_to=FOLDER --xla_dump_hlo_as_text', or give a file with compiled.as_text()"
        )
    largest = max(found, key=lambda file: (file.stat().st_size, file.name))
    return largest, f"{largest.name} was read, the largest of {len(found)} compiled programs in {path}"


def read_text(file: pathlib.Path) -> str:
    """The text of a file, compressed with gzip or not.

    Raises:
      ValueError: the file holds no HLO; the message names it and says what it is and what to do.
    """
    data = read_unpacked(file)
    kind = file_kind(data)
    if kind != "the text of an HLO module":
        raise ValueError(f"{file}: this is no text of an HLO module but {kind}; {_REMEDIES.get(kind, _REMEDY)}")
    return data.decode("utf-8", "replace")


def statements(lines: Iterable[str]) -> Iterator[str]:
    """Headers, instructions and ends of computations, each as one text, on however many lines it stands.

    Raises:
      ValueError: a statement does not end, or a bracket closes another.
    """
    pending: list[str] = []
    opened = ""
    for line in lines:
        if not line.strip() or (line.lstrip().startswith("//") and not opened.endswith('"')):
            continue
        if not opened:
            if END.match(line):
                yield from _joined(pending)
                yield line
                pending = []
                continue
            if INSTRUCTION.match(line) or _HEADER.match(line):
                yield from _joined(pending)
                pending = []
            elif not pending:
                continue  # tables of file names and stack frames
        pending.append(line)
        opened = opened_by(line, opened)
        if opened == "{" and COMPUTATION.match("\n".join(pending)):
            yield from _joined(pending)
            pending, opened = [], ""
    if opened:
        raise ValueError(f"no {opened[-1]!r} closes in {pending[0].strip()[:80]!r}: the text is cut off or damaged")
    yield from _joined(pending)


def _joined(lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield "\n".join(lines)


def opened_by(line: str, opened: str) -> str:
    """The brackets, and perhaps the quote, that are open after a line, given those that were open before it."""
    if not opened.endswith('"') and '"' not in line and all(line.count(a) == line.count(b) for a, b in _PAIRS):
        return opened
    for match in _MARK.finditer(line):
        mark = match[0]
        if opened.endswith('"'):
            opened = opened[:-1] if mark == '"' else opened
        elif mark in '"([{':
            opened += mark
        elif mark in _PAIR_OF:
            if not opened.endswith(_PAIR_OF[mark]):
                raise ValueError(f"no bracket closes before {mark!r} in {line.strip()[:80]!r}: the text is damaged")
            opened = opened[:-1]
    return opened
