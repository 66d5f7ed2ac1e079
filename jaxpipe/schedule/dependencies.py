"""Which action waits for which: shared by the checker, the simulator and the packing."""

from __future__ import annotations

from jaxpipe.schedule.action import Action, Kind
from jaxpipe.schedule.schedule import Schedule


def inputs(schedule: Schedule, action: Action) -> tuple[tuple[Action, ...], ...]:
    """What an action waits for: for each input, the actions of which one must have run.

    >>> from jaxpipe.schedule.gpipe import gpipe
    >>> [list(map(str, options)) for options in inputs(gpipe(2, 1), Action(0, Kind.B, 0))]
    [['0F0'], ['1B0', '1I0']]
    """
    stage, kind, m = action
    if kind is Kind.F:
        return ((Action(stage - 1, Kind.F, m),),) if stage else ()
    if kind is Kind.W:
        return ((Action(stage, Kind.I, m),),)
    own = (Action(stage, Kind.F, m),)
    if stage == schedule.num_stages - 1:
        return (own,)
    return own, (Action(stage + 1, Kind.B, m), Action(stage + 1, Kind.I, m))
