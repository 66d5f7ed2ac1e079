"""Readers, writers and sections of a report: registered ones keep their Protocol, and others are arguments."""

import csv
import dataclasses
import pathlib

import pytest

from profiling import READERS, WRITERS, Event, Trace, measure, read_trace, write_trace
from profiling.classify.classifier import KERNELS, classify
from profiling.reports.section import Findings
from profiling.reports.tables import SECTIONS, report_tables
from profiling.table import Column, Table
from tests.profiling.conftest import THREE_LAYERS
from tests.profiling.traces import layer_trace
from tests.profiling.xspaces import gpu_profile, written

HEAD = "device,lane,start,end,name\n"


class CsvReader:
    """A reader of files that no profiler writes."""

    profiler = "a spreadsheet"
    files = "a table of events (.csv)"

    def sniff(self, head, name):
        return "a table of events" if head.startswith(HEAD.encode()) else ""

    def find(self, folder):
        return next((path.name for path in sorted(folder.rglob("*.csv"))), "")

    def read(self, paths, rules):
        files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*.csv")))]
        rows = [row for file in files for row in csv.DictReader(file.read_text().splitlines())]
        events = [
            Event(int(row["device"]), row["lane"], float(row["start"]), float(row["end"]), row["name"]) for row in rows
        ]
        return classify(Trace(files[0].name, "csv", tuple(events)), (*rules, *KERNELS))


def write_csv(path, traces, *, links=(), counted=True):
    [trace] = [traces] if isinstance(traces, Trace) else traces
    with open(path, "w", newline="") as file:
        file.write(HEAD)
        rows = ((event.device, event.lane, event.start, event.end, event.name) for event in trace.events)
        csv.writer(file).writerows(rows)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "events.txt"
    path.write_text(HEAD + "0,7,0.0,4.0,ampere_sgemm_128x64_tn\n1,7,1.0,3.0,mystery\n")
    return path


@pytest.fixture
def samples(tmp_path):
    """A file of each registered reader's, by its profiler."""
    profile = pathlib.Path(written(tmp_path, gpu_profile()))
    profile = profile if profile.is_file() else next(profile.rglob("*.xplane.pb"))
    return {"jax.profiler": profile, "PyTorch": THREE_LAYERS}


class TestReaders:
    def test_another_reader_is_an_argument(self, table):
        trace = read_trace(table, readers=(CsvReader(), *READERS))
        assert [(event.device, event.kind) for event in trace.events] == [(0, "GEMM"), (1, "other kernel")]
        assert trace.source == "csv"

    def test_another_reader_reads_folders(self, table):
        table.rename(table.with_name("events.csv"))
        assert len(read_trace(table.parent, readers=(CsvReader(), *READERS)).events) == 2

    def test_another_reader_changes_nothing_for_others(self, samples):
        for path in samples.values():
            assert read_trace(path, readers=(CsvReader(), *READERS)) == read_trace(path)

    def test_without_it_the_file_is_refused(self, table):
        with pytest.raises(ValueError, match=r"events\.txt: no JSON"):
            read_trace(table)

    def test_files_of_two_profilers_are_refused(self, table, samples):
        with pytest.raises(ValueError, match=r"of a spreadsheet \(events\.txt\), but there are traces of PyTorch"):
            read_trace([table, samples["PyTorch"]], readers=(CsvReader(), *READERS))

    def test_a_folder_without_any_names_what_each_reads(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"neither a PyTorch trace .* nor a profile of .* nor a table of events"):
            read_trace(tmp_path / "empty", readers=(CsvReader(), *READERS))

    @pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.profiler)
    def test_each_registered_reader_knows_its_own_files_alone(self, reader, samples, tmp_path):
        own = samples[reader.profiler]
        for profiler, path in samples.items():
            assert bool(reader.sniff(path.read_bytes()[:1024], path.name)) == (profiler == reader.profiler)
        (tmp_path / "below").mkdir()
        assert reader.find(tmp_path / "below") == ""
        (tmp_path / "below" / own.name).write_bytes(own.read_bytes())
        assert reader.find(tmp_path / "below") == own.name
        trace = reader.read([own], ())
        assert trace.events and all(event.group != "unclassified" for event in trace.events)
        assert list(trace.events) == sorted(trace.events, key=lambda event: (event.start, event.end))
        with pytest.raises(ValueError, match="other"):
            (tmp_path / "other").write_bytes(b"SQLite format 3\0")
            reader.read([tmp_path / "other"], ())


class TestWriters:
    def test_another_writer_is_an_argument(self, tmp_path):
        trace = layer_trace()
        write_trace(tmp_path / "step.csv", trace, writers={**WRITERS, ".csv": write_csv})
        found = read_trace(tmp_path / "step.csv", readers=(CsvReader(), *READERS))
        assert [event.name for event in found.events] == [event.name for event in trace.events]

    def test_an_ending_without_a_writer_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"step\.csv.* choose one of \.pftrace, \.json, \.json\.gz"):
            write_trace(tmp_path / "step.csv", layer_trace())

    @pytest.mark.parametrize("ending", WRITERS)
    def test_each_registered_writer(self, ending, tmp_path):
        one, other = tmp_path / f"one{ending}", tmp_path / f"other{ending}"
        write_trace(one, layer_trace())
        WRITERS[ending](other, [layer_trace()], links=(), counted=True)
        assert one.read_bytes() == other.read_bytes() != b""
        write_trace(other, layer_trace(), counted=False)
        assert len(other.read_bytes()) < len(one.read_bytes())
        with pytest.raises(ValueError, match="must end in"):
            WRITERS[ending](tmp_path / "step.txt", layer_trace())
        with pytest.raises(ValueError, match="no traces"):
            WRITERS[ending](one, ())
        late = dataclasses.replace(layer_trace().events[0], end=0.0)
        with pytest.raises(ValueError, match="no event may end before it starts"):
            WRITERS[ending](one, Trace("", "kineto", (late,)))


class TestSections:
    def test_another_section_is_an_argument(self):
        def events(found):
            return Table("events", "Events", "", (Column("events", "n"),), ((len(found.trace.events),),))

        trace = layer_trace()
        found = Findings(trace, measure(trace))
        assert [table.name for table in report_tables(found, (events,))] == ["events"]
        names = [table.name for table in report_tables(found, (*SECTIONS, events))]
        assert names == [*(table.name for table in report_tables(found)), "events"]

    @pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
    def test_each_registered_section_gives_tables(self, section):
        trace = layer_trace()
        made = section(Findings(trace, measure(trace)))
        assert all(isinstance(table, Table) for table in ([made] if isinstance(made, Table) else made))
