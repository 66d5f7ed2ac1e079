"""Byte-level text: the Python standard library's own source, or any files."""

from __future__ import annotations

import dataclasses
import glob
import pathlib
import sysconfig

import numpy as np

SEPARATOR = 0
"""The byte between files; it is never a target."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text as bytes.

    Attributes:
      train, held_out: ``uint8[bytes]``; the held-out part is every tenth stretch of 64 KiB.
    """

    train: np.ndarray
    held_out: np.ndarray


def load_corpus(pattern: str | None = None, max_bytes: int = 8_000_000) -> Corpus:
    """Reads the files of a glob pattern, or the standard library's modules, in sorted order.

    Raises:
      ValueError: if there is no text.
    """
    if pattern is None:
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        files = sorted(path for path in root.rglob("*.py") if not _is_foreign(path.relative_to(root)))
    else:
        files = sorted(pathlib.Path(name) for name in glob.glob(pattern, recursive=True))
    parts: list[bytes] = []
    size = 0
    for path in files:
        if size >= max_bytes:
            break
        if path.is_file():
            parts.append(path.read_bytes().replace(b"\0", b"") + bytes([SEPARATOR]))
            size += len(parts[-1])
    text = np.frombuffer(b"".join(parts)[:max_bytes], np.uint8)
    if len(text) < 1 << 16:
        raise ValueError(f"{len(files)} files of {pattern or 'the standard library'} hold {len(text)} bytes: give more")
    stretch = np.arange(len(text)) // (1 << 16)
    held_out = stretch % 10 == min(9, stretch[-1])
    return Corpus(text[~held_out], text[held_out])


def make_batch(text: np.ndarray, seed: int, step: int, batch: int, sequence: int) -> dict[str, np.ndarray]:
    """A batch of random windows that depends on seed and step alone.

    Returns:
      ``tokens`` and ``targets``, ``int32[batch, sequence]``, and ``mask``, ``float32[batch, sequence]``, which is 0
      where the target is a file separator.

    >>> text = np.frombuffer(b"hello, world", np.uint8)
    >>> example = make_batch(text, seed=0, step=0, batch=2, sequence=4)
    >>> example["tokens"].shape, bool((example["tokens"][:, 1:] == example["targets"][:, :-1]).all())
    ((2, 4), True)
    """
    starts = np.random.default_rng((seed, step)).integers(0, len(text) - sequence, batch)
    windows = text[starts[:, None] + np.arange(sequence + 1)].astype(np.int32)
    targets = windows[:, 1:]
    return {
        "tokens": windows[:, :-1],
        "targets": targets,
        "mask": (targets != SEPARATOR).astype(np.float32),
    }


def unigram_entropy(text: np.ndarray) -> float:
    """Entropy of the text's byte frequencies, in nats a byte: the loss of the best guess without context.

    >>> round(unigram_entropy(np.frombuffer(b"abababab", np.uint8)), 4)
    0.6931
    """
    counts = np.bincount(text, minlength=256)
    frequencies = counts[counts > 0] / len(text)
    return float(-(frequencies * np.log(frequencies)).sum())


def _is_foreign(path: pathlib.Path) -> bool:
    """Installed packages and test data, which differ between machines more than the library does."""
    return bool({"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"} & set(path.parts))
