"""What a program is being traced for: the device of the mesh in scope, otherwise the default device."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

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


def choose_backend(
    backend: str,
    target: Callable[[], Target],
    why_not: Callable[[], str | None],
    task: str,
    tell: Callable[[str], None],
) -> str:
    """The backend of an operation that XLA and a Hopper kernel can do: "xla", "mosaic", or "either": lowering decides.

    Args:
      backend: that was asked for: "auto", "xla" or "mosaic".
      target: gives the device.
      why_not: gives what keeps the kernel from it on a Hopper GPU; None: nothing.
      task: what cannot be done, for the message.
      tell: is told why a GPU gets XLA's form without being asked for it.

    Raises:
      ValueError: an unknown backend; "mosaic" where it cannot run.
    """
    if backend not in ("auto", "xla", "mosaic"):
        raise ValueError(f'backend={backend!r}: it must be "auto", "xla" or "mosaic"')
    if backend == "xla":
        return "xla"
    device, reason = target(), why_not()
    if not device.hopper:
        reason = f"the device is {device.kind!r}, no Hopper GPU"
    if reason is None:
        return "mosaic" if backend == "mosaic" else "either"
    if backend == "mosaic":
        raise ValueError(f'backend="mosaic" cannot {task}: {reason}; take backend="auto" or "xla"')
    if device.platform == "gpu":
        tell(reason)
    return "xla"
