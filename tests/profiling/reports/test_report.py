"""A report's numbers are the metrics', in every form; what is doubtful is said."""

import dataclasses
import pathlib
import re

import pytest

from profiling.event import Event, Trace
from profiling.hlo.hiding import CompiledCollective, CompiledOverlap
from profiling.metrics import measure
from profiling.reports.making import EXPLAINED, report
from profiling.table import Column, Table, as_markdown, as_text, written
from tests.profiling.traces import HOSTILE, layer_trace, tangled_trace

DEEPSEEK = pathlib.Path(__file__).resolve().parents[4] / "shared" / "data" / "deepseek_profile_train.json.gz"


def figures(made):
    return {figure.name: figure.value for figure in made.figures}


def column(table, title):
    index = [column.title for column in table.columns].index(title)
    return [row[index] for row in table.rows]


def test_figures_are_the_metrics():
    trace = layer_trace()
    made, measured = report(trace), measure(trace)
    whole = measured.summary
    assert made.measurement == measured
    assert figures(made) == {
        "overlap": whole.overlaps["transfer"].ratio,
        "exposed": whole.overlaps["transfer+wait"].exposed,
        "compute": whole.breakdown.compute / whole.breakdown.window,
        "makespan": 196.0,
        "idle": whole.breakdown.device_idle,
        "bubble": pytest.approx(sum(b.compute_bubble for b in whole.bubbles) / 2),
        "unclassified": 0.0,
    }


def test_tables_are_the_metrics():
    """By hand: two devices, two layers, each 40 + 5 + 30 or 31 of compute, 5 of waits and 20 of transfers."""
    made = report(layer_trace())
    kinds = dict(zip(column(made["kinds"], "kind"), column(made["kinds"], "total"), strict=True))
    assert kinds == {
        "attention core": 160.0, "grouped GEMM": 122.0, "dispatch kernel": 80.0, "dense GEMM": 20.0, "barrier": 20.0
    }  # fmt: skip
    assert sum(column(made["kinds"], "share")) == pytest.approx(1.0)
    assert column(made["kinds"], "blocks")[:3] == [None, "112", "20"]
    phases = dict(zip(column(made["phases"], "phase"), column(made["phases"], "group"), strict=True))
    assert phases["dispatch(F)"] == "transfer, wait"
    layers = made["layers"]
    assert [column.title for column in layers.columns] == ["layer", "attn(F)", "dispatch(F)", "shared(F)", "mlp(F)"]
    assert layers.rows == (("0", 40.0, 25.0, 5.0, 30.5), ("1", 40.0, 25.0, 5.0, 30.5), ("mean", 40.0, 25.0, 5.0, 30.5))
    assert column(made["devices"], "exposed with waits") == [40.0, 40.0]
    assert column(made["bubbles"], "bubble") == pytest.approx([1 - 152 / 196, 1 - 150 / 196])
    assert column(made["overlap"], "exposed") == [60.0, 80.0, 80.0]
    assert column(made["gaps"], "gap") == [0.0, 2.0, 5.0, 20.0, 50.0]
    assert column(made["lanes"], "alone") == [140.0, 40.0, 142.0, 40.0]
    assert made["skew"].caption.startswith("Seen in 4 collectives that several devices have in common: starts lie 0.0")
    assert column(made["skew"], "is last") == [0.0, 0.0]


def test_kernels_with_most_time_are_counted_over_all_devices():
    """By hand: of each kernel, 2 devices times 2 layers."""
    table = report(layer_trace())["kernels"]
    assert column(table, "kernel") == ["attention_kernel", "grouped_gemm", "dispatch", "notify_dispatch", "shared"]
    assert column(table, "total") == [160.0, 122.0, 80.0, 20.0, 20.0]
    assert column(table, "events") == [4] * 5
    assert column(table, "mean")[:2] == [40.0, 30.5] and column(table, "longest")[:2] == [40.0, 31.0]
    assert sum(column(table, "share")) == pytest.approx(1.0)
    assert table.events[1] == ("grouped_gemm", "grouped GEMM")


def test_kernels_that_are_not_listed_are_counted():
    events = tuple(Event(0, "7", 9.0 * i, 9.0 * i + 1 + i % 2, f"kernel_{i}", group="compute") for i in range(40))
    loop = Event(0, "7", 0.0, 400.0, "while", group="control")
    table = report(Trace("many", "xplane", (loop, *events)))["kernels"]
    assert len(table.rows) == 30 and column(table, "longest") == [2.0] * 20 + [1.0] * 10
    assert table.caption.endswith("The 30 longest of 40: the other 10 take 16.67%.")
    assert "while" not in column(table, "kernel")


