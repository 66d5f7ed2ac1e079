"""``--schedule auto``: what is chosen is printed, stored with the run, and kept by one that continues."""

import functools
import json
import pathlib
import runpy
import sys
import types

import jax
import pytest

import jaxpipe

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

from pretraining import auto, flags
from pretraining.trainer import TrainConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]

if jax.device_count() < 8:
    pytest.skip("needs 8 devices", allow_module_level=True)


class Choice:
    """Stands for what `jaxpipe.choose_pipeline` returns."""

    def __init__(self, schedule):
        self.schedule = schedule

    def __str__(self):
        return f"| {self.schedule.name} | chosen |"


def arguments(*given):
    return flags.train_parser().parse_args(["--schedule", "auto", "--mesh", "pp=2,ep=2", *given])


@pytest.fixture
def settle(monkeypatch):
    """``settle(args)``, and the calls of `jaxpipe.choose_pipeline` so far, which chooses ZB1P of 4 microbatches."""
    calls = []

    def choose_pipeline(make, batch, mesh, **options):
        calls.append((make, batch, options))
        return Choice(jaxpipe.schedule.build("zb1p", 2, options["microbatches"] or 4))

    monkeypatch.setattr(jaxpipe, "choose_pipeline", choose_pipeline)

    def run(args):
        mesh = jaxpipe.make_mesh(**args.mesh)
        auto.settle(args, mesh, lambda schedule: None, TrainConfig(1), lambda sequences: f"{sequences} sequences")
        return args

    return types.SimpleNamespace(run=run, calls=calls)


def test_a_choice_is_printed_stored_and_kept(settle, tmp_path, capsys):
    """16 sequences, as without ``auto``: 4 times 4 of two ranks; in 4 microbatches again when it continues."""
    out = tmp_path / "run"
    args = settle.run(arguments("--out", str(out)))
    assert (args.schedule, args.microbatches, args.microbatch_size) == ("zb1p", 4, 4)
    ((_, batch, options),) = settle.calls
    assert batch == "16 sequences" and options["microbatches"] is None
    assert "| zb1p | chosen |" in capsys.readouterr().out
    stored = json.loads((out / auto.FILE).read_text())
    assert stored["table"] == ["| zb1p | chosen |"] and stored["mesh"] == {"pp": 2, "ep": 2}
    for again in (["--out", str(out)], ["--out", str(tmp_path / "other"), "--resume", str(out)]):
        args = settle.run(arguments(*again, "--microbatch-size", "8"))
        assert (args.schedule, args.microbatches, args.microbatch_size) == ("zb1p", 4, 4)
    assert len(settle.calls) == 1
    settle.run(arguments("--out", str(out), "--resume", "never", "--microbatches", "8", "--microbatch-size", "2"))
    assert settle.calls[1][1:] == ("16 sequences", {**options, "microbatches": 8, "rng": settle.calls[1][2]["rng"]})


def test_a_choice_for_another_mesh_is_refused(settle, tmp_path):
    settle.run(arguments("--out", str(tmp_path)))
    with pytest.raises(ValueError, match=r"schedule.json was chosen for the mesh \{'pp': 2, 'ep': 2\}, this run has"):
        settle.run(arguments("--out", str(tmp_path), "--mesh", "pp=2,ep=1"))
    settle.run(arguments("--out", str(tmp_path / "other"), "--resume", str(tmp_path), "--mesh", "pp=2,ep=1"))
    assert len(settle.calls) == 2  # another run's choice for another mesh is none for this one


@pytest.mark.slow
def test_a_run_chooses_and_continues(tmp_path, monkeypatch, capsys):
    pytest.importorskip("orbax.checkpoint", reason="needs the package orbax-checkpoint")
    fewer = functools.partial(jaxpipe.choose_pipeline, schedules=["1f1b", "zb1p"], repeats=1)
    monkeypatch.setattr(jaxpipe, "choose_pipeline", fewer)
    main = runpy.run_path(str(ROOT / "examples" / "pretrain.py"))["main"]
    common = ["--schedule", "auto", "--mesh", "pp=2,ep=2", "--microbatches", "4", "--microbatch-size", "2"]
    common += ["--eval-every", "0", "--steps", "3", "--out", str(tmp_path)]
    with jax.numpy_dtype_promotion("standard"):
        monkeypatch.setattr("pretraining.hosts.stop_signal", lambda start: lambda step: step == 2)
        assert main(common) == 0
        before = json.loads((tmp_path / auto.FILE).read_text())
        first = capsys.readouterr()
        assert "| chosen |" in first.out and "jaxpipe.choose: measuring" in first.err
        monkeypatch.setattr("pretraining.hosts.stop_signal", lambda start: lambda step: False)
        assert main(common) == 0
    second = capsys.readouterr()
    assert "measuring" not in second.err
    assert f"with {before['schedule']} on" in first.out + first.err + second.out + second.err
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len([line for line in lines if "loss" in json.loads(line)]) == 3
