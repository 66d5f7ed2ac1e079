"""The stages of a pipeline divided within a budget, all kinds at one price: they share the slots."""

from __future__ import annotations

from collections.abc import Sequence

from jaxpipe.runtime.operations import Pools
from jaxpipe.runtime.program import Program
from jaxpipe.schedule.action import Kind
from jaxpipe.stage.split import Divisible
from jaxpipe.stage.stage import SplitStage
from jaxpipe.stage.stash import Division, Slots, fit


def slots_of(program: Program) -> Slots:
    """The slots that a rank allocates, one of each sort for what nobody reads.

    >>> import jaxpipe
    >>> from jaxpipe.runtime.lower import lower
    >>> slots_of(lower(jaxpipe.schedule.build("zb1p", 2, 4))), slots_of(lower(jaxpipe.schedule.build("1f1b", 2, 4)))
    (Slots(stash=3, weight=3, cross=3, apart=1.0), Slots(stash=3, weight=3, cross=0, apart=0.0))
    """
    actions = [action.kind for rank in program.schedule.ranks for group in rank for action in group]
    apart, runs = (actions.count(kind) for kind in (Kind.W, Kind.F))
    cross = program.num_cross_slots
    return Slots(
        stash=program.num_stash_slots + 1,
        weight=program.num_weight_stash_slots + 1,
        cross=cross + 1 if cross else 0,
        apart=apart / runs if runs else 0.0,
    )


def divide_stages(
    kinds: Sequence[Divisible], program: Program, stash: int | None, *, recompute: bool, flat: bool
) -> tuple[SplitStage, ...]:
    """Each kind of stage in its parts.

    ``recompute`` is as of `jaxpipe.stage.split_stage`, for no budget; ``flat`` as of `Pools`.

    Raises:
      ValueError: ``stash`` bytes of a microbatch and stage are too few.
    """
    if stash is None:
        return tuple(kind.split(recompute=recompute) for kind in kinds)
    slots = slots_of(program)

    def divide_at(price: float) -> Division:
        found = [kind.priced(price, slots) for kind in kinds]
        splits = tuple(split for split, _ in found)
        pools = Pools.of(splits, flat=flat)
        nbytes = slots.nbytes(pools.stash.avals, pools.weight_stash.avals, pools.cross.avals)
        return Division(splits, nbytes, sum(seconds for _, seconds in found))

    return fit(stash, slots, divide_at).splits
