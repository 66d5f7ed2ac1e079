"""Pictures of timelines: every action is there, where and as long as the simulation says."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from jaxpipe.schedule import BUILDERS, Costs, Timeline, build, draw_perfetto, draw_svg, draw_text, simulate

SVG = "{http://www.w3.org/2000/svg}"
COSTS = (Costs(), Costs(overlapped=2.5, p2p=0.5), Costs(12.5, 8.0, 4.5, p2p=0.25))


@pytest.fixture(params=BUILDERS)
def schedule(request):
    return build(request.param, 4, 8)


@pytest.fixture(params=COSTS, ids=range(len(COSTS)))
def timeline(request, schedule):
    return simulate(schedule, request.param)


def num_actions(timeline: Timeline) -> int:
    return sum(len(event.group) for events in timeline.events for event in events)


def test_text_shows_every_event(timeline: Timeline) -> None:
    *rows, legend = draw_text(timeline).splitlines()
    assert "forward" in legend and "idle" in legend
    for row, events in zip(rows, timeline.events, strict=True):
        labels = [cell for cell in row.split()[2:] if cell not in (".", "-")]
        assert [label.count("&") + 1 for label in labels] == [len(event.group) for event in events]


def test_text_has_a_column_for_each_unit() -> None:
    timeline = simulate(build("dualpipe", 8, 20))
    rows = draw_text(timeline).splitlines()[:-1]
    assert [len(row.split()) - 2 for row in rows] == [timeline.makespan] * 8
    assert [row.split()[2:].count(".") for row in rows] == list(timeline.bubble)


def test_text_of_an_event_that_starts_between_columns() -> None:
    """Starts of 0.5, 1.5, 2.5 round to neighbouring columns, not to the same even one."""
    timeline = simulate(build("gpipe", 2, 4), Costs(p2p=0.5))
    assert draw_text(timeline).splitlines()[1].split()[2:8] == [".", ".", "0", "1", "2", "3"]


def test_text_is_bounded_if_an_action_is_very_short() -> None:
    row = draw_text(simulate(build("zb1p", 2, 4), Costs(weight=1e-6))).splitlines()[0]
    assert len(row.split()) <= 503


def test_svg_has_a_cell_for_each_action(timeline: Timeline) -> None:
    root = ET.fromstring(draw_svg(timeline))
    cells = [element for element in root.iter(f"{SVG}rect") if element.get("class") in ("F", "B", "I", "W")]
    pairs = [element for element in root.iter(f"{SVG}rect") if element.get("class") == "pair"]
    assert len(cells) == num_actions(timeline)
    assert len(pairs) == sum(len(event.group) > 1 for events in timeline.events for event in events)
    titles = [title.text for cell in cells for title in cell.iter(f"{SVG}title")]
    actions = [str(action) for events in timeline.events for event in events for action in event.group]
    assert titles == actions


def test_svg_names_the_devices_and_the_kinds(timeline: Timeline) -> None:
    texts = [element.text for element in ET.fromstring(draw_svg(timeline)).iter(f"{SVG}text")]
    for rank in range(timeline.schedule.num_ranks):
        assert f"Device {rank}" in texts
    assert {"Time", "forward", "backward", "input gradient", "weight gradient"} <= set(texts)


def test_svg_shades_directions_apart() -> None:
    root = ET.fromstring(draw_svg(simulate(build("dualpipe", 4, 8))))
    fills = {element.get("fill") for element in root.iter(f"{SVG}rect") if element.get("class") == "F"}
    assert len(fills) == 2


def test_svg_is_as_wide_whatever_the_unit() -> None:
    """The costs' unit does not change the picture's size."""
    schedule = build("dualpipev", 4, 10)
    widths = {ET.fromstring(draw_svg(simulate(schedule, Costs(c, c, c)))).get("width") for c in (0.25, 1.0, 64.0)}
    assert len(widths) == 1


def test_svg_cells_end_inside_the_picture(timeline: Timeline) -> None:
    root = ET.fromstring(draw_svg(timeline))
    rects = list(root.iter(f"{SVG}rect"))
    right = max(float(rect.get("x", 0)) + float(rect.get("width", 0)) for rect in rects)
    assert right <= float(root.get("width", 0))


def test_perfetto_has_each_action_for_its_time(timeline: Timeline) -> None:
    events = json.loads(draw_perfetto(timeline))["traceEvents"]
    drawn = {event["name"]: event for event in events if event["ph"] == "X" and event["cat"] in ("F", "B", "I", "W")}
    assert len(drawn) == num_actions(timeline)
    for rank, groups in enumerate(timeline.events):
        busy = 0.0
        for event in groups:
            parts = [drawn[str(action)] for action in event.group]
            assert {part["tid"] for part in parts} == {rank}
            assert parts[0]["ts"] == pytest.approx(1000 * event.start)
            assert sum(part["dur"] for part in parts) == pytest.approx(1000 * (event.end - event.start))
            for part, action in zip(parts, event.group, strict=True):
                assert part["args"]["stage"] == action.stage and part["args"]["microbatch"] == action.microbatch
            busy += sum(part["dur"] for part in parts)
        assert busy == pytest.approx(1000 * timeline.busy[rank])


def test_perfetto_nests_overlapped_pairs_and_names_the_ranks() -> None:
    timeline = simulate(build("dualpipev", 4, 10))
    events = json.loads(draw_perfetto(timeline))["traceEvents"]
    pairs = [event for event in events if event.get("cat") == "overlapped"]
    assert len(pairs) == sum(len(event.group) > 1 for groups in timeline.events for event in groups)
    assert {pair["dur"] for pair in pairs} == {3000}
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == ["dualpipev", "rank 0", "rank 1", "rank 2", "rank 3"]


def test_timelines_without_time_are_drawn() -> None:
    timeline = simulate(build("gpipe", 1, 1), Costs(0, 0, 0))
    assert draw_text(timeline).startswith("rank 0")
    ET.fromstring(draw_svg(timeline))
