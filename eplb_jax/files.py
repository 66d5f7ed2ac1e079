"""Loads and placements as NumPy's npz files."""

from __future__ import annotations

import os
import zipfile

import numpy as np
from jaxtyping import Num

from eplb_jax.arguments import check_loads
from eplb_jax.placement import Array, Placement

Path = str | os.PathLike[str]


def save_loads(path: Path, loads: Num[Array, "layers experts"]) -> None:
    """Writes loads [layers, experts] as array ``loads`` of an npz file.

    Raises:
      ValueError: negative or non-finite loads; not two axes.
    """
    check_loads(loads, "loads")
    _save(path, loads=np.asarray(loads))


def read_loads(path: Path) -> Num[np.ndarray, "layers experts"]:
    """The array ``loads`` of an npz file, or its only array; one of [steps, layers, experts] is summed over steps.

    Raises:
      ValueError: another kind of file, several arrays of other names, or loads that no plan can be made for.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_loads(f"{folder}/loads.npz", np.array([[3, 1]]))
    ...     read_loads(f"{folder}/loads.npz")
    array([[3, 1]])
    """
    arrays = _read(path)
    if "loads" not in arrays and len(arrays) != 1:
        raise ValueError(f"{path} holds arrays {sorted(arrays)}: name the loads 'loads'")
    loads = arrays["loads"] if "loads" in arrays else next(iter(arrays.values()))
    loads = loads.sum(0) if loads.ndim == 3 else loads
    check_loads(loads, f"the loads of {path}")
    return loads


def save_placement(path: Path, placement: Placement) -> None:
    """Writes the three arrays by their names into an npz file."""
    phy2log, log2phy, logcnt = (np.asarray(array) for array in placement)
    _save(path, phy2log=phy2log, log2phy=log2phy, logcnt=logcnt)


def read_placement(path: Path) -> Placement:
    """What `save_placement` wrote.

    Raises:
      ValueError: a file without the three arrays.
    """
    arrays = _read(path)
    names = ("phy2log", "log2phy", "logcnt")
    if not set(names) <= set(arrays):
        raise ValueError(f"{path} holds arrays {sorted(arrays)}: a placement has {', '.join(names)}")
    return Placement(*(arrays[name] for name in names))


def _save(path: Path, **arrays: np.ndarray) -> None:
    with open(path, "wb") as file:  # given a name, NumPy may change its ending
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            return {"loads": file}
        with file:
            return dict(file)
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a file that NumPy's savez or save writes: {error}") from error
