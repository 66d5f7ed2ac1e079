"""One process or many: how they find each other, learn that one has died, and end."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import TextIO

import jax
from jax.experimental import multihost_utils

HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as dead, and all others end."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """How many processes there are and how they find each other.

    Attributes:
      count: processes; 1: this one, which needs no other.
      coordinator: "host:port" of the first process; None: as Slurm or Open MPI say.
      index: of this process; None: likewise.
    """

    count: int = 1
    coordinator: str | None = None
    index: int | None = None


def detect(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
) -> Processes:
    """The processes of this run, from flags or from what Slurm and Open MPI set.

    Raises:
      ValueError: some flags without the others, or an index out of range.

    >>> detect({})
    Processes(count=1, coordinator=None, index=None)
    >>> detect({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "3"})
    Processes(count=16, coordinator=None, index=None)
    >>> detect({}, "10.0.0.1:1234", 2, 1)
    Processes(count=2, coordinator='10.0.0.1:1234', index=1)
    """
    given = {"--coordinator": coordinator, "--num-processes": count, "--process-id": index}
    if any(value is not None for value in given.values()):
        missing = [name for name, value in given.items() if value is None]
        if missing or count is None or index is None or not 0 <= index < count:
            raise ValueError(
                f"{', '.join(f'{name} {value}' for name, value in given.items() if value is not None)}"
                + (f" without {', '.join(missing)}: give all three" if missing else ": the id is below the number")
            )
        return Processes(count, coordinator, index)
    for size in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if int(environment.get(size, "1")) > 1:
            return Processes(int(environment[size]))
    return Processes()


def join(processes: Processes, *, heartbeat: int = HEARTBEAT) -> None:
    """Connects this process to the others; before anything asks jax for devices.

    When a process dies, the coordination service ends all others after ``heartbeat`` seconds, wherever they wait.
    Warnings of every process then begin with its number.

    Raises:
      RuntimeError: they do not find each other.
    """
    if processes.count == 1:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        processes.coordinator,
        None if processes.index is None else processes.count,
        processes.index,
        heartbeat_timeout_seconds=heartbeat,
        # One that has ended its work waits so long for the others to end theirs.
        shutdown_timeout_seconds=heartbeat,
    )

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = warnings.formatwarning(message, category, filename, lineno, line)
        print(f"process {jax.process_index()}: {text}", end="", file=file or sys.stderr, flush=True)

    warnings.showwarning = show


def leave(code: int) -> None:
    """Ends the process; after a failure at once, because a dead process would be waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    if jax.process_count() > 1:
        jax.distributed.shutdown()
    sys.exit(0)


def is_first() -> bool:
    """Whether this process logs and writes."""
    return jax.process_index() == 0


def stop_signal() -> Callable[[int], bool]:
    """A function of the step just done: whether SIGTERM has asked the run to end after it; the same on all processes.

    Of several processes jax catches the signal, and chooses a step that all of them reach.
    """
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    return lambda _: asked.is_set()
