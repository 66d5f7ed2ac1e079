"""Quantisation on Hopper GPUs."""

from __future__ import annotations

from typing import Any


def why_not(*operands: Any) -> str:
    """Why no kernel takes such operands."""
    return f"there is no kernel for operands of shape {operands[0].shape}"
