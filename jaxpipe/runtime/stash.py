"""The stages of a pipeline divided within a budget, all kinds at one price: they share the slots."""

from __future__ import annotations

from collections.abc import Sequence

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
    kinds: Sequence[Divisible], program: Program, stash: int | None, *, copied: bool, flat: bool
) -> tuple[SplitStage, ...]:
    """Each kind of stage in its parts.

    ``copied`` tells whether what is kept is copied into slots: where it is not, computing it again costs more than
    keeping it, so that without a budget what is named "recompute" is kept. ``flat`` is as of `Pools`.

    Raises:
      ValueError: ``stash`` bytes of a microbatch and stage are too few.
    """
    if stash is None:
        return tuple(kind.split(recompute=copied) for kind in kinds)
    slots = slots_of(program)._replace(copied=copied)

    def divided(found: Sequence[tuple[SplitStage, float]], price: float) -> Division:
        splits = tuple(split for split, _ in found)
        pools = Pools.of(splits, flat=flat)
        nbytes = slots.nbytes(pools.stash.avals, pools.weight_stash.avals, pools.cross.avals)
        return Division(splits, nbytes, sum(seconds for _, seconds in found), price)

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
    return found.splits
