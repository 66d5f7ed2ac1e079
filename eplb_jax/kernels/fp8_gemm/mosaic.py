"""The products of scaled 8-bit numbers by our own kernels for Hopper GPUs."""

from __future__ import annotations

from typing import Any


def why_not(lhs: Any, rhs: Any) -> str | None:
    """Why the kernels do not take numbers of these shapes; None if they do."""
    return f"no kernel takes lhs {lhs.shape} and rhs {rhs.shape}"
