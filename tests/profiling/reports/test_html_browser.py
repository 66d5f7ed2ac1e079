"""The page, in a real browser: no complaint on its console, the report's numbers, and a timeline that answers."""

import json
import math
import urllib.parse

import pytest

from profiling.event import Event, Trace
from profiling.reports.html import write_html
from profiling.reports.making import report
from profiling.table import Table, written
from tests.profiling import chromium
from tests.profiling.traces import HOSTILE, layer_trace, tangled_trace

GUTTER = 168
"""Pixels that the names of lanes take on a wide page."""
FIRST_LANE = 26 + (22 + 22 + 6) + 22 + 11
"""Pixels from the timeline's top to the middle of the first device's first lane: below the axis and the host."""

executable = chromium.find()
pytestmark = pytest.mark.skipif(
    executable is None, reason="needs chromium, chromium-browser or google-chrome on the path"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = chromium.Browser(executable, tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a report's page; whatever happens, the browser must have nothing to complain of."""

    def open_page(made, fragment="", **options):
        path = tmp_path / "page.html"
        write_html(path, made)
        browser.open(f"{path.as_uri()}{fragment}", **options)
        return browser

    yield open_page
    assert browser.problems == []


def text(browser, selector):
    return browser.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")


def put(browser, name, value, event):
    """Enters a value as a user does."""
    browser.evaluate(
        f"""{{
          const field = document.getElementById("{name}");
          field.value = {json.dumps(value)};
          field.dispatchEvent(new Event("{event}"));
        }}"""
    )
    browser.settle()


def view(browser):
    """Start and end of what the timeline shows, from the address that keeps it; None while it shows everything."""
    address = browser.evaluate("new Promise(done => setTimeout(() => done(location.hash), 250))")
    found = urllib.parse.parse_qs(address[1:]).get("view")
    return tuple(map(float, found[0].split(","))) if found else None


def pixels(browser, name="timeline"):
    """How many different colours a canvas shows, and how many of its pixels are not of its most common one."""
    return browser.evaluate(
        f"""(() => {{
          const shown = document.getElementById("{name}"), canvas = document.createElement("canvas");
          [canvas.width, canvas.height] = [shown.width, shown.height];
          const context = canvas.getContext("2d", {{ willReadFrequently: true }}), counts = new Map();
          context.drawImage(shown, 0, 0);
          const {{ data }} = context.getImageData(0, 0, canvas.width, canvas.height);
          for (const pixel of new Uint32Array(data.buffer)) counts.set(pixel, (counts.get(pixel) || 0) + 1);
          return [counts.size, data.length / 4 - Math.max(...counts.values())];
        }})()"""
    )


def place(browser, row, time, shown):
    """Where on the screen a time is, ``row`` pixels below the timeline's top, given what it shows."""
    left, top, width = browser.evaluate(
        "{const box = document.getElementById('timeline').getBoundingClientRect(); [box.left, box.top, box.width]}"
    )
    start, end = shown
    return left + GUTTER + (time - start) / (end - start) * (width - GUTTER), top + row


def cells(browser, table, column):
    return browser.evaluate(
        f"[...document.querySelectorAll('#{table} tbody tr')].map(row => row.cells[{column}].firstChild.data)"
    )


def test_numbers_are_those_of_the_report(opened):
    measured = layer_trace()
    made = report(measured, layer_trace("predicted", slower=0.9))
    browser = opened(made)
    cards = browser.evaluate(
        """[...document.querySelectorAll("#summary li")].map(
          card => [card.id, card.dataset.value, card.querySelector(".value").textContent])"""
    )
    assert cards == [[f"figure-{f.name}", repr(f.value), f.written] for f in made.shown]
    values = {name.removeprefix("figure-"): float(value) for name, value, _ in cards}
    overlaps = made.measurement.summary.overlaps
    assert values["overlap"] == overlaps["transfer"].ratio == 0.25
    assert values["exposed"] == overlaps["transfer+wait"].exposed == 80.0
    for table in map(Table.filled, made.tables):
        shown = [cells(browser, table.name, column) for column in range(len(table.columns))]
        assert list(map(list, zip(*shown, strict=True))) == table.cells()
    kinds = {}
    for metrics in made.measurement.devices:
        for row in metrics.kinds:
            kinds[row.name] = kinds.get(row.name, 0.0) + row.total
    found = dict(zip(cells(browser, "kinds", 0), cells(browser, "kinds", 3), strict=True))
    assert found == {name: written(total, "us") for name, total in kinds.items()}
    notes = browser.evaluate("[...document.querySelectorAll('#notes li')].map(li => li.textContent)")
    assert notes == list(made.notes)
    assert text(browser, "#status") == "990.0 µs – 1.20 ms · 20 events"


def test_canvases_are_drawn(opened):
    browser = opened(report(layer_trace()))
    for name, least in (("timeline", 10_000), ("overview", 3000)):
        colours, covered = pixels(browser, name)
        assert colours >= 8 and covered > least, name
    dark = opened(report(layer_trace()), dark=True)
    assert pixels(dark)[0] >= 8
    assert dark.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 18, 24)"


def test_zoom_pan_and_fit(opened):
    browser = opened(report(layer_trace()))
    x, y = place(browser, 60, 1095.0, (990.0, 1200.0))
    browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-100)
    low, high = view(browser)
    # The time under the pointer stays there.
    assert high - low == pytest.approx(210 * math.exp(-0.22), rel=1e-3) and (low + high) / 2 == pytest.approx(
        1095, abs=1
    )
    zoomed = pixels(browser)
    browser.mouse("mousePressed", x, y, button="left", buttons=1, clickCount=1)
    browser.mouse("mouseMoved", x + 50, y, button="left", buttons=1)
    browser.mouse("mouseReleased", x + 50, y, button="left", clickCount=1)
    moved = view(browser)
    assert moved[0] < low and moved[1] - moved[0] == pytest.approx(high - low, abs=0.01)
    assert pixels(browser) != zoomed
    browser.evaluate("document.getElementById('timeline').focus()")
    for key in ("w", "ArrowUp", "d", "ArrowRight", "s", "ArrowDown", "a", "ArrowLeft"):
        before = view(browser)
        browser.key(key)
        after = view(browser)
        if key in ("a", "ArrowLeft", "d", "ArrowRight"):
            assert (after[0] > before[0]) == (key in ("d", "ArrowRight"))
        else:
            assert (after[1] - after[0] < before[1] - before[0]) == (key in ("w", "ArrowUp"))
    browser.key("0")
    assert view(browser) is None and text(browser, "#status").startswith("990.0 µs – 1.20 ms")
    browser.evaluate("document.getElementById('in').click()")
    assert view(browser)
    browser.evaluate("document.getElementById('out').click()")
    assert view(browser) is None


