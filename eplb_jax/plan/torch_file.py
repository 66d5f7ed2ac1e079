"""Tensors of a file that `torch.save` wrote, read without PyTorch and without running what its pickle says.

Such a file is a zip archive, its entries not compressed: ``data.pkl`` says what there is, ``data/0`` and so on hold the
numbers. A pickle is a program that may call any function. Here its instructions are read one by one: those that make
numbers, names, lists, dicts and tensors are followed, any other is refused, and nothing is ever imported or called.

Source: the notes on serialisation semantics in PyTorch's documentation, ``torch/serialization.py``, and Python's
`pickletools`.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
import zipfile
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

STORAGES = {
    "BoolStorage": np.dtype(np.bool_),
    "ByteStorage": np.dtype(np.uint8),
    "CharStorage": np.dtype(np.int8),
    "ShortStorage": np.dtype(np.int16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
}
"""Classes of module torch that a pickle names for the numbers of a tensor."""

NAMES = {
    "torch._utils _rebuild_tensor_v2",
    "collections OrderedDict",
    *(f"torch {name}" for name in STORAGES),
}
"""All that a pickle may name, as its instruction has it."""

VALUES = ["BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"]
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclasses.dataclass(frozen=True)
class _Name:
    """A function or class that the pickle names; never looked up."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """The numbers of a tensor: an entry of the archive."""

    entry: str
    dtype: np.dtype
    size: int


MOST_AXES = 64
"""Of a tensor."""

_MARK = object()


def is_torch_file(file: BinaryIO) -> bool:
    """Whether an open zip file is one of PyTorch's; leaves it at its beginning."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name == "data.pkl" or name.endswith("/data.pkl") for name in archive.namelist())
    except Exception:  # whatever the bytes of an unknown file make zipfile raise
        return False
    finally:
        file.seek(0)


def read_torch_file(file: BinaryIO) -> Any:
    """What the file holds: dicts, lists and tuples of numbers, strings and NumPy arrays.

    Raises:
      ValueError: a file of another kind, or whose pickle does more than that.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _read(archive)
    except ValueError:
        raise
    except Exception as error:  # as above
        raise ValueError(f"it is no archive of torch.save: {error}") from error


def _read(archive: zipfile.ZipFile) -> Any:
    sizes = {}
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its entry {info.filename!r} is compressed, which torch.save does not do")
        if info.compress_size != info.file_size:
            raise ValueError(
                f"its entry {info.filename!r} is of {info.compress_size} bytes and claims {info.file_size}"
            )
        sizes[info.filename] = info.file_size
    pickles = [name for name in sizes if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"it has {len(pickles)} entries data.pkl: torch.save writes one")
    folder = pickles[0].removesuffix("data.pkl")
    order = archive.read(folder + "byteorder") if folder + "byteorder" in sizes else b"little"
    if order.strip() != b"little":
        raise ValueError(f"its byte order is {order!r}: only little-endian files are read")
    return _Reader(archive, folder, sizes).run(archive.read(pickles[0]))


class _Reader:
    """Follows the instructions of one pickle."""

    def __init__(self, archive: zipfile.ZipFile, folder: str, sizes: dict[str, int]) -> None:
        self.archive, self.folder, self.sizes = archive, folder, sizes
        self.data: dict[str, bytes] = {}
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """The value that the pickle leaves."""
        try:
            for opcode, argument, _ in pickletools.genops(program):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self.follow(opcode.name, argument)
        except (IndexError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"its pickle is damaged: {type(error).__name__} {error}") from error
        raise ValueError("its pickle is damaged: it has no end")

    def follow(self, name: str, argument: Any) -> None:
        """One instruction."""
        stack = self.stack
        if name in VALUES:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in TUPLES:
            items = [stack.pop() for _ in range(TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "TUPLE":
            stack.append(tuple(self.since_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self.since_mark()
            self.last(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self.since_mark()
            self.last(dict).update(zip(items[::2], items[1::2], strict=True))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            value = self.memo[argument]
            if isinstance(value, list | dict | tuple):  # each level of such could be twice as large as the one below
                raise ValueError("its pickle holds a list, dict or tuple twice: only tensors and plain values are read")
            stack.append(value)
        elif name == "GLOBAL":
            if argument not in NAMES:
                raise ValueError(
                    f"its pickle names {argument.replace(' ', '.')!r}: only tensors and plain values are read"
                )
            stack.append(_Name(argument))
        elif name == "BINPERSID":
            stack.append(self.storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self.make(function, arguments))
        else:
            raise ValueError(f"its pickle has the instruction {name}: only tensors and plain values are read")

    def since_mark(self) -> list[Any]:
        """Takes what is on the stack above the last mark, and the mark."""
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def last(self, kind: type) -> Any:
        """What is on top, which must be a list or a dict."""
        if not isinstance(self.stack[-1], kind):
            raise ValueError(
                f"its pickle adds to a {type(self.stack[-1]).__name__}, where a {kind.__name__} is expected"
            )
        return self.stack[-1]

    def storage(self, described: Any) -> _Storage:
        """The entry that ("storage", class, key, device, size) describes."""
        if not (isinstance(described, tuple) and len(described) == 5 and described[0] == "storage"):
            raise ValueError(f"its pickle refers to {described!r}: only storages of tensors are read")
        _, kind, key, _, size = described
        name = kind.name.removeprefix("torch ") if isinstance(kind, _Name) else str(kind)
        entry = f"{self.folder}data/{key}"
        if name not in STORAGES or not isinstance(size, int) or entry not in self.sizes:
            raise ValueError(f"its pickle refers to {size} numbers of {name} in {entry!r}, which are not there")
        dtype = STORAGES[name]
        if size < 0 or self.sizes[entry] != size * dtype.itemsize:
            raise ValueError(
                f"its entry {entry!r} has {self.sizes[entry]} bytes, {size} numbers of {dtype} need others"
            )
        return _Storage(entry, dtype, size)

    def make(self, function: Any, arguments: Any) -> Any:
        """The tensor or the empty dict that a call would make."""
        if function == _Name("collections OrderedDict") and arguments == ():
            return {}
        if (
            function != _Name("torch._utils _rebuild_tensor_v2")
            or not isinstance(arguments, tuple)
            or len(arguments) < 4
        ):
            raise ValueError(f"its pickle calls {function}: only tensors and plain values are read")
        storage, offset, shape, strides = arguments[:4]
        if not (isinstance(storage, _Storage) and len(shape) == len(strides) <= MOST_AXES) or any(
            not isinstance(number, int) or not 0 <= number < 2**62 for number in (offset, *shape, *strides)
        ):
            raise ValueError(f"its pickle describes a tensor by a shape of {len(shape)} axes, which is none")
        last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
        if math.prod(shape) > storage.size or (math.prod(shape) and last >= storage.size):
            raise ValueError(f"a tensor of shape {shape} does not fit the {storage.size} numbers that are stored")
        if storage.entry not in self.data:
            self.data[storage.entry] = self.archive.read(storage.entry)
        data = np.frombuffer(self.data[storage.entry], storage.dtype)
        if data.size != storage.size:
            raise ValueError(f"its entry {storage.entry!r} holds {data.size} numbers, not the {storage.size} it claims")
        if not math.prod(shape):
            return np.zeros(shape, storage.dtype)
        strides = tuple(stride * storage.dtype.itemsize for stride in strides)
        return np.lib.stride_tricks.as_strided(data[offset:], shape, strides, writeable=False)
