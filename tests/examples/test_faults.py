"""What a run does when it is killed, when the disk is full, and when it is asked for what cannot be."""

import ctypes
import os
import pathlib
import random
import re
import runpy
import signal
import subprocess
import sys
import time

import jax
import pytest

from tests.examples.fake_run import Fake, run

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 400
WRITING = ".orbax-checkpoint-tmp"
LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
os.execv(sys.argv[1], sys.argv[1:])
"""


pytest.importorskip("orbax.checkpoint", reason="needs the package orbax-checkpoint")


def start(*command, cache):
    """A Python program of this repository, on 4 fake devices."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for compiled programs: what runs in it later starts sooner."""
    return tmp_path_factory.mktemp("cache")


def steps_of(out, ending=""):
    """Steps of which there is a checkpoint, or one whose name ends so."""
    pattern = re.compile(rf"(\d+){re.escape(ending)}")
    names = [path.name for path in (out / "checkpoints").glob("[0-9]*")]
    return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))


def wait_for(out, step, process, endings=("",), seconds=100):
    """Returns when there is a checkpoint of that step or a later one."""
    end = time.monotonic() + seconds
    while not any(found >= step for ending in endings for found in steps_of(out, ending)):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"no step {step}, there are {steps_of(out)}: {process.communicate()}")
        time.sleep(0.005)


def kill_again_and_again(tmp_path, cache, kills):
    """Kills a run that saves after every step; returns how often a write was under way, and where it went on."""
    rng = random.Random(0)
    out = tmp_path / "out"
    during, steps = 0, [0]
    for _ in range(kills):
        process = start("-m", "tests.examples.fake_run", out, STEPS, cache=cache)
        last = max(steps_of(out), default=0)
        assert last >= steps[-1], "a whole checkpoint was lost"
        steps.append(last)
        # Half of them while a checkpoint is being written, which its name tells.
        endings = ("", WRITING) if rng.random() < 0.5 else ("",)
        wait_for(out, last + 1 + rng.randrange(10), process, endings)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.communicate()
        during += bool(steps_of(out, WRITING))
    process = start("-m", "tests.examples.fake_run", out, steps[-1] + 30, cache=cache)
    printed, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert "damaged" not in errors
    begin = int(re.search(r"began after (\d+), ended after (\d+)", printed)[1])
    assert begin >= steps[-1] > 0
    return during, [*steps[1:], begin]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 20])
def test_killed_at_any_moment_a_run_continues(tmp_path, cache, kills):
    during, steps = kill_again_and_again(tmp_path, cache, kills)
    print(f"{kills} kills, {during} during a checkpoint's write: every restart found one; steps {steps}")
    assert len(steps) == kills + 1 and steps == sorted(steps)
    assert during >= kills // 5


def test_sigterm_saves_and_ends_well(tmp_path, cache):
    process = start("-m", "tests.examples.fake_run", tmp_path, 100_000, cache=cache)
    wait_for(tmp_path, 2, process)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    ended = int(re.search(r"ended after (\d+)", printed)[1])
    assert (tmp_path / "checkpoints" / str(ended)).is_dir()
    assert f"asked to stop: saved after step {ended} of 100000" in printed


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 KB."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder = tmp_path / "disk"
    folder.mkdir()
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=600k"):
        pytest.skip(f"cannot mount a tmpfs: {os.strerror(ctypes.get_errno())}")
    yield folder
    libc.umount2(str(folder).encode(), 2)


def test_a_full_disk_ends_the_run_and_leaves_a_good_checkpoint(small_disk, cache):
    (small_disk / "ballast").write_bytes(bytes(200_000))
    fake = Fake()
    run(fake, small_disk / "out", 3, save_every=1)
    with (small_disk / "more").open("wb") as file, pytest.raises(OSError, match="No space"):
        while True:
            os.write(file.fileno(), bytes(512))
    process = start("-m", "tests.examples.fake_run", small_disk / "out", 50, cache=cache)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "No space left" in errors, errors
    (small_disk / "ballast").unlink()
    (small_disk / "more").unlink()
    result, began = run(fake, small_disk / "out", 6, save_every=1)
    assert 3 <= began <= 5 and int(result.state.step) == 6


def test_a_file_that_may_not_grow_ends_the_run(tmp_path, cache):
    """The limit of a file's size stands in for a quota."""
    command = [sys.executable, "-m", "tests.examples.fake_run", str(tmp_path), "3"]
    # The compilation cache is read only: its files may not grow either.
    process = start("-c", LIMITED, *command, cache=cache)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "File too large" in errors, errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/nowhere/*.txt"], r"no files match /nowhere/\*.txt: check the path"),
        (["--mesh", "pp=4,ep=4"], r"a mesh of .* needs 16 devices and there are 8"),
        (["--config", "tinier"], r"no model 'tinier': known are tiny, "),
        (["--layers", "0"], r"dense_layers=1 of layers=0"),
        (["--schedule", "fastest"], r"fastest"),
        (["--microbatch-size", "3"], r"--microbatch-size 3 does not divide over the 2 devices"),
        (["--save-every", "0"], r"'save_every': 0.*: all must be at least 1"),
        (["--coordinator", "localhost:1"], r"without --num-processes, --process-id: give all three"),
        (["--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "2"], r"the id is below the number"),
    ],
)
def test_bad_input_ends_with_2(tmp_path, capsys, arguments, message):
    if jax.device_count() != 8:
        pytest.skip("messages name 8 devices")
    main = runpy.run_path(str(ROOT / "examples" / "pretrain.py"))["main"]
    assert main(["--out", str(tmp_path), *arguments]) == 2
    assert re.search(f"^pretrain.py: .*{message}", capsys.readouterr().err, re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_the_exit_code_is_that_of_the_error(tmp_path, cache):
    process = start(
        "examples/pretrain.py", "--data", "/nowhere/*", "--out", tmp_path, "--mesh", "pp=2,ep=2", cache=cache
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in errors, errors
    assert re.search(r"^pretrain.py: no files match /nowhere/\*", errors, re.MULTILINE)