def test_hover_tells_and_click_keeps(opened):
    browser = opened(report(layer_trace()))
    x, y = place(browser, FIRST_LANE, 1020.0, (990.0, 1200.0))
    assert browser.evaluate("document.getElementById('tip').hidden")
    browser.mouse("mouseMoved", x, y)
    browser.settle()
    assert not browser.evaluate("document.getElementById('tip').hidden")
    assert browser.evaluate("[...document.querySelectorAll('#tip > *')].map(part => part.textContent)") == [
        "attention_kernel", "40.00 µs from 1.00 ms", "attention core · compute", "attn(F) · layer 0 · microbatch 0",
        "rank 0, device 1 · stream 7",
    ]  # fmt: skip
    browser.click(x, y)
    facts = browser.evaluate(
        """Object.fromEntries([...document.querySelectorAll("#details dl div")].map(
          pair => [pair.firstChild.textContent, pair.lastChild.textContent]))"""
    )
    assert text(browser, "#details h3") == "attention_kernel"
    assert facts == {
        "start": "1000.000 µs", "duration": "40.000 µs", "device": "rank 0, device 1", "lane": "stream 7",
        "kind": "attention core", "group": "compute", "phase": "attn(F)", "layer": "0", "microbatch": "0",
        "of this name": "4, 160.0 µs in all, 40.00 µs each", "scope": "step/layer_0/attn",
    }  # fmt: skip
    browser.key(".")
    assert text(browser, "#details h3") == "shared"
    browser.key("Escape")
    assert browser.evaluate("document.getElementById('details').hidden")


def test_find_dims_the_rest_and_steps_through(opened):
    browser = opened(report(layer_trace()))
    everything = pixels(browser)
    put(browser, "query", "GEMM layer:1", "input")
    browser.settle()
    assert text(browser, "#status").endswith("20 events · 4 match, 71.00 µs")
    assert pixels(browser) != everything
    browser.evaluate("document.getElementById('query').focus()")
    browser.key("Enter")
    assert text(browser, "#details h3") == "shared"
    browser.key("Escape")
    assert text(browser, "#status").endswith("20 events")


