"""Tokens to train on: the Python standard library's source, any text files, or tokens that lie ready in files.

Text is read byte by byte and kept in memory; ``.bin`` and ``.npy`` files are mapped, and only what a
batch needs is read.
"""

from __future__ import annotations

import dataclasses
import glob
import pathlib
import sysconfig
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxpipe.deepseek.model import SEGMENTS

SEPARATOR = 0
"""The byte between text files; it is never a target."""

STRETCH = 1 << 16
"""Tokens that are held out, or trained on, together."""

LIBRARY_BYTES = 8_000_000
"""How much of the standard library's source is read."""

SAMPLE = 8_000_000
"""Tokens, at most, that `unigram_entropy` counts."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Either the tokens to train on or those held out: every tenth stretch, or the last whole one of fewer.

    Attributes:
      files: arrays of one dimension, one behind the other.
      held_out: which of the two parts this is.
      separator: the token between documents, which is never a target; None: every token is one.
      vocab: all tokens must be smaller.
      apart: whether batches have "segments", by which a token sees those of its own document alone. A document begins
        with the separator before it, of which its first token is predicted.

    >>> part = Part((np.arange(3 * STRETCH) // STRETCH,), held_out=False, separator=None, vocab=3)
    >>> len(part), part.read(STRETCH - 1, STRETCH + 1).tolist()
    (131072, [0, 1])
    >>> dataclasses.replace(part, held_out=True).read(0, 2).tolist()
    [2, 2]
    """

    files: tuple[np.ndarray, ...]
    held_out: bool
    separator: int | None
    vocab: int
    apart: bool = False

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of a batch's arrays."""
        return "tokens", "targets", "mask", *([SEGMENTS] if self.apart else [])

    @property
    def total(self) -> int:
        """Tokens of both parts."""
        return sum(map(len, self.files))

    @property
    def _first(self) -> int:
        """The first stretch that is held out; others follow at every tenth."""
        return min(10, self.total // STRETCH) - 1

    def __len__(self) -> int:
        """Tokens of this part."""
        whole, rest = divmod(self.total, STRETCH)
        held = sum(STRETCH if stretch < whole else rest for stretch in range(self._first, whole + 1, 10))
        return held if self.held_out else self.total - held

    def read(self, start: int, stop: int) -> np.ndarray:
        """``int32[stop - start]``: tokens of this part as if nothing lay between its stretches.

        Raises:
          ValueError: a token that the vocabulary has not, or one below 0.
        """
        pieces = []
        while start < stop:
            stretch, within = divmod(start, STRETCH)
            count = min(stop - start, STRETCH - within)
            place = self._first + 10 * stretch if self.held_out else stretch + (stretch + 9 - self._first) // 9
            pieces.append(self._read_all(place * STRETCH + within, count))
            start += count
        # Checked before the cast, which would wrap a large unsigned number.
        tokens = np.concatenate(pieces)
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self.vocab):
            raise ValueError(
                f"the data hold tokens from {tokens.min()} to {tokens.max()} and the model has a vocabulary of "
                f"{self.vocab}: choose the model for these tokens, or the tokens' right width (--token-dtype)"
            )
        return tokens.astype(np.int32)

    def batch(
        self, seed: int, step: int, batch: int, sequence: int, rows: Sequence[int] | None = None
    ) -> dict[str, np.ndarray]:
        """See `make_batch`."""
        # One window less than would fit, so that an epoch may begin anywhere in the first.
        windows = (len(self) - 1) // sequence - 1
        if windows < 1:
            raise ValueError(
                f"{len(self)} tokens have no two windows of sequence + 1 = {sequence + 1}: shorten the sequence"
            )
        found = []
        for row in range(batch) if rows is None else rows:
            epoch, position = divmod(step * batch + row, windows)
            shift = int(np.random.default_rng((seed, epoch)).integers(sequence))
            start = shift + sequence * permuted(position, windows, (seed, epoch))
            found.append(self.read(start, start + sequence + 1))
        tokens = np.stack(found)
        targets = tokens[:, 1:]
        is_target = np.ones(targets.shape, bool) if self.separator is None else targets != self.separator
        made = {"tokens": tokens[:, :-1], "targets": targets, "mask": is_target.astype(np.float32)}
        if self.apart:
            made[SEGMENTS] = np.cumsum(made["tokens"] == self.separator, 1, dtype=np.int32)
        return made

    def _read_all(self, start: int, count: int) -> np.ndarray:
        """Tokens of both parts, across the borders of files."""
        pieces = []
        for file in self.files:
            if start < len(file) and count > 0:
                pieces.append(np.asarray(file[start : start + count]))
                count -= len(pieces[-1])
                start = len(file)
            start -= len(file)
        return np.concatenate(pieces)


