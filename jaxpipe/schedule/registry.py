"""All schedules by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from jaxpipe.schedule.builders.dualpipe import dualpipe
from jaxpipe.schedule.builders.dualpipev import dualpipev
from jaxpipe.schedule.builders.gpipe import gpipe
from jaxpipe.schedule.builders.interleaved import interleaved
from jaxpipe.schedule.builders.one_f_one_b import one_f_one_b
from jaxpipe.schedule.builders.zbv import zbv
from jaxpipe.schedule.builders.zero_bubble import zero_bubble
from jaxpipe.schedule.schedule import Schedule

BUILDERS: Mapping[str, Callable[[int, int], Schedule]] = MappingProxyType(
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
"""Every schedule's builder, a function of (num_ranks, num_microbatches)."""


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
