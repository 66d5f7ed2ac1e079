"""Who runs what: the table of backends, and the choice between them and XLA, which runs everything everywhere."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from eplb_jax.kernels.backend import KernelBackend, current_target
from eplb_jax.kernels.fallback import log_fallback
from eplb_jax.kernels.hopper import Hopper
from eplb_jax.kernels.mesh_axis import explicit_axes, varying

Backend = str
"""What a user asks for: "auto", "xla" or a name of `BACKENDS`."""

BACKENDS: dict[str, KernelBackend] = {"mosaic": Hopper()}
"""By name, those that "auto" prefers first. XLA, which runs everywhere, is none of them."""


class KernelTask(NamedTuple):
    """Operations that one backend runs all of, and what is said where it cannot.

    Attributes:
      verb: what a backend cannot do, for the error.
      fallback: what the log says where a GPU gets XLA's form without being asked for it.
    """

    verb: str
    fallback: str


TASKS = {
    "grouped_matmul": KernelTask("run this", "grouped_matmul runs on XLA's ragged dot, which is slow on GPUs"),
    "scaled_matmul": KernelTask("multiply these", "products in FP8 run on XLA, which makes them in float32"),
    "scaled_outer": KernelTask("multiply these", "weight gradients in FP8 run on XLA, which makes them in float32"),
    "move_rows": KernelTask("move these rows", "rows are moved by XLA's fusions, not by our kernels"),
    "gate_gradient": KernelTask(
        "make the gate's gradient", "the gate's gradient is made by XLA's fusions, not by our kernel"
    ),
    "quantise": KernelTask("quantise this", "numbers of 8 bits are made by XLA's fusions, not by our kernels"),
    "scaled_gate": KernelTask(
        "gate these rows in 8 bits", "rows of 8 bits are gated by XLA's fusions, not by our kernels"
    ),
    "attend_latents": KernelTask(
        "attend to these latents", "attention over caches of latents runs on XLA, which reads them twice"
    ),
}

logger = logging.getLogger(__name__)


class ChosenBackend(NamedTuple):
    """Who runs a task; hashable, so static.

    Attributes:
      backend: a name of `BACKENDS`, or "xla".
      only: whether the kernels run whatever the program is lowered for; otherwise XLA's form runs elsewhere.
    """

    backend: str
    only: bool = False


XLA = ChosenBackend("xla")


def choose(task: str, backend: str, *operands: Any) -> ChosenBackend:
    """Who runs a task on the device that the program in hand is for.

    Args:
      task: a name of `TASKS`.
      backend: what was asked for: "auto", "xla" or a name of `BACKENDS`.
      operands: arrays, or what has their shapes and dtypes.

    Raises:
      ValueError: an unknown backend; one that cannot run the task.

    >>> choose("grouped_matmul", "xla")
    ChosenBackend(backend='xla', only=False)
    """
    if backend not in ("auto", "xla", *BACKENDS):
        *names, last = (f'"{name}"' for name in ("auto", "xla", *BACKENDS))
        raise ValueError(f"backend={backend!r}: it must be {', '.join(names)} or {last}")
    if backend == "xla":
        return XLA
    device, reasons, axes = current_target(), [], explicit_axes(*operands)
    for name in BACKENDS if backend == "auto" else (backend,):
        reason = BACKENDS[name].why_not(task, device, *operands)
        if reason is None and axes:
            reason = f"the operands are sharded over {', '.join(axes)}, of type Explicit, outside of jax.shard_map"
        if reason is None:
            return ChosenBackend(name, only=backend != "auto")
        reasons.append(reason)
    if backend != "auto":
        verb = TASKS[task].verb
        raise ValueError(f'backend="{backend}" cannot {verb}: {reasons[0]}; take backend="auto" or "xla"')
    if device.platform == "gpu":
        log_fallback(logger, TASKS[task].fallback, "; ".join(reasons))
    return XLA


def dispatch(choice: ChosenBackend, name: str, by_xla: Callable[..., Any], *operands: jax.Array, **static: Any) -> Any:
    """The results of an operation on the chosen backend.

    Under `jax.vmap` a kernel runs once for each part of the batch: it fills a GPU by itself.

    Args:
      choice: from `choose`.
      name: the operation, for `KernelBackend.kernel`.
      by_xla: XLA's form of it.
      operands: arrays that either takes.
      static: keywords that either takes.
    """
    xla = varying(functools.partial(by_xla, **static))
    if choice.backend == "xla":
        return xla(*operands)
    backend = BACKENDS[choice.backend]
    kernel = functools.partial(backend.kernel(name), **static)
    kernel = varying(jax.custom_batching.sequential_vmap(kernel))
    if choice.only:
        return kernel(*operands)
    return jax.lax.platform_dependent(*operands, default=xla, **{backend.platform: kernel})
