"""Byte-level text: the Python standard library's own source, or any files."""

from __future__ import annotations

import dataclasses
import glob
import pathlib
import sysconfig

import numpy as np

SEPARATOR = 0
"""The byte between files; it is never a target."""

STRETCH = 1 << 16
"""Bytes of text that are held out, or trained on, together."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text as bytes.

    Attributes:
      train, held_out: ``uint8[bytes]``; the held-out part is every tenth stretch of 64 KiB, or the
        last whole one of a text that has fewer.
    """

    train: np.ndarray
    held_out: np.ndarray


def load_corpus(pattern: str | None = None, max_bytes: int = 8_000_000) -> Corpus:
    """Reads the files of a glob pattern, or the standard library's modules, in sorted order.

    Raises:
      ValueError: if there are fewer than two stretches of text, one for either part.
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
    if len(text) < 2 * STRETCH:
        source = pattern or "the standard library"
        raise ValueError(
            f"{len(files)} files of {source}, cut at {max_bytes} bytes, hold {len(text)}: "
            f"at least {2 * STRETCH} are needed, give more text or a larger max_bytes"
        )
    held_out = np.arange(len(text)) // STRETCH % 10 == min(10, len(text) // STRETCH) - 1
    return Corpus(text[~held_out], text[held_out])


def make_batch(text: np.ndarray, seed: int, step: int, batch: int, sequence: int) -> dict[str, np.ndarray]:
    """A batch of random windows that depends on seed and step alone.

    Returns:
      ``tokens`` and ``targets``, ``int32[batch, sequence]``, and ``mask``, ``float32[batch, sequence]``, which is 0
      where the target is a file separator.

    Raises:
      ValueError: if the text is too short for one window of ``sequence + 1`` bytes.

    >>> text = np.frombuffer(b"hello, world", np.uint8)
    >>> example = make_batch(text, seed=0, step=0, batch=2, sequence=4)
    >>> example["tokens"].shape, bool((example["tokens"][:, 1:] == example["targets"][:, :-1]).all())
    ((2, 4), True)
    """
    if len(text) <= sequence:
        raise ValueError(f"text of {len(text)} bytes has no window of sequence + 1 = {sequence + 1}: shorten sequence")
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
