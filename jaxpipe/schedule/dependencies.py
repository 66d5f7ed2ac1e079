"""Which action waits for which, for checker and simulator; `runtime.graph` has the same rules for columns."""

from __future__ import annotations

from collections.abc import Sequence

from jaxpipe.schedule.action import Action, Group, Kind
from jaxpipe.schedule.schedule import Schedule


def inputs(schedule: Schedule, action: Action) -> tuple[tuple[Action, ...], ...]:
    """What an action waits for: for each input, the actions of which one must have run.

    >>> from jaxpipe.schedule.builders.gpipe import gpipe
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


class Tokens:
    """What has run of a schedule, to ask many times whether a group can run; the rules are those of `inputs`.

    >>> from jaxpipe.schedule.builders.gpipe import gpipe
    >>> tokens = Tokens(gpipe(2, 1))
    >>> tokens.run(((Action(0, Kind.F, 0),), (Action(1, Kind.B, 0),)), 0)  # 1B0 waits for 1F0
    1
    """

    def __init__(self, schedule: Schedule) -> None:
        self._forwards, self._grads, self._inputs = (
            [bytearray(schedule.num_microbatches) for _ in range(schedule.num_stages)] for _ in range(3)
        )
        """By stage and microbatch: whether F, B or I, and I have run."""

    def run(self, groups: Sequence[Group], position: int) -> int:
        """Runs the groups in order, from a position on, until one has to wait; returns that one's position."""
        forwards, grads, inputs = self._forwards, self._grads, self._inputs
        last = len(forwards) - 1
        for at in range(position, len(groups)):
            group = groups[at]
            for stage, kind, m in group:
                if kind is Kind.F:
                    ready = not stage or forwards[stage - 1][m]
                elif kind is Kind.W:
                    ready = inputs[stage][m]
                else:
                    ready = forwards[stage][m] and (stage == last or grads[stage + 1][m])
                if not ready:
                    return at
            for stage, kind, m in group:
                if kind is Kind.F:
                    forwards[stage][m] = True
                elif kind is not Kind.W:
                    grads[stage][m] = True
                    inputs[stage][m] = kind is Kind.I
        return len(groups)
