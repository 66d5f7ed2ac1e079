"""The stages of a pipeline divided within a budget: kinds of stages share the slots."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from jaxpipe.runtime.operations import Pools
from jaxpipe.runtime.program import Program
from jaxpipe.schedule.action import Kind
from jaxpipe.stage.split import Divisible
from jaxpipe.stage.stage import SplitStage
from jaxpipe.stage.stash import Division, Slots, fit

_SHARES = (0.0, 0.1, 0.4, 0.7)
"""Of the price of all kinds of stages, prices of one."""

_TRIES = 3
"""Budgets at which kinds are divided each by itself, the first the whole one."""


def slots_of(program: Program) -> Slots:
    """The slots that a rank allocates.

    >>> import jaxpipe
    >>> from jaxpipe.runtime.lower import lower
    >>> [slots_of(lower(jaxpipe.schedule.build(name, 2, 4)))[:4] for name in ("zb1p", "1f1b")]
    [(2, 2, 2, 1.0), (2, 2, 0, 0.0)]
    """
    actions = [action.kind for rank in program.schedule.ranks for group in rank for action in group]
    apart, runs = (actions.count(kind) for kind in (Kind.W, Kind.F))
    return Slots(
        stash=program.num_stash_slots,
        weight=program.num_weight_stash_slots,
        cross=program.num_cross_slots,
        apart=apart / runs if runs else 0.0,
    )


def divide_stages(
    kinds: Sequence[Divisible],
    program: Program,
    stash: int | None,
    *,
    copied: bool,
    flat: bool,
    kind_of: Sequence[int] | None,
) -> tuple[SplitStage, ...]:
    """Each kind of stage in its parts.

    ``copied`` tells whether what is kept is copied into slots: where it is not, computing it again costs more than
    keeping it, so that without a budget what is named "recompute" is kept. ``flat`` is as of `Pools`, ``kind_of`` as of
    `Model`: a kind's time counts as often as there are stages of it.

    Raises:
      ValueError: ``stash`` bytes of a microbatch and stage are too few.
    """
    if stash is None:
        return tuple(kind.split(recompute=copied) for kind in kinds)
    slots = slots_of(program)._replace(copied=copied)
    stages = [1 if kind_of is None else kind_of.count(kind) for kind in range(len(kinds))]

    def divided(found: Sequence[tuple[SplitStage, float]], price: float) -> Division:
        splits = tuple(split for split, _ in found)
        pools = Pools.of(splits, flat=flat)
        nbytes = slots.nbytes(pools.stash.avals, pools.weight_stash.avals, pools.cross.avals)
        seconds = sum(count * seconds for count, (_, seconds) in zip(stages, found, strict=True))
        return Division(splits, nbytes, seconds, price)

    found = fit(stash, slots, lambda price: divided([kind.priced(price, slots) for kind in kinds], price))
    if len(kinds) == 1 or not found.price:
        return found.splits
    # Kinds share slots: at the price of all, those that keep little leave room that costs nothing. The largest first.
    chosen = [kind.priced(found.price, slots) for kind in kinds]
    sizes = [slots.nbytes(*split.residuals, split.crossing) for split, _ in chosen]
    for place in sorted(range(len(kinds)), key=lambda place: -sizes[place]):
        for share in _SHARES:
            mine = kinds[place].priced(found.price * share, slots)
            changed = divided([*chosen[:place], mine, *chosen[place + 1 :]], found.price)
            if changed.nbytes <= stash * slots.microbatches and changed.seconds <= found.seconds:
                found, chosen[place] = changed, mine
                break
    # A kind that few stages are of may be the one that keeps most, so that its price is too high for all others.
    other = _each_by_itself(kinds, stash, slots, lambda found: divided(found, 0.0))
    return found.splits if other is None or other.seconds >= found.seconds else other.splits


def _each_by_itself(
    kinds: Sequence[Divisible],
    stash: int,
    slots: Slots,
    together: Callable[[Sequence[tuple[SplitStage, float]]], Division],
) -> Division | None:
    """Kinds of stages at prices of their own, of which each fits the budget; None where all do not in shared slots.

    Slots hold what any kind keeps, of each dtype by itself: where that is more than any kind takes, budgets are less.
    """
    budget = stash
    for _ in range(_TRIES):
        try:
            alone = [fit(budget, slots, functools.partial(_alone, kind, slots)) for kind in kinds]
        except ValueError:
            return None
        found = together([(*each.splits, each.seconds) for each in alone])
        if found.nbytes <= stash * slots.microbatches:
            return found
        budget = budget * stash * slots.microbatches // found.nbytes
    return None


def _alone(kind: Divisible, slots: Slots, price: float) -> Division:
    split, seconds = kind.priced(price, slots)
    return Division((split,), slots.nbytes(*split.residuals, split.crossing), seconds, price)
