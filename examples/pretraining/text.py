"""Text to tokens by a tokenizer of Hugging Face's format: documents into a file of tokens, once, and then as any other.

Files are `.txt` and others, each a document, or `.jsonl`, each line a document, ``{"text": "..."}``, or a conversation;
see `pretraining.chat`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pretraining.data import Corpus, make_corpus
from pretraining.optional import need

PIECE = 1 << 20
"""Characters, about, that are encoded together; longer documents are cut at the end of a line."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and what is known of it.

    Attributes:
      path: of its tokenizer.json.
      model: `tokenizers.Tokenizer`.
      end: the token after each document; it is never a target.
      settings: of tokenizer_config.json; empty where there is none.
    """

    path: pathlib.Path
    model: Any
    end: int
    settings: dict[str, Any]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of some texts, none added."""
        found = self.model.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, np.uint32) for one in found]


def open_model(path: pathlib.Path) -> tuple[pathlib.Path, Any]:
    """The path of a tokenizer.json, or of a folder's, and what it holds: `tokenizers.Tokenizer`.

    Raises:
      ValueError: no such file, or no tokenizer.
      MissingPackage: tokenizers is not installed.
    """
    tokenizers = need("tokenizers", "texts in a model's own tokens", "tokenizers", extra="text")
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no file {path}: --tokenizer names a tokenizer.json, or a folder with one")
    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises Exception itself
        raise ValueError(f"{path} is no tokenizer: {error}") from None
    # Of whoever saved it last; a document is read whole, and nothing else.
    model.no_truncation()
    model.no_padding()
    return path, model


def open_tokenizer(path: pathlib.Path, end: int | None = None) -> Tokenizer:
    """A tokenizer.json, or the one of a folder.

    Args:
      path: of it.
      end: the token after each document; None: what the files beside it call the end of a sequence.

    Raises:
      ValueError: no such file, or no tokenizer, or nobody says which token ends a document.
      MissingPackage: tokenizers is not installed.
    """
    path, model = open_model(path)
    if end is None:
        end = end_of(path, model)
    if end is None:
        raise ValueError(f"nothing beside {path} says which token ends a document: name it with --separator")
    return Tokenizer(path, model, end, _read(path.with_name("tokenizer_config.json")))


def end_of(path: pathlib.Path, model: Any) -> int | None:
    """The token that ends a sequence, as the files beside a tokenizer.json say; None: they do not."""
    named = _read(path.with_name("tokenizer_config.json")).get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    if isinstance(named, str) and (known := model.token_to_id(named)) is not None:
        return known
    for name in ("generation_config.json", "config.json"):
        found = _read(path.with_name(name)).get("eos_token_id")
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int):
            return found
    return None


def load_texts(
    paths: Sequence[pathlib.Path], tokenizer: Tokenizer, vocab: int, cache: pathlib.Path, source: str
) -> Corpus:
    """The documents of some files as tokens, which are kept in a file of ``cache`` and found there again.

    Raises:
      ValueError: too few tokens; lines that are no documents; a tokenizer with more tokens than the vocabulary.
      OSError: the file cannot be written.
    """
    check_vocab(tokenizer, vocab)
    kept = cache / f"{_key(paths, tokenizer)}.bin"
    if jax.process_index() == 0 and not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        scratch = kept.with_suffix(f".{os.getpid()}.tmp")
        try:
            with open(scratch, "wb") as file:
                for tokens in encoded(documents(paths), tokenizer):
                    file.write(tokens.tobytes())
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        os.replace(scratch, kept)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{kept} is written")
    if not kept.stat().st_size:
        raise ValueError(f"{source} holds no text")
    return make_corpus((np.memmap(kept, np.uint32, mode="r"),), tokenizer.end, vocab, f"{source} by {tokenizer.path}")


def encoded(texts: Iterable[tuple[str, bool]], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """``uint32`` tokens of pieces of documents, with the end's token after the last piece of each."""

    def encode(pieces: list[tuple[str, bool]]) -> Iterator[np.ndarray]:
        found = tokenizer.encode([text for text, _ in pieces])
        for tokens, (_, ends) in zip(found, pieces, strict=True):
            yield np.append(tokens, np.uint32(tokenizer.end)) if ends else tokens

    waiting: list[tuple[str, bool]] = []
    size = 0
    for piece in texts:
        waiting.append(piece)
        size += len(piece[0])
        if size >= PIECE:
            yield from encode(waiting)
            waiting, size = [], 0
    yield from encode(waiting)


def documents(paths: Sequence[pathlib.Path]) -> Iterator[tuple[str, bool]]:
    """Pieces of documents, each with whether it is the last one of its document.

    Raises:
      ValueError: a line of a .jsonl file that is no document; bytes that are no UTF-8.
    """
    for path in paths:
        if path.suffix == ".jsonl":
            for number, value in json_lines(path):
                text = value.get("text")
                if not isinstance(text, str):
                    raise ValueError(f'{path}, line {number}: {list(value)} without "text": a line is a document')
                yield text, True
            continue
        piece: list[str] = []
        size = 0
        try:
            with open(path, encoding="utf-8", newline="") as file:
                for line in file:
                    if size >= PIECE:
                        yield "".join(piece), False
                        piece, size = [], 0
                    piece.append(line)
                    size += len(line)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8: {error}") from None
        yield "".join(piece), True


def json_lines(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a .jsonl file with the numbers of their lines, empty lines left out.

    Raises:
      ValueError: a line that is no object, or holds text that is none in UTF-8.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is no JSON: {error}") from None
            if not isinstance(value, dict):
                raise ValueError(f"{path}, line {number} is JSON of {type(value).__name__}: each is an object")
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = ascii(error.object[error.start : error.start + 1])
                raise ValueError(
                    f"{path}, line {number} holds the surrogate {half} alone, half of a character that was cut: mend "
                    "the line, or leave it out"
                ) from None
            yield number, value


def check_vocab(tokenizer: Tokenizer, vocab: int) -> None:
    """Refuses a tokenizer of another model.

    Raises:
      ValueError: it has more tokens than the model.
    """
    count = max(tokenizer.model.get_vocab_size(with_added_tokens=True), tokenizer.end + 1)
    if count > vocab:
        raise ValueError(
            f"{tokenizer.path} has {count} tokens, the model a vocabulary of {vocab}: take the model's own"
        )


def _read(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _key(paths: Sequence[pathlib.Path], tokenizer: Tokenizer) -> str:
    """What the tokens depend on, as a name."""
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    # "whole": files of tokens of documents that tokenizers' own lengths had cut have other names.
    known = "whole", hashlib.sha256(tokenizer.path.read_bytes()).hexdigest(), tokenizer.end, files
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:24]
