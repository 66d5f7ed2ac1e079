"""Loads and placements as NumPy's npz files; loads that servers recorded, too."""

from __future__ import annotations

import json
import os
import stat
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Num

from eplb_jax.plan.arguments import check_loads
from eplb_jax.plan.placement import Array, Placement
from eplb_jax.plan.recorded import NAMES, loads_of
from eplb_jax.plan.torch_file import is_torch_file, read_torch_file

Path = str | os.PathLike[str]

ARRAYS = ("phy2log", "log2phy", "logcnt")
SIZES = ("num_gpus", "num_nodes", "num_groups")


def save_loads(path: Path, loads: Num[Array, "layers experts"]) -> None:
    """Writes loads [layers, experts] as array ``loads`` of an npz file; dtypes that NumPy lacks in a wider one.

    A file that was there is replaced once the new one is whole.

    Raises:
      ValueError: negative or non-finite loads; not two axes.
    """
    check_loads(loads, "loads")
    loads = np.asarray(loads)
    if loads.dtype.isbuiltin != 1:  # bfloat16, float8, int4, ...: NumPy would read back bytes
        loads = loads.astype(np.float32 if jnp.issubdtype(loads.dtype, jnp.floating) else np.int32)
    _save(path, loads=loads)


def read_loads(path: Path) -> Num[np.ndarray, "layers experts"]:
    """The array ``loads`` of an npz file, or its only array; one of [steps, layers, experts] is summed over steps.

    Files that servers of others record are read, too, npz, JSON or `torch.save`'s: SGLang's ``logical_count``, and
    counts by slot with a ``physical_to_logical_map``; see `eplb_jax.plan.recorded`. Nothing that such a file says is
    run.

    Sums of floats are made in float64 and are float64; those of integers are exact, or float64 beyond 2**53. Two-byte
    records are read as the bfloat16 that NumPy's own savez makes into them, and are float32.

    Raises:
      ValueError: another kind of file, several arrays of other names, a pickle that does more than hold
        tensors, or loads that no plan can be made for.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_loads(f"{folder}/loads.npz", np.array([[3, 1]]))
    ...     read_loads(f"{folder}/loads.npz")
    array([[3, 1]])
    """
    with open(path, "rb") as file:
        head = file.read(64)
        file.seek(0)
        try:
            if head.startswith(b"PK") and is_torch_file(file):
                loads = loads_of(read_torch_file(file))
            elif head.lstrip()[:1] in (b"{", b"["):
                loads = loads_of(_read_json(file.read()))
            else:
                names, arrays = _read(path, NAMES)
                if not arrays:
                    raise ValueError(f"it holds arrays {names}: name the loads 'loads'")
                loads = loads_of(arrays if set(arrays) & set(NAMES) else next(iter(arrays.values())))
        except ValueError as error:
            message = str(error)
            raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from error
    if loads.dtype in (np.dtype("V2"), np.dtype(jnp.bfloat16)):  # NumPy's own file, and a torch one
        loads = loads.view(jnp.bfloat16).astype(np.float32)
    if loads.ndim == 3:
        loads = _sum_steps(loads, path)
    check_loads(loads, f"the array of loads in {path}")
    return loads


def _read_json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it begins like JSON and is none: {error}") from error


def _sum_steps(loads: np.ndarray, path: Path) -> np.ndarray:
    if not len(loads):
        raise ValueError(f"the array of loads in {path} has shape {loads.shape}: [steps, layers, experts] of no step")
    if loads.dtype.kind in "biuf":
        bad = (~np.isfinite(loads) | (loads < 0)).any((1, 2))
        first = int(np.argmax(bad))
        check_loads(loads[first], f"step {first} of the loads in {path}")
    else:
        check_loads(loads[0], f"the array of loads in {path}")
    total = loads.sum(0, dtype=np.float64)
    return loads.sum(0) if loads.dtype.kind in "biu" and total.max() < 2.0**53 else total


def save_placement(
    path: Path,
    placement: Placement,
    *,
    num_gpus: int | None = None,
    num_nodes: int | None = None,
    num_groups: int | None = None,
) -> None:
    """Writes the three arrays by their names into an npz file, and the sizes that are given.

    Slots alone do not tell on how many GPUs they are: with ``num_gpus`` a reader can. A file that was there is replaced
    once the new one is whole.

    Raises:
      ValueError: sizes that the placement does not fit.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_placement(f"{folder}/plan.npz", Placement.from_phy2log(np.array([[0, 1, 0, 2]]), 3), num_gpus=2)
    ...     read_placement(f"{folder}/plan.npz", num_gpus=4)
    Traceback (most recent call last):
    ValueError: ...plan.npz is a placement for num_gpus=2, not 4: read it as that, or plan anew
    """
    sizes = dict(zip(SIZES, (num_gpus, num_nodes, num_groups), strict=True))
    known = {name: size for name, size in sizes.items() if size is not None}
    for name, size in known.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"{name}={size!r}: it must be a positive int")
    if num_gpus is not None:
        if placement.num_replicas % num_gpus:
            raise ValueError(f"{placement.num_replicas} replicas do not divide over num_gpus={num_gpus}")
        if num_gpus % (num_nodes or 1):
            raise ValueError(f"num_gpus={num_gpus} do not divide over num_nodes={num_nodes}")
    phy2log, log2phy, logcnt = (np.asarray(array) for array in placement)
    arrays = {name: np.asarray(size, np.int64) for name, size in known.items()}
    _save(path, phy2log=phy2log, log2phy=log2phy, logcnt=logcnt, **arrays)


