"""All schedules by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from jaxpipe.schedule.dualpipe import dualpipe
from jaxpipe.schedule.dualpipev import dualpipev
from jaxpipe.schedule.gpipe import gpipe
from jaxpipe.schedule.interleaved import interleaved
from jaxpipe.schedule.one_f_one_b import one_f_one_b
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.zbv import zbv
from jaxpipe.schedule.zero_bubble import zero_bubble

builders: Mapping[str, Callable[[int, int], Schedule]] = MappingProxyType(
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
    if name not in builders:
        raise ValueError(f"unknown schedule {name!r}; choose one of {', '.join(builders)}")
    return builders[name](num_ranks, num_microbatches)
