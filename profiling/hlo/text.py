"""Parses the text of a compiled program, XLA's HLO: computations with their instructions in the scheduled order.

The text is what `compiled.as_text()` returns, or `*after_optimizations.txt` of a dump.
"""

from __future__ import annotations

import dataclasses
import functools
import graphlib
import json
import math
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from profiling.hlo.lines import COMPUTATION, END, INSTRUCTION, find_text, opened_by, read_text, statements

_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"|[()\[\]{},]', re.DOTALL)
_COMMENT = re.compile(r'("(?:[^"\\]++|\\.)*+")|/\*.*?\*/|//[^\n]*', re.DOTALL)
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([^\]]*)\](\{[^}]*\})?")
_OPCODE = re.compile(r"\s*([a-z][a-z0-9-]*)\(")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_BITS = re.compile(r"(?:bf|[sufc])(\d+)")
_CALLED = ("calls", "to_apply", "body", "condition", "branch_computations", "true_computation", "false_computation",
           "called_computations")  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Array:
    """An array's type.

    Attributes:
      dtype: name of the type in XLA, such as "bf16" or "f8e4m3fn".
      dims: sizes; a bounded dynamic size counts as its bound.
      layout: text between the braces, such as "1,0".

    >>> Array("bf16", (8, 128)).bytes
    2048
    """

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def elements(self) -> int:
        """The number of elements; 1 for a scalar."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """The bytes in memory, unpadded; 0 for tokens and opaque values."""
        if self.dtype == "pred":
            return self.elements
        match = _BITS.match(self.dtype)
        return math.ceil(self.elements * int(match[1]) / 8) if match else 0


Shape = Array | tuple["Shape", ...]
"""An array, or a tuple of shapes."""


def arrays(shape: Shape) -> tuple[Array, ...]:
    """The arrays of a shape from left to right.

    >>> [a.dtype for a in arrays(((Array("bf16", ()),), Array("f32", ())))]
    ['bf16', 'f32']
    """
    return (shape,) if isinstance(shape, Array) else tuple(a for part in shape for a in arrays(part))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: without the percent sign.
      opcode: such as "fusion" or "all-to-all-start".
      shape: of the result.
      operands: names of instructions of the same computation.
      literal: text in the parentheses instead of operands: a parameter's number or a constant's value.
      attributes: attributes as text: {"dimensions": "{0}", ...}.
      is_root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    shape: Shape
    operands: tuple[str, ...] = ()
    literal: str = ""
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    is_root: bool = False

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result."""
        return arrays(self.shape)

    @functools.cached_property
    def op_name(self) -> str:
        """The path of named scopes that it was traced under; "" if unknown."""
        match = _OP_NAME.search(self.attributes.get("metadata", ""))
        return match[1] if match else ""

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it calls."""
        texts = (self.attributes[key] for key in _CALLED if key in self.attributes)
        return tuple(name.strip().lstrip("%") for text in texts for name in split(text.strip("{}")))

    @property
    def target(self) -> str:
        """The target of a custom call; "" for any other instruction."""
        return self.attributes.get("custom_call_target", "").strip('"')

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """The compiler's backend_config if it is JSON, otherwise empty."""
        text = self.attributes.get("backend_config", "")
        if not text.startswith('{"'):
            return {}
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return {}

    @property
    def trip_count(self) -> int | None:
        """How often a while loop runs; None if the compiler does not know."""
        known = self.config.get("known_trip_count", {}).get("n")
        return None if known is None else int(known)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(source, target) devices of a collective-permute, a send or a receive."""
        text = self.attributes.get("source_target_pairs", "")
        text = text or self.attributes.get("frontend_attributes", "").partition("source_target_pairs=")[2]
        return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", text))


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run.

    Attributes:
      name: without the percent sign.
      instructions: all of them.
    """

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def index(self) -> Mapping[str, int]:
        """The position of each instruction."""
        return {instruction.name: i for i, instruction in enumerate(self.instructions)}

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[self.index[name]]

    def operands(self, instruction: Instruction) -> tuple[Instruction, ...]:
        """The operands of an instruction of this computation."""
        return tuple(self[name] for name in instruction.operands)

    @functools.cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """The instructions that take the result of each one."""
        users: dict[str, list[Instruction]] = {instruction.name: [] for instruction in self.instructions}
        for instruction in self.instructions:
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
        return {name: tuple(found) for name, found in users.items()}

    @property
    def root(self) -> Instruction:
        """The instruction whose result is that of the computation."""
        return next(i for i in reversed(self.instructions) if i.is_root)