def read_placement(path: Path, *, num_gpus: int | None = None, num_nodes: int | None = None) -> Placement:
    """What `save_placement` wrote, checked.

    Args:
      path: the file.
      num_gpus, num_nodes: sizes that it must be for, where it records them (`read_sizes`). Of a file that does not
        record its GPUs, the slots must divide over them.

    Raises:
      ValueError: a file without the three arrays; arrays that do not agree; a placement for other sizes.
    """
    names, arrays = _read(path, (*ARRAYS, *SIZES))
    if not set(ARRAYS) <= set(arrays):
        raise ValueError(f"{path} holds arrays {names}: a placement has {', '.join(ARRAYS)}")
    for name in ARRAYS:
        if arrays[name].dtype.kind not in "iu":
            raise ValueError(f"{path}: {name} has dtype {arrays[name].dtype}: a placement is of integers")
    recorded = _sizes_of(arrays, path)
    for name, wanted in (("num_gpus", num_gpus), ("num_nodes", num_nodes)):
        if wanted is not None and recorded.get(name, wanted) != wanted:
            raise ValueError(
                f"{path} is a placement for {name}={recorded[name]}, not {wanted}: read it as that, or plan anew"
            )
    placement = Placement(*(arrays[name] for name in ARRAYS))
    one_layer = placement.phy2log.ndim == 1
    layers = Placement(*(array[None] for array in placement)) if one_layer else placement
    try:
        layers.check(num_gpus or recorded.get("num_gpus", 1))
    except ValueError as error:
        raise ValueError(f"{path} holds no placement: {error}") from error
    return Placement(*(array.astype(np.int32) for array in placement))


def read_sizes(path: Path) -> dict[str, int]:
    """Those of num_gpus, num_nodes and num_groups that the file of a placement records; older files have none.

    Raises:
      ValueError: another kind of file.
    """
    return _sizes_of(_read(path, SIZES)[1], path)


def _sizes_of(arrays: dict[str, np.ndarray], path: Path) -> dict[str, int]:
    sizes = {}
    for name in set(SIZES) & set(arrays):
        value = arrays[name]
        if value.size != 1 or value.dtype.kind not in "iu" or value.item() < 1:
            raise ValueError(f"{path} records {name}={value.tolist()}: it must be a positive integer")
        sizes[name] = int(value.item())
    return sizes


def _save(path: Path, **arrays: np.ndarray) -> None:
    """Writes beside the file and then replaces it, so that nobody reads half of one or loses the old."""
    path = os.path.realpath(path)  # of a link, the file that it leads to
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):  # a device or pipe is written to
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
        return
    beside = f"{path}.{os.getpid()}.part"
    try:
        with open(beside, "wb") as file:  # given a name, NumPy may change its ending
            np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        if os.path.exists(beside):
            os.remove(beside)
        raise


def _read(path: Path, wanted: tuple[str, ...]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Names of all arrays, and those arrays that are wanted, or else the only one."""
    with open(path, "rb") as opened:
        head = opened.read(8)
        if not head.startswith((b"PK", b"\x93NUMPY")):
            begins = f"it begins with {head!r}" if head else "it is empty"
            raise ValueError(f"{path} is not a file that NumPy's savez or save writes: {begins}")
        opened.seek(0)
        try:
            file = np.load(opened, allow_pickle=False)
            if isinstance(file, np.ndarray):
                return ["without a name"], {"": file}
            names = sorted(file)
            chosen = [name for name in names if name in wanted] or (names if len(names) == 1 else [])
            arrays = {name: file[name] for name in chosen}
        except Exception as error:  # whatever the bytes of an unknown file make NumPy, zipfile or zlib raise
            reason = "arrays of Python objects are not read" if "allow_pickle" in str(error) else error
            raise ValueError(f"{path} is not a file that NumPy's savez or save writes: {reason}") from error
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise ValueError(f"{path} is not a file that NumPy's savez or save writes: it holds {names}")
    return names, arrays
