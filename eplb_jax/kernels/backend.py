"""What a program is being traced for, and what a backend of kernels must say and do."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Protocol

import jax

HOPPER_SMS = 132
"""Multiprocessors of an H100 or H200 as modules; cards have fewer."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
      platform: "gpu", "cpu" or "tpu"; "" where a mesh does not say.
      kind: the device's name.
      cores: multiprocessors of a GPU.
      hopper: whether it is a GPU of compute capability 9.0.
    """

    platform: str
    kind: str
    cores: int
    hopper: bool


def current_target() -> Target:
    """The device that the program in hand will run on, as far as tracing can know.

    A mesh in scope (``jax.set_mesh``, `jax.shard_map`) decides, also one of a topology that is only compiled for
    (``jax.experimental.topologies``); otherwise ``jax_default_device`` or the first device.

    >>> current_target().hopper or current_target().platform != "gpu" or "other GPU"
    True
    """
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        kind = abstract.device_kind
        hopper = bool(re.search(r"\b(G?H[12]00|H800|H20)\b", kind))
        return Target("gpu" if hopper else "", kind, abstract.num_cores or HOPPER_SMS, hopper)
    device: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(device, jax.Device):
        device = jax.devices(device)[0]
    hopper = device.platform == "gpu" and str(getattr(device, "compute_capability", "")) == "9.0"
    return Target(device.platform, device.device_kind, getattr(device, "core_count", None) or HOPPER_SMS, hopper)


class KernelBackend(Protocol):
    """Kernels that do what XLA can do, faster, on one kind of device; a line of `eplb_jax.kernels.registry.BACKENDS`.

    XLA's form of each operation is what the kernels must agree with, for values and for gradients. The tasks and their
    operations: "grouped_matmul" with "matmul", "outer" and "added_outer"; "scaled_matmul" with one of the same name;
    "scaled_outer" with that and "added_scaled_outer"; "move_rows" with "copy_rows" and "add_rows"; "gate_gradient" with
    "gated_backward"; "quantise" with "quantise_rows", "quantise", "columns_of" and "quantise_weights"; "scaled_gate"
    with "gate" and "gate_backward"; "attend_latents" with one of the same name. Those that add write over their last
    operand, a float32 total.
    """

    @property
    def platform(self) -> str:
        """The platform that its programs are lowered for, as `jax.lax.platform_dependent` names it."""
        ...

    def why_not(self, task: str, device: Target, *operands: Any) -> str | None:
        """What keeps the kernels from a task for operands of these shapes and dtypes; None where nothing does."""
        ...

    def kernel(self, name: str) -> Callable[..., Any]:
        """The function of an operation, which takes what XLA's form takes."""
        ...
