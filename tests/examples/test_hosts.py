"""Two processes of a run: equal to one, stopped together, and not left waiting when one dies."""

import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

import launch_local
from pretraining import hosts
from pretraining.checkpoint import Checkpoints
from pretraining.observe import METRICS, read_metrics

from tests.examples.fake_run import Fake, run

ROOT = pathlib.Path(__file__).resolve().parents[2]

pytest.importorskip("orbax.checkpoint", reason="needs the package orbax-checkpoint")
if jax.device_count() < 8:
    pytest.skip("needs 8 devices", allow_module_level=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def two(monkeypatch, cache):
    """Starts two processes with 4 devices each; returns them, and what they print."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    started = []

    def start(*script):
        output = io.StringIO()
        environments = launch_local.on_fake_devices(2, 4, os.environ)
        processes = launch_local.launch(list(map(str, script)), environments, output)
        started.extend(processes)
        return processes, output

    yield start
    for process in started:
        process.kill()
        process.wait()


def losses(out):
    return [line["loss"] for line in read_metrics(out / METRICS) if "loss" in line]


def wait_for(path, processes, output, seconds=90):
    end = time.monotonic() + seconds
    while not path.exists():
        assert all(process.poll() is None for process in processes), output.getvalue()
        assert time.monotonic() < end, output.getvalue()
        time.sleep(0.02)


def test_two_processes_equal_one(two, tmp_path):
    """Which continue what one has begun, and one can read what they have saved."""
    fake = Fake(pp=8)
    run(fake, tmp_path / "two", 3)
    processes, output = two("-m", "tests.examples.fake_run", tmp_path / "two", 6)
    assert launch_local.wait(processes) == 0, output.getvalue()
    assert "began after 3, ended after 6" in output.getvalue()
    result, _ = run(fake, tmp_path / "one", 6)
    np.testing.assert_allclose(losses(tmp_path / "two"), result.losses, rtol=1e-6)
    checkpoints = Checkpoints(tmp_path / "two" / "checkpoints", fake.layout)
    found = checkpoints.restore()
    checkpoints.close()
    assert found.step == 6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found.state, result.state)


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_when_a_process_is_killed_the_other_says_so_and_the_next_run_goes_on(two, tmp_path, killed):
    processes, output = two("-m", "tests.examples.fake_run", tmp_path, 100_000)
    wait_for(tmp_path / "checkpoints" / "2", processes, output)
    processes[killed].kill()
    start = time.monotonic()
    assert processes[1 - killed].wait(60) == 1
    print(f"process {1 - killed} ended after {time.monotonic() - start:.1f} s")
    time.sleep(0.2)
    said = f"process {1 - killed} ends, as process {killed} has ended or cannot be reached; the last whole checkpoint"
    assert re.search(rf"^\[{1 - killed}\] {said} is of step \d+$", output.getvalue(), re.MULTILINE), output.getvalue()
    # Of the first process XLA misses its own service, and may say so too.
    assert killed == 0 or "stack trace" not in output.getvalue()
    fake, steps = Fake(pp=8), max(map(int, numbered(tmp_path / "checkpoints"))) + 1
    result, start = run(fake, tmp_path, steps)
    assert start >= 2
    # What two processes began from nothing is what one does.
    expected, _ = run(fake, tmp_path / "one", steps)
    assert result.losses[-1] == pytest.approx(expected.losses[-1], rel=1e-4)


def numbered(folder):
    return [path.name for path in folder.iterdir() if path.name.isdigit()]


@pytest.mark.slow
def test_sigterm_stops_both_after_the_same_step(two, tmp_path):
    processes, output = two("-m", "tests.examples.fake_run", tmp_path, 100_000)
    wait_for(tmp_path / "checkpoints" / "2", processes, output)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    assert launch_local.wait(processes) == 0, output.getvalue()
    ended = int(re.search(r"ended after (\d+)", output.getvalue())[1])
    assert (tmp_path / "checkpoints" / str(ended)).is_dir()


def test_the_launcher_ends_what_does_not_end(two, capsys):
    script = "import sys, time; sys.exit(3) if sys.argv[-1] == '1' else time.sleep(100)"
    processes, _ = two("-c", script)
    assert launch_local.wait(processes, grace=0.5) == 3
    assert processes[0].poll() in (-signal.SIGTERM, -signal.SIGKILL)
    assert "process 0 has not ended: it is ended" in capsys.readouterr().out


def test_each_process_has_its_own_gpus():
    """What would be started, without a GPU."""
    plain = {"PATH": "/bin", "XLA_FLAGS": "--mine"}
    script, environments, grace = launch_local.parse(
        ["--gpus", "2", "--grace", "5", "--", "run.py", "--gpus", "9"], plain
    )
    assert (script, grace) == (["run.py", "--gpus", "9"], 5.0)
    assert environments == [
        plain | {"JAX_PLATFORMS": "cuda,cpu", "CUDA_VISIBLE_DEVICES": index} for index in ("0", "1")
    ]
    some = plain | {"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b,GPU-c,GPU-d", "JAX_PLATFORMS": "cuda"}
    _, environments, _ = launch_local.parse(["--gpus", "4", "--processes", "2", "run.py"], some)
    assert [found["CUDA_VISIBLE_DEVICES"] for found in environments] == ["GPU-a,GPU-b", "GPU-c,GPU-d"]
    assert {found["JAX_PLATFORMS"] for found in environments} == {"cuda"}


def test_fake_devices_are_the_default():
    _, environments, grace = launch_local.parse(["run.py"], {"CUDA_VISIBLE_DEVICES": "0"})
    assert grace == launch_local.GRACE and len(environments) == 2
    assert all("device_count=4 " in found["XLA_FLAGS"] and found["JAX_PLATFORMS"] == "cpu" for found in environments)


@pytest.mark.parametrize(
    ("arguments", "visible", "message"),
    [
        (["--gpus", "3", "--processes", "2"], None, "--gpus 3 do not divide over --processes 2"),
        (["--gpus", "2"], "0", "CUDA_VISIBLE_DEVICES=0 lets 1 be seen"),
        (["--gpus", "1"], "", "CUDA_VISIBLE_DEVICES= lets 0 be seen"),
        (["--gpus", "2", "--devices", "2"], None, "give one of them"),
        (["--gpus", "0"], None, "at least one"),
    ],
)
def test_what_cannot_be_launched(capsys, arguments, visible, message):
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    with pytest.raises(SystemExit):
        launch_local.parse([*arguments, "run.py"], environment)
    assert message in capsys.readouterr().err


def test_an_error_of_any_process_is_the_launchers(two):
    """The first to fail decides, whichever it is; a signal counts as the shell counts it."""
    for script, code in (("sys.exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)):
        processes, output = two("-c", f"import sys\nif sys.argv[-1] == '1': {script}\nimport time; time.sleep(60)")
        assert launch_local.wait(processes, grace=0.1) == code, output.getvalue()
        assert all(process.poll() is not None for process in processes)


def test_an_abort_of_the_runtime_is_an_exit_code(capfd):
    """As XLA does it, from C, where Python's own handlers would not run."""
    code = (
        "import os, sys; sys.path.insert(0, 'examples'); from pretraining import hosts; hosts.NEWS = 0; "
        "hosts._on_abort(lambda: (print('said', flush=True), os._exit(1))); os.abort()"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 1
    assert capfd.readouterr().out == "said\n"


def test_who_says_how_many_processes_there_are():
    assert hosts.detect({"OMPI_COMM_WORLD_SIZE": "4"}).count == 4
    assert hosts.detect({"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1"}).count == 1
    assert hosts.detect(os.environ, "here:1", 3, 2) == hosts.Processes(3, "here:1", 2)
    with pytest.raises(ValueError, match="--num-processes 2 without --coordinator, --process-id: give all three"):
        hosts.detect({}, None, 2)
