"""The orders of DualPipe and DualPipeV are DeepSeek's, group by group; DualPipeV's are PyTorch's too."""

import json
import pathlib

import pytest

from jaxpipe.schedule import Action, Kind, build

GOLDEN = pathlib.Path(__file__).resolve().parent.parent.parent / "golden"
ENTRIES = json.loads((GOLDEN / "schedules.json").read_text())


def recorded_action(entry, kind, stage, direction_or_chunk, microbatch):
    """An action as recorded: DualPipe's microbatches are numbered per direction, DualPipeV's are not."""
    half = entry["num_microbatches"] // 2
    first = direction_or_chunk * half if entry["schedule"] == "dualpipe" else 0
    return Action(stage, Kind(kind), first + microbatch)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e['schedule']}-{e['num_ranks']}-{e['num_microbatches']}")
def test_order_is_deepseeks(entry):
    schedule = build(entry["schedule"], entry["num_ranks"], entry["num_microbatches"])
    recorded = tuple(
        tuple(tuple(recorded_action(entry, *action) for action in group) for group in rank) for rank in entry["ranks"]
    )
    assert schedule.ranks == recorded


def test_all_recordings_are_compared():
    """The file holds three DualPipe and two DualPipeV schedules, none of them empty."""
    assert [(e["schedule"], e["num_ranks"], e["num_microbatches"]) for e in ENTRIES] == [
        ("dualpipe", 2, 4),
        ("dualpipe", 4, 8),
        ("dualpipe", 8, 20),
        ("dualpipev", 2, 4),
        ("dualpipev", 4, 10),
    ]
    assert all(len(e["ranks"]) == e["num_ranks"] and all(e["ranks"]) for e in ENTRIES)


def test_dualpipev_is_pytorchs():
    """Cells compared as text, so that this does not rest on the reader of CSV files."""
    rows = (GOLDEN / "dualpipev_4rank_10mb.csv").read_text().split()
    expected = [[cell for cell in row.split(",") if cell] for row in rows]

    def cell(group):
        texts = [str(action) for action in group]
        return texts[0] if len(texts) == 1 else f"({';'.join(texts)})OVERLAP_F_B"

    assert [[cell(group) for group in rank] for rank in build("dualpipev", 4, 10).ranks] == expected
