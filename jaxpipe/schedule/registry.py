"""All schedules by name, and what a schedule's builder must do."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from jaxpipe.schedule.builders.dualpipe import dualpipe
from jaxpipe.schedule.builders.dualpipev import dualpipev
from jaxpipe.schedule.builders.gpipe import gpipe
from jaxpipe.schedule.builders.interleaved import interleaved
from jaxpipe.schedule.builders.one_f_one_b import one_f_one_b
from jaxpipe.schedule.builders.zbv import zbv
from jaxpipe.schedule.builders.zero_bubble import zero_bubble
from jaxpipe.schedule.schedule import Schedule


class Builder(Protocol):
    """What makes a schedule for a number of ranks and of microbatches: a function in a file of `builders`.

    A builder whose line stands in `BUILDERS` is on the command line, in the comparison of schedules and in the tests,
    which hold it to this:

    * The schedule has the name under which the builder is registered, as many ranks and microbatches as were asked for,
      and passes `jaxpipe.schedule.check`. Its stages are a multiple of its ranks.
    * The microbatches of a direction stay in order: on a rank, each kind of action of a stage takes them in turn.
    * The same numbers give the same schedule: a builder is a pure function, and knows no costs.
    * Integers of NumPy and JAX are integers too; `at_least` takes them, and refuses everything else.

    Raises:
      ValueError: the schedule does not exist for these numbers; the message has the values and says which would do.

    `jaxpipe.value_and_grad` takes any `Schedule`, of whatever function made it; only `build`, the command line and the
    comparison look into `BUILDERS`.
    """

    def __call__(self, num_ranks: int, num_microbatches: int, /) -> Schedule:
        """The schedule."""
        ...


BUILDERS: Mapping[str, Builder] = MappingProxyType(
    {
        "gpipe": gpipe,
        "1f1b": one_f_one_b,
        "interleaved": interleaved,
        "zb1p": zero_bubble,
        "zbv": zbv,
        "dualpipe": dualpipe,
        "dualpipev": dualpipev,
    }
)
"""Every schedule's `Builder` by name: a schedule is registered by a line here."""


def build(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    """Builds a schedule by name.

    Raises:
      ValueError: an unknown name, or numbers that the schedule does not exist for.

    >>> build("1f1b", 2, 4).num_stages
    2
    """
    if name not in BUILDERS:
        raise ValueError(f"unknown schedule {name!r}; choose one of {', '.join(BUILDERS)}")
    return BUILDERS[name](num_ranks, num_microbatches)
