"""Starts several processes of one run on this machine, each with some fake CPU devices.

    python examples/launch_local.py --processes 2 --devices 4 -- examples/pretrain.py --mesh pp=4,ep=2 --out runs/two

They talk through gloo. When one ends with an error, the others end by themselves within a minute, because they miss it;
those that do not are ended. The exit code is that of the first error.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import TextIO

GRACE = 60.0
"""Seconds that the others have to end by themselves after one has ended with an error."""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(
    script: Sequence[str], processes: int, devices: int, output: TextIO = sys.stdout
) -> list[subprocess.Popen[str]]:
    """Starts the processes of a run; each line that one prints begins with its number in ``output``."""
    coordinator = f"127.0.0.1:{free_port()}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {
        # Fake devices share the machine's cores and may wait long for each other.
        "XLA_FLAGS": f"{flags} --xla_cpu_collective_call_terminate_timeout_seconds=1200",
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    found = []
    for index in range(processes):
        command = [sys.executable, "-u", *script, "--coordinator", coordinator]
        command += ["--num-processes", str(processes), "--process-id", str(index)]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None
        threading.Thread(target=_copy, args=(process.stdout, output, f"[{index}] "), daemon=True).start()
        found.append(process)
    return found


def wait(processes: Sequence[subprocess.Popen[str]], grace: float = GRACE) -> int:
    """Returns when all have ended: 0, or the first error's exit code."""
    first: int | None = None
    end = float("inf")
    while any(process.poll() is None for process in processes):
        failed = [process for process in processes if process.poll()]
        if failed and first is None:
            first, end = failed[0].returncode, time.monotonic() + grace
            index = processes.index(failed[0])
            print(f"process {index} has ended with {first}; the others have {grace:.0f} seconds to end", flush=True)
        if time.monotonic() > end:
            for process in processes:
                if process.poll() is None:
                    print(f"process {processes.index(process)} has not ended: it is ended", flush=True)
                    process.kill()
        time.sleep(0.1)
    codes = [process.returncode for process in processes]
    code = first if first is not None else next((code for code in codes if code), 0)
    # A signal's number is negative here; the shell's way is to add it to 128.
    return code if code >= 0 else 128 - code


def _copy(source: TextIO, sink: TextIO, prefix: str) -> None:
    with source:
        for line in source:
            # Gloo tells of every group of devices that has met.
            if "is connected to" not in line:
                sink.write(prefix + line)
                sink.flush()


def main() -> int:
    """Starts, waits, and passes SIGTERM on; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=4, help="fake CPU devices of each")
    parser.add_argument("--grace", type=float, default=GRACE, help="seconds to end after an error of another")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="after --: a script and its arguments")
    args = parser.parse_args()
    script = args.script[1:] if args.script[:1] == ["--"] else args.script
    if not script or args.processes < 1 or args.devices < 1:
        parser.error("give at least one process and device, and a script after --")
    processes = launch(script, args.processes, args.devices)
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in processes])
    return wait(processes, args.grace)


if __name__ == "__main__":
    sys.exit(main())
