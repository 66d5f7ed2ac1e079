"""The loop of the pretraining example, on a model of a few numbers: resuming, stopping, metrics."""

import contextlib
import json
import pathlib
import signal
import sys

import jax
import numpy as np
import pytest

from tests.examples.fake_run import LAYERS, THROUGHPUT, Fake, run

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

from pretraining import flags, hosts
from pretraining.checkpoint import Checkpoints
from pretraining.loop import LoopConfig, TooManySkips, train
from pretraining.observe import METRICS, Observer, keep_until, read_metrics
from pretraining.run import set_up

from tests.cases import cases

pytest.importorskip("orbax.checkpoint", reason="needs the package orbax-checkpoint")
if jax.device_count() < 4:
    pytest.skip("needs 4 devices", allow_module_level=True)


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y) and x.dtype == y.dtype, a, b))


@pytest.fixture(scope="module")
def fake():
    return Fake()


@pytest.fixture(scope="module")
def uninterrupted(fake, tmp_path_factory):
    """A run without a pause."""
    return run(fake, tmp_path_factory.mktemp("uninterrupted"), 20, save_every=20)[0]


def test_resuming_equals_a_run_without_a_pause(fake, tmp_path, uninterrupted):
    first, _ = run(fake, tmp_path, 10)
    second, start = run(fake, tmp_path, 20)
    assert start == 10
    assert first.losses + second.losses == uninterrupted.losses
    assert equal(second.state, uninterrupted.state)


@cases(
    ("pp", "order"),
    [(2, range(LAYERS)), (4, (0, 7, 1, 6, 2, 5, 3, 4)), (1, (3, 2, 1, 0, 7, 6, 5, 4))],
    quick=[(4, (0, 7, 1, 6, 2, 5, 3, 4))],
)
def test_resuming_on_another_mesh_and_schedule(fake, tmp_path, uninterrupted, pp, order):
    run(fake, tmp_path, 10)
    second, start = run(Fake(pp, tuple(order)), tmp_path, 20)
    assert start == 10
    np.testing.assert_allclose(second.losses, uninterrupted.losses[10:], rtol=1e-5)
    weights, expected = second.state.params.stages["w"], uninterrupted.state.params.stages["w"]
    assert weights.sharding.mesh.shape["pp"] == pp
    np.testing.assert_allclose(weights, np.asarray(expected)[list(order)], rtol=1e-5, atol=1e-7)


def test_steps_without_finite_gradients_are_skipped_and_counted(fake, tmp_path):
    result, _ = run(fake, tmp_path, 10, poison=(3, 4, 6))
    assert int(result.state.skipped) == 3 and int(result.state.skipped_in_a_row) == 0
    assert np.flatnonzero(np.isnan(result.losses)).tolist() == [3, 4, 6]
    lines = read_metrics(tmp_path / METRICS)
    assert [line["step"] for line in lines if "loss" not in line] == [4, 5, 7]


def test_many_skipped_steps_in_a_row_end_the_run_and_leave_a_good_checkpoint(fake, tmp_path):
    with pytest.raises(TooManySkips, match="3 steps in a row, up to step 7, had a loss or gradients"):
        run(fake, tmp_path, 20, poison=range(4, 50))
    result, start = run(fake, tmp_path, 12)
    assert start == 5 and int(result.state.skipped) == 1
    assert np.isfinite(result.losses).all()


def test_a_run_that_is_asked_to_stop_saves_first(fake, tmp_path, uninterrupted):
    result, _ = run(fake, tmp_path, 20, save_every=100, stop=lambda step: step == 7)
    assert result.interrupted and len(result.losses) == 7
    rest, start = run(fake, tmp_path, 20)
    assert start == 7 and not rest.interrupted and equal(rest.state, uninterrupted.state)


