"""Tells what a file is from its first bytes or its name: a trace, a compiled program, or something else."""

from __future__ import annotations

import re
from typing import NamedTuple


class FileKind(NamedTuple):
    """A kind of file that is neither a trace nor a compiled program.

    Attributes:
      what: what such a file is, with an article, in words that fit after "this is".
      remedy: how to get a trace instead; "" if `what` says it.
      beginnings: first bytes of such files, in small letters if the case of letters does not matter.
      endings: endings of such files' names, in small letters.
      offset: position of the beginnings in the file.
    """

    what: str
    remedy: str
    beginnings: tuple[bytes, ...] = ()
    endings: tuple[str, ...] = ()
    offset: int = 0


_PROFILE_AGAIN = "profile with torch.profiler or jax.profiler instead"

OTHER_KINDS = (
    FileKind("a pointer of Git LFS, not the file itself: run `git lfs pull`", "", (b"version https://git-lfs",)),
    FileKind("a gzip archive: unpack it", "", (b"\x1f\x8b",)),
    FileKind("a zip archive: unpack it", "", (b"PK\x03\x04",)),
    FileKind("a zstd archive: unpack it", "", (b"\x28\xb5\x2f\xfd",)),
    FileKind("a bzip2 archive: unpack it", "", (b"BZh",)),
    FileKind("an xz archive: unpack it", "", (b"\xfd7zXZ",)),
    FileKind("a tar archive: unpack it", "", (b"ustar",), offset=257),
    FileKind("an SQLite database, as Nsight Systems and rocprof export", _PROFILE_AGAIN, (b"SQLite format 3",)),
    FileKind("a report of Nsight Systems", _PROFILE_AGAIN, endings=(".nsys-rep", ".qdrep")),
    FileKind("a report of Nsight Compute", _PROFILE_AGAIN, (b"NVR\0",), (".ncu-rep",)),
    FileKind("a page of HTML", "save the trace itself, not the page that shows it", (b"<!doctype html", b"<html")),
    FileKind("XML", _PROFILE_AGAIN, (b"<",)),
    FileKind("a picture", "name the trace itself", (b"\x89PNG", b"\xff\xd8\xff")),
    FileKind("a PDF", "name the trace itself", (b"%PDF",)),
    FileKind("a program", "name the trace itself", (b"\x7fELF",)),
    FileKind(
        "a pickle, such as PyTorch's memory snapshot",
        "export the trace with export_chrome_trace",
        (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
    ),
)
"""Kinds that no reader takes, in the order in which they are tried."""

_LOOKED_AT = 1 << 20


def is_json(head: bytes) -> bool:
    """Whether a file begins like an object or a list in JSON.

    >>> is_json(b' {"traceEvents": ['), is_json(b"[1]"), is_json(b"step,loss"), is_json(b"{not json")
    (True, True, False, False)
    """
    text = head.lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n\0").replace(b"\0", b"")
    return bool(re.match(rb'\{\s*("|\}|$)|\[\s*([\[{"\d\]tfn-]|$)', text))


def is_xspace(head: bytes, name: str) -> bool:
    """Whether a file is a profile of `jax.profiler`: it begins with a plane of a host or a device, or its name says so.

    >>> is_xspace(b"\\n\\x10\\x12\\x0e/device:GPU:0", "profile"), is_xspace(b"{}", "a.json")
    (True, False)
    """
    begins = head[:1] == b"\n" and any(plane in head for plane in (b"/host:", b"/device:", b"Task Environment"))
    return begins or name.lower().endswith(".xplane.pb")


def refusal(head: bytes, name: str) -> str:
    """Says what a file is that no reader of traces takes, and what to do; "" if it may be a trace.

    >>> refusal(b"SQLite format 3\\0", "a.sqlite").split(";")[0]
    'an SQLite database, as Nsight Systems and rocprof export'
    """
    if other := _other_kind(head, name):
        return "; ".join(filter(None, (other.what, other.remedy)))
    is_perfetto = name.lower().endswith((".pftrace", ".perfetto-trace"))
    if is_perfetto or (head[:1] == b"\n" and b"\0" in head and not is_xspace(head, name)):
        return f"a protocol buffer, such as Perfetto's trace, which only its own viewer reads; {_PROFILE_AGAIN}"
    return ""


def file_kind(data: bytes) -> str:
    """What the bytes of a file are, with an article, in words that fit after "this is".

    >>> file_kind(b'{"traceEvents": []}'), file_kind(b"<!DOCTYPE html>"), file_kind(b"")
    ('a Chrome trace in JSON', 'a page of HTML', 'empty')
    >>> file_kind(b"HloModule jit_f, is_scheduled=true"), file_kind(b"module @jit_f {")
    ('the text of an HLO module', 'MLIR text, StableHLO for instance')
    """
    if other := _other_kind(data[:_LOOKED_AT]):
        return other.what
    head = _text(data[:_LOOKED_AT])
    if not head:
        return "empty" if not data else "blank"
    if head.startswith((b"{", b"[")):
        return "a Chrome trace in JSON" if b'"traceEvents"' in head else "JSON"
    if re.search(rb"^\s*HloModule ", head, re.MULTILINE):
        return "the text of an HLO module"
    if re.search(rb"^(builtin\.)?module(\s+@\S+)?(\s+attributes\s)?\s*\{|^#loc", head, re.MULTILINE):
        return "MLIR text, StableHLO for instance"
    binary = sum(byte < 9 or 13 < byte < 32 for byte in head[:4096])
    return "binary data" if binary > 0.02 * len(head[:4096]) else "plain text"


def _other_kind(head: bytes, name: str = "") -> FileKind | None:
    text, lower = _text(head[:4096]).lower(), name.lower()
    return next(
        (
            kind
            for kind in OTHER_KINDS
            if head.startswith(kind.beginnings, kind.offset)
            or (not kind.offset and text.startswith(kind.beginnings))
            or (kind.endings and lower.endswith(kind.endings))
        ),
        None,
    )


def _text(head: bytes) -> bytes:
    """The text without the mark of UTF-8 and white space before it."""
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()
