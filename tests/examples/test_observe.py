"""What a run shows and writes never ends it, and needs no package that only some parts of a run need."""

import importlib
import json
import pathlib
import resource
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

from pretraining import observe
from pretraining.export import export_run
from pretraining.observe import METRICS, Observer, Throughput, read_metrics
from pretraining.optional import MissingPackage

THROUGHPUT = Throughput(tokens=8, flops=1.0, peak=1e12)


@pytest.fixture
def absent(monkeypatch):
    """Makes packages absent."""

    def hide(*packages):
        find = importlib.import_module

        def without(name, package=None):
            if name.split(".")[0] in packages:
                raise ModuleNotFoundError(f"No module named {name!r}")
            return find(name, package)

        monkeypatch.setattr(importlib, "import_module", without)

    return hide


def steps(observer, first, last):
    for step in range(first, last + 1):
        observer.step(step, {"loss": 1.0 / step})


def test_metrics_need_no_other_package(absent, tmp_path, capsys):
    absent("tensorboardX", "rich")
    with Observer(tmp_path, 12, 0, THROUGHPUT) as observer:
        steps(observer, 1, 12)
        observer.evaluation(12, 0.5)
    lines = read_metrics(tmp_path / METRICS)
    assert [line["step"] for line in lines] == [*range(1, 13), 12]
    assert lines[-1]["held_out_loss"] == 0.5
    assert not (tmp_path / "tensorboard").exists()
    shown = capsys.readouterr().out
    assert "no TensorBoard events: TensorBoard's events need the package tensorboardX: pip install" in shown
    assert [line.split("  ")[0] for line in shown.splitlines()[1:]] == [
        "step 1/12", "step 10/12", "step 12/12", "step 12/12",
    ]  # fmt: skip


def test_what_needs_a_missing_package_says_so(absent, tmp_path):
    absent("safetensors")
    with pytest.raises(MissingPackage, match=r"exports need the package safetensors: pip install"):
        export_run(tmp_path, tmp_path / "a.safetensors")
    checkpoint = importlib.import_module("pretraining.checkpoint")
    absent("orbax")
    with pytest.raises(MissingPackage, match=r"checkpoints need the package orbax-checkpoint"):
        checkpoint.Checkpoints(tmp_path, None)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_for_a_while(absent, tmp_path, recwarn):
    """The limit of a file's size stands in for a full disk: half a line is written, then nothing."""
    absent("tensorboardX", "rich")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Observer(tmp_path, 9, 0, THROUGHPUT) as observer:
        steps(observer, 1, 3)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / METRICS).stat().st_size + 9, before[1]))
            with pytest.warns(UserWarning, match=r"no metrics in .*metrics.jsonl: .* the run goes on") as found:
                steps(observer, 4, 6)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert len(found) == 1
        with pytest.warns(UserWarning, match=r"can be written again; 3 lines are missing"):
            steps(observer, 7, 9)
    assert [line["step"] for line in read_metrics(tmp_path / METRICS)] == [1, 2, 3, 7, 8, 9]


def test_tensorboard_ends_no_run(tmp_path, monkeypatch):
    writer = pytest.importorskip("tensorboardX.event_file_writer", reason="needs the package tensorboardX").EventsWriter

    def full(*_):
        raise OSError(28, "No space left on device")

    with Observer(tmp_path, 3, 0, THROUGHPUT) as observer:
        monkeypatch.setattr(writer, "write_event", full)
        with pytest.warns(
            UserWarning, match=r"no more TensorBoard events: OSError: .*No space left.* goes on"
        ) as found:
            steps(observer, 1, 3)
    assert len(found) == 1
    assert [line["step"] for line in read_metrics(tmp_path / METRICS)] == [1, 2, 3]


def test_an_output_that_is_closed_ends_no_run(absent, tmp_path, monkeypatch):
    absent("tensorboardX", "rich")

    def closed(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    with Observer(tmp_path, 3, 0, THROUGHPUT) as observer:
        monkeypatch.setattr("builtins.print", closed)
        with pytest.warns(UserWarning, match="nothing more is shown: BrokenPipeError") as found:
            steps(observer, 1, 3)
    assert len(found) == 1 and len(read_metrics(tmp_path / METRICS)) == 3


def test_a_folder_that_cannot_be_written_is_an_error_before_the_run(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OSError), Observer(tmp_path / "out", 3, 0, THROUGHPUT):
        pass


def test_lines_are_whole(tmp_path):
    path = tmp_path / METRICS
    lines = observe.JsonLines(path)
    lines.write({"step": 1})
    assert json.loads(path.read_text()) == {"step": 1}
    lines.close()
