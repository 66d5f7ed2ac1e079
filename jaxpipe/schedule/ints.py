"""The one check that all builders make of their arguments."""

from __future__ import annotations


def at_least(schedule: str, name: str, value: int, minimum: int) -> None:
    """Raises ValueError unless ``value`` is an int of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{schedule} with {name}={value!r}: it must be an integer of at least {minimum}")
