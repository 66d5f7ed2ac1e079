"""Hugging Face folders: which tensors their safetensors files hold, and their rows.

Files are untrusted. All that a header says is checked against its file before memory is taken, and nothing that could
run code, such as a pickle, is opened. Rows are read by position: the pages of a memory map would count as this
process's memory.

Source of the format: https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import posixpath
import re
import struct
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUMS = "SHA256SUMS"

LARGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""

DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""What weights are kept in, by the format's names."""

SIZES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "F64": 8, "I64": 8,
    "U64": 8, "C64": 8, **{name: dtype.itemsize for name, dtype in DTYPES.items()},
}  # fmt: skip
"""Bytes of an element of every dtype of whole bytes that the format has."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file.

    Attributes:
      name: as the file has it.
      path: of the file.
      dtype: the format's name of it, as "BF16".
      shape: of the tensor.
      start: the byte of the file where it begins.
    """

    name: str
    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * SIZES[self.dtype]

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Some rows along the first axis, in the file's dtype; of a scalar the whole.

        Raises:
          ValueError: a dtype that is none of weights; a file that has become shorter.
        """
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.name} in {self.path} is {self.dtype}: weights are {', '.join(DTYPES)}")
        count = self.shape[0] if self.shape else 1
        stop = count if stop is None else stop
        found = np.empty((stop - start, *self.shape[1:]), DTYPES[self.dtype])
        row = found.nbytes // max(1, stop - start)
        left = memoryview(found.reshape(-1).view(np.uint8).data)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start + start * row)
            while left:
                # Linux reads at most 2 GiB at once.
                read = file.readinto(left[: 1 << 30])
                if not read:
                    raise ValueError(f"{self.path} ends within {self.name}: it was changed while it was read")
                left = left[read:]
        return found if self.shape else found.reshape(())


def open_folder(folder: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """The tensors of a folder with safetensors files, by name; headers alone are read.

    A folder has `INDEX` and the files that it names, or one file ``model.safetensors``.

    Raises:
      ValueError: no such files, pickles instead of them, files that are damaged or do not match their index.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / SINGLE
    ...     _ = path.write_bytes(encode_header({"a": ("F32", (2, 3))}) + bytes(24))
    ...     open_folder(folder)["a"].rows(1).tolist()
    [[0.0, 0.0, 0.0]]
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: name one with config.json and safetensors files")
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise ValueError(_nothing_to_read(folder))
        return read_header(folder / SINGLE)
    files = _read_index(folder / INDEX)
    headers = {}
    for name in sorted(set(files.values())):
        if not (folder / name).exists():
            held = sorted(tensor for tensor, file in files.items() if file == name)
            raise ValueError(f"{folder / name} is missing; {INDEX} says that it holds {listed(held)}: fetch it again")
        headers[name] = read_header(folder / name)
    for tensor, name in files.items():
        if tensor not in headers[name]:
            raise ValueError(f"{tensor} is not in {folder / name}, where {INDEX} says it is: fetch both again")
    found: dict[str, TensorEntry] = {}
    for name, header in headers.items():
        for tensor, entry in header.items():
            if files.get(tensor) != name:
                raise ValueError(f"{tensor} in {folder / name} is not where {INDEX} says: {files.get(tensor)}")
            found[tensor] = entry
    return found


def read_header(path: pathlib.Path) -> dict[str, TensorEntry]:
    """What a safetensors file holds, by name.

    Raises:
      ValueError: no safetensors file, or one that is truncated, or whose header does not describe its bytes.
    """
    if path.suffix in PICKLES:
        raise ValueError(f"{path} may be a pickle, which runs code when it is read: convert it to safetensors")
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or length > min(LARGEST_HEADER, size - 8):
            raise ValueError(
                f"{path} has {size} bytes and should begin with a header of {length}: it is truncated, or no "
                "safetensors file; fetch it again"
            )
        text = file.read(length)
    header = parse_json(text, path)
    header.pop("__metadata__", None)
    found = {name: _entry(name, value, path, 8 + length) for name, value in header.items()}
    end = 8 + length
    for entry in sorted(found.values(), key=lambda entry: (entry.start, entry.nbytes)):
        if entry.start != end:
            raise ValueError(f"{entry.name} in {path} begins at byte {entry.start} instead of {end}: a damaged header")
        end += entry.nbytes
        if end > size:
            raise ValueError(
                f"{entry.name} in {path}, {entry.dtype}{list(entry.shape)}, ends at byte {end}, and the file has {size}"
                ": it is truncated; fetch it again"
            )
    if end != size:
        raise ValueError(f"{path} has {size} bytes, and its tensors end at {end}: it is damaged; fetch it again")
    return found