class Batches(Protocol):
    """What batches are made of: `Part`, or conversations."""

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of a batch's arrays."""
        ...

    @property
    def total(self) -> int:
        """Tokens that a checkpoint knows the data by."""
        ...

    def __len__(self) -> int:
        """Tokens."""
        ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """``int32[stop - start]`` tokens."""
        ...

    def batch(
        self, seed: int, step: int, batch: int, sequence: int, rows: Sequence[int] | None = None
    ) -> dict[str, np.ndarray]:
        """See `make_batch`."""
        ...


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What to train on and what to evaluate on.

    Attributes:
      train, held_out: the two parts of the same tokens.
      source: where they come from, for people.
    """

    train: Batches
    held_out: Batches
    source: str


def load_corpus(
    pattern: str | None = None,
    *,
    vocab: int = 256,
    token_dtype: str = "uint16",
    separator: int | None = None,
    max_tokens: int | None = None,
) -> Corpus:
    """Opens the files of a glob pattern, or the standard library's modules, in sorted order.

    Args:
      pattern: of ``.bin`` files (tokens without a header), of ``.npy`` files (integers, one dimension), or of text.
      vocab: size of the model's vocabulary; text needs 256.
      token_dtype: of ``.bin`` files.
      separator: the token between documents of ``.bin`` and ``.npy`` files, if there is one. Between texts it is 0.
      max_tokens: leave out what comes after so many; None: all, and of the standard library `LIBRARY_BYTES`.

    Raises:
      ValueError: no files, files of several kinds, files that hold no tokens, a vocabulary too small for bytes, or
        fewer than two stretches of tokens, one for either part.
    """
    if pattern is None:
        paths, source = _library(), "the standard library"
        max_tokens = LIBRARY_BYTES if max_tokens is None else max_tokens
    else:
        paths, source = find_files(pattern), pattern
    kinds = {path.suffix if path.suffix in (".bin", ".npy") else "text" for path in paths}
    if len(kinds) > 1:
        raise ValueError(f"{source} matches files of kinds {', '.join(sorted(kinds))}: train on one kind at a time")
    if kinds == {"text"}:
        if vocab < 256:
            raise ValueError(f"text is read byte by byte and needs a vocabulary of 256, the model's is {vocab}")
        files, separator = (_read_texts(paths, max_tokens),), SEPARATOR
    else:
        files = tuple(_map_file(path, token_dtype) for path in paths)
    if max_tokens is not None:
        files = _cut(files, max_tokens)
    total = sum(map(len, files))
    if total < 2 * STRETCH:
        cut = "" if max_tokens is None else f", cut at {max_tokens} tokens,"
        raise ValueError(
            f"{len(paths)} files of {source}{cut} hold {total} tokens: at least {2 * STRETCH} are needed, give more "
            "data" + ("" if max_tokens is None else " or a larger limit")
        )
    return make_corpus(files, separator, vocab, f"{len(paths)} files of {source}")


def keep_apart(corpus: Corpus) -> Corpus:
    """The corpus with documents that do not see each other.

    Raises:
      ValueError: nobody knows where documents end; conversations, each of which is a sequence of its own.

    >>> corpus = keep_apart(make_corpus([np.arange(2 * STRETCH) % 5], 0, 5, "numbers"))
    >>> corpus.train.batch(seed=1, step=0, batch=1, sequence=8)["segments"].tolist()
    [[0, 0, 0, 1, 1, 1, 1, 1]]
    """

    def apart(part: Batches) -> Part:
        if not isinstance(part, Part):
            raise ValueError(
                f"--document-mask: {corpus.source} are conversations, each in a sequence of its own already"
            )
        if part.separator is None:
            raise ValueError(f"--document-mask: name the token between documents of {corpus.source} with --separator")
        return dataclasses.replace(part, apart=True)

    return Corpus(apart(corpus.train), apart(corpus.held_out), corpus.source)


def find_files(pattern: str) -> list[pathlib.Path]:
    """The files of a glob pattern, in sorted order.

    Raises:
      ValueError: there are none.
    """
    paths = [path for path in sorted(map(pathlib.Path, glob.glob(pattern, recursive=True))) if path.is_file()]
    if not paths:
        raise ValueError(
            f"no files match {pattern}: check the path; a pattern must be quoted, as in --data 'books/*.txt'"
        )
    return paths


def make_corpus(files: Sequence[np.ndarray], separator: int | None, vocab: int, source: str) -> Corpus:
    """Tokens, one array behind the other, as the two parts of a corpus.

    Raises:
      ValueError: fewer than two stretches of tokens.
    """
    files = tuple(files)
    if (total := sum(map(len, files))) < 2 * STRETCH:
        raise ValueError(f"{source} hold {total} tokens: at least {2 * STRETCH} are needed, give more data")
    train = Part(files, False, separator, vocab)
    return Corpus(train, dataclasses.replace(train, held_out=True), source)


def make_batch(
    part: Batches, seed: int, step: int, batch: int, sequence: int, rows: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """The batch of a step, or some of its rows; depends on part, seed, step and sizes alone.

    An epoch cuts the part into windows, beginning somewhere in the first, and reads them in a random order: every
    token is seen once. The order of an epoch is computed, not stored, so any host can start at any step.

    Args:
      part: where to read.
      seed: of the order.
      step: counts batches, from 0.
      batch: sequences of a whole batch.
      sequence: positions of a sequence.
      rows: which sequences of the batch to make; None: all.

    Returns:
      ``tokens`` and ``targets``, ``int32[rows, sequence]``, and ``mask``, ``float32[rows, sequence]``, which is 0
      where the target is a separator; of a part whose documents are apart also ``segments``, ``int32[rows, sequence]``.

    Raises:
      ValueError: the part is too short for two windows of ``sequence + 1`` tokens, or see `Part.read`.

    >>> part = Part((np.arange(2 * STRETCH) % 200,), held_out=False, separator=0, vocab=200)
    >>> example = make_batch(part, seed=0, step=0, batch=2, sequence=4)
    >>> example["tokens"].shape, bool((example["tokens"][:, 1:] == example["targets"][:, :-1]).all())
    ((2, 4), True)
    """
    return part.batch(seed, step, batch, sequence, rows)


def global_batch(
    part: Batches, seed: int, step: int, batch: int, sequence: int, sharding: NamedSharding
) -> dict[str, jax.Array]:
    """`make_batch` on the devices of all hosts, each of which reads only the rows that its devices hold."""
    made: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def fetch(name: str, index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(batch)
        if (start, stop) not in made:
            made[start, stop] = make_batch(part, seed, step, batch, sequence, range(start, stop))
        return made[start, stop][name][:, index[1]]

    return {
        name: jax.make_array_from_callback((batch, sequence), sharding, lambda index, name=name: fetch(name, index))
        for name in part.arrays
    }


def permuted(index: int, count: int, key: tuple[int, ...]) -> int:
    """Where a random permutation of ``range(count)`` takes an index, without the permutation in memory.

    A Feistel network permutes the smallest power of four that is large enough; what falls outside goes through again.

    >>> sorted(permuted(index, 10, (0, 1)) for index in range(10)) == list(range(10))
    True
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = [int(word) for word in np.random.SeedSequence(key).generate_state(6)]
    while True:
        left, right = index >> half, index & mask
        for word in keys:
            mixed = (right * 0x9E3779B1 + word) & 0xFFFFFFFF
            mixed = ((mixed ^ mixed >> 15) * 0x85EBCA77) & 0xFFFFFFFF
            left, right = right, left ^ (mixed ^ mixed >> 13) & mask
        index = left << half | right
        if index < count:
            return index


