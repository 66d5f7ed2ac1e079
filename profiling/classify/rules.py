"""Rules that say what an event does, and files of a user's own rules."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from typing import Any

from profiling.event import GROUPS

FIELDS = ("name", "function", "kernel", "hlo_op", "scope", "phase", "lane")
"""What a rule may search. "name" is the whole name that the profiler gave. "function" is the function in it, without
template arguments, return type and parameters. "kernel" is the function followed by its template arguments in angle
brackets if it only runs them, as ``cutlass::Kernel2`` does. The others are fields of the event."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule: events whose field contains the pattern are of this kind.

    Attributes:
      pattern: regular expression, searched for anywhere in the field; ``^`` and ``$`` bind it to the ends.
      kind: what such an event does, such as "grouped GEMM".
      group: what its time counts as: "compute", "transfer", "wait", "unclassified" or "control"; see `Event`.
      field: what is searched: "name" (as the profiler gave it), "function" (the name without template arguments,
        return type and parameters), "kernel" (the function, with template arguments if it only runs them), "hlo_op",
        "scope", "phase" or "lane".

    Raises:
      ValueError: the group or the field does not exist, or the pattern is no regular expression.

    >>> Rule(r"^my_all_to_all", "all-to-all", "transfer").group
    'transfer'
    """

    pattern: str
    kind: str
    group: str
    field: str = "name"

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"Rule(group={self.group!r}): choose one of {', '.join(GROUPS)}")
        if self.field not in FIELDS:
            raise ValueError(f"Rule(field={self.field!r}): choose one of {', '.join(FIELDS)}")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"Rule(pattern={self.pattern!r}) is no regular expression: {error}") from error


def load_rules(path: str | os.PathLike[str]) -> tuple[Rule, ...]:
    """Loads rules from a JSON file: a list of objects with "pattern", "kind" and "group", and perhaps "field".

    The first rule that matches counts, before all tables of this package.

    Raises:
      ValueError: the file does not exist, is no JSON, or has an entry that is no rule; the message names both.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "rules.json"
    >>> _ = path.write_text('[{"pattern": "^my_exchange", "kind": "all-to-all", "group": "transfer"}]')
    >>> load_rules(path)
    (Rule(pattern='^my_exchange', kind='all-to-all', group='transfer', field='name'),)
    """
    path = pathlib.Path(path)
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: the file of rules cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON ({error}); write a list of rules, {_EXAMPLE}") from error
    if not isinstance(found, list):
        raise ValueError(f"{path}: holds {_what(found)} and not a list of rules, {_EXAMPLE}")
    return tuple(_rule(f"{path}, entry {number}", entry) for number, entry in enumerate(found, 1))


_EXAMPLE = '[{"pattern": "^my_exchange", "kind": "all-to-all", "group": "transfer"}]'
_REQUIRED = ("pattern", "kind", "group")


def _rule(where: str, entry: Any) -> Rule:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: holds {_what(entry)} and not a rule, as in {_EXAMPLE}")
    if missing := [name for name in _REQUIRED if name not in entry]:
        raise ValueError(
            f"{where}: {' and '.join(missing)} missing; a rule has {', '.join(_REQUIRED)} and may have field"
        )
    if unknown := [name for name in entry if name not in (*_REQUIRED, "field")]:
        raise ValueError(f"{where}: {unknown[0]!r} is unknown; a rule has {', '.join(_REQUIRED)} and may have field")
    if wrong := [name for name, value in entry.items() if not isinstance(value, str)]:
        raise ValueError(f"{where}: {wrong[0]} is {_what(entry[wrong[0]])} and not a text")
    if empty := [name for name in ("pattern", "kind") if not entry[name]]:
        raise ValueError(f"{where}: {empty[0]} is empty, which matches or names nothing in particular")
    try:
        return Rule(**entry)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _what(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