@dataclasses.dataclass(frozen=True)
class Module:
    """A program of one device.

    Attributes:
      name: of the module.
      is_scheduled: whether the order of the text is the order in which it runs.
      devices: how many devices run it.
      entry: the computation that runs first.
      computations: all of them, by name.
    """

    name: str
    is_scheduled: bool
    devices: int
    entry: str
    computations: Mapping[str, Computation]

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]

    def called(self, instruction: Instruction) -> tuple[Computation, ...]:
        """The computations that an instruction calls, without reductions that an excerpt leaves out."""
        return tuple(self.computations[name] for name in instruction.called if name in self.computations)


def split(text: str) -> list[str]:
    """Splits a text at the commas that stand in no bracket and no quotes.

    >>> split("a, f(b, c), {d, e}")
    ['a', ' f(b, c)', ' {d, e}']
    """
    parts, depth, start = [], 0, 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in "([{":
            depth += 1
        elif token in ")]}":
            depth -= 1
        elif token == "," and depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]] if text[start:].strip() else parts


def _close(text: str, start: int) -> int:
    """The position at which the bracket at `start` closes."""
    depth = 0
    for match in _TOKEN.finditer(text, start):
        depth += (match[0] in "([{") - (match[0] in ")]}")
        if depth == 0:
            return match.start()
    raise ValueError(f"no bracket closes {text[start : start + 60]!r}: the text is cut off")


def _array(text: str) -> Array:
    match = _ARRAY.match(text.strip())
    if not match:
        raise ValueError(f"{text[:60]!r} is no type: the text is damaged, or its XLA prints types in a new way")
    dims = (int(re.sub(r"\D", "", size) or 0) for size in match[2].split(",") if size.strip())
    return Array(match[1], tuple(dims), (match[3] or "").strip("{}"))


def _shape(text: str) -> Shape:
    text = text.strip()
    return tuple(_shape(part) for part in split(text[1:-1])) if text.startswith("(") else _array(text)


def _instruction(line: str, match: re.Match[str]) -> Instruction:
    start = match.end()
    if line.startswith("(", start):
        end = _close(line, start) + 1
    else:
        found = _ARRAY.match(line, start)
        end = found.end() if found else start
    opcode = _OPCODE.match(line, end)
    if not opcode:
        raise ValueError(f"{line.strip()[:100]!r} is no instruction: the text is damaged")
    close = _close(line, opcode.end() - 1)
    inside = line[opcode.end() : close]
    has_operands = opcode[1] not in ("parameter", "constant", "iota")
    attributes = (part.strip().partition("=") for part in split(line[close + 1 :]))
    return Instruction(
        name=match[2],
        opcode=opcode[1],
        shape=_shape(line[start:end]),
        operands=tuple((part.split() or [""])[-1].lstrip("%") for part in split(inside)) if has_operands else (),
        literal="" if has_operands else inside,
        attributes={key: value for key, _, value in attributes},
        is_root=bool(match[1]),
    )


def _computations(statements: Iterator[str]) -> Iterator[tuple[bool, Computation]]:
    for statement in statements:
        header = COMPUTATION.match(statement)
        if not header:
            continue
        found: list[Instruction] = []
        for statement in statements:
            if END.match(statement):
                break
            if "/*" in statement or "//" in statement:
                statement = _COMMENT.sub(lambda match: match[1] or "", statement)
            if match := INSTRUCTION.match(statement):
                found.append(_instruction(statement, match))
        else:
            raise ValueError(f"computation {header[2]!r} has no end: the text is cut off")
        if not found:
            raise ValueError(f"computation {header[2]!r} has no instruction: the text is damaged")
        if not any(instruction.is_root for instruction in found):
            found[-1] = dataclasses.replace(found[-1], is_root=True)  # old printers leave ROOT out
        yield bool(header[1]), Computation(header[2], tuple(found))