def test_one_kernel_that_runs_as_several_kinds_has_a_row_for_each():
    kinds = enumerate(("all-reduce", "all-gather"))
    events = tuple(
        Event(0, "13", i, i + 1.0, "ncclDevKernel_Generic", kind=kind, group="transfer") for i, kind in kinds
    )
    assert sorted(column(report(Trace("", "kineto", events))["kernels"], "kind")) == ["all-gather", "all-reduce"]


def test_a_window_that_is_mostly_idle_has_no_speedup():
    """2 us of communication beside 100 us of compute in 10 ms: what is between decides, not what is hidden."""
    gemm = Event(0, "7", 0.0, 100.0, "gemm", kind="GEMM", group="compute")
    reduce = Event(0, "13", 9_998.0, 10_000.0, "nccl", kind="all-reduce", group="transfer")
    made = report(Trace("idle", "kineto", (gemm, reduce)))
    assert column(made["overlap"], "efficiency") == column(made["overlap"], "speed-up") == [None] * 3
    assert "efficiency" not in made.text().partition("Definitions")[0]
    assert column(made["overlap"], "overlap ratio") == [0.0] * 3


def test_what_tells_nothing_is_left_out():
    """One device, no phases, no communication: no table repeats the figures or has one row "(none)"."""
    names = [
        table.name for table in report(Trace("", "xplane", (Event(0, "gpu", 0.0, 4.0, "a", group="compute"),))).tables
    ]
    assert names == ["kernels", "kinds", "lanes"]
    phased = Event(0, "gpu", 0.0, 4.0, "a", group="compute", phase="execute(1)_context(0)")
    names = [table.name for table in report(Trace("", "xplane", (phased,))).tables]
    assert "phases" in names and "actions" not in names


def test_paths_do_not_stand_at_the_top():
    trace = dataclasses.replace(layer_trace(), metadata={"chip": "H800", "trace name": "/tmp/a.json", "ranks": [None]})
    made = report(trace)
    assert made.facts == ("read from kineto", "2 devices", "20 events", "chip H800")
    assert made["metadata"].rows == (("chip", "H800"), ("trace name", "/tmp/a.json"))


def test_longest_exposed_stretches():
    table = report(layer_trace())["exposed-segments"]
    assert column(table, "length") == [15.0] * 4 + [5.0] * 4
    assert table.spans[0] == (1040.0, 1055.0)
    assert set(column(table, "what waits for what")[4:]) == {
        f"mlp(F) of layer {layer} waits for dispatch(F) of layer {layer}" for layer in (0, 1)
    }


def test_prediction_beside_the_measurement():
    measured, predicted = layer_trace(), layer_trace("predicted", slower=0.9, start=0.0)
    made = report(measured, dataclasses.replace(predicted, notes=("no slow-down modelled",)))
    assert figures(made)["predicted"] == pytest.approx(176.0, abs=1)
    simulated = measure(predicted).summary.bubbles
    assert column(made["bubbles"], "simulated") == [bubble.compute_bubble for bubble in simulated]
    phases = {row[0]: row[2:5] for row in made["predicted-phases"].rows}
    assert phases["attn(F)"] == pytest.approx((160.0, 144.0, -0.1))
    assert len(made["predicted-tasks"].rows) == 2 * 2 * 4
    assert "predicted: no slow-down modelled" in made.notes
    assert not any(table.name.startswith("predicted") for table in report(measured).tables)


def test_tasks_of_one_side_are_noted():
    measured = layer_trace()
    fewer = dataclasses.replace(measured, events=tuple(e for e in measured.events if e.phase != "shared(F)"))
    notes = report(measured, fewer).notes
    assert any(note.startswith("only measured: ") and "shared(F)" in note for note in notes)


def test_a_prediction_of_other_devices_is_refused():
    other = Trace("elsewhere", "simulated", (Event(9, "gpu", 0.0, 1.0, "a", group="compute"),))
    with pytest.raises(ValueError, match="no device in common"):
        report(layer_trace(), other)
    with pytest.raises(ValueError, match="no events"):
        report(Trace("empty", "xplane", ()))


