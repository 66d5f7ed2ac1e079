"""Several files of PyTorch's as one trace: ranks, hosts, clocks, archives, folders with other things in them."""

import bz2
import gzip
import importlib
import json
import lzma
import shutil
import sys
import zipfile

import pytest

from profiling.__main__ import main
from profiling.read.kineto import read_kineto
from profiling.read.trace import read_trace
from tests.profiling.kineto_files import document, gpu, half_covered, host


@pytest.fixture
def rank(write_trace):
    """Writes the file of one rank, whose events begin `late` us after the others'."""

    def rank(number, name=None, late=0, **header):
        events = [event | {"ts": event["ts"] + late} for event in half_covered()]
        return write_trace(document(events, number, 4, **header), name or f"host{number}_7.1700.pt.trace.json")

    return rank


def starts(trace):
    return {device: min(event.start for event in trace.events if event.device == device) for device in trace.devices}


class TestRanks:
    def test_files_and_their_folder(self, rank, tmp_path):
        files = [rank(2, late=5), rank(1, "sub.json.gz")]
        for trace in (
            read_kineto(files),
            read_kineto(tmp_path),
            read_trace(tmp_path),
            read_trace([str(f) for f in files]),
        ):
            assert starts(trace) == {1: 0.0, 2: 5.0}
            assert trace.metadata["clock"] == "common"

    def test_on_the_command_line(self, rank, tmp_path, capsys):
        files = [str(rank(0)), str(rank(1))]
        assert main(["report", *files]) == 0
        assert "2 devices" in capsys.readouterr().out
        assert main(["report", str(tmp_path)]) == 0
        assert main(["report", files[0], "missing.json"]) == 2
        assert "missing.json: there is no such file or folder" in capsys.readouterr().err

    def test_ranks_from_the_files_names(self, rank):
        files = [rank(None, "rank-3.Jul_15.pt.trace.json"), rank(None, "graph_capture_rank_1.17.json")]
        assert read_kineto(files).devices == (1, 3)

    def test_a_file_without_a_rank(self, rank):
        trace = read_kineto([rank(3), rank(None, "other.json")])
        assert trace.devices == (0, 1)
        assert trace.notes[0] == (
            "devices are numbered in the order of the files, as 1 of 2 files name no rank (other.json): "
            "0 is GPU 0 of host3_7.1700.pt.trace.json; 1 is GPU 0 of other.json"
        )

    def test_several_gpus(self, write_trace):
        """One file keeps its GPUs' numbers; two files count on."""
        events = [gpu("k", 0, 9, device=2), gpu("k", 0, 9, device=3)]
        one, two = (write_trace(document(events, rank), f"{rank}.json") for rank in (0, 1))
        assert read_kineto(one).devices == (2, 3)
        trace = read_kineto([one, two])
        assert trace.devices == (0, 1, 2, 3)
        assert "as a file has several GPUs" in trace.notes[0]

    def test_jobs_of_their_own(self, write_trace):
        """Servers that each are rank 0 of 1 are no ranks of one another."""
        files = [write_trace(document(half_covered(), 0, 1), name) for name in ("a.json", "b.json")]
        trace = read_kineto(files)
        assert trace.devices == (0, 1)
        assert "as several files have the same rank" in trace.notes[0]

    def test_the_same_rank_at_the_same_time(self, rank, tmp_path):
        files = [rank(1, "a.json"), rank(1, "b.json", late=50)]
        for path in (files, tmp_path):
            with pytest.raises(ValueError, match=r"a\.json.*b\.json.* are of ranks \[1, 1\]: read one file of each"):
                read_kineto(path)

    def test_a_file_and_its_packed_copy(self, rank, tmp_path):
        rank(1, "a.json")
        rank(1, "a.json.gz")
        trace = read_kineto(tmp_path)
        assert len(trace.events) == 2
        assert "left out: a.json.gz, the same as a.json" in trace.notes

    def test_equal_ranks_in_the_names_of_files_alone(self, rank, tmp_path):
        """Two nodes that each count from 0."""
        rank(None, "node0/rank0.json")
        rank(None, "node1/rank0.json", late=3)
        assert starts(read_kineto(tmp_path)) == {0: 0.0, 1: 3.0}

    def test_what_is_true_of_several_files_is_said_once(self, rank):
        trace = read_kineto([rank(n) for n in range(3)])
        assert sum("no launch of a GPU event" in note for note in trace.notes) == 1
        assert any(note.startswith("host0_7.1700.pt.trace.json and 2 more: no launch") for note in trace.notes)

    def test_of_several_sessions_in_a_folder_the_newest_counts(self, rank, tmp_path):
        files = [rank(n, f"host{n}_7.{session}.json", 1e7 * session) for n in (0, 1) for session in (0, 1)]
        trace = read_kineto(tmp_path)
        assert trace.metadata["files"] == ["host0_7.1.json", "host1_7.1.json"]
        assert "left out: host0_7.0.json, an earlier session of rank 0; name files to read it" in trace.notes
        with pytest.raises(ValueError, match="read one file of each rank"):
            read_kineto(files)


