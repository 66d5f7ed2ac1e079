"""The stages of a pipeline divided within a budget: kinds of stages share the slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxpipe.runtime.operations import Pools
from jaxpipe.runtime.program import Program
from jaxpipe.schedule.action import Kind
from jaxpipe.stage.split import Divisible
from jaxpipe.stage.stage import SplitStage
from jaxpipe.stage.stash import Division, Slots, fit

_SHARES = (0.0, 0.1, 0.4, 0.7)
"""Of the price of all kinds of stages, prices of one."""


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

    def divided(found: Mapping[int, tuple[SplitStage, float]], price: float) -> Division:
        """Some kinds, by place."""
        splits = tuple(found[place][0] for place in sorted(found))
        pools = Pools.of(splits, flat=flat)
        nbytes = slots.nbytes(pools.stash.device.avals, pools.weight_stash.device.avals, pools.cross.avals)
        return Division(splits, nbytes, sum(stages[place] * seconds for place, (_, seconds) in found.items()), price)

    found = fit(
        stash, slots, lambda price: divided(dict(enumerate(kind.priced(price, slots) for kind in kinds)), price)
    )
    if len(kinds) == 1 or not found.price:
        return found.splits
    # Kinds share slots: at the price of all, those that keep little leave room that costs nothing. The largest first.
    chosen = dict(enumerate(kind.priced(found.price, slots) for kind in kinds))
    sizes = [slots.nbytes(*split.residuals, split.crossing) for split, _ in chosen.values()]
    for place in sorted(range(len(kinds)), key=lambda place: -sizes[place]):
        for share in _SHARES:
            mine = kinds[place].priced(found.price * share, slots)
            changed = divided({**chosen, place: mine}, found.price)
            if changed.nbytes <= stash * slots.microbatches and changed.seconds <= found.seconds:
                found, chosen[place] = changed, mine
                break
    # A kind that few stages are of may be the one that keeps most, and its price too high for all others.
    other = _each_after_another(kinds, stages, stash, slots, divided)
    return found.splits if other is None or other.seconds >= found.seconds else other.splits


def _each_after_another(
    kinds: Sequence[Divisible],
    stages: Sequence[int],
    stash: int,
    slots: Slots,
    divided: Callable[[Mapping[int, tuple[SplitStage, float]], float], Division],
) -> Division | None:
    """Kinds of stages at prices of their own, that of most stages first; None where one finds no room beside others.

    Slots hold what any kind keeps, of each dtype by itself. So the first kind takes what it needs, and every other one
    the slots that are there by then and what is left of the budget.
    """
    chosen: dict[int, tuple[SplitStage, float]] = {}
    found = None
    for place in sorted(range(len(kinds)), key=lambda place: -stages[place]):

        def at(price: float, place: int = place, others: Mapping[int, Any] = dict(chosen)) -> Division:
            return divided({**others, place: kinds[place].priced(price, slots)}, price)

        try:
            found = fit(stash, slots, at)
        except ValueError:
            return None
        chosen[place] = kinds[place].priced(found.price, slots)
    return found
