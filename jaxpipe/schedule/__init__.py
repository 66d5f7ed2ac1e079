"""Pipeline schedules as data, in plain Python: build, check, simulate, draw.

What `__all__` names is public; all modules below are internal and may change without notice.

`build` makes a `Schedule` by the name of its `Builder`; so does a builder itself, such as `dualpipev`. `check` proves
that a schedule can run, `simulate` gives the `Timeline` of one with given `Costs`, or `StageCosts` where stages differ,
and ``draw_`` functions draw that. `improve` searches for an order that is faster with given costs, and `lower_bound`
says what none can go below. `bound_deferred` puts fewer weight gradients off. `to_csv` and `from_csv` are PyTorch's
notation.
"""

from jaxpipe.schedule.action import Action, Kind
from jaxpipe.schedule.bound import lower_bound
from jaxpipe.schedule.builders.dualpipe import dualpipe
from jaxpipe.schedule.builders.dualpipev import dualpipev
from jaxpipe.schedule.builders.gpipe import gpipe
from jaxpipe.schedule.builders.interleaved import interleaved
from jaxpipe.schedule.builders.one_f_one_b import one_f_one_b
from jaxpipe.schedule.builders.zbv import zbv
from jaxpipe.schedule.builders.zero_bubble import zero_bubble
from jaxpipe.schedule.checker import check
from jaxpipe.schedule.csv import from_csv, to_csv
from jaxpipe.schedule.deferring import bound_deferred
from jaxpipe.schedule.draw import draw_perfetto, draw_text
from jaxpipe.schedule.improving import improve
from jaxpipe.schedule.registry import BUILDERS, Builder, build
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulator import Costs, StageCosts, Timeline, simulate
from jaxpipe.schedule.svg import draw_svg

__all__ = [
    "BUILDERS",
    "Action",
    "Builder",
    "Costs",
    "Kind",
    "Schedule",
    "StageCosts",
    "Timeline",
    "bound_deferred",
    "build",
    "check",
    "draw_perfetto",
    "draw_svg",
    "draw_text",
    "dualpipe",
    "dualpipev",
    "from_csv",
    "gpipe",
    "improve",
    "interleaved",
    "lower_bound",
    "one_f_one_b",
    "simulate",
    "to_csv",
    "zbv",
    "zero_bubble",
]
