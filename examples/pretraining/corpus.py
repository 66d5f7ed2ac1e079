"""What a model learns from, or is measured on: which files are read in whose tokens."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Mapping
from typing import Any

from pretraining import chat, data, text

BYTES = "bytes"
"""In place of a tokenizer's path: a token is a byte."""

BYTE_VOCAB = 256
"""The vocabulary of a model of bytes: one whose folder holds no tokenizer needs none."""

READY = (".bin", ".npy")
"""Endings of files that hold tokens."""

Reader = pathlib.Path | str | None
"""A tokenizer's path; `BYTES`; None: nobody knows how the model reads text."""


def reader_of_folder(folder: pathlib.Path, vocab: int) -> Reader:
    """How the model of a Hugging Face folder reads text: by the folder's tokenizer.json.

    >>> reader_of_folder(pathlib.Path("none"), 102400), reader_of_folder(pathlib.Path("none"), 256)
    (None, 'bytes')
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        return path
    return BYTES if vocab == BYTE_VOCAB else None


def reader_of_run(facts: Mapping[str, Any], vocab: int) -> Reader:
    """How a run has read text, as its checkpoint says it; see `reader_fact`.

    >>> reader_of_run({"reader": "/mine/tokenizer.json"}, 102400).name, reader_of_run({"reader": "bytes"}, 102400)
    ('tokenizer.json', 'bytes')
    """
    if (known := facts.get("reader")) is not None:
        return BYTES if known == BYTES else pathlib.Path(known)
    folder = facts.get("hugging_face", {}).get("folder")
    if folder is not None:
        return reader_of_folder(pathlib.Path(folder), vocab)
    return BYTES if vocab == BYTE_VOCAB else None


def reader_of_training(args: argparse.Namespace, vocab: int) -> Reader:
    """How a run shall read text: by ``--tokenizer``, or as the folder of ``--from`` does, or as bytes."""
    if args.tokenizer is not None:
        return args.tokenizer
    return BYTES if args.weights is None else reader_of_folder(args.weights, vocab)


def reader_fact(args: argparse.Namespace, vocab: int) -> str | None:
    """What the checkpoint of a run says of `reader_of_training`; None: its data were tokens already."""
    reader = reader_of_training(args, vocab)
    if isinstance(reader, pathlib.Path):
        return str(reader.absolute())
    ready = args.data is not None and all(found.suffix in READY for found in data.find_files(args.data))
    return None if ready else reader


def open_corpus(args: argparse.Namespace, reader: Reader, model: Any, vocab: int, sequence: int) -> data.Corpus:
    """The files of ``--data``, or the standard library's source, in the tokens of the model.

    Args:
      args: with ``data``, ``tokenizer``, ``token_dtype``, ``separator`` and ``document_mask``.
      reader: how the model reads text; ``--tokenizer`` where that is given.
      model: whose reader it is, for people.
      vocab: of the model.
      sequence: tokens of a sequence, at which conversations are cut.

    Raises:
      ValueError: text that nobody knows how to read, a tokenizer without text, or see `data.load_corpus`,
        `text.load_texts`, `chat.load_conversations` and `data.keep_apart`.
      MissingPackage: tokenizers, or jinja2 for conversations, is not installed.
    """
    found = _open(args, reader, model, vocab, sequence)
    return data.keep_apart(found) if args.document_mask else found


def _open(args: argparse.Namespace, reader: Reader, model: Any, vocab: int, sequence: int) -> data.Corpus:
    paths = [] if args.data is None else data.find_files(args.data)
    if args.data is None and args.tokenizer is not None:
        raise ValueError(f"--tokenizer {args.tokenizer} without --data: name the texts that it is to read")
    if args.data is None and reader != BYTES:
        raise ValueError(
            f"--data is missing: the default, the standard library's source as bytes, says nothing to {model}; name "
            "texts, with --tokenizer where the model has none beside it, or .npy or .bin files of its tokens"
        )
    # Files of tokens among others are refused there.
    if args.data is None or any(found.suffix in READY for found in paths):
        return data.load_corpus(args.data, vocab=vocab, token_dtype=args.token_dtype, separator=args.separator)
    if reader == BYTES:
        jsonl = [found for found in paths if found.suffix == ".jsonl"]
        if jsonl:
            raise ValueError(f"{jsonl[0]} holds documents or conversations: name the model's --tokenizer")
        return data.load_corpus(args.data, vocab=vocab, token_dtype=args.token_dtype, separator=args.separator)
    if reader is None:
        raise no_reader(f"--data {args.data} is text", model, ".npy or .bin files of its tokens")
    tokenizer = text.open_tokenizer(pathlib.Path(reader), args.separator)
    if chat.are_conversations(paths):
        return chat.load_conversations(paths, tokenizer, vocab, sequence, args.data)
    return text.load_texts(paths, tokenizer, vocab, pathlib.Path("runs") / "tokens", args.data)


def no_reader(what: str, model: Any, instead: str) -> ValueError:
    """The error for text to a model whose tokenizer nobody knows."""
    return ValueError(
        f"{what}, and no tokenizer.json says which tokens {model} makes of it: name the model's with --tokenizer FILE "
        f"(transformers writes one with AutoTokenizer.from_pretrained(...).save_pretrained(...)), or give {instead}"
    )