class TestClocks:
    def test_bases_of_hosts(self, rank):
        """Microseconds since a base of each host's; the second begins 7 us late."""
        files = [
            rank(0, baseTimeNanoseconds=5_000_000_000, host_name="a"),
            rank(1, late=-1e6, baseTimeNanoseconds=6_000_007_000, host_name="b"),
        ]
        trace = read_kineto(files)
        assert starts(trace) == pytest.approx({0: 0.0, 1: 7.0})
        assert trace.metadata["hosts"] == ["a", "b"]
        assert trace.metadata["clock"] == "hosts'"
        assert "the files are of 2 hosts, whose clocks may differ by milliseconds" in trace.notes

    @pytest.mark.parametrize(("late", "said"), [(2e6, "2.0 s"), (3 * 86_400e6, "3.0 days"), (600, "450.0 us")])
    def test_files_of_different_moments(self, rank, late, said):
        """They would be idle for the time between them, if they lay on one clock."""
        trace = read_kineto([rank(0), rank(1, late=late)])
        assert starts(trace) == {0: 0.0, 1: 0.0}
        assert trace.window == (0.0, 150.0)
        assert trace.metadata["clock"] == "each file its own"
        assert f"begins {said} after host0_7.1700.pt.trace.json ends" in trace.notes[0]

    def test_one_of_three_apart(self, rank):
        trace = read_kineto([rank(0), rank(1, late=20), rank(2, late=1e6)])
        assert starts(trace) == {0: 0.0, 1: 0.0, 2: 0.0}
        assert "host2_7.1700.pt.trace.json begins 999.8 ms after host1_7.1700.pt.trace.json ends" in trace.notes[0]

    def test_steps_lie_on_the_clock_of_their_events(self, write_trace):
        one, two = (
            write_trace(document([host("ProfilerStep#1", at - 10, 50), gpu("k", at, 5)], n), f"{n}.json")
            for n, at in enumerate((1000, 9e6))
        )
        assert [step.start for step in read_kineto([one, two]).steps] == [-10.0, -10.0]


class TestFolders:
    def test_what_is_no_trace_is_left_out_and_said(self, rank, write_trace, tmp_path):
        rank(0)
        write_trace([{"file": "a.json", "batch_size": 32}], "execution_details.json")
        write_trace(document([host("gloo:all_reduce", 0, 5)], 1), "cpu_only.json")
        (tmp_path / "readme.txt").write_text("no trace")
        trace = read_trace(tmp_path)
        assert trace.devices == (0,)
        assert "left out: readme.txt: no JSON" in trace.notes
        said = [note for note in trace.notes if note.startswith("left out: ")]
        assert any("execution_details.json: JSON, but no Chrome trace" in note for note in said)
        assert any("cpu_only.json: no GPU events (categories: user_annotation)" in note for note in said)

    def test_none_of_the_files_is_one(self, write_trace, tmp_path):
        write_trace([1], "a.json")
        write_trace({"b": 1}, "b.json")
        with pytest.raises(ValueError, match=r"none of 2 files is a trace of GPUs: left out: a\.json"):
            read_trace(tmp_path)

    def test_a_file_that_is_cut_short_is_not_passed_over(self, rank, tmp_path):
        rank(0)
        (tmp_path / "z.json").write_bytes(rank(1).read_bytes()[:-20])
        with pytest.raises(ValueError, match=r"z\.json: .*cut short"):
            read_trace(tmp_path)

    def test_folders_in_the_folder(self, rank, tmp_path):
        rank(0, "node0/a.json")
        rank(1, "node1/a.json.gz")
        assert read_trace(tmp_path).devices == (0, 1)

    def test_nothing_to_read(self, tmp_path):
        with pytest.raises(ValueError, match="there is neither a PyTorch trace"):
            read_trace(tmp_path)
        with pytest.raises(ValueError, match="there is no file to read"):
            read_trace([])

    def test_both_kinds(self, rank, tmp_path):
        rank(0)
        (tmp_path / "host.xplane.pb").write_bytes(b"")
        (tmp_path / "host.trace.json.gz").write_bytes(gzip.compress(b'{"traceEvents": []}'))
        with pytest.raises(ValueError, match=r"of jax.profiler \(host.xplane.pb\), but there are traces of PyTorch"):
            read_trace([tmp_path, rank(1, "other/b.json")])


