"""Captures profiles of steps, and the facts that the readers need beside them."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import time
import warnings
from collections.abc import Iterator, Mapping

import jax

from profiling.read.xplane_files import SIDECAR

COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="


@contextlib.contextmanager
def capture(
    folder: str | pathlib.Path,
    *,
    ranks: Mapping[int, int] | None = None,
    session: str | None = None,
    host_level: int = 1,
) -> Iterator[pathlib.Path]:
    """Profiles everything that runs within the context. Let the last step end on the devices before the context does.

    Args:
      folder: folder to write into. Each process writes a folder of its own, ``proc0`` and so on.
      ranks: pipeline rank of each device; see `profiling.read.pipeline.pipeline_ranks`.
      session: name of this profile, the same in all processes; None stands for the time, with a single process only.
      host_level: level of host tracing, at least 1: below that XLA reports no operation of a CPU device.

    Yields:
      The folder of this process.

    Raises:
      ValueError: host_level below 1, or several processes without a session's name.

    Warns:
      UserWarning: command buffers are on, on a GPU. They hide which operation a kernel belongs to. This function sets
        no flag, because XLA reads its flags only once, before the first computation.

    >>> import jax.numpy as jnp, tempfile
    >>> from profiling.read.xplane import read_xplane
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with capture(folder):
    ...         _ = jax.block_until_ready(jax.jit(jnp.sin)(jnp.ones(8)))
    ...     trace = read_xplane(folder)
    >>> trace.source, any("sin" in event.scope for event in trace.events)
    ('xplane', True)
    """
    if host_level < 1:
        raise ValueError(f"host_level={host_level}: below 1 a profile holds no operation of a CPU device")
    if session is None:
        if jax.process_count() > 1:
            raise ValueError(
                f"{jax.process_count()} processes: give all of them the same session, or each names the profile after "
                "its own clock and they are not found together"
            )
        session = time.strftime("%Y_%m_%d_%H_%M_%S")
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.default_backend() == "gpu" and COMMAND_BUFFERS not in flags.split():
        warnings.warn(
            f"command buffers hide which HLO operation a kernel belongs to: set XLA_FLAGS={COMMAND_BUFFERS} before jax "
            "starts to profile, and leave it out to train",
            stacklevel=3,
        )
    mine = pathlib.Path(folder) / f"proc{jax.process_index()}"
    mine.mkdir(parents=True, exist_ok=True)
    (mine / SIDECAR).write_text(json.dumps(_facts(flags, ranks or {}), indent=1), encoding="utf-8")
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = host_level
    options.session_id = session
    with jax.profiler.trace(str(mine), profiler_options=options):
        yield mine


def annotate_step(number: int, name: str = "step") -> jax.profiler.StepTraceAnnotation:
    """Marks a step on the host's track; use it in ``with``.

    The host runs ahead of the devices, so take the devices' times from their events.
    """
    return jax.profiler.StepTraceAnnotation(name, step_num=number)


def _facts(flags: str, ranks: Mapping[int, int]) -> dict[str, object]:
    local = jax.local_devices()
    return {
        # The profiler numbers a machine's GPUs as the driver does, though a process may use but some of them.
        "devices": {
            str(i if device.local_hardware_id is None else device.local_hardware_id): device.id
            for i, device in enumerate(local)
        },
        "ranks": {str(device): rank for device, rank in ranks.items()},
        "metadata": {
            "chip": local[0].device_kind,
            "platform": local[0].platform,
            "process": jax.process_index(),
            "jax": jax.__version__,
            "xla_flags": flags,
        },
    }
