"""Files as profilers, browsers and clusters leave them: packed or not, under any name, and which kind each one is."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib
import io
import lzma
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

HEAD = 1 << 16
"""Bytes by which the kind of a file is told."""

_ARCHIVE = (b"PK\x03\x04", b"PK\x05\x06")

DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, gzip.BadGzipFile)
"""What unpacking raises for a file that is damaged or cut short."""


class Source(NamedTuple):
    """One trace: a file, or a member of an archive.

    Attributes:
      path: of the file.
      name: for messages: the path, and behind it the member of an archive.
      member: of an archive, "" for a file of its own.
    """

    path: pathlib.Path
    name: str
    member: str = ""

    @property
    def label(self) -> str:
        """The last part of the name."""
        return pathlib.PurePath(self.member or self.path).name

    @property
    def is_packed(self) -> bool:
        """Whether its bytes are those of a packed file."""
        return bool(self.member) or _begins(self.path, tuple(_PACKED))

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """What is inside, unpacked.

        Raises:
          ValueError: no such file, none that may be read, or packed in a way that this Python cannot unpack.
        """
        with contextlib.ExitStack() as stack:
            try:
                if self.member:
                    archive = stack.enter_context(zipfile.ZipFile(self.path))
                    stream: Any = stack.enter_context(archive.open(self.member))
                else:
                    stream = stack.enter_context(self.path.open("rb"))
                unpacked = _unpacked(stream, stack)
            except ImportError as error:
                raise ValueError(
                    f"{self.name}: packed with Zstandard; `pip install zstandard`, or unpack it with `zstd -d`"
                ) from error
            except (RuntimeError, NotImplementedError) as error:
                raise ValueError(f"{self.name}: the archive cannot be unpacked ({error}); unpack it first") from error
            except DAMAGE as error:
                raise ValueError(f"{self.name}: the file is damaged or cut short ({error}); copy it again") from error
            except OSError as error:
                raise ValueError(f"{self.name}: cannot be read: {error.strerror or error}") from error
            yield unpacked

    def head(self) -> bytes:
        """The first bytes of what is inside; all that there are if it is damaged behind them."""
        found = b""
        with self.open() as stream:
            try:
                while len(found) < HEAD and (more := stream.read(4096)):
                    found += more
            except (*DAMAGE, OSError):
                pass
        return found


def sources(path: pathlib.Path) -> list[Source]:
    """A file as what there is to read in it: itself, or the JSON files and profiles in a zip archive.

    Raises:
      ValueError: an archive that is damaged or holds nothing of the kind.
    """
    if not path.is_file() or not _begins(path, _ARCHIVE):
        return [Source(path, str(path))]
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
    except DAMAGE as error:
        raise ValueError(f"{path}: the archive is damaged or cut short ({error}); copy it again") from error
    names = [name for name in names if not name.startswith("__MACOSX/")]
    found = [name for name in names if ".json" in name.lower()] or names
    if not found:
        raise ValueError(f"{path}: the archive is empty")
    return [Source(path, f"{path}/{name}", name) for name in sorted(found)]


def _begins(path: pathlib.Path, magic: tuple[bytes, ...]) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(8).startswith(magic)
    except OSError:
        return False


class _Zstandard(io.RawIOBase):
    """Python has it from 3.14 on; before, a package does. Its errors become those of the other packings."""

    def __init__(self, stream: Any) -> None:
        try:
            module = importlib.import_module("compression.zstd")
            self._stream = module.ZstdFile(stream, "rb")
        except ImportError:
            module = importlib.import_module("zstandard")
            self._stream = module.ZstdDecompressor().stream_reader(stream, read_across_frames=True)
        self._error = module.ZstdError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._stream.readinto(buffer)
        except self._error as error:
            raise zlib.error(str(error)) from error


_PACKED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda stream: gzip.GzipFile(fileobj=stream, mode="rb"),
    b"\x28\xb5\x2f\xfd": _Zstandard,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"BZh": bz2.BZ2File,
}


def _unpacked(stream: Any, stack: contextlib.ExitStack) -> Any:
    """By its first bytes, not its name: browsers unpack downloads and keep the name. Some pack what is packed."""
    for _ in range(3):
        stream = stack.enter_context(io.BufferedReader(stream, HEAD))
        first = stream.peek(8)[:8]
        unpack = next((unpack for magic, unpack in _PACKED.items() if first.startswith(magic)), None)
        if unpack is None:
            break
        stream = stack.enter_context(unpack(stream))
    return stream


def is_json(head: bytes) -> bool:
    """Whether a file begins as an object or a list in JSON does.

    >>> is_json(b' {"traceEvents": ['), is_json(b"[1]"), is_json(b"step,loss"), is_json(b"{not json")
    (True, True, False, False)
    """
    text = head.lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n\0").replace(b"\0", b"")
    return bool(re.match(rb'\{\s*("|\}|$)|\[\s*([\[{"\d\]tfn-]|$)', text))


def is_xspace(head: bytes, name: str) -> bool:
    """Whether a file is a profile of `jax.profiler`: a protocol buffer that begins with a plane of a host or device.

    >>> is_xspace(b"\\n\\x10\\x12\\x0e/device:GPU:0", "profile"), is_xspace(b"{}", "a.json")
    (True, False)
    """
    begins = head[:1] == b"\n" and any(plane in head for plane in (b"/host:", b"/device:", b"Task Environment"))
    return begins or name.lower().endswith(".xplane.pb")


def kind(head: bytes, name: str) -> str:
    """What a file that no reader takes is, and what to do, for the end of a sentence.

    >>> kind(b"SQLite format 3\\0", "a.sqlite").split(",")[0]
    'an SQLite database'
    """
    lower = name.lower()
    text = head.lstrip().lower()
    return next((sentence for found, sentence in _kinds(head, text, lower) if found), "")


def _kinds(head: bytes, text: bytes, name: str) -> Iterator[tuple[bool, str]]:
    again = "profile with torch.profiler or jax.profiler instead"
    yield text.startswith(b"version https://git-lfs"), "a pointer of Git LFS, not the file; run `git lfs pull`"
    yield head.startswith(b"SQLite format 3"), f"an SQLite database, as Nsight Systems and rocprof export; {again}"
    yield name.endswith((".nsys-rep", ".qdrep")), f"a report of Nsight Systems; {again}"
    yield name.endswith(".ncu-rep") or head.startswith(b"NVR\0"), f"a report of Nsight Compute; {again}"
    yield (
        text.startswith((b"<!doctype html", b"<html")),
        "a web page; save the trace itself, not the page that shows it",
    )
    yield text.startswith(b"<?xml"), f"XML; {again}"
    yield head[257:262] == b"ustar", "a tar archive; unpack it and name the folder"
    yield (
        name.endswith((".pftrace", ".perfetto-trace")) or (head[:1] == b"\n" and b"\0" in head),
        f"a protocol buffer, such as Perfetto's trace, which only its own viewer reads; {again}",
    )
    yield (
        head.startswith(b"\x80") and head[1:2] in b"\x02\x03\x04\x05",
        "a pickle, such as PyTorch's memory snapshot; export the trace with export_chrome_trace",
    )
    yield head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"%PDF")), "a picture or a document; name the trace itself"
