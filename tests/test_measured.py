"""docs/measured.json and the pages that quote it: every figure has a record, and says what the record says."""

import datetime
import doctest
import json
import pathlib
import re
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "examples" / "benchmarks"))

import pages
import record

from tests import commands

ROOT = record.ROOT
RECORDS = record.read_records()
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in pages.pages()}
NUMBER = pages.NUMBER.pattern
MEASURED = re.compile(
    rf"{NUMBER}(?:(?:,| and| to| or| against| instead of) {NUMBER})* ?"
    r"(?:ms|us|µs|s|seconds|minutes|%|kB|MB|GB|MiB|GiB|TFLOP/s|TB/s|GB/s|tokens/s|times)(?![\w/])"
)
"""A number with a unit: a measurement, as far as its looks tell."""

UNTIED = {
    # What looks like a measurement and is none. Whole pages are those whose figures another test holds.
    "docs/guides/memory.md: 6%": "what tests/examples/test_plan.py allows",
    "docs/guides/schedules.md": "printed by the command that the page shows; test_readme.py runs it",
    "README.md: 10.4%|9.1%|5.5%|25.9%": "of that same table, as test_readme.py checks",
    "docs/guides/fp8.md: 0.25%": "what DeepSeek's report claims",
    "docs/guides/kernels.md: 2%": "a threshold of the report",
    "docs/guides/traces.md: 60 s": "a limit of the reader",
    "docs/guides/traces.md: 100%": "the upper end of a share: it cannot be more",
    "docs/guides/collectives.md: 12ms|30ms": "arguments of a command",
    "docs/measured/experts.md: 2%|1%": "how much loads drift in the benchmark, and what `sticky` may leave",
    "docs/measured/experts.md: 15 times": "repeats",
    "docs/measured/gpus.md: 1.25 times": "a capacity factor",
    "docs/measured/gpus.md: 450 GB/s": "NVLink's rate, as published",
    "docs/measured/profiling.md: 33 ms": "two frames of a screen",
    "docs/measured/gpus.md: 80%|5%|75%": "defaults of XLA and JAX",
    "docs/measured/overlap.md: 20%": "an assumption",
    "docs/measured/overlap.md: 3 ms": "an example",
    r"docs/measured/overlap.md: (400|360|50) GB/s": "links as they are taken to be",
    r"docs/measured/.*: (80|141) GB": "sizes of cards",
}


def blank(match):
    return re.sub(r"[^\n]", " ", match[0])


def untied(text):
    """(line, text) of what looks like a measurement outside of code, links and what has a key."""
    for pattern in (re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE), pages.TABLE, pages.FIGURE):
        text = pattern.sub(blank, text)
    text = re.sub(r"`[^`\n]*`", blank, text)
    return [(text.count("\n", 0, match.start()) + 1, match[0]) for match in MEASURED.finditer(text)]


def allowed(page, text):
    return any(
        page == entry or (": " in entry and re.fullmatch(entry, f"{page}: {text}", re.DOTALL) is not None)
        for entry in (each.replace(": ", ": (?:", 1) + ")" if ": " in each else each for each in UNTIED)
    )


@pytest.mark.parametrize("page", PAGES)
def test_the_page_says_what_was_measured(page):
    assert pages.differences(PAGES[page], RECORDS) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_measurement_has_a_key(page):
    assert [found for found in untied(PAGES[page]) if not allowed(page, found[1])] == []


def test_what_is_allowed_without_a_key_is_there():
    found = [(page, text) for page, content in PAGES.items() for _, text in untied(content)]
    for entry in UNTIED:
        page, _, texts = entry.partition(": ")
        assert any(re.fullmatch(page, p) and (not texts or re.fullmatch(texts, text)) for p, text in found), entry


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/measured/")])
def test_every_measured_table_has_keys(page):
    """A table with numbers is tied as a whole, or each of its figures is."""
    text = pages.FIGURE.sub("", pages.TABLE.sub("", PAGES[page]))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [cell.strip() for row in rows for cell in row.strip("|").split("|")[1:]]
    assert [cell for cell in cells if re.match(rf"{NUMBER}(?!\w)", cell)] == []