def unigram_entropy(part: Batches) -> float:
    """Entropy of the frequencies of tokens, in nats: the loss of the best guess without context.

    Of the first `SAMPLE` tokens; separators count, as they are read too.

    >>> round(unigram_entropy(Part((np.arange(2 * STRETCH) % 2,), False, None, 2)), 4)
    0.6931
    """
    tokens = part.read(0, min(len(part), SAMPLE))
    counts = np.bincount(tokens)
    frequencies = counts[counts > 0] / len(tokens)
    return float(-(frequencies * np.log(frequencies)).sum())


def _library() -> list[pathlib.Path]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    return sorted(path for path in root.rglob("*.py") if not _is_foreign(path.relative_to(root)))


def _is_foreign(path: pathlib.Path) -> bool:
    """Installed packages and test data, which differ between machines more than the library does."""
    return bool({"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"} & set(path.parts))


def _read_texts(paths: Sequence[pathlib.Path], most: int | None) -> np.ndarray:
    parts: list[bytes] = []
    size = 0
    for path in paths:
        if most is not None and size >= most:
            break
        parts.append(path.read_bytes().replace(b"\0", b"") + bytes([SEPARATOR]))
        size += len(parts[-1])
    return np.frombuffer(b"".join(parts), np.uint8)


def _map_file(path: pathlib.Path, token_dtype: str) -> np.ndarray:
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is no .npy file of numbers: {error}") from None
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{path} holds {array.dtype}{list(array.shape)}: tokens are integers in one dimension")
        return array
    dtype = np.dtype(token_dtype)
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise ValueError(f"{path} has {size} bytes, not a whole number of {dtype} tokens: is --token-dtype right?")
    return np.memmap(path, dtype, mode="r")


def _cut(files: Sequence[np.ndarray], most: int) -> tuple[np.ndarray, ...]:
    found = []
    for file in files:
        found.append(file[:most])
        most -= len(found[-1])
    return tuple(found)
