"""A profile and its report never end a run, and say what they lack."""

import contextlib
import dataclasses
import pathlib
import sys
import types

import jax
import pytest

from jaxpipe.schedule import Costs, build, simulate

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

from pretraining import profile_steps

from profiling.read.timeline import read_timeline


@pytest.fixture
def reported(monkeypatch):
    """Reports of DualPipeV's actions on 2 ranks of 2 devices each, as if they had been measured."""
    schedule = build("dualpipev", 2, 4)
    pipeline = types.SimpleNamespace(program=types.SimpleNamespace(schedule=schedule))
    ranks = {0: 0, 1: 0, 2: 1, 3: 1}
    step = read_timeline(simulate(schedule, Costs(2.0, 3.0, 1.0, 4.0, 5.0)), unit_us=10.0)
    monkeypatch.setattr(profile_steps, "pipeline_ranks", lambda mesh: ranks)
    monkeypatch.setattr(profile_steps, "attribute", lambda trace, *_: trace)
    monkeypatch.setattr(profile_steps, "group_actions", lambda trace, *_: trace)

    def make(folder, devices, phases=("F", "B", "I", "W", "FB")):
        events = [
            dataclasses.replace(event, device=device)
            for device in devices
            for event in step.events
            if event.device == ranks[device] and event.phase in phases
        ]
        trace = dataclasses.replace(step, source="xplane", events=tuple(events), ranks=ranks)
        monkeypatch.setattr(profile_steps, "read_xplane", lambda _: trace)
        return profile_steps.write_report(folder, None, pipeline, 1)

    return make


def test_all_ranks(reported, tmp_path):
    page, of = reported(tmp_path, range(4))
    assert of == "1 step" and "the trace has" not in page.read_text()
    assert "predicted makespan" in page.read_text()


@pytest.mark.parametrize(
    ("devices", "said"), [((0, 1), "rank 0 of 2"), ((2, 3), "rank 1 of 2"), ((0, 1, 2), "3 of 4 devices")]
)
def test_some_ranks_are_reported_as_such(reported, tmp_path, devices, said):
    page, of = reported(tmp_path, devices)
    assert of == f"{said} in 1 step"
    assert f"the trace has {said} alone" in page.read_text()
    assert "predicted makespan" in page.read_text()


def test_a_backward_that_ran_in_pairs_alone_has_a_prediction(reported, tmp_path):
    page, _ = reported(tmp_path, range(4), ("F", "FB"))
    assert "predicted makespan" in page.read_text()


def test_a_report_without_prediction_is_better_than_none(reported, tmp_path):
    with pytest.warns(UserWarning, match=r"no simulated step beside.*actions \['F'\]: costs need"):
        page, _ = reported(tmp_path, range(4), ("F",))
    assert "overlap ratio" in page.read_text() and "predicted makespan" not in page.read_text()


def test_no_report_is_a_warning(reported, tmp_path):
    with pytest.warns(UserWarning, match=rf"no report of the profile in {tmp_path}/none: \w+: "):
        assert reported(tmp_path / "none", range(4)) is None
    with pytest.warns(UserWarning, match=r"no report of the profile in .*: ValueError: it holds no action"):
        assert reported(tmp_path, ()) is None


@pytest.mark.parametrize("when", ["start", "stop"])
def test_a_profiler_that_fails_lets_the_steps_run(monkeypatch, tmp_path, when):
    @contextlib.contextmanager
    def broken(*_, **__):
        if when == "start":
            raise RuntimeError("another profile is running")
        yield
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profile_steps, "capture", broken)
    mesh = jax.make_mesh((1,), ("pp",), devices=jax.devices()[:1])
    around = profile_steps.profiler(tmp_path, mesh, 5, 2)
    ran = []
    with pytest.warns(UserWarning, match="no profile: .*(is running|No space)") as found:
        for step in range(5, 11):
            with around(step):
                ran.append(step)
    assert ran == [*range(5, 11)] and len(found) == 1


def test_an_error_of_a_step_is_none_of_the_profiler(monkeypatch, tmp_path):
    monkeypatch.setattr(profile_steps, "capture", lambda *_, **__: contextlib.nullcontext())
    mesh = jax.make_mesh((1,), ("pp",), devices=jax.devices()[:1])
    around = profile_steps.profiler(tmp_path, mesh, 0, 2)
    with pytest.raises(FloatingPointError), around(profile_steps.SETTLED):
        raise FloatingPointError