def test_compiled_schedule():
    one = CompiledCollective(
        computation="main", name="all-to-all-start.1", kind="all-to-all", label="jit(step)/F/dispatch",
        is_asynchronous=True, count=4, devices=8, bytes=2e6, remote_bytes=0.0, us=50.0, hidden_us=40.0,
        between_us=40.0, between_flops=1e9, products=(), could_hide_us=60.0, place="inner",
    )  # fmt: skip
    made = report(
        layer_trace(), schedule=CompiledOverlap("jit_step", "H200", (one,), (), 500.0, 400.0, notes=("guessed",))
    )
    table = made["schedule-collectives"]
    assert table.title == "Collectives of jit_step on H200"
    assert table.rows[0][:6] == ("partial", "async", "all-to-all", 4, 2.0, 50.0)
    assert column(made["schedule-kinds"], "exposed") == [40.0, 40.0]
    assert len({table.name for table in made.tables}) == len(made.tables)
    assert "compiled schedule: guessed" in made.notes


def test_without_communication_there_is_no_ratio():
    made = report(Trace("alone", "xplane", (Event(0, "gpu", 0.0, 4.0, "a", kind="GEMM", group="compute"),)))
    assert figures(made)["overlap"] is None and figures(made)["exposed"] is None
    assert {table.name for table in made.tables} == {"kernels", "kinds", "lanes"}
    assert "exposed communication" not in made.text() + made.markdown()
    assert re.search(r"^overlap ratio +none  no communication in this trace$", made.text(), re.MULTILINE)
    assert "1 device · 1 event\n" in made.text() and "nan" not in made.text()


def test_what_no_rule_knows_is_listed():
    made = report(tangled_trace())
    assert figures(made)["unclassified"] == 1.0
    assert column(made["unclassified"], "name")[0] == "outer"


@pytest.mark.parametrize("form", ["text", "markdown"])
def test_forms_hold_every_number_and_definition(form):
    made = report(layer_trace(), layer_trace("predicted", slower=0.9))
    found = made.text(None, None) if form == "text" else made.markdown(None)
    for figure in made.shown:
        assert figure.written in found
    for table in map(Table.filled, made.tables):
        for cell in (cell for row in table.cells() for cell in row):
            assert cell in found.replace("\\", "")
    for name, meaning in EXPLAINED:
        assert name in found and meaning in found
    assert "clocks are integer microseconds" in found


def test_long_tables_say_what_they_leave_out():
    table = Table("t", "Title", "", (Column("n", "n"),), tuple((i,) for i in range(50)))
    assert as_text(table, 3).splitlines()[-2:] == ["2", "... and 47 more"]
    assert as_markdown(table, 3).endswith("| 2 |\n\n... and 47 more")
    assert "more" not in as_text(table) + as_markdown(table, 50)


def test_markdown_tables_are_whole_whatever_the_names():
    found = report(tangled_trace()).markdown()
    assert "<" not in found
    tables = [block for block in found.split("\n\n") if block.startswith("|")]
    assert len(tables) >= 5
    for table in tables:
        lines = [line.replace("\\|", "") for line in table.splitlines()]
        assert len({line.count("|") for line in lines}) == 1
    assert HOSTILE not in found


def test_cells_and_rows():
    assert [written(value, unit) for value, unit in ((0.5, "%"), (None, "%"), ("", ""), (12345, "n"), (2.0, "x"))] == [
        "50.00%", "-", "(none)", "12,345", "2.000"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="has not one cell for each of 1"):
        Table("t", "T", "", (Column("a"),), ((1, 2),))
    with pytest.raises(KeyError, match="no table 'nothing'; there are overlap"):
        report(layer_trace())["nothing"]


@pytest.mark.skipif(not DEEPSEEK.exists(), reason="needs DeepSeek's published trace")
def test_deepseeks_trace():
    from profiling.read.kineto import read_kineto  # noqa: PLC0415

    made = report(read_kineto(DEEPSEEK))
    assert [row[:5] for row in made["overlap"].cells()] == [
        ["A transfers", "80.452", "77.509", "96.34%", "2,943.0"],
        ["B transfers and waits", "113.030", "108.881", "96.33%", "4,149.0"],
        ["C communication lanes", "114.521", "110.292", "96.31%", "4,229.0"],
    ]
    assert figures(made)["makespan"] == 129_012.0
    assert made["exposed-segments"].rows[0][4] == "attn(B) of layer 3 waits for dispatch(B) of layer 3"
    assert figures(made)["unclassified"] == 0.0
