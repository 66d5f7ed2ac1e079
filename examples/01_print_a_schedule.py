"""Prints DualPipe on 8 ranks with 20 microbatches, the figure of DeepSeek's report.

    python examples/01_print_a_schedule.py

The bubble of every rank is that of the published formula.
"""

from jaxpipe.schedule import build, simulate
from jaxpipe.schedule.draw import draw_text
from jaxpipe.schedule.simulator import closed_form_bubble

timeline = simulate(build("dualpipe", 8, 20))
print(draw_text(timeline))
print(f"bubble of every rank {timeline.bubble}, by DeepSeek's formula {closed_form_bubble('dualpipe', 8)}")
assert set(timeline.bubble) == {closed_form_bubble("dualpipe", 8)} == {6.0}
