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


def heaviest_gpu(weight: np.ndarray, slots: np.ndarray, num_gpus: int) -> np.ndarray:
    """Load of the heaviest GPU of each row [rows], in float64; weight [rows, E], slots [rows, R]."""
    row = np.arange(len(weight))[:, None] * weight.shape[1]
    counts = np.bincount((slots + row).reshape(-1), minlength=weight.size).reshape(weight.shape)
    each = weight.astype(np.float64) / np.maximum(counts, 1)
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
