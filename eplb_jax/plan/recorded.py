"""Loads as servers record them: which of a file's arrays they are, and counts by physical expert made logical.

SGLang's recorder (``python/sglang/srt/eplb/expert_distribution.py`` of github.com/sgl-project/sglang) saves, by
`torch.save`, ``logical_count`` [steps, layers, experts] in its modes stat and stat_approx, and in per_pass ``records``,
each with ``global_physical_count`` [layers, slots], beside ``last_physical_to_logical_map`` [layers, slots]. Its
``--init-expert-location`` takes the first as JSON, too. vLLM (``vllm/distributed/eplb/eplb_state.py`` of
github.com/vllm-project/vllm) has no file of its own: its state's ``expert_load_window`` [steps, layers, slots] or
``expert_load_pass`` [layers, slots] is read from a file that also has its ``physical_to_logical_map`` [layers, slots].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

LOGICAL = ("loads", "logical_count")
PHYSICAL = ("expert_load_window", "expert_load_pass", "global_physical_count")
MAPS = ("physical_to_logical_map", "last_physical_to_logical_map")
NAMES = (*LOGICAL, *PHYSICAL, *MAPS)
"""Names of arrays that mean loads, or say what slots hold."""


def loads_of(found: Any) -> np.ndarray:
    """The loads [layers, experts] or [steps, layers, experts] in what a file holds.

    Args:
      found: an array, nested lists, or a mapping of names to such, as servers record them.

    Raises:
      ValueError: none of the names; counts by slot without the map of slots, or that do not fit it.

    >>> loads_of({"rank": 0, "logical_count": [[[3, 1]], [[1, 1]]]}).sum(0).tolist()
    [[4, 2]]
    >>> loads_of({"expert_load_pass": [[2, 3, 4]], "physical_to_logical_map": [[1, 0, 1]]}).tolist()
    [[3, 6]]
    """
    if not isinstance(found, Mapping):
        return _array("the loads", found)
    for name in LOGICAL:
        if name in found:
            return _array(name, found[name])
    maps = [_array(name, found[name]) for name in MAPS if name in found]
    counts = [_array(name, found[name]) for name in PHYSICAL if name in found]
    if "records" in found and not counts:
        counts = [_of_records(found["records"])]
    if not counts:
        raise ValueError(f"it holds {sorted(map(str, found))}: name the loads 'loads' or 'logical_count'")
    if not maps:
        raise ValueError(f"its counts are by slot, of shape {counts[0].shape}: it must have {MAPS[0]!r} beside them")
    return _to_logical(counts[0], maps[0])


def _of_records(records: Any) -> np.ndarray:
    """The physical counts of each pass, [passes, layers, slots]."""
    name = "global_physical_count"
    if not isinstance(records, list | tuple) or not records:
        raise ValueError("its records are empty, or no list")
    if not all(isinstance(record, Mapping) and name in record for record in records):
        raise ValueError(f"its records have no {name!r}: record in SGLang's mode stat, stat_approx or per_pass")
    passes = [_array(name, record[name]) for record in records]
    if len({array.shape for array in passes}) > 1:
        raise ValueError(
            f"its records have {name!r} of shapes {sorted({array.shape for array in passes})}: one is needed"
        )
    return np.stack(passes)


def _to_logical(counts: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Counts [..., layers, slots] added up by the expert that each slot [layers, slots] holds; -1: no expert."""
    if slots.dtype.kind not in "iu" or slots.ndim != 2 or counts.ndim not in (2, 3) or counts.shape[-2:] != slots.shape:
        raise ValueError(
            f"its counts have shape {counts.shape} and its map of slots is {slots.dtype} of shape {slots.shape}: they "
            "must be [layers, slots], the counts perhaps of several steps"
        )
    most = int(slots.max(initial=-1))
    if not 0 <= most < slots.shape[1] or slots.min() < -1:
        raise ValueError(f"its map of slots holds experts {slots.min()} to {most}: there are at most {slots.shape[1]}")
    counts = counts.astype(np.int64 if counts.dtype.kind in "biu" else np.float64)  # sums of narrow counts would wrap
    layer, slot = np.nonzero(slots >= 0)
    out = np.zeros((len(slots), most + 1, *counts.shape[:-2]), counts.dtype)
    np.add.at(out, (layer, slots[layer, slot]), np.moveaxis(counts, (-2, -1), (0, 1))[layer, slot])
    return np.moveaxis(out, (0, 1), (-2, -1))


def _array(name: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} is no array: its lists have different lengths") from error
    if array.dtype == object:
        raise ValueError(f"{name} is no array of numbers")
    return array
