"""Slots against a plain allocator, on random intervals."""

import numpy as np
import pytest

from jaxpipe.runtime.slots import colour


def plainly(intervals):
    """Lowest free slot first, one interval after the other."""
    slots, held = {}, []
    for start, end, index in sorted((start, end, index) for index, (start, end) in enumerate(intervals)):
        held = [(until, slot) for until, slot in held if until > start]
        taken = {slot for _, slot in held}
        slots[index] = next(slot for slot in range(len(intervals)) if slot not in taken)
        held.append((end, slots[index]))
    return [slots[index] for index in range(len(intervals))]


@pytest.mark.parametrize("seed", range(30))
def test_equals_the_plain_allocator(seed):
    rng = np.random.default_rng(seed)
    count, groups = rng.integers(0, 80), rng.integers(1, 4)
    group, start = rng.integers(0, groups, count), rng.integers(0, 40, count)
    end = start + rng.integers(1, 20, count)
    slots, used = colour(group, start, end)
    alive = 0
    for number in range(groups):
        mine = group == number
        assert slots[mine].tolist() == plainly(list(zip(start[mine], end[mine], strict=True)))
        alive = max([alive, *(((start <= t) & (t < end))[mine].sum() for t in range(60))])
    assert used == alive


def test_many_slots():
    """As many as GPipe needs for its microbatches, beyond any machine word."""
    slots, used = colour(np.zeros(500, int), np.arange(500), np.arange(500) + 500)
    assert (slots == np.arange(500)).all() and used == 500


@pytest.mark.parametrize("end", [3, 2])
def test_an_empty_interval_is_an_error(end):
    with pytest.raises(ValueError, match=rf"interval \[3, {end}\) is empty"):
        colour(np.array([0, 0]), np.array([1, 3]), np.array([9, end]))
