"""Hugging Face folders, written tensor by tensor in any order and by several processes: places in files come first."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxpipe.deepseek.config import ModelConfig
from jaxpipe.deepseek.hf_config import to_hf_config
from jaxpipe.deepseek.hf_files import DTYPES, INDEX, SINGLE, SIZES, encode_header, read_json
from jaxpipe.deepseek.hf_fp8 import BLOCK, quantise
from jaxpipe.deepseek.hf_names import Tensor, scale_name, tensors

FORMATS: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "fp8": "F8_E4M3"}
"""What weights may be written in, and what safetensors calls it."""

LARGEST = 5 << 30
"""Bytes of a file, beyond which another is begun."""

COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "tiktoken.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files that stand beside weights; none of them is code."""

AT_ONCE = 4
"""Tensors that are converted and written at the same time."""

Written = tuple[str, int, np.ndarray]
"""A tensor's name, the first of its rows, and these rows."""


@dataclasses.dataclass(frozen=True)
class FileSpan:
    """Where a tensor is to be written.

    Attributes:
      dtype: as safetensors names it.
      shape: of it.
      file: its name.
      start: the byte of the file where it begins.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * SIZES[self.dtype]


def write_folder(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    blocks: Callable[[Mapping[str, Tensor]], Iterator[Written]],
    *,
    dtype: str = "bfloat16",
    max_shard_size: int = LARGEST,
    like: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Writes a folder with config.json, safetensors files and their index.

    All processes call it together; the folder appears when all have written.

    Args:
      folder: to write.
      config: of the model.
      blocks: of the model's tensors (those that repeat others left out), what this process writes: whole tensors, or
        some rows of one that is not `quantised`.
      dtype, max_shard_size, like, overwrite, progress: see `save`.

    Returns:
      A line that says what was written.

    Raises:
      ValueError, OSError: see `save`.
    """
    # Of a link, what it leads to.
    folder = pathlib.Path(os.path.realpath(folder))
    if dtype not in FORMATS:
        raise ValueError(f"dtype={dtype!r}: weights are written in {', '.join(FORMATS)}")
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size={max_shard_size}: bytes of a file, at least 1; a tensor is never divided")
    if folder.exists() and not overwrite:
        raise ValueError(f"{folder} is there already: choose another name, or overwrite=True")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder: choose another name, or remove it")
    table = tensors(config)
    places = plan_files(table, dtype, max_shard_size)
    total = sum(place.nbytes for place in places.values())
    source = None if like is None else pathlib.Path(like)
    about = {} if source is None else read_json(source / "config.json")
    described = _described(config, dtype, about)
    partial = folder.with_name(f"{folder.name}.partial")
    first = jax.process_index() == 0
    with _all_or_none(f"make {partial}"):
        if first:
            _make(partial)
    try:
        with _all_or_none(f"prepare {partial}"):
            if first:
                _prepare(partial, places, total)
        with _all_or_none(f"write {partial}"):
            _write_all(partial, table, places, blocks, total, progress)
        with _all_or_none(f"name {folder}"):
            if first:
                _write_texts(partial, described, places, source)
                _put_in_place(partial, folder)
    except BaseException:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    files = sorted({place.file for place in places.values()})
    return (
        f"{len(places)} tensors, {total / 1e6:.1f} MB in {len(files)} {'files' if len(files) > 1 else 'file'}, {folder}"
    )


def _write_all(
    partial: pathlib.Path,
    table: Mapping[str, Tensor],
    places: Mapping[str, FileSpan],
    blocks: Callable[[Mapping[str, Tensor]], Iterator[Written]],
    total: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Writes what this process has, some tensors at a time."""
    done, failed = 0, None
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        waiting: list[concurrent.futures.Future[int]] = []

        def finish(left: int) -> None:
            nonlocal done
            while len(waiting) > left:
                done += waiting.pop(0).result()
                if progress is not None:
                    progress(done, total)

        for block in blocks({name: tensor for name, tensor in table.items() if tensor.copy_of is None}):
            if failed is None:
                try:
                    waiting.append(pool.submit(_write, partial, table, places, *block))
                    finish(2 * AT_ONCE - 1)
                except Exception as error:
                    if jax.process_count() == 1:
                        raise
                    # The other processes go through all blocks, and some are gathered from this one.
                    failed = error
        if failed is not None:
            raise failed
        finish(0)
    assert jax.process_count() > 1 or done == total, (done, total)


def plan_files(table: Mapping[str, Tensor], dtype: str, max_shard_size: int = LARGEST) -> dict[str, FileSpan]:
    """Where each tensor of a model goes, scales of FP8 beside their matrices.

    >>> table = {"a": Tensor((2, 3), ()), "b": Tensor((3,), (), exact=True)}
    >>> [(place.file, place.dtype, place.nbytes) for place in plan_files(table, "bfloat16", 12).values()]
    [('model-00001-of-00002.safetensors', 'BF16', 12), ('model-00002-of-00002.safetensors', 'F32', 12)]
    """
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in table.items():
        if tensor.exact:
            kinds[name] = "F32", tensor.shape
        elif dtype != "fp8":
            kinds[name] = FORMATS[dtype], tensor.shape
        elif tensor.quantised:
            kinds[name] = FORMATS[dtype], tensor.shape
            kinds[scale_name(name)] = "F32", tensor.scale_shape
        else:
            kinds[name] = "BF16", tensor.shape
    groups: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    left = max_shard_size
    for name, (kind, shape) in kinds.items():
        size = math.prod(shape) * SIZES[kind]
        if size > left and groups[-1]:
            groups.append({})
            left = max_shard_size
        groups[-1][name] = kind, shape
        left -= size
    found = {}
    for index, group in enumerate(groups):
        file = SINGLE if len(groups) == 1 else f"model-{index + 1:05}-of-{len(groups):05}.safetensors"
        start = len(_header(group))
        for name, (kind, shape) in group.items():
            found[name] = FileSpan(kind, shape, file, start)
            start += found[name].nbytes
    return found


def _header(group: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    # transformers refuses files that do not say whose tensors they hold.
    return encode_header(group, {"format": "pt"})


def _make(partial: pathlib.Path) -> None:
    """The folder that is written before it gets its name."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
    except FileExistsError:
        raise ValueError(
            f"{partial} is there already, of a program that still writes, or was killed, or of somebody else: choose "
            "another name, or remove it"
        ) from None


def _put_in_place(partial: pathlib.Path, folder: pathlib.Path) -> None:
    """Gives what is written its name; what had it before is removed thereafter."""
    if not folder.exists():
        partial.rename(folder)
        return
    aside = pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".old", dir=folder.parent))
    try:
        folder.rename(aside)
    except OSError:
        aside.rmdir()
        raise
    try:
        partial.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    try:
        shutil.rmtree(aside)
    except OSError as error:
        warnings.warn(f"{aside}, which {folder} was before, cannot be removed: {error}", stacklevel=2)