def encode_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The bytes before the tensors' own, which follow each other in this order.

    Args:
      tensors: dtype, as "BF16", and shape of each by name.
      metadata: texts by name.

    >>> encode_header({"a": ("F32", (2,))})[8:]
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  '
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # Tensors begin at multiples of eight bytes, so that others may map them.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def parse_json(text: bytes, path: pathlib.Path) -> dict[str, Any]:
    """An object that a file holds; no name stands in it twice.

    Raises:
      ValueError: anything else.
    """

    def once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{name} stands in it twice")
            found[name] = value
        return found

    try:
        found = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has no JSON where it should: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} has JSON of {type(found).__name__} where it should have an object")
    return found


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """`parse_json` of a whole file.

    Raises:
      ValueError: no such file, one that is too large, or not an object.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}: name a folder as Hugging Face has it, with {path.name}")
    if path.stat().st_size > LARGEST_HEADER:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: more than {LARGEST_HEADER} are no such file")
    return parse_json(path.read_bytes(), path)


def check_sums(folder: pathlib.Path, files: Iterable[str]) -> int:
    """Compares files with their SHA-256, where the folder has any; returns how many were compared.

    They stand in ``SHA256SUMS`` or ``FILE.sha256``, as sha256sum writes them, or alone in the latter, or are what
    ``hf download --local-dir`` notes beside its files, unless a file was changed thereafter.

    Raises:
      ValueError: a file that differs; a line that is no checksum.
    """
    sums = {posixpath.normpath(path): found for path, found in _sums(folder / SUMS)}
    compared = 0
    for name in files:
        # Whatever folder the file was in when it was written.
        own = {posixpath.basename(path) or name: found for path, found in _sums(folder / f"{name}.sha256")}
        wanted = sums.get(name) or own.get(name) or _noted_by_hub(folder, name)
        if wanted is None:
            continue
        with open(folder / name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted:
            raise ValueError(f"{folder / name} has SHA-256 {found} and should have {wanted}: fetch it again")
        compared += 1
    return compared


def listed(names: Iterable[str], most: int = 10) -> str:
    """The first names, and how many there are.

    >>> listed(["a", "b", "c"], 2)
    '3 tensors: a, b, ...'
    """
    names = list(names)
    return f"{len(names)} tensors: {', '.join(names[:most])}{', ...' if len(names) > most else ''}"


def _entry(name: str, value: Any, path: pathlib.Path, origin: int) -> TensorEntry:
    """A tensor of a header, whose sizes fit each other."""
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise ValueError(f"{name} in {path} has dtype {dtype!r}: known are {', '.join(SIZES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} in {path} has shape {shape!r} and bytes {offsets!r}: a damaged header")
    entry = TensorEntry(name, path, dtype, tuple(shape), origin + offsets[0])
    if entry.nbytes != offsets[1] - offsets[0]:
        raise ValueError(
            f"{name} in {path}, {dtype}{shape}, has {entry.nbytes} bytes, and its header gives it those from "
            f"{offsets[0]} to {offsets[1]}: a damaged header"
        )
    return entry


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _read_index(path: pathlib.Path) -> dict[str, str]:
    """The file of each tensor."""
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{path} has no weight_map: it should name the file of each tensor")
    for tensor, name in files.items():
        # Names alone: a path could lead anywhere.
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(
                f"{path} says that {tensor} is in {name!r}: only safetensors files beside the index are read, no "
                "pickles and no paths; convert it to safetensors"
            )
    return files


def _nothing_to_read(folder: pathlib.Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return (
            f"{folder} holds pickles ({pickles[0]}), which run code when they are read: convert them with "
            "save_pretrained(..., safe_serialization=True) of transformers where you trust them"
        )
    return f"{folder} has neither {INDEX} nor {SINGLE}: name a folder as Hugging Face has it"


def _sums(path: pathlib.Path) -> list[tuple[str, str]]:
    """Paths and checksums of a file as sha256sum writes it; "" for the path that is not there."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        if not line.strip() or line.startswith("#"):
            continue
        parts = re.fullmatch(r"([0-9a-fA-F]{64})(?: [ *](.+)|\s*)", line)
        if parts is None or (path.name == SUMS and not parts[2]):
            raise ValueError(f"{path} has {line!r} where a SHA-256 should be: write it as sha256sum does")
        found.append((parts[2] or "", parts[1].lower()))
    return found


def _noted_by_hub(folder: pathlib.Path, name: str) -> str | None:
    """The SHA-256 that huggingface_hub keeps of large files: the second line, if it is no commit's.

    The third line is the time when that was noted. As hub does, a second later is taken for the same.
    """
    path = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if len(lines) < 3 or not re.fullmatch("[0-9a-f]{64}", lines[1]) or not re.fullmatch(r"\d+(\.\d+)?", lines[2]):
        return None
    return lines[1] if (folder / name).stat().st_mtime - 1 <= float(lines[2]) else None
