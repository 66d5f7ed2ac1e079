"""A captured pipeline step: every operation finds its device, action, layer and microbatch."""

import collections

import jax
import jax.numpy as jnp
import pytest

import jaxpipe
from jaxpipe.runtime.unrolled import find_repeat
from jaxpipe.schedule import build, simulate
from profiling.event import Event, Trace
from profiling.metrics import measure
from profiling.read.pipeline import attribute, group_actions, measured_costs, pipeline_ranks
from profiling.read.scopes import action_of
from profiling.read.timeline import read_timeline
from profiling.read.xplane import read_xplane
from profiling.recording import capture
from profiling.reports.making import report

RANKS, MICROBATCHES, WIDTH, STEPS = 4, 8, 64, 2


def stage(params, x, ctx):
    for i in range(2):
        with jax.named_scope(f"layer_{i}"), jax.named_scope("mlp"):
            x = x + jnp.tanh(x @ params["up"][i]) @ params["down"][i]
    return x


def head(outer, y, data, ctx):
    return jnp.mean((y - data) ** 2)


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """A DualPipeV step on 4 ranks x 2 data-parallel devices, captured twice."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    return capture_steps(tmp_path_factory.mktemp("profile"), RANKS, 2)


def capture_steps(folder, num_ranks, dp, name="dualpipev", **options):
    mesh, schedule = jaxpipe.make_mesh(pp=num_ranks, dp=dp), build(name, num_ranks, MICROBATCHES)
    keys = jax.random.split(jax.random.key(0), 2)
    stages = {
        "up": jax.random.normal(keys[0], (schedule.num_stages, 2, WIDTH, 2 * WIDTH)) * 0.1,
        "down": jax.random.normal(keys[1], (schedule.num_stages, 2, 2 * WIDTH, WIDTH)) * 0.1,
    }
    pipeline = jaxpipe.value_and_grad(stage, schedule, mesh, head=head, data_axes=("dp",), **options)
    step, params = jax.jit(pipeline), jaxpipe.Params(stages)
    batch = jnp.ones((MICROBATCHES * dp * 16, WIDTH))
    jax.block_until_ready(step(params, batch))
    ranks = pipeline_ranks(mesh)
    with capture(folder, ranks=ranks):
        for _ in range(STEPS):
            jax.block_until_ready(step(params, batch))
    return read_xplane(folder), pipeline.program, schedule, ranks


def test_every_operation_is_attributed(captured):
    trace, _, _, ranks = captured
    assert trace.devices == tuple(range(8)) and trace.ranks == ranks and sorted(set(ranks.values())) == [0, 1, 2, 3]
    assert not [note for note in trace.notes if "no end" in note]  # asynchronous operations found theirs
    found = measure(trace)
    assert found.unattributed_share < 0.02 and found.unclassified_share < 0.02
    computed = [event for event in trace.events if event.phase.startswith("mlp(")]
    assert {action_of(event.phase) for event in computed} >= {"F", "B", "I", "W"}
    assert {event.layer for event in computed} == {0, 1}
    in_layers = sum(event.duration for event in computed)
    stray = sum(
        event.duration
        for event in trace.events
        if event.layer is None
        and event.phase in ("F", "B", "I", "W")
        and not {"read", "write"} & set(event.scope.split("/"))
    )
    assert stray < 0.02 * in_layers


def test_microbatches_are_the_schedules(captured):
    check_microbatches(*captured)


def test_one_rank_runs_unrolled_code(tmp_path):
    """Some of its steps have operations of their own, others come round in a loop."""
    trace, program, schedule, ranks = capture_steps(tmp_path, 1, 1)
    repeat = find_repeat(program)
    assert repeat.times > 1 and repeat.period * repeat.times < program.num_steps
    check_microbatches(trace, program, schedule, ranks)


def test_two_mirrored_ranks_run_unrolled_code(tmp_path):
    check_microbatches(*capture_steps(tmp_path, 2, 1, "dualpipe", dispatch="unrolled"))


@pytest.mark.parametrize("dispatch", ["stretches", "by_rank"])
def test_pieces_of_code_have_operations_of_their_own(tmp_path, dispatch):
    check_microbatches(*capture_steps(tmp_path, 2, 1, dispatch=dispatch))


def check_microbatches(trace, program, schedule, ranks):
    actions = group_actions(trace, program, ranks, STEPS)
    seen = collections.defaultdict(list)
    for event in actions.events:
        if set(event.phase) <= set("FBIW"):
            seen[event.device].append((event.phase, event.microbatch))
    for device, rank in ranks.items():
        expected = [
            ("".join(action.kind.value for action in group), group[0].microbatch) for group in schedule.ranks[rank]
        ]
        # A step's end and the next one's start may interleave on a CPU: compare what ran, not when.
        assert collections.Counter(seen[device]) == collections.Counter(expected * STEPS)


def test_events_of_actions_have_microbatches(captured):
    trace, program, _, ranks = captured
    placed = attribute(trace, program, ranks, STEPS)
    assert {event.microbatch for event in placed.events if event.phase == "mlp(F)"} == set(range(MICROBATCHES))
    computed = [event for event in placed.events if event.phase in {f"mlp({action})" for action in "FBIW"}]
    without = sum(event.duration for event in computed if event.microbatch is None)
    assert without < 0.05 * sum(event.duration for event in computed)


def test_bubbles_stand_beside_the_simulated_ones(captured):
    trace, program, schedule, ranks = captured
    actions = group_actions(trace, program, ranks, STEPS)
    predicted = read_timeline(simulate(schedule, measured_costs(actions)))
    text = report(actions, predicted).text()
    assert "Bubble per rank" in text and "simulated" in text
    print(text.split("Bubble per rank")[1].split("\n\n")[0])


def test_another_program_or_number_of_steps_is_refused(captured):
    trace, program, _, ranks = captured
    with pytest.raises(ValueError, match="whole number of times"):
        attribute(trace, program, ranks, steps=3)
    with pytest.raises(ValueError, match="not 'stage'"):
        pipeline_ranks(jaxpipe.make_mesh(pp=RANKS), "stage")


def test_costs_of_what_did_not_run():
    def action(phase, duration):
        return Event(0, "compute", 0.0, duration, phase, phase=phase)

    costs = measured_costs(
        Trace("", "xplane", (action("F", 2.0), action("F", 4.0), action("F", 3.0), action("B", 8.0)))
    )
    assert (costs.forward, costs.backward, costs.backward_input, costs.weight) == (3, 8, 4, 4)
    assert costs.overlapped is None
    with pytest.raises(ValueError, match="costs need F"):
        measured_costs(Trace("", "xplane", (action("I", 1.0), action("W", 1.0))))
