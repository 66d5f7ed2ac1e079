"""Brings the figures of docs/measured.json to README and documentation, or says where they differ.

    python examples/benchmarks/pages.py            # ends with 1 where a page says something else than the file
    python examples/benchmarks/pages.py --write    # writes the file's figures into the pages

A page ties its figures to keys with comments that readers do not see:

* ``<!--m:KEY-->1,234<!--/m-->`` round a figure of a sentence. ``min PATTERN`` and ``max PATTERN`` in place of a key are
  the least and the greatest of several, with ``*`` for what differs. Such a comment never begins a line: Markdown would
  end the paragraph there.
* ``<!--table:KEY-->`` on a line of its own before a table, with ``{0}``, ``{1}`` and so on for the row's first cells,
  its labels (an empty one is that of the row above), and ``{column}`` for the column's title. Every number of the other
  cells is a figure. The second of a cell has the second key where ``;`` divides two, else the first and " (2)".

The page says with how many decimals a figure stands there.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import pathlib
import re
import sys
from collections.abc import Iterator

from record import ROOT, Records, read_records

NUMBER = re.compile(r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?")
FIGURE = re.compile(r"<!--m:(?P<key>.+?)-->(?P<text>.*?)<!--/m-->")
TABLE = re.compile(r"^<!--table:(?P<keys>.+?)-->\n+(?P<rows>(?:\|.*\n)+)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Quote:
    """A figure of a page: its key or expression, its text, and where that is."""

    key: str
    text: str
    start: int
    end: int


def value_of(key: str, records: Records) -> float:
    """The value of a key, or of "min PATTERN" or "max PATTERN".

    Raises:
      KeyError: there is none.
    """
    for name, choose in (("min ", min), ("max ", max)):
        if key.startswith(name):
            pattern = key.removeprefix(name)
            found = [record["value"] for each, record in records.items() if fnmatch.fnmatchcase(each, pattern)]
            if not found:
                raise KeyError(key)
            return choose(found)
    return records[key]["value"]


def shown(value: float, like: str) -> str:
    """The value with the decimals and the commas of a text.

    >>> shown(1805.4721, like="1,921.6"), shown(0.68, like="0.7"), shown(3, like="12")
    ('1,805.5', '0.7', '3')
    """
    decimals = len(like.partition(".")[2])
    return f"{value:,.{decimals}f}" if "," in like else f"{value:.{decimals}f}"


def quotes(page: str) -> list[Quote]:
    """All figures of a page that are tied to keys, in order."""
    found = [Quote(each["key"], each["text"], *each.span("text")) for each in FIGURE.finditer(page)]
    found += [quote for table in TABLE.finditer(page) for quote in _of_table(table)]
    return sorted(found, key=lambda quote: quote.start)


def _of_table(table: re.Match[str]) -> Iterator[Quote]:
    keys = [key.strip() for key in table["keys"].split(";")]
    labels = max((int(digit) + 1 for digit in re.findall(r"\{(\d)\}", table["keys"])), default=0)
    titles: list[str] = []
    above = [""] * labels
    start = table.start("rows")
    for number, line in enumerate(table["rows"].splitlines(keepends=True)):
        cells = _cells(line, start)
        start += len(line)
        if number == 0:
            titles = [_label(text) for text, _ in cells]
        if number < 2:
            continue
        above = [_label(text) or before for (text, _), before in zip(cells, above, strict=False)]
        for title, (text, at) in list(zip(titles, cells, strict=True))[labels:]:
            if "<!--m:" in text:
                continue  # it has keys of its own
            for i, figure in enumerate(NUMBER.finditer(text)):
                key = keys[min(i, len(keys) - 1)]
                key = functools.reduce(lambda key, n: key.replace(f"{{{n}}}", above[n]), range(labels), key)
                key = key.replace("{column}", title) + (f" ({i + 2 - len(keys)})" if i >= len(keys) else "")
                yield Quote(key, figure[0], at + figure.start(), at + figure.end())


def _cells(line: str, start: int) -> list[tuple[str, int]]:
    """The cells of a line, and where each begins."""
    found, at = [], start + 1
    for cell in line.strip()[1:-1].split("|"):
        text = cell.strip()
        found.append((text, at + cell.index(text) if text else at))
        at += len(cell) + 1
    return found


def _label(text: str) -> str:
    return text.replace("`", "")


def differences(page: str, records: Records) -> list[str]:
    """A sentence for each figure of a page that the records do not have, or have otherwise."""
    found = []
    for quote in quotes(page):
        try:
            want = shown(value_of(quote.key, records), like=quote.text)
        except KeyError:
            found.append(f"no record {quote.key!r}, quoted as {quote.text}")
            continue
        if want != quote.text:
            found.append(f"{quote.key}: {quote.text} stands there, {want} was measured")
    return found


def with_figures(page: str, records: Records) -> str:
    """The page with the records' figures."""
    for quote in reversed(quotes(page)):
        page = page[: quote.start] + shown(value_of(quote.key, records), like=quote.text) + page[quote.end :]
    return page


def pages() -> list[pathlib.Path]:
    """README and the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    """Checks the pages, or writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the figures into the pages")
    args = parser.parse_args()
    records, wrong = read_records(), 0
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if args.write:
            path.write_text(with_figures(text, records), encoding="utf-8")
            continue
        for sentence in differences(text, records):
            print(f"{path.relative_to(ROOT)}: {sentence}")
            wrong += 1
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