def parse(text: str) -> Module:
    """Parses the text of a module.

    Args:
      text: `compiled.as_text()` of a program that was compiled for CPUs or GPUs, on any machine.

    Raises:
      ValueError: the text is no HLO module or is damaged; the message shows where.

    >>> module = parse('''HloModule small, is_scheduled=true, num_partitions=2
    ... ENTRY %main (p: f32[4]) -> f32[4] {
    ...   %p = f32[4]{0} parameter(0)
    ...   ROOT %sum = f32[4]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
    ... }''')
    >>> module.devices, module["main"].root.opcode, module["main"].root.operands
    (2, 'all-reduce', ('p',))
    """
    if re.match(r"\s+HloModule ", text):
        text = textwrap.dedent(text)
    starts = [match.start() for match in re.finditer(r"^HloModule ", text, re.MULTILINE)]
    if not starts:
        raise ValueError(f"no HLO module in the text {text[:60]!r}...: give what compiled.as_text() returns")
    if len(starts) > 1:
        raise ValueError(f"{len(starts)} HLO modules in one text: give the text of one of them")
    lines = iter(text[starts[0] :].split("\n"))
    header, opened = "", ""
    for line in lines:
        header, opened = f"{header}{line}\n", opened_by(line, opened)
        if not opened and not line.rstrip().endswith(","):
            break
    name, *rest = split(header[len("HloModule ") :].strip())
    facts = {key: value for key, _, value in (part.strip().partition("=") for part in rest)}
    entry, computations = "", {}
    for is_entry, computation in _computations(statements(lines)):
        if computation.name in computations:
            raise ValueError(f"computation {computation.name!r} stands there twice: the text is damaged")
        computations[computation.name] = computation
        entry = computation.name if is_entry else entry
    if not entry:
        raise ValueError(f"module {name!r} has no ENTRY computation: the text is cut off")
    is_scheduled = facts.get("is_scheduled") == "true"
    _check(computations, is_scheduled)
    return Module(
        name=name.strip(),
        is_scheduled=is_scheduled,
        devices=_count(facts, "num_partitions") * _count(facts, "replica_count"),
        entry=entry,
        computations=computations,
    )


def _count(facts: Mapping[str, str], key: str) -> int:
    text = facts.get(key, "1")
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise ValueError(f"{key}={text!r} in the module's first line is no number of devices: the text is damaged")
    return int(text)


def _check(computations: Mapping[str, Computation], is_scheduled: bool) -> None:
    """Raises ValueError if instructions take or call what does not exist, or call each other in a ring."""
    calls: dict[str, set[str]] = {}
    for name, computation in computations.items():
        calls[name] = set()
        for i, instruction in enumerate(computation.instructions):
            last = i if is_scheduled else len(computation.instructions)
            missing = [operand for operand in instruction.operands if computation.index.get(operand, last) >= last]
            if instruction.opcode == "call" or "to_apply" not in instruction.attributes:
                missing += [called for called in instruction.called if called not in computations]
            if missing:
                raise ValueError(
                    f"{instruction.name!r} in computation {name!r} needs {missing[0]!r}, which is not there before: "
                    "the text is damaged or cut off"
                )
            calls[name].update(called for called in instruction.called if called in computations)
        if len(computation.index) < len(computation.instructions):
            raise ValueError(f"computation {name!r} has two instructions of one name: the text is damaged")
    try:
        tuple(graphlib.TopologicalSorter(calls).static_order())
    except graphlib.CycleError as error:
        raise ValueError(f"computations call each other in a ring, {error.args[1]}: the text is damaged") from None


def read(path: str | os.PathLike[str]) -> Module:
    """Reads the module in a file, compressed with gzip or not, or in a folder of XLA's dumps; see `find_text`.

    Raises:
      ValueError: the file holds no HLO module or a damaged one; the message names it and says what it is.
    """
    file, _ = find_text(path)
    text = read_text(file)
    try:
        return parse(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from error
