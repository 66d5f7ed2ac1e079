"""One process or many: how they find each other, learn that one has died, and end."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from typing import NoReturn, TextIO

import jax
from jax.experimental import multihost_utils

from jaxpipe._jax import distributed_state
from pretraining.peers import Peers

HEARTBEAT = 30
"""Seconds without a sign of life after which a machine counts as dead, and all other processes end."""

NEWS = 2.0
"""Seconds in which a process whose step fails may hear that another has ended, which is why."""


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


def join(
    processes: Processes, *, heartbeat: int = HEARTBEAT, name: str = "", resume: Callable[[], str] = lambda: ""
) -> Peers:
    """Connects this process to the others; before anything asks jax for devices.

    When one of several processes ends before its time, all others say so and end with 1, or with its exit code if it
    gave one, wherever they wait: at once where it was killed, after ``heartbeat`` seconds where a machine falls silent.
    Warnings of every process then begin with its number.

    Args:
      processes: from `detect`.
      heartbeat: seconds after which a silent machine counts as dead.
      name: of the program, for what is said.
      resume: what to say of going on when the run has ended so.

    Raises:
      RuntimeError: they do not find each other.
    """
    if processes.count == 1:
        return Peers(0, 1, lambda *_: None)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        processes.coordinator,
        None if processes.index is None else processes.count,
        processes.index,
        # Its way of ending the others is to abort them: it comes after ours.
        heartbeat_timeout_seconds=2 * heartbeat,
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

    service = distributed_state()
    if service is None:
        warnings.warn(
            "this jax does not say where the first process is: one that is killed is missed late", stacklevel=2
        )
        return Peers(0, 1, lambda *_: None)
    index = service.process_id

    def end(code: int, what: str) -> NoReturn:
        # What XLA says of it from here on is no news.
        errors = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        parts = f"process {index} ends, as {what}", resume()
        os.write(errors, f"{name}{'; '.join(filter(None, parts))}\n".encode())
        os._exit(code)

    def ended(other: int, code: int, message: str) -> None:
        end(code, f"process {other} has ended" + (f": {message}" if message else " or cannot be reached"))

    peers = Peers(index, service.num_processes, ended)
    _on_abort(lambda: end(1, "XLA has aborted it, see above"))
    try:
        key = "pretrain/peers"
        if index == 0:
            service.client.key_value_set(key, peers.serve(heartbeat))
            peers.wait(heartbeat)
        else:
            host = service.coordinator_address.rpartition(":")[0].strip("[]")
            peers.connect(host, service.client.blocking_key_value_get(key, 1000 * heartbeat), heartbeat)
    except (OSError, RuntimeError) as error:
        warnings.warn(f"a process that is killed may be missed late: {type(error).__name__}: {error}", stacklevel=2)
    return peers


def _on_abort(end: Callable[[], object]) -> None:
    """Calls a function that ends the process instead of abort(), by which XLA ends it when it misses another.

    A handler of Python's own would only be noted, and abort() go on.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handle(_: int) -> None:
        time.sleep(NEWS)  # the cause may be about to be known
        end()

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(handle))  # C keeps it as long as the process lives
    ctypes.CDLL(None).signal(signal.SIGABRT, handle)


def fail(peers: Peers, code: int, message: str) -> None:
    """Tells the other processes that this one ends; does not return if it does so because another has ended."""
    if peers.count > 1:
        if code == 1:
            time.sleep(NEWS)
        peers.fail(code, message)


def finish(peers: Peers) -> None:
    """Returns when all processes have done their work."""
    peers.finish()
    if jax.process_count() > 1:
        jax.distributed.shutdown()
        signal.signal(signal.SIGABRT, signal.SIG_DFL)


def leave(code: int) -> None:
    """Ends the process; after a failure at once, because a dead process would be waited for."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # whoever read it is gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if code:
        os._exit(code)
    sys.exit(0)


def is_first() -> bool:
    """Whether this process logs and writes."""
    return jax.process_index() == 0


def stop_signal(start: int) -> Callable[[int], bool]:
    """A function of the step just done: whether SIGTERM has asked the run to end after it; the same on all processes.

    Of several processes jax catches the signal, and chooses the step after the latest that any has told it of, or step
    1 where none has yet. So steps are told from ``start``, those done before this run: a signal that comes while the
    run is restored or compiled would otherwise never be heard.
    """
    if jax.process_count() > 1:
        return lambda step: multihost_utils.reached_preemption_sync_point(step - start)
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    return lambda _: asked.is_set()