@pytest.mark.parametrize("page", PAGES)
def test_no_comment_begins_a_line_of_a_paragraph(page):
    """Markdown would end the paragraph there."""
    assert re.findall(r"^\s*<!--m:.*", PAGES[page], re.MULTILINE) == []


def test_records_are_whole():
    scripts = re.compile(r"(?:^|\s)python (examples/\S+\.py)")
    for key, entry in RECORDS.items():
        how = {"command", "source"} & set(entry)
        assert len(how) == 1, key
        assert set(entry) == {"value", "unit", "machine", "date", *how}, key
        assert type(entry["value"]) in (int, float), key
        assert entry["unit"] in ("", *record.UNITS), key
        assert entry["machine"], key
        assert entry[how.pop()], key
        datetime.date.fromisoformat(entry["date"])
        for script in scripts.findall(entry.get("command", "")):
            assert (ROOT / script).exists(), key


COMMANDS = sorted({entry["command"] for entry in RECORDS.values() if "command" in entry})


@pytest.mark.parametrize("command", [each for each in COMMANDS if not each.startswith("not kept: ")])
def test_recorded_commands_are_parsed(command):
    (words,) = commands.commands(command)
    commands.check(words)


def test_the_file_is_written_as_benchmarks_write_it():
    assert record.MEASURED.read_text(encoding="utf-8") == record.dump(RECORDS)


PAGE = """\
The step takes <!--m:a/step ms-->12.3<!--/m--> ms; ratios <!--m:min a/*/ratio-->0.9<!--/m--> to
<b></b><!--m:max a/*/ratio-->1.1<!--/m-->.

<!--table:a/{0}/{1}/{column}-->

| name | size | tokens/s | `ratio` |
|---|---|---|---|
| `x` | 8 | 1,234 (5) | 0.9 |
| | 16 | - | 1.1 |
"""
VALUES = {
    "a/step ms": 12.34,
    "a/x/8/tokens/s": 1234,
    "a/x/8/tokens/s (2)": 5,
    "a/x/8/ratio": 0.91,
    "a/x/16/ratio": 1.12,
}


def of(values):
    return {key: {"value": value} for key, value in values.items()}


def test_pages_follow_the_records():
    assert pages.differences(PAGE, of(VALUES)) == []
    newer = of(VALUES | {"a/step ms": 1000.06, "a/x/8/tokens/s": 98765, "a/x/8/ratio": 0.84})
    assert len(pages.differences(PAGE, newer)) == 4  # the least ratio stands there twice
    written = pages.with_figures(PAGE, newer)
    assert pages.differences(written, newer) == []
    for text in ("1000.1<!--/m--> ms", "98,765 (5)", "ratios <!--m:min a/*/ratio-->0.8<!--/m-->", "| 0.8 |", "| 1.1 |"):
        assert text in written


def test_a_figure_without_a_record_is_named():
    records = of(VALUES)
    del records["a/x/16/ratio"]
    assert pages.differences(PAGE, records)[-1] == "no record 'a/x/16/ratio', quoted as 1.1"


def test_measurements_without_a_key_are_found():
    text = f"Takes 3 ms, 2.5 to 4 GiB.\n`5 ms`, <!--m:k-->6<!--/m--> ms\n\n```\n7 ms\n```\n{PAGE}12% of H100s\n"
    assert untied(text) == [(1, "3 ms"), (1, "2.5 to 4 GiB"), (text.count("\n"), "12%")]


def test_records_are_added_and_replaced(tmp_path):
    file = tmp_path / "measured.json"
    record.write_records(file, {"a/ms": (1.23456789, "ms"), "a/n": (3, "")}, command="c", machine="m")
    record.write_records(file, {"a/n": (4, "")}, command="d", machine="m")
    found = json.loads(file.read_text())
    assert (found["a/ms"]["value"], found["a/ms"]["command"], found["a/n"]["value"]) == (1.23457, "c", 4)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("module", [pages, record])
def test_examples_of_docstrings(module):
    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(module).attempted > 0
