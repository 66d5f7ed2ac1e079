"""Pipeline schedules as data: build, check, simulate. Plain Python, no tracing."""

from jaxpipe.schedule.action import Action as Action
from jaxpipe.schedule.action import Kind as Kind
from jaxpipe.schedule.builders import build as build
from jaxpipe.schedule.builders import builders as builders
from jaxpipe.schedule.check import check as check
from jaxpipe.schedule.csv import from_csv as from_csv
from jaxpipe.schedule.csv import to_csv as to_csv
from jaxpipe.schedule.draw import draw_perfetto as draw_perfetto
from jaxpipe.schedule.draw import draw_text as draw_text
from jaxpipe.schedule.dualpipe import dualpipe as dualpipe
from jaxpipe.schedule.dualpipev import dualpipev as dualpipev
from jaxpipe.schedule.gpipe import gpipe as gpipe
from jaxpipe.schedule.interleaved import interleaved as interleaved
from jaxpipe.schedule.one_f_one_b import one_f_one_b as one_f_one_b
from jaxpipe.schedule.schedule import Schedule as Schedule
from jaxpipe.schedule.simulate import Costs as Costs
from jaxpipe.schedule.simulate import Timeline as Timeline
from jaxpipe.schedule.simulate import simulate as simulate
from jaxpipe.schedule.svg import draw_svg as draw_svg
from jaxpipe.schedule.zbv import zbv as zbv
from jaxpipe.schedule.zero_bubble import zero_bubble as zero_bubble