def test_legend_hides_and_colours_change(opened):
    browser = opened(report(layer_trace()))
    labels = "[...document.querySelectorAll('#legend button')].map(b => b.textContent)"
    assert browser.evaluate(labels)[0] == "attention core160.0 µs"
    covered = pixels(browser)[1]
    browser.evaluate("document.querySelector('#legend button').click()")
    browser.settle()
    assert browser.evaluate("document.querySelector('#legend button').getAttribute('aria-pressed')") == "false"
    assert pixels(browser)[1] < covered
    put(browser, "colour", "group", "change")
    assert browser.evaluate(labels) == ["compute302.0 µs", "transfer80.00 µs", "wait20.00 µs"]
    browser.settle()
    assert pixels(browser)[1] >= covered


def test_tables_sort(opened):
    browser = opened(report(layer_trace()))

    def press(index):
        browser.evaluate(f"document.querySelectorAll('#kinds thead button')[{index}].click()")
        return browser.evaluate(f"document.querySelectorAll('#kinds thead th')[{index}].getAttribute('aria-sort')")

    assert press(0) == "ascending" and cells(browser, "kinds", 0) == sorted(cells(browser, "kinds", 0))
    assert press(0) == "descending" and cells(browser, "kinds", 0) == sorted(cells(browser, "kinds", 0), reverse=True)
    assert press(3) == "descending"
    assert [float(cell) for cell in cells(browser, "kinds", 3)] == sorted(
        map(float, cells(browser, "kinds", 3)), reverse=True
    )
    assert press(7) == "descending" and cells(browser, "kinds", 7) == ["112", "20", "20", "-", "-"]
    assert press(7) == "ascending" and cells(browser, "kinds", 7) == ["20", "20", "112", "-", "-"]


def test_an_exposed_stretch_is_shown_where_it_is(opened):
    made = report(layer_trace())
    browser = opened(made)
    browser.evaluate("document.querySelector('table#exposed-segments tbody button').click()")
    start, end = made["exposed-segments"].spans[0]
    margin = 2 * (end - start)
    assert view(browser) == pytest.approx((start - margin, end + margin), abs=0.01)


def test_a_kernel_is_shown_where_it_took_longest_and_then_next_longest(opened):
    name = "void ns::gemm<float>(float*)"
    spans = ((100.0, 110.0), (200.0, 230.0), (400.0, 420.0))
    events = [Event(0, "7", *span, name, kind="GEMM", group="compute") for span in spans]
    other = Event(0, "7", 600.0, 700.0, name, kind="copy", group="compute")
    browser = opened(report(Trace("", "kineto", (*events, other))))
    row = "[...document.querySelectorAll('#kernels tbody tr')].find(row => row.dataset.kind === 'GEMM')"
    assert browser.evaluate(f"[{row}.cells[0].textContent, {row}.cells[0].title]") == ["ns::gemm<float>", name]
    views, starts = [], []
    for _ in range(4):
        browser.evaluate(f"{row}.querySelector('button').click()")
        views.append(view(browser))
        starts.append(text(browser, "#details dd"))
    assert views == [(140.0, 290.0), (360.0, 460.0), (100.0, 150.0), (140.0, 290.0)]
    assert starts == ["200.000 µs", "400.000 µs", "100.000 µs", "200.000 µs"]
    assert text(browser, "#details h3") == name
    assert browser.evaluate("document.activeElement.id") == "timeline"


def test_what_is_seldom_busy_is_pale_from_afar(opened):
    """Two lanes of 20,000 events each, one busy all the time, one for a hundredth of it."""
    events = [
        Event(0, lane, i * 10.0, i * 10.0 + length, lane, kind="GEMM", group="compute")
        for lane, length in (("dense", 10.0), ("sparse", 0.1))
        for i in range(20_000)
    ]
    browser = opened(report(Trace("", "kineto", tuple(events))))
    first = 26 + 22
    strength = browser.evaluate(
        f"""(() => {{
          const shown = document.getElementById("timeline"), canvas = document.createElement("canvas");
          [canvas.width, canvas.height] = [shown.width, shown.height];
          const context = canvas.getContext("2d", {{ willReadFrequently: true }});
          context.drawImage(shown, 0, 0);
          const pixel = (y) => context.getImageData(600, y, 1, 1).data.slice(0, 3);
          return [{first} + 11, {first} + 33].map((y) => 255 - Math.min(...pixel(y)));
        }})()"""
    )
    assert strength[0] > 2 * strength[1] > 0


