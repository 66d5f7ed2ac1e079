"""Starts several processes of one run on this machine, each with some fake CPU devices or with GPUs of its own.

    python examples/launch_local.py --processes 2 --devices 4 -- examples/pretrain.py --mesh pp=4,ep=2 --out runs/two
    python examples/launch_local.py --gpus 2 -- examples/pretrain.py --mesh pp=2 --out runs/gpus      # one GPU each

When one ends with an error, the others end by themselves, because they miss it; those that do not are ended. The exit
code is that of the first error.
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
from collections.abc import Mapping, Sequence
from typing import TextIO

GRACE = 60.0
"""Seconds that the others have to end by themselves after one has ended with an error."""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def on_fake_devices(processes: int, devices: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment of each process that has so many fake CPU devices; they talk through gloo.

    >>> [found] = on_fake_devices(1, 4, {"XLA_FLAGS": "--a"})
    >>> found["XLA_FLAGS"].split()[:2], found["JAX_PLATFORMS"]
    (['--a', '--xla_force_host_platform_device_count=4'], 'cpu')
    """
    flags = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    changes = {
        # Fake devices share the machine's cores and may wait long for each other.
        "XLA_FLAGS": f"{flags} --xla_cpu_collective_call_terminate_timeout_seconds=1200",
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    return [dict(environment) | changes for _ in range(processes)]


def on_gpus(processes: int, gpus: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment of each process, so that it sees an equal share of so many GPUs and no other.

    They are the first of those in CUDA_VISIBLE_DEVICES, where that is set.

    Raises:
      ValueError: the GPUs do not divide over the processes, or fewer are visible.

    >>> [found["CUDA_VISIBLE_DEVICES"] for found in on_gpus(2, 4, {"CUDA_VISIBLE_DEVICES": "7,6,5,4,3"})]
    ['7,6', '5,4']
    >>> [found["CUDA_VISIBLE_DEVICES"] for found in on_gpus(2, 2, {})]
    ['0', '1']
    """
    if gpus % processes:
        raise ValueError(f"--gpus {gpus} do not divide over --processes {processes}")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",") if name.strip()] if visible is not None else range(gpus)
    if len(names) < gpus:
        raise ValueError(f"--gpus {gpus}, and CUDA_VISIBLE_DEVICES={visible} lets {len(names)} be seen")
    share = gpus // processes
    # Where there are none, jax would otherwise take the CPU without a word.
    changes = {"JAX_PLATFORMS": environment.get("JAX_PLATFORMS") or "cuda,cpu"}
    return [
        dict(environment) | changes | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, names[start : start + share]))}
        for start in range(0, gpus, share)
    ]


def launch(
    script: Sequence[str], environments: Sequence[Mapping[str, str]], output: TextIO = sys.stdout
) -> list[subprocess.Popen[str]]:
    """Starts the processes of a run, one for each environment.

    Each line that one prints begins with its number in ``output``.
    """
    coordinator = f"127.0.0.1:{free_port()}"
    found = []
    for index, environment in enumerate(environments):
        command = [sys.executable, "-u", *script, "--coordinator", coordinator]
        command += ["--num-processes", str(len(environments)), "--process-id", str(index)]
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
    told: set[int] = set()
    while any(process.poll() is None for process in processes):
        for index, process in enumerate(processes):
            if not process.poll() or index in told:
                continue
            told.add(index)
            print(f"process {index} has ended with {process.returncode}", flush=True)
            if first is None:
                first, end = process.returncode, time.monotonic() + grace
                print(f"the others have {grace:.0f} seconds to end", flush=True)
        if time.monotonic() > end:
            for index, process in enumerate(processes):
                if process.poll() is None:
                    print(f"process {index} has not ended: it is ended", flush=True)
                    process.kill()
        time.sleep(0.1)
    for index in {index for index, process in enumerate(processes) if process.returncode} - told:
        print(f"process {index} has ended with {processes[index].returncode}", flush=True)
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


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], list[dict[str, str]], float]:
    """The script with its arguments, the environment of each process, and the grace in seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, help="default: 2, or one for each of --gpus")
    parser.add_argument("--devices", type=int, help="fake CPU devices of each process; default: 4")
    parser.add_argument("--gpus", type=int, help="of all processes together, instead of fake CPU devices")
    parser.add_argument("--grace", type=float, default=GRACE, help="seconds to end after an error of another")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="after --: a script and its arguments")
    args = parser.parse_args(arguments)
    script = args.script[1:] if args.script[:1] == ["--"] else args.script
    given = [number for number in (args.processes, args.devices, args.gpus) if number is not None]
    if not script or min(given, default=1) < 1:
        parser.error("give at least one process and device, and a script after --")
    if args.gpus and args.devices:
        parser.error(f"--gpus {args.gpus} and --devices {args.devices}: give one of them")
    if not args.gpus:
        return script, on_fake_devices(args.processes or 2, args.devices or 4, environment), args.grace
    try:
        return script, on_gpus(args.processes or args.gpus, args.gpus, environment), args.grace
    except ValueError as error:
        parser.error(str(error))


def main() -> int:
    """Starts, waits, and passes SIGTERM on; returns the exit code."""
    script, environments, grace = parse(sys.argv[1:], os.environ)
    processes = launch(script, environments)
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in processes])
    return wait(processes, grace)


if __name__ == "__main__":
    sys.exit(main())
