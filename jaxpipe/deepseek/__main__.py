"""The command line: ``python -m jaxpipe.deepseek logits FOLDER TOKENS.npy --out LOGITS.npy``.

Logits of a Hugging Face folder in float32 on one device, to be compared with another library's.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.deepseek.folder import read_folder
from jaxpipe.deepseek.generate import Server
from jaxpipe.deepseek.serving import serve


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; bad input ends it with a message and status 2."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jaxpipe.deepseek", description="Models of DeepSeek's kind.")
    commands = parser.add_subparsers(dest="command", required=True)
    logits = commands.add_parser("logits", help="logits of a Hugging Face folder, float32 on one device")
    logits.add_argument("folder", type=pathlib.Path, help="with config.json and safetensors files")
    logits.add_argument("tokens", type=pathlib.Path, help=".npy file of integers [sequences, tokens]")
    logits.add_argument("--out", type=pathlib.Path, required=True, help=".npy file to write, float32 [.., .., vocab]")
    logits.add_argument("--batch", type=int, default=1, help="sequences at a time")
    logits.set_defaults(run=_logits)
    return parser


def _logits(args: argparse.Namespace) -> None:
    tokens = _read_array(args.tokens)
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"{args.tokens} holds an array of shape {tokens.shape}: give [sequences, tokens]")
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch}: at least 1")
    config, tree = read_folder(args.folder)
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, backend="xla"))
    # A GPU's default for float32 has 10 bits.
    with jax.default_matmul_precision("highest"):
        server = Server(config, serve(config, tree, dtype=jnp.float32))
        made = [server.logits(tokens[start : start + args.batch]) for start in range(0, len(tokens), args.batch)]
    with args.out.open("wb") as file:  # NumPy would add an ending to a name
        np.save(file, np.concatenate(made))
    print(f"{args.out}: logits of {tokens.shape[0]} sequences of {tokens.shape[1]} tokens, {config.total} parameters")


def _read_array(path: pathlib.Path) -> np.ndarray:
    with path.open("rb") as file:
        try:
            return np.lib.format.read_array(file, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path} is no .npy file of integers, as numpy.save writes them: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
