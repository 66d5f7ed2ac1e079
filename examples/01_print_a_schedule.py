"""DualPipe's schedule for 8 ranks and 20 microbatches, as in the figure of DeepSeek's report.

    python examples/01_print_a_schedule.py

Builds the schedule, runs it on paper and prints who does what when. Nothing is traced and no device is needed.
"""

from jaxpipe.schedule import Costs, build, simulate
from jaxpipe.schedule.draw import draw_text
from jaxpipe.schedule.simulate import closed_form_bubble

RANKS, MICROBATCHES = 8, 20


def main():
    """Prints the grid, and compares the bubble with the published formula."""
    costs = Costs(forward=1, backward_input=1, weight=1)
    timeline = simulate(build("dualpipe", RANKS, MICROBATCHES), costs)
    print(draw_text(timeline))
    published = closed_form_bubble("dualpipe", RANKS, costs)
    print(f"a step takes {timeline.makespan:g}; each rank idles for {max(timeline.bubble):g}, published: {published:g}")
    assert set(timeline.bubble) == {published} == {6}


if __name__ == "__main__":
    main()
