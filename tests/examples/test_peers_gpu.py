"""The comparison with PyTorch's and DeepSeek's pipelines: its numbers, its processes, and a run of small sizes."""

import argparse
import doctest
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))

import peers_gpu
import peers_model
from chunks import dense_chunk

SCRIPT = peers_gpu.__file__

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")


def test_numbers_are_the_same_in_numpy_and_jax():
    places, seed = np.arange(10000, dtype=np.uint32), np.uint32(peers_model.seed(3, "up"))
    found = peers_model.numbers(places, seed, 2.0)
    np.testing.assert_array_equal(peers_model.numbers(jnp.asarray(places), jnp.asarray(seed), 2.0), found)
    assert found.dtype == np.float32 and found.min() >= -2 and found.max() < 2
    assert abs(found.mean()) < 0.05 and found.std() == pytest.approx(2 / 3**0.5, rel=0.02)
    other = peers_model.numbers(places, np.uint32(peers_model.seed(4, "up")), 2.0)
    assert abs(np.corrcoef(found, other)[0, 1]) < 0.05
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.05


@needs_torch
def test_numbers_are_the_same_in_torch():
    peers_torch = importlib.import_module("peers_torch")
    found = peers_torch.numbers("up", 3, (100, 50), 0.25, "cpu").numpy()
    places = np.arange(5000, dtype=np.uint32).reshape(100, 50)
    np.testing.assert_array_equal(found, peers_model.numbers(places, np.uint32(peers_model.seed(3, "up")), 0.25))


def test_the_model_is_that_of_the_other_benchmarks():
    shapes = jax.eval_shape(dense_chunk(1, 256, 64).init, jax.random.key(0))
    assert {name: leaf.shape[1:] for name, leaf in shapes.items()} == peers_model.shapes(256)
    values = dense_chunk(1, 256, 64).init(jax.random.key(0))
    for name, (inputs, _) in peers_model.shapes(256).items():
        assert peers_model.spread(inputs) / 3**0.5 == pytest.approx(float(values[name].std()), rel=0.02)


def workers(*programs):
    """Starts programs, each Python code that may read the jobs that are left."""

    def start(jobs):
        codes = ["import json, os, sys, time\n" + code for code in programs]
        return peers_gpu.Workers.start(
            ([sys.executable, "-c", code, json.dumps(jobs)], dict(os.environ)) for code in codes
        )

    return start


ANSWER = """
for index, (side, name, count) in enumerate(json.loads(sys.argv[1])):
    print(json.dumps({"job": index}), flush=True)
    if name == "dies":
        os._exit(3)
    if name == "fails":
        print(json.dumps({"job": index, "error": "ValueError: no"}), flush=True)
        os._exit(1)
    if name == "hangs":
        time.sleep(60)
    print("noise", flush=True)
    print(json.dumps({"job": index, "row": {"step": count}}), flush=True)
"""


def test_processes_that_die_fail_or_hang_cost_one_row_each(capsys):
    names = ["a", "dies", "b", "fails", "hangs", "c"]
    jobs = [("torch", name, count) for count, name in enumerate(names)]
    found = list(peers_gpu.answers(workers(ANSWER, "print('also here')"), jobs, patience=2))
    assert [job for job, _ in found] == jobs
    assert [row for _, row in found] == [
        {"step": 0}, "process 0 ended with 3", {"step": 2}, "ValueError: no", "said nothing for 2 s", {"step": 5},
    ]  # fmt: skip
    assert "also here" in capsys.readouterr().err
    assert list(peers_gpu.answers(workers("sys.exit(1)"), jobs[:1], 2)) == [(jobs[0], "did not start")]


def test_ratios_are_of_the_same_schedule_and_of_the_best():
    speeds = {
        ("ours", "dualpipe", 8): 6.0, ("ours", "zbv", 8): 8.0, ("deepseek", "DualPipe", 8): 5.0,
        ("torch", "ScheduleZBVZeroBubble", 8): 4.0, ("torch", "Schedule1F1B", 8): 2.0, ("ours", "dualpipe", 16): 1.0,
    }  # fmt: skip
    assert peers_gpu.ratios(speeds, "float32") == {"dualpipe_over_deepseek_fp32_8": 1.2, "best_over_torch_8": 2.0}
    assert set(peers_gpu.ratios(speeds, "bfloat16")) == {"dualpipe_over_deepseek_bf16_8", "best_over_torch_bf16_8"}


def test_what_is_missing_is_said(monkeypatch):
    args = argparse.Namespace(dualpipe="")
    assert peers_gpu.missing("ours", args) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert peers_gpu.missing("torch", args) == "PyTorch is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name == "torch" else None)
    expected = "name a checkout of github.com/deepseek-ai/DualPipe with --dualpipe FOLDER"
    assert expected in peers_gpu.missing("deepseek", args)


@pytest.mark.slow
@pytest.mark.parametrize("sides", ["ours", pytest.param("torch", marks=needs_torch)])
def test_small_sizes_run(sides):
    """All of a side, with the same losses and gradients; where PyTorch is, on two processes of the CPU."""
    options = f"--tiny --microbatches 4 --repeats 1 --sides {sides} --patience 100".split()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, SCRIPT, *options], env=environment, text=True,
                          capture_output=True, check=True)  # fmt: skip
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len({"ours": peers_gpu.OURS, "torch": peers_gpu.TORCH}[sides])
    for row in rows:
        assert float(row[7]) == pytest.approx(1.1053, rel=1e-3), row
        assert float(row[8].rstrip(" |")) == pytest.approx(0.2923, rel=1e-3), row


@pytest.mark.parametrize("module", [peers_model, peers_gpu])
def test_examples_of_docstrings(module):
    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(module).attempted > 0
