"""Pretrains a language model with experts through a pipeline.

    python examples/pretrain.py                                  # tiny, DualPipeV on 8 fake CPU devices
    python examples/pretrain.py --schedule zb1p --mesh pp=2,ep=2 --steps 50 --data 'books/*.txt' --out runs/books
    python examples/pretrain.py --out runs/books                 # again, after an interruption: continues
    python examples/pretrain.py plan --config dsv3-671b --mesh pp=16,ep=64
    python examples/pretrain.py --from DeepSeek-V2-Lite --mesh pp=2,ep=8 --out runs/mine --data 'mine/*.npy'
    python examples/pretrain.py export runs/mine --to mine       # a folder as Hugging Face has it
    python examples/pretrain.py eval --run runs/books
    python examples/pretrain.py generate --run runs/books --prompt 'def main('

Ends with 0 when all went well, also after SIGTERM, which saves; with 2 when what was asked for is not possible; with 1
when the run failed: start it again, and it continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import sys
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from pretraining import flags, hosts
from pretraining.checkpoint import DamagedError, SaveError, last_checkpoint
from pretraining.optional import MissingPackage


def train(arguments: list[str]) -> int:
    """Trains; returns the exit code."""
    args = flags.train_parser(__doc__).parse_args(arguments)
    try:
        processes = hosts.detect(os.environ, args.coordinator, args.num_processes, args.process_id)
    except ValueError as error:
        return fail(2, str(error))
    share_of_devices = math.prod(args.mesh.values()) // processes.count
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Fake devices share the machine's cores and may wait long for each other.
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(1, share_of_devices)}"
            " --xla_cpu_collective_call_terminate_timeout_seconds=1200"
        )
    # Of a GPU's memory; the rest is for NCCL and code. `jaxpipe.compiler_options` plans with as much.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    try:
        peers = hosts.join(
            processes,
            heartbeat=args.heartbeat,
            name="pretrain.py: ",
            resume=lambda: how_to_resume(args.out),
        )
    except RuntimeError as error:
        return fail(1, f"the {processes.count} processes do not find each other: {error}")
    code, message = run_to_its_end(args, processes.count)
    if code:
        hosts.fail(peers, code, message)
        return fail(code, message)
    hosts.finish(peers)
    return 0


def run_to_its_end(args: argparse.Namespace, count: int) -> tuple[int, str]:
    """Trains in this process, one of ``count``; returns the exit code and what went wrong."""
    # The number of fake devices is set by now.
    from pretraining import loop, run  # noqa: PLC0415

    try:
        run.train(args)
    except (run.BadInput, MissingPackage) as error:
        return 2, str(error)
    except (SaveError, DamagedError, loop.TooManySkips, run.CheckFailed) as error:
        return 1, str(error)
    except OSError as error:
        return 1, f"{error}: the run ends; checkpoints written before are whole"
    except RuntimeError as error:
        if count == 1:
            raise
        return 1, f"a step failed, perhaps because another process has ended: {error}".splitlines()[0]
    except Exception as error:
        if count == 1:
            raise
        # The others would wait for this one.
        traceback.print_exc()
        return 1, f"{type(error).__name__}: {error}"
    return 0, ""


def how_to_resume(out: pathlib.Path | None) -> str:
    """What to do when a run has ended that could have gone on."""
    if out is None:
        return ""
    return f"{last_checkpoint(out / 'checkpoints')}: start the same command again, and it goes on"


def plan(arguments: list[str]) -> int:
    """Prints what a run would need; returns the exit code."""
    from pretraining.plan import main as print_plan  # noqa: PLC0415

    try:
        print_plan(arguments)
    except (ValueError, RuntimeError) as error:  # the latter: no compiler for GPUs is installed
        return fail(2, str(error))
    return 0


def export(arguments: list[str]) -> int:
    """Writes parameters of a run; returns the exit code."""
    from pretraining.export import export_run  # noqa: PLC0415
    from pretraining.export_folder import export_folder  # noqa: PLC0415

    args = flags.export_parser().parse_args(arguments)
    try:
        if args.max_file is not None and not 0 < args.max_file < math.inf:
            raise ValueError(f"--max-file {args.max_file}: GB of a file, above 0")
        if args.to.suffix == ".safetensors":
            if given := [name for name in ("like", "max_file") if getattr(args, name) is not None]:
                names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
                raise ValueError(f"{names} with --to {args.to}: that is for folders, as --to {args.to.stem}")
            print(export_run(args.run, args.to, args.dtype))
        else:
            largest = int((flags.MAX_FILE if args.max_file is None else args.max_file) * 1e9)
            print(export_folder(args.run, args.to, args.dtype, like=args.like, max_shard_size=largest))
    except (ValueError, MissingPackage) as error:
        return fail(2, str(error))
    except (DamagedError, OSError) as error:
        return fail(1, str(error))
    return 0


def use(command: str, arguments: list[str]) -> int:
    """Evaluates a model, or has it continue prompts; returns the exit code."""
    from pretraining import serving  # noqa: PLC0415

    parser, run = {
        "eval": (serving.eval_parser, serving.evaluate),
        "generate": (serving.generate_parser, serving.generate),
    }[command]
    args = parser().parse_args(arguments)
    if args.devices > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        fake = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices}"
        os.environ["XLA_FLAGS"] = fake
    try:
        run(args)
    except (ValueError, MissingPackage) as error:
        return fail(2, str(error))
    except OSError as error:
        return fail(1, str(error))
    return 0


def fail(code: int, message: str) -> int:
    """Says what went wrong; returns the exit code."""
    print(f"pretrain.py: {message}", file=sys.stderr, flush=True)
    return code


def main(arguments: list[str]) -> int:
    """Runs a subcommand; returns the exit code."""
    command, rest = flags.split_command(arguments)
    if command in ("eval", "generate"):
        return use(command, rest)
    return {"train": train, "plan": plan, "export": export}[command](rest)


if __name__ == "__main__":
    hosts.leave(main(sys.argv[1:]))
