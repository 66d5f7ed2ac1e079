"""Opens files as profilers, browsers and clusters leave them: packed or not, under any name."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib
import io
import lzma
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

HEAD = 1 << 16
"""How many bytes of a file tell its kind."""

_ARCHIVE = (b"PK\x03\x04", b"PK\x05\x06")

DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, gzip.BadGzipFile)
"""Exceptions that unpacking raises for a damaged or cut file."""


class Source(NamedTuple):
    """One trace: a file, or a member of an archive.

    Attributes:
      path: path of the file.
      name: name for messages: the path, followed by the member of an archive.
      member: member of an archive; "" for the file itself.
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
        """Whether the file is packed."""
        return bool(self.member) or _begins(self.path, tuple(_PACKED))

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Opens the unpacked content.

        Raises:
          ValueError: the file does not exist, may not be read, or is packed in a way that this Python cannot unpack.
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
        """The first bytes of the content; fewer if it is damaged after them."""
        found = b""
        with self.open() as stream:
            try:
                while len(found) < HEAD and (more := stream.read(4096)):
                    found += more
            except (*DAMAGE, OSError):
                pass
        return found


def sources(path: pathlib.Path) -> list[Source]:
    """The traces in a file: the file itself, or the JSON files in a zip archive, or all its files if none is JSON.

    Raises:
      ValueError: the archive is damaged or empty.
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
    """Unpacks Zstandard, with Python 3.14 or with the package `zstandard`, and raises what other packings raise."""

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
    """Unpacks by the first bytes: browsers unpack downloads and keep the name. Some files are packed twice."""
    for _ in range(3):
        stream = stack.enter_context(io.BufferedReader(stream, HEAD))
        first = stream.peek(8)[:8]
        unpack = next((unpack for magic, unpack in _PACKED.items() if first.startswith(magic)), None)
        if unpack is None:
            break
        stream = stack.enter_context(unpack(stream))
    return stream


def read_unpacked(file: pathlib.Path) -> bytes:
    """The bytes of a file, unpacked if it is compressed with gzip.

    Raises:
      ValueError: the file cannot be read or unpacked.
    """
    try:
        data = file.read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: cannot be read, damaged or cut short ({error}): copy it again") from None
