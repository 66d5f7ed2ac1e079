"""Pipeline schedules as data: build, check, simulate. Plain Python, no tracing."""

from jaxpipe.schedule.action import Action as Action
from jaxpipe.schedule.action import Kind as Kind
from jaxpipe.schedule.builders.dualpipe import dualpipe as dualpipe
from jaxpipe.schedule.builders.dualpipev import dualpipev as dualpipev
from jaxpipe.schedule.builders.gpipe import gpipe as gpipe
from jaxpipe.schedule.builders.interleaved import interleaved as interleaved
from jaxpipe.schedule.builders.one_f_one_b import one_f_one_b as one_f_one_b
from jaxpipe.schedule.builders.zbv import zbv as zbv
from jaxpipe.schedule.builders.zero_bubble import zero_bubble as zero_bubble
from jaxpipe.schedule.checker import check as check
from jaxpipe.schedule.csv import from_csv as from_csv
from jaxpipe.schedule.csv import to_csv as to_csv
from jaxpipe.schedule.draw import draw_perfetto as draw_perfetto
from jaxpipe.schedule.draw import draw_text as draw_text
from jaxpipe.schedule.registry import BUILDERS as BUILDERS
from jaxpipe.schedule.registry import build as build
from jaxpipe.schedule.schedule import Schedule as Schedule
from jaxpipe.schedule.simulator import Costs as Costs
from jaxpipe.schedule.simulator import Timeline as Timeline
from jaxpipe.schedule.simulator import simulate as simulate
from jaxpipe.schedule.svg import draw_svg as draw_svg
