"""What a file holds, unpacked, and what it is, from its first bytes, for the sentence that refuses it."""

from __future__ import annotations

import gzip
import pathlib
import re
import zlib

_BEGINNINGS = (
    (b"\x1f\x8b", "a gzip archive"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it"),
    (b"BZh", "a bzip2 archive: unpack it"),
    (b"\xfd7zXZ", "an xz archive: unpack it"),
    (b"SQLite format 3", "an SQLite database, such as Nsight Systems or rocprof write"),
    (b"\x7fELF", "a program"),
    (b"\x89PNG", "a picture"),
    (b"%PDF", "a PDF"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: fetch it with git lfs pull"),
)
_LOOKED_AT = 1 << 20


def file_kind(data: bytes) -> str:
    """What the bytes of a file are, with an article, in words that fit behind "this is".

    >>> file_kind(b'{"traceEvents": []}'), file_kind(b"<!DOCTYPE html>"), file_kind(b"")
    ('a Chrome trace in JSON', 'a page of HTML', 'empty')
    >>> file_kind(b"HloModule jit_f, is_scheduled=true"), file_kind(b"module @jit_f {")
    ('the text of an HLO module', 'MLIR text, StableHLO for instance')
    """
    for beginning, kind in _BEGINNINGS:
        if data.startswith(beginning):
            return kind
    head = data[:_LOOKED_AT].removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head:
        return "empty" if not data else "blank"
    if head.startswith((b"{", b"[")):
        return "a Chrome trace in JSON" if b'"traceEvents"' in head else "JSON"
    if re.match(rb"(?i)<!doctype html|<html", head):
        return "a page of HTML"
    if head.startswith(b"<"):
        return "XML"
    if re.search(rb"^\s*HloModule ", head, re.MULTILINE):
        return "the text of an HLO module"
    if re.search(rb"^(builtin\.)?module(\s+@\S+)?(\s+attributes\s)?\s*\{|^#loc", head, re.MULTILINE):
        return "MLIR text, StableHLO for instance"
    binary = sum(byte < 9 or 13 < byte < 32 for byte in head[:4096])
    return "binary data" if binary > 0.02 * len(head[:4096]) else "plain text"


def read_unpacked(file: pathlib.Path) -> bytes:
    """The bytes of a file, unpacked where it is compressed with gzip.

    Raises:
      ValueError: it cannot be read or unpacked.
    """
    try:
        data = file.read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: cannot be read, damaged or cut short ({error}): copy it again") from None