def test_a_signal_asks_to_stop():
    before = signal.getsignal(signal.SIGTERM)
    try:
        stop = hosts.stop_signal(0)
        assert not stop(0)
        signal.raise_signal(signal.SIGTERM)
        assert stop(1)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_processes_tell_steps_from_where_the_run_began(monkeypatch):
    """A signal that comes before the first step is for the first one: jax then chooses step 1."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.multihost_utils, "reached_preemption_sync_point", lambda step: step == 1)
    stop = hosts.stop_signal(10)
    assert stop(11) and not stop(12)


class Watch:
    """A rebalancer that notes what it is asked."""

    def __init__(self):
        self.placement, self.calls = None, []

    def observe(self, loads, step, seconds):
        assert (seconds is None) == (step in (1, 4, 5, 7))
        assert loads.shape == (2, 4)
        self.calls.append(-step)

    def maybe_rebalance(self, state, step):
        self.calls.append(step)
        return state

    def metrics(self):
        return {"plan_of_step": self.calls[-1] - 1.0} if self.calls[-1] == 5 else {}

    def planning(self):
        return {"planning_seconds": 0.25} if self.calls[-1] == 3 else {}

    def described(self):
        return None

    def state_dict(self):
        return {"seen": np.int32(len(self.calls))}


def test_experts_are_rebalanced_while_steps_run_and_before_saving(fake, tmp_path):
    """Loads of a step are seen when the next one has begun, and before it where the state is saved or evaluated."""
    watch = Watch()
    checkpoints = Checkpoints(tmp_path, fake.layout)
    evaluated = []

    def evaluate(state):
        evaluated.append(int(state.step))
        return 1.0

    program = fake.program(evaluate=evaluate)
    with Observer(tmp_path / "out", 8, 0, THROUGHPUT) as observer:
        train(LoopConfig(8, 4, 3), program, fake.init(), observer, checkpoints=checkpoints, rebalancer=watch)
    assert watch.calls == [1, -1, 2, -2, -3, 3, -4, 4, 5, -5, -6, 6, 7, -7, -8, 8]
    assert evaluated == [3, 6]
    lines = {line["step"]: line for line in read_metrics(tmp_path / "out" / METRICS) if "loss" in line}
    assert [step for step, line in lines.items() if "plan_of_step" in line] == [6], "the first step with the plan"
    assert lines[6]["rebalance_seconds"] >= 0 and "rebalance_seconds" not in lines[7]
    assert [step for step, line in lines.items() if "planning_seconds" in line] == [4], "the step beside the plan"
    # After a pause for saving or evaluation, a step's time is not known.
    assert [step for step, line in lines.items() if "step_seconds" not in line] == [1, 4, 5, 7]
    restored = checkpoints.restore()
    assert restored.step == 8 and restored.facts["balance"]["seen"] == 16
    checkpoints.close()


def test_times_of_profiled_steps_are_not_those_of_training(fake, tmp_path):
    """The step before them ends only when the profile does, and their own time is the profiler's."""

    @contextlib.contextmanager
    def around(step):
        yield step in (3, 4)

    run(fake, tmp_path, 9, save_every=100, around=around)
    lines = {line["step"]: line for line in read_metrics(tmp_path / METRICS) if "loss" in line}
    for name in ("step_seconds", "tokens_per_second"):
        # The first step compiles; the others without are those and the first after an evaluation.
        assert [step for step, line in lines.items() if name not in line] == [1, 3, 4, 5], name


def test_metrics_of_steps_that_were_lost_are_dropped(tmp_path):
    lines = [{"step": step, "loss": 1.0} for step in (1, 2, 2, 3)]
    path = tmp_path / METRICS
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    keep_until(path, 2)
    assert read_metrics(path) == lines[:3]


def test_metrics_are_written_as_lines_and_events(fake, tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the package tensorboardX")
    run(fake, tmp_path, 5)
    lines = read_metrics(tmp_path / METRICS)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["mfu"] == pytest.approx(lines[-1]["tokens_per_second"] / 1e12)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"tokens_per_second" in events.read_bytes()


def test_other_processes_show_nothing(tmp_path, capsys):
    with Observer(None, 2, 0, THROUGHPUT) as observer:
        observer.note("nothing")
        observer.step(1, {"loss": 1.0})
        observer.evaluation(1, 1.0)
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_numbers_of_the_loop_are_checked():
    with pytest.raises(ValueError, match=r"'save_every': 0.*: all must be at least 1"):
        LoopConfig(10, 0)


@pytest.mark.parametrize("text", ["pp", "ep=2", "pp=4,tp=2", "pp=0", "pp=x"])
def test_wrong_meshes(text, capsys):
    with pytest.raises(SystemExit) as error:
        flags.train_parser().parse_args(["--mesh", text])
    assert error.value.code == 2 and text in capsys.readouterr().err


def test_flags_change_the_model():
    """Flags that are given replace the configuration's values, others do not."""
    changed = run_setup(["--layers", "3", "--sequence", "32", "--remat", "layer"])
    usual = run_setup([])
    assert (changed.layers, changed.sequence, changed.remat) == (3, 32, "layer")
    assert (usual.layers, usual.sequence, usual.remat, usual.vocab) == (9, 64, "none", changed.vocab)


def run_setup(given):
    """The configuration of a run on one device."""
    return set_up(flags.train_parser().parse_args(["--mesh", "pp=1,ep=1", *given])).config
