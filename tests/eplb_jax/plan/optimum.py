"""The best plan there is, by trying all: for a few experts on a few GPUs."""

import itertools


def best_load(weight, replicas, gpus):
    """Load of the heaviest GPU of the best plan of one layer, without groups."""
    experts, capacity = len(weight), replicas // gpus
    best = float(sum(weight))
    for cuts in itertools.combinations(range(1, replicas), experts - 1):
        counts = [b - a for a, b in zip((0, *cuts), (*cuts, replicas), strict=True)]
        items = sorted((w / c for w, c in zip(weight, counts, strict=True) for _ in range(c)), reverse=True)
        best = min(best, _best_packing(items, gpus, capacity, best))
    return best


def _best_packing(items, gpus, capacity, best):
    """The least heaviest load below best of packing items, else best."""
    loads, held = [0.0] * gpus, [0] * gpus

    def go(i):
        nonlocal best
        if i == len(items):
            best = min(best, max(loads))
            return
        tried = set()
        for gpu in range(gpus):
            state = loads[gpu], held[gpu]
            if held[gpu] < capacity and state not in tried and loads[gpu] + items[i] < best:
                tried.add(state)
                loads[gpu], held[gpu] = loads[gpu] + items[i], held[gpu] + 1
                go(i + 1)
                loads[gpu], held[gpu] = state

    go(0)
    return best