def _prepare(partial: pathlib.Path, places: Mapping[str, FileSpan], total: int) -> None:
    """Files of their full sizes."""
    free = shutil.disk_usage(partial).free
    if free < total:
        raise OSError(f"{partial.parent} has {free / 1e9:.1f} GB free, and {total / 1e9:.1f} GB are to be written")
    for name in {place.file for place in places.values()}:
        group = {tensor: place for tensor, place in places.items() if place.file == name}
        with open(partial / name, "wb") as file:
            file.write(_header({tensor: (place.dtype, place.shape) for tensor, place in group.items()}))
            file.truncate(max(place.start + place.nbytes for place in group.values()))


def _write(
    folder: pathlib.Path,
    table: Mapping[str, Tensor],
    places: Mapping[str, FileSpan],
    name: str,
    row: int,
    array: np.ndarray,
) -> int:
    """Writes rows of a tensor, its scales, and what repeats it; returns bytes."""
    if places[name].dtype == "F8_E4M3":
        try:
            numbers, scales = quantise(array)
        except ValueError as error:
            raise ValueError(f"{name} cannot be written in FP8: {error}") from None
        return _put(folder, places[name], 0, numbers) + _put(folder, places[scale_name(name)], 0, scales)
    copies = [other for other, tensor in table.items() if tensor.copy_of == name]
    array = _converted(name, array, DTYPES[places[name].dtype])
    return sum(_put(folder, places[target], row, array) for target in (name, *copies))


def _converted(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        found = array.astype(dtype, copy=False)
    # Of the dtypes of files float16 alone ends far below float32.
    if found.dtype == np.float16 and (lost := np.isinf(found) & np.isfinite(array)).any():
        largest = np.abs(array[lost]).max()
        raise ValueError(
            f"{name} cannot be written in float16, which ends at 65504: it holds {largest:.6g}; take bfloat16"
        )
    return found


def _put(folder: pathlib.Path, place: FileSpan, row: int, array: np.ndarray) -> int:
    offset = place.start + row * math.prod(place.shape[1:]) * SIZES[place.dtype]
    left = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    size = len(left)
    with open(folder / place.file, "r+b", buffering=0) as file:
        file.seek(offset)
        while left:
            left = left[file.write(left[: 1 << 30]) :]
    return size


def _described(config: ModelConfig, dtype: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, as far as it goes as that of another folder."""
    # What the weights were kept in before, and code that would be fetched, say nothing about these files.
    kept = {name: value for name, value in about.items() if name not in ("quantization_config", "auto_map")}
    described = to_hf_config(config, kept or None)
    described["dtype" if "dtype" in about else "torch_dtype"] = "bfloat16" if dtype == "fp8" else dtype
    if dtype == "fp8":
        described["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        }
    return described


def _write_texts(
    folder: pathlib.Path,
    described: Mapping[str, Any],
    places: Mapping[str, FileSpan],
    like: pathlib.Path | None,
) -> None:
    """config.json, the index of several files, and what stands beside the weights of another folder."""
    _write_json(folder / "config.json", described)
    files = {name: place.file for name, place in places.items()}
    if len(set(files.values())) > 1:
        size = sum(place.nbytes for place in places.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": files})
    if like is not None:
        for name in COPIED:
            if (like / name).is_file():
                shutil.copyfile(like / name, folder / name)


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _all_or_none(what: str) -> Iterator[None]:
    """A step of all processes: they wait for each other, and where it fails on some, it does on all."""
    failed = None
    try:
        yield
    except BaseException as error:
        failed = error
    if jax.process_count() > 1:
        good = np.ravel(multihost_utils.process_allgather(np.int32(failed is None)))
        if failed is None and not good.all():
            raise OSError(f"could not {what}: processes {np.flatnonzero(good == 0).tolist()} failed, and say why")
    if failed is not None:
        raise failed
