"""The whole program: a run that pauses, or changes mesh and schedule, equals one that does neither."""

import json
import pathlib
import runpy
import signal

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

pytest.importorskip("orbax.checkpoint", reason="needs the package orbax-checkpoint")
if jax.device_count() < 8:
    pytest.skip("needs 8 devices", allow_module_level=True)


@pytest.fixture
def pretrain():
    """The program's main function, with promotion as a user has it."""
    before = signal.getsignal(signal.SIGTERM)
    with jax.numpy_dtype_promotion("standard"):
        yield runpy.run_path(str(ROOT / "examples" / "pretrain.py"))["main"]
    signal.signal(signal.SIGTERM, before)


def losses(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [found["loss"] for found in map(json.loads, lines) if "loss" in found]


@pytest.mark.slow
def test_a_pause_changes_nothing_and_another_mesh_almost_nothing(pretrain, tmp_path, monkeypatch):
    """Rebalancing of experts after steps 5, 10 and 15 is part of what continues."""

    def run(out, steps, *flags):
        # A run of fewer steps would have other learning rates: this one is asked to stop.
        monkeypatch.setattr("pretraining.hosts.stop_signal", lambda start: lambda step: step == steps)
        common = ["--eval-every", "0", "--save-every", "100", "--rebalance-every", "5", "--warmup", "3"]
        assert pretrain(["--out", str(tmp_path / out), "--steps", "20", *common, *flags]) == 0

    run("uninterrupted", 20)
    uninterrupted = losses(tmp_path / "uninterrupted")
    run("paused", 10)
    other = ["--resume", str(tmp_path / "paused"), "--schedule", "1f1b", "--mesh", "pp=2,ep=2", "--microbatches", "8"]
    run("other", 20, *other)
    np.testing.assert_allclose(losses(tmp_path / "other"), uninterrupted[10:], rtol=1e-5)
    run("paused", 20)
    assert losses(tmp_path / "paused") == uninterrupted