def test_steps_through_what_was_found_in_both_directions(opened):
    browser = opened(report(layer_trace()), "#find=grouped")
    starts = []
    for key in (".", ".", ".", ".", ".", ",", ",", ",", ","):
        browser.evaluate("document.getElementById('timeline').focus()")
        browser.key(key)
        starts.append(text(browser, "#details dd"))
    first, second = "1065.000 µs", "1165.000 µs"  # on either device
    assert starts == [first, first, second, second, second, second, first, first, first]


def test_what_no_event_has_cannot_be_coloured_by(opened):
    trace = Trace("", "kineto", (Event(0, "7", 0.0, 1.0, "a", kind="GEMM", group="compute"),))
    browser = opened(report(trace))
    disabled = (
        "[...document.querySelectorAll('#colour option')].filter(option => option.disabled).map(option => option.value)"
    )
    assert browser.evaluate(disabled) == ["phase", "layer", "microbatch"]
    assert text(browser, "#status").endswith("· 1 event")


def test_the_address_keeps_the_view(opened):
    made = report(layer_trace())
    browser = opened(made, "#view=1040,1100&find=dispatch&colour=phase&event=2,1")
    assert text(browser, "#status") == "1.04 ms – 1.10 ms · 20 events · 8 match, 100.0 µs"
    assert browser.evaluate("document.getElementById('colour').value") == "phase"
    assert text(browser, "#details h3") == "dispatch"
    browser.evaluate("document.getElementById('fit').click()")
    assert view(browser) is None
    assert browser.evaluate("location.hash") == "#find=dispatch&colour=phase&event=2%2C1"
    broken = opened(made, "#view=a,b&event=99,99&colour=none")
    assert text(broken, "#status").startswith("990.0 µs – 1.20 ms")


def test_hostile_names_stay_names(opened):
    browser = opened(report(tangled_trace()))
    assert browser.evaluate("document.title") == browser.evaluate("document.querySelector('h1').textContent") == HOSTILE
    assert browser.evaluate("document.querySelectorAll('img, script:not([type])').length") == 1
    browser.evaluate("document.getElementById('timeline').focus()")
    put(browser, "query", "onerror", "input")
    browser.key(".")
    assert text(browser, "#details h3") == HOSTILE
    assert HOSTILE in browser.evaluate("[...document.querySelectorAll('#notes li')].map(li => li.textContent)")


@pytest.mark.parametrize("width", [360, 1400])
def test_nothing_is_wider_than_the_window(opened, width):
    browser = opened(report(layer_trace(), layer_trace("predicted")), width=width, height=800)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert pixels(browser)[0] >= 8


def test_a_hundred_thousand_events_answer_at_once(opened):
    """Merged where they share a pixel; found by halving. The bound is loose: a shared machine draws without a GPU."""
    events = [
        Event(
            device,
            str(7 + lane),
            i * 10.0 + lane,
            i * 10.0 + 8.0,
            f"kernel {i % 300}",
            group="compute",
            kind=f"kind {i % 9}",
        )
        for i in range(12_500)
        for device in range(4)
        for lane in (0, 1)
    ]
    browser = opened(report(Trace("large", "xplane", tuple(events))))
    assert "100,000 events" in text(browser, "#status")
    milliseconds = browser.evaluate(
        """new Promise(done => {
          const button = document.getElementById("in"), start = performance.now();
          let count = 0;
          const step = () => {
            button.click();
            if (++count < 20) requestAnimationFrame(step);
            else done((performance.now() - start) / count);
          };
          step();
        })"""
    )
    assert milliseconds < 250


def test_a_page_without_communication_or_with_one_instant(opened):
    instant = Trace("", "xplane", (Event(0, "gpu", 5.0, 5.0, "a", group="compute"),))
    browser = opened(report(instant))
    assert text(browser, "#figure-overlap .value") == "none"
    assert browser.evaluate("document.querySelector('button#exposed').disabled")
