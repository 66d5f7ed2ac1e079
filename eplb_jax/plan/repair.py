"""Repair of one node's plan on the host: other replica counts, and the fewest GPUs packed anew.

As in `eplb_jax.plan.search`, a node has E experts and G GPUs of K slots, R = G K replicas.
"""

from __future__ import annotations

import heapq

import numpy as np


def repack(weight: np.ndarray, old: np.ndarray, counts: np.ndarray, target: float, num_gpus: int) -> np.ndarray | None:
    """Slots [R] with these replica counts [E] and no GPU above target, most of them as in old [R].

    Opens the GPUs that are too heavy or lose a replica, then others in one of two orders, until what the open GPUs hold
    can be packed greedily. Returns None if this fails even with all GPUs open.
    """
    capacity = len(old) // num_gpus
    each = weight / np.maximum(counts, 1)
    slots = old.reshape(num_gpus, capacity).copy()
    totals = each[slots].sum(1)
    heaviest_first = np.argsort(-totals, kind="stable")
    surplus = np.bincount(old, minlength=len(weight)) - counts
    for expert in np.nonzero(surplus > 0)[0]:
        holders = heaviest_first[(slots[heaviest_first] == expert).any(1)]
        places = [(gpu, slot) for gpu in holders for slot in np.nonzero(slots[gpu] == expert)[0]]
        for place in places[: surplus[expert]]:
            slots[place] = -1
    added = np.repeat(np.arange(len(weight)), np.maximum(-surplus, 0))
    forced = (slots < 0).any(1) | (totals > target)
    lightest_slot = np.where(slots >= 0, each[slots], np.inf).min(1)
    found = [_open_fewest(each, slots, added, forced, order, target) for order in (totals, lightest_slot)]
    plans = [plan for plan in found if plan is not None]
    return min(plans, key=lambda plan: replicas_moved(old[None], plan[None], num_gpus)[0], default=None)


def _open_fewest(
    each: np.ndarray, slots: np.ndarray, added: np.ndarray, forced: np.ndarray, order: np.ndarray, target: float
) -> np.ndarray | None:
    """Slots [R] with as few GPUs [G] opened, beyond the forced ones and in ascending order, as suffice, or None."""
    others = np.nonzero(~forced)[0]
    others = others[np.argsort(order[others], kind="stable")]

    def attempt(number: int) -> np.ndarray | None:
        gpus = np.sort(np.r_[np.nonzero(forced)[0], others[:number]])
        items = np.r_[slots[gpus][slots[gpus] >= 0], added]
        packs = _pack_greedily(each, items, len(gpus), slots.shape[1], target)
        if packs is None:
            return None
        out = slots.copy()
        out[gpus] = packs[assign_packs(slots[gpus], packs)]
        return out.reshape(-1)

    number, plan = 0, attempt(0)
    while plan is None and number < len(others):
        number = min(2 * number + 1, len(others))
        plan = attempt(number)
    low = (number - 1) // 2
    while plan is not None and number - low > 1:
        middle = (low + number) // 2
        fewer = attempt(middle)
        plan, number, low = (plan, number, middle) if fewer is None else (fewer, middle, low)
    return plan


def _pack_greedily(each: np.ndarray, items: np.ndarray, packs: int, capacity: int, target: float) -> np.ndarray | None:
    """Experts [packs, K], heaviest first onto the lightest pack with a free slot; None if one gets above target."""
    out = np.full((packs, capacity), -1, np.int32)
    lightest = [(0.0, pack, 0) for pack in range(packs)]
    for expert in items[np.argsort(-each[items], kind="stable")]:
        load, pack, held = heapq.heappop(lightest)
        load += float(each[expert])
        if load > target:
            return None
        out[pack, held] = expert
        if held + 1 < capacity:
            heapq.heappush(lightest, (load, pack, held + 1))
    return out


def assign_packs(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Which of the packs [G, K] each GPU gets, so that most replicas stay on their GPU; old [G, K] may hold -1."""
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 - plans by other policies need no SciPy

    return linear_sum_assignment(common_experts(old, new), maximize=True)[1]


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


def held_by_gpus(slots: np.ndarray, num_experts: int) -> np.ndarray:
    """Whether each GPU holds each expert, bool [..., G, E], of slots [..., G, K] that may hold -1."""
    held = np.zeros((*slots.shape[:-1], num_experts + 1), bool)
    np.put_along_axis(held, np.where(slots < 0, num_experts, slots), True, axis=-1)
    return held[..., :-1]


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
