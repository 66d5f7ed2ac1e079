"""What placements have in common and what moves between them, on the host.

As in `eplb_jax.plan.search`, a node has E experts and G GPUs of K slots, R = G K replicas.
"""

from __future__ import annotations

import numpy as np


def common_experts(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """How many experts each old GPU [..., G, K] and each new one have in common [..., G, G]; slots may hold -1."""
    experts = max(old.max(initial=0), new.max(initial=0)) + 1
    gpus, capacity = new.shape[-2:]
    before = old.reshape(-1, *old.shape[-2:])
    row = np.arange(len(before))[:, None, None]
    holders = np.zeros((len(before), experts + 1, gpus), np.int32)  # the last expert stands for none
    holders[row, new.reshape(-1, gpus, capacity), np.arange(gpus)[:, None]] = 1
    holders[:, -1] = 0
    common = np.zeros((len(before), old.shape[-2], gpus), np.int32)
    for slot in range(old.shape[-1]):
        again = (before[..., :slot] == before[..., slot, None]).any(-1)
        common += holders[row[..., 0], np.where(again, -1, before[..., slot])]
    return common.reshape(*old.shape[:-1], gpus)


def replicas_moved(old: np.ndarray, new: np.ndarray, num_gpus: int) -> np.ndarray:
    """Experts of all GPUs that a GPU did not hold before, of each row; slots [rows, R] both."""
    capacity = old.shape[1] // num_gpus
    before, after = (slots.reshape(len(slots), num_gpus, capacity) for slots in (old, new))
    counted = after >= 0
    for slot in range(capacity):
        counted &= after != before[..., slot, None]
        counted[..., slot + 1 :] &= after[..., slot + 1 :] != after[..., slot, None]
    return counted.sum((1, 2))


def swap_back(
    weight: np.ndarray, old: np.ndarray, new: np.ndarray, most: np.ndarray, num_gpus: int, gpus_per_node: int
) -> np.ndarray:
    """New slots [rows, R] without the swaps that a search took and did not need: fewer experts are new to their GPU.

    Two replicas of a node that are new to their GPUs swap places where that brings one of them back to a GPU that held
    it, or both, and leaves both GPUs within ``most``: first those of which both come back, of these those whose heavier
    GPU is lightest, as many at once as are of different GPUs, until there are none.

    Args:
      weight: loads of experts [rows, E].
      old, new: slots before and after the search [rows, R].
      most: load that no GPU of a row may exceed by a swap [rows].
    """
    out, shape, experts = new.copy(), (-1, num_gpus, new.shape[1] // num_gpus), weight.shape[1]
    each = _replica_loads(weight, new)  # swaps leave it
    left = np.arange(len(new))
    while len(left):
        was, now = (slots[left].reshape(shape) for slots in (old, out))
        row, gpu, slot = np.nonzero(_counts(now, now) > _counts(was, now))  # what is new to its GPU
        gone = _counts(now, was) < _counts(was, was)
        free_row, free_gpu, _ = np.nonzero(gone)
        free = np.unique((free_row * experts + was[gone]) * num_gpus + free_gpu)  # whom a GPU held, by row and expert
        expert, place = now[row, gpu, slot], row * num_gpus + gpu
        # Each replica with each GPU that held its expert, and with each of those that are new there.
        first, home = _matches(row * experts + expert, free // num_gpus)
        pair, second = _matches(row[first] * num_gpus + free[home] % num_gpus, place)
        first = first[pair]
        loads = np.take_along_axis(each[left], out[left], axis=1).reshape(shape)
        load, total = loads[row, gpu, slot], loads.sum(2).reshape(-1)
        drop = load[first] - load[second]
        after = np.maximum(total[place[first]] - drop, total[place[second]] + drop) / most[left[row[first]]]
        may = (after <= 1) & (gpu[first] // gpus_per_node == gpu[second] // gpus_per_node)
        first, second, after = first[may], second[may], after[may]
        other = (row[first] * experts + expert[second]) * num_gpus + gpu[first]
        both = free[np.searchsorted(free, other).clip(max=len(free) - 1)] == other
        # A pair of which both come back is found from either side; it stands for both where it is the first one's.
        once = ~both | (first < second)
        order = np.argsort((row[first] * 4 + after + 2 * ~both)[once], kind="stable")
        ends = np.stack([first, second], axis=1)[once][order]
        number = np.arange(len(ends))
        earliest = np.empty(len(total), int)
        earliest[place[ends[::-1]]] = number[::-1, None]  # of several numbers the last one stays
        ends = ends[(earliest[place[ends]] == number[:, None]).all(1)]
        rows = left[row[ends]]
        slots = (gpu * shape[2] + slot)[ends]
        out[rows, slots] = out[rows, slots[:, ::-1]]
        left = np.unique(rows)
    return out


def _counts(held: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """How often GPUs' slots [..., K] hold each of the experts [..., n]: [..., n]."""
    return (held[..., None, :] == asked[..., None]).sum(-1)


def _matches(keys: np.ndarray, ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of equal numbers: their indices among the keys and among the ordered ones."""
    begin, end = (np.searchsorted(ordered, keys, side) for side in ("left", "right"))
    number = end - begin
    key = np.repeat(np.arange(len(keys)), number)
    return key, np.arange(len(key)) - np.repeat(number.cumsum() - number - begin, number)


def _replica_loads(weight: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Load of a replica of each expert [rows, E], in float64; weight [rows, E], slots [rows, R]."""
    row = np.arange(len(weight))[:, None] * weight.shape[1]
    counts = np.bincount((slots + row).reshape(-1), minlength=weight.size).reshape(weight.shape)
    return weight.astype(np.float64) / np.maximum(counts, 1)


def heaviest_gpu(weight: np.ndarray, slots: np.ndarray, num_gpus: int) -> np.ndarray:
    """Load of the heaviest GPU of each row [rows], in float64; weight [rows, E], slots [rows, R]."""
    each = _replica_loads(weight, slots)
    return np.take_along_axis(each, slots, axis=1).reshape(len(slots), num_gpus, -1).sum(2).max(1)


def keep_slots(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """GPUs' new slots [n, K] in an order that leaves experts in the slots that they had there [n, K]."""
    place = np.arange(old.shape[1])
    earlier = place[:, None] > place
    copy_old, copy_new = (((x[:, :, None] == x[:, None]) & earlier).sum(2) for x in (old, new))
    same = (old[:, :, None] == new[:, None]) & (copy_old[:, :, None] == copy_new[:, None])  # [n, old slot, new slot]
    out = np.where(same.any(2), old, -1)
    free, coming = (np.argsort(taken, axis=1, kind="stable") for taken in (same.any(2), same.any(1)))
    left = place < (~same.any(2)).sum(1, keepdims=True)
    rows, index = np.nonzero(left)
    out[rows, free[rows, index]] = new[rows, coming[rows, index]]
    return out
