"""Values of a Kineto file, any of which may have a wrong type."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any


def integer(value: Any) -> int | None:
    """A whole number of 64 bits, given as a number or as text, decimal or hexadecimal; None for anything else.

    >>> integer("0x1f"), integer(7.0), integer("12"), integer([1]), integer(1.5), integer(True), integer(2**70)
    (31, 7, 12, None, None, None, None)
    """
    if isinstance(value, str):
        text = value.strip()
        try:
            value = int(text, 16 if text.lower().startswith("0x") else 10) if len(text) < 40 else None
        except ValueError:
            try:
                value = float(text)
            except ValueError:
                return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if -(2**63) <= value < 2**63 else None


def short(name: str, most: int = 60) -> str:
    """A kernel's name, shortened for a sentence."""
    return name if len(name) <= most else name[: most - 1] + "…"


def arguments(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of an event; empty if they are no object."""
    args = item.get("args")
    return args if isinstance(args, dict) else {}


def thread_of(item: Mapping[str, Any]) -> tuple[str, str]:
    """Process and thread of an event."""
    return str(item.get("pid")), str(item.get("tid"))


def microseconds(value: Any) -> float | None:
    """A finite number of microseconds; None for anything else."""
    try:
        time = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return time if math.isfinite(time) and not isinstance(value, bool) else None


def last_number(name: Any) -> int:
    """The last number in a name; 0 if it has none."""
    if isinstance(name, int):
        return int(name)
    found = re.findall(r"\d{1,18}", str(name))
    return int(found[-1]) if found else 0