class TestPacking:
    @pytest.mark.parametrize("name", ["trace.json.gz", "TRACE.JSON", "trace", "trace.json", "trace.txt"])
    @pytest.mark.parametrize(
        "pack", [bytes, gzip.compress, bz2.compress, lzma.compress, lambda text: gzip.compress(gzip.compress(text))]
    )
    def test_by_content_whatever_the_name(self, tmp_path, name, pack):
        (tmp_path / name).write_bytes(pack(json.dumps(document(half_covered())).encode()))
        assert len(read_trace(tmp_path / name).events) == 2

    def test_zip(self, rank, tmp_path):
        """An archive is as the folder that was packed."""
        files = [rank(0), rank(1, "b.json.gz")]
        with zipfile.ZipFile(tmp_path / "traces.ZIP", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file, f"traces/{file.name}")
            archive.writestr("__MACOSX/traces/._b.json", b"\0")
        trace = read_trace(tmp_path / "traces.ZIP")
        assert trace.devices == (0, 1)
        assert trace.metadata["files"] == sorted(file.name for file in files)

    def test_zip_that_is_damaged(self, rank, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.write(rank(0), "a.json")
        content = (tmp_path / "a.zip").read_bytes()
        (tmp_path / "a.zip").write_bytes(content[:-30])
        with pytest.raises(ValueError, match=r"a\.zip: the archive is damaged or cut short"):
            read_trace(tmp_path / "a.zip")
        (tmp_path / "a.zip").write_bytes(content[:300] + b"?" + content[301:])
        with pytest.raises(ValueError, match=r"a\.zip/a\.json: the file is damaged or cut short"):
            read_trace(tmp_path / "a.zip")
        with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
            archive.writestr("folder/", b"")
        with pytest.raises(ValueError, match=r"empty\.zip: the archive is empty"):
            read_trace(tmp_path / "empty.zip")

    def test_zstandard(self, tmp_path, monkeypatch):
        (tmp_path / "a.json.zst").write_bytes(b"\x28\xb5\x2f\xfd" + b"\0" * 20)
        monkeypatch.setitem(sys.modules, "zstandard", None)
        monkeypatch.setitem(sys.modules, "compression.zstd", None)
        with pytest.raises(ValueError, match=r"a\.json\.zst: packed with Zstandard; `pip install zstandard`"):
            read_trace(tmp_path / "a.json.zst")

    def test_zstandard_where_there_is_a_module(self, tmp_path):
        module = next((name for name in ("compression.zstd", "zstandard") if _has(name)), None)
        if module is None:
            pytest.skip("neither Python 3.14 nor the package zstandard is here")
        text = json.dumps(document(half_covered())).encode()
        compress = importlib.import_module(module).compress
        (tmp_path / "a").write_bytes(compress(text[:99]) + compress(text[99:]))
        assert len(read_trace(tmp_path / "a").events) == 2
        (tmp_path / "a").write_bytes(compress(text)[:-9])
        with pytest.raises(ValueError, match="damaged or cut short"):
            read_trace(tmp_path / "a")

    def test_a_folder_of_archives(self, rank, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.write(rank(0), "a.json")
        shutil.copy(rank(1), tmp_path / "b")
        for file in tmp_path.glob("*.json"):
            file.unlink()
        assert read_trace(tmp_path).devices == (0, 1)


def _has(name):
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
