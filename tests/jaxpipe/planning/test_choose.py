"""What is measured is the stage's own work, and what is chosen is the fastest schedule that fits."""

import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxpipe
import jaxpipe.flax
from jaxpipe.planning import comparing, measuring
from jaxpipe.planning.candidates import between, lockstep_seconds, on_schedule
from jaxpipe.planning.measuring import Stopwatch, measure_costs
from jaxpipe.runtime.pack import pack
from jaxpipe.schedule import Costs, StageCosts, build, simulate
from tests.jaxpipe.runtime.models import token_batch, token_embed, token_head, token_params, token_stage, token_weight

WIDTH = 8


def stage(params, x, ctx):
    """Any number of layers."""
    for w in params:
        x = jnp.tanh(x @ w)
    return x


def head(outer, y, data, ctx):
    return (y**2).mean()


def params_of(schedule):
    """Eight layers, in stages."""
    return jaxpipe.Params(jnp.full((schedule.num_stages, 8 // schedule.num_stages, WIDTH, WIDTH), 0.1))


def choose(monkeypatch, costs_of, params=params_of, *, mesh=None, rows=32, **options):
    """A choice where ``costs_of(stages, microbatches)`` stands for measurements; and what was measured."""
    asked = []

    def measured(pipeline, params, batch, rng, step_inputs, *, num_microbatches, repeats):
        stages = pipeline.program.schedule.num_stages
        asked.append((stages, num_microbatches))
        return costs_of(stages, num_microbatches)

    monkeypatch.setattr(comparing, "measure_costs", measured)
    mesh = jaxpipe.make_mesh(pp=2) if mesh is None else mesh
    batch = jnp.ones((rows, WIDTH))
    return jaxpipe.choose(stage, params, batch, mesh, head=head, progress=False, **options), asked


def alike(stages, count, *, pair=1.0, p2p=0.0):
    """Costs of a model of 1 s forward, 1 s of each half backward, over stages and microbatches; pairs take a share."""
    one = 1 / stages / count
    return StageCosts((Costs(one, one, one, overlapped=3 * one * pair),) * stages, p2p)


def test_every_action_is_measured_with_the_work_that_it_has():
    """Two layers of square products, by the FLOPs that XLA counts in each program."""
    schedule, width, rows = build("zbv", 2, 4), 64, 32
    step = jaxpipe.value_and_grad(stage, schedule, jaxpipe.make_mesh(pp=2), head=head, dispatch="loops")
    params = jaxpipe.Params(jnp.ones((4, 2, width, width)))
    watch = Stopwatch(step, params, jnp.ones((4 * rows, width)), None, None, 4)
    product = 2 * rows * width * width
    with ThreadPoolExecutor(1) as pool:
        programs = {name: program.result() for (name, _), (program, _) in watch.programs(pool).items()}
    flops = {name: program.cost_analysis().get("flops", 0) for name, program in programs.items()}
    found = {name: round(count / product) for name, count in flops.items()}
    assert {name: found[name] for name in ("F", "I", "W", "B", "F&B")} == {"F": 2, "I": 2, "W": 2, "B": 4, "F&B": 6}
    assert sorted(found) == ["B", "F", "F&B", "I", "W", "head", "message"]


def test_what_the_compiler_shards_stays_so():
    """Megatron's specs over an axis of the compiler: no program gathers what another has made."""
    specs = jaxpipe.Params({"up": P("pp", None, "tp"), "down": P("pp", "tp")}, P())
    step = jaxpipe.value_and_grad(
        lambda params, x, ctx: jnp.tanh(x @ params["up"]) @ params["down"],
        build("1f1b", 2, 2), jaxpipe.make_mesh(pp=2, tp=2), head=head, specs=specs,
    )  # fmt: skip
    params = jaxpipe.Params({"up": jnp.ones((2, 16, 64)), "down": jnp.ones((2, 64, 16))})
    watch = Stopwatch(step, params, jnp.ones((16, 16)), None, None, 2)
    with ThreadPoolExecutor(1) as pool:
        programs = watch.programs(pool)
        texts = {name: program.result().as_text() for (name, _), (program, _) in programs.items()}
    assert all("all-gather" not in text for text in texts.values())
    assert "all-reduce" in texts["F"] and "all-reduce" in texts["I"]
    assert watch.measure(1).stages[0].weight > 0


@pytest.mark.parametrize(
    "mesh, options",
    [
        ({"pp": 2, "dp": 2}, {"data_axes": ("dp",), "fsdp_axis": "dp", "min_shard_size": 0}),
        pytest.param({"pp": 2}, {"shared_ends": True}, marks=pytest.mark.slow),
        pytest.param({"pp": 2, "tp": 2}, {"dispatch": "loops"}, marks=pytest.mark.slow),
        pytest.param({"pp": 2, "dp": 2}, {"data_axes": ("dp",), "zero1_axis": "dp"}, marks=pytest.mark.slow),
    ],
)
def test_pipelines_of_all_sorts_are_measured(mesh, options):
    """Integers between stages, dropout, auxiliary losses, metrics, weights; parameters given as shapes too."""
    schedule = build("zbv", 2, 4)
    step = jaxpipe.value_and_grad(
        token_stage, schedule, jaxpipe.make_mesh(**mesh), embed=token_embed, head=token_head, weight=token_weight,
        **options,
    )  # fmt: skip
    params, batch = token_params(schedule), token_batch(16)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    found = measure_costs(step, shapes, batch, jax.random.key(0), repeats=1)
    assert len(found.stages) == 4 and len(set(found.stages)) == 1
    times = (*dataclasses.astuple(found.stages[0])[:4], found.p2p, found.embed, found.embed_grad, found.head)
    assert min(times) > 0
    assert (found.stages[0].overlapped is None) == (step.dispatch == "sequential")


def test_kinds_of_stages_are_measured_apart():
    def long(w, x, ctx):
        for _ in range(30):
            x = jnp.tanh(x @ w) * ctx.step_inputs
        return x

    kinds = jaxpipe.StageKinds([lambda w, x, ctx: x + w[0], long], [0, 1])
    schedule = build("1f1b", 2, 2)
    step = jaxpipe.value_and_grad(kinds, schedule, jaxpipe.make_mesh(pp=2), head=head)
    params, batch = jaxpipe.Params(jnp.ones((2, 256, 256))), jnp.ones((256, 256))
    short, far = measure_costs(step, params, batch, step_inputs=jnp.float32(0.5), repeats=3).stages
    assert far.forward > short.forward and far.of(jaxpipe.schedule.Kind.B) > short.of(jaxpipe.schedule.Kind.B)


def test_what_cannot_be_measured_is_refused():
    schedule, params = build("1f1b", 2, 2), jaxpipe.Params(jnp.ones((2, 2, WIDTH, WIDTH)))
    mesh = jaxpipe.make_mesh(pp=2)
    abstract = jaxpipe.value_and_grad(stage, schedule, mesh.abstract_mesh, head=head)
    with pytest.raises(ValueError, match="a mesh without devices"):
        measure_costs(abstract, params, jnp.ones((4, WIDTH)))
    with pytest.raises(ValueError, match="no gradients to measure"):
        measure_costs(jaxpipe.forward(stage, schedule, mesh), params, jnp.ones((4, WIDTH)))
    step = jaxpipe.value_and_grad(stage, schedule, mesh, head=head)
    with pytest.raises(ValueError, match="a batch of 5 does not divide into 2 microbatches"):
        measure_costs(step, params, jnp.ones((5, WIDTH)))


def test_the_fastest_by_the_costs_is_chosen(monkeypatch):
    """Without pairs that gain ZB-V has the smallest bubble; with them DualPipe, the second copy of which fits."""
    mesh = jaxpipe.make_mesh(pp=4)
    plain, _ = choose(monkeypatch, alike, mesh=mesh, microbatches=8)
    paired, _ = choose(monkeypatch, lambda *sizes: alike(*sizes, pair=0.7), mesh=mesh, microbatches=8)
    assert plain.schedule.name == "zbv" and paired.schedule.name == "dualpipe"
    for choice in (plain, paired):
        names = [row.name for row in choice.rows]
        assert sorted(names) == sorted(jaxpipe.schedule.BUILDERS)
        seconds = [row.seconds for row in choice.rows]
        assert seconds == sorted(seconds) and choice.rows[0].reason == ""
        assert all(re.fullmatch(r"[\d.]+% slower|as fast, and stashes more", row.reason) for row in choice.rows[1:])
        assert all(row.memory is not None for row in choice.rows)
        assert choice.bound <= choice.seconds
    row = next(row for row in plain.rows if row.name == "1f1b")
    assert row.simulated == pytest.approx(simulate(build("1f1b", 4, 8), alike(4, 8)).makespan)


def test_the_chosen_pipeline_runs(monkeypatch, x64):
    """It gives the loss and gradients of `jaxpipe.value_and_grad` with the same schedule."""
    choice, _ = choose(monkeypatch, alike, schedules=["zbv", "1f1b"], microbatches=4)
    params, batch = params_of(choice.schedule), jnp.linspace(0, 1, 32 * WIDTH).reshape(32, WIDTH)
    (loss, _), grads = jax.jit(choice.pipeline)(params, batch)
    step = jaxpipe.value_and_grad(stage, choice.schedule, jaxpipe.make_mesh(pp=2), head=head, costs=choice.costs)
    (expected, _), others = jax.jit(step)(params, batch)
    assert loss == expected
    np.testing.assert_array_equal(grads.stages, others.stages)


def test_messages_count(monkeypatch):
    """Where messages cost as much as microbatches, few large ones win; where nothing does, many small ones do."""
    costly, _ = choose(monkeypatch, lambda *sizes: alike(*sizes, p2p=0.3), schedules=["1f1b"])
    free, asked = choose(monkeypatch, alike, schedules=["1f1b"])
    assert costly.schedule.num_microbatches < free.schedule.num_microbatches == 32
    assert asked == [(2, 32), (2, 2), (2, 8)]
    assert {row.num_microbatches for row in free.rows} == {2, 4, 8, 16, 32}


def test_microbatches_too_large_to_be_measured_are_left_out(monkeypatch):
    """Memory runs out for halves of the batch, and for quarters."""

    def costs(stages, count):
        if count < 8:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return alike(stages, count)

    choice, asked = choose(monkeypatch, costs, schedules=["1f1b"])
    assert [count for _, count in asked] == [32, 2, 32, 4, 32, 8, 16]
    reasons = {row.num_microbatches: row.reason for row in choice.rows}
    assert reasons[4] == "one of 4 microbatches is too large for a device"
    assert choice.schedule.num_microbatches == 32 and len(reasons) == 5
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        choose(monkeypatch, costs, schedules=["1f1b"], microbatches=4)


def test_memory_decides(monkeypatch):
    """DualPipe is the fastest and holds two copies: with memory for one, another is chosen."""
    given = dict(schedules=["1f1b", "dualpipe", "zb1p"], microbatches=8)
    pairs = lambda *sizes: alike(*sizes, pair=0.7)  # noqa: E731
    free, _ = choose(monkeypatch, pairs, **given)
    memory = {row.name: row.memory.total for row in free.rows}
    budget = memory["dualpipe"] - 1
    tight, _ = choose(monkeypatch, pairs, **given, memory=budget)
    assert tight.schedule.name != "dualpipe" and tight.memory.total <= budget
    reasons = {row.name: row.reason for row in tight.rows}
    assert reasons["dualpipe"].startswith("needs ")
    least = min(memory.values())
    with pytest.raises(ValueError, match=rf"no schedule fits.*microbatches, {least / 1e9:.4g} GB; allow as much"):
        choose(monkeypatch, pairs, **given, memory=least - 1)
    fits, _ = choose(monkeypatch, pairs, **given, memory=least)
    assert fits.memory.total == least


def test_an_optimizer_counts_as_memory(monkeypatch):
    class Adam:
        @staticmethod
        def init(params):
            return params, params

    plain, _ = choose(monkeypatch, alike, schedules=["1f1b"], microbatches=2)
    adam, _ = choose(monkeypatch, alike, schedules=["1f1b"], microbatches=2, optimizer=Adam)
    assert adam.memory.total - plain.memory.total == 2 * 4 * WIDTH * WIDTH * 4  # a rank's 4 layers, two moments


def test_the_search_finds_more_than_the_builders(monkeypatch):
    """Stages whose weight gradients are short: no builder was made for them."""

    def costs(stages, count):
        return StageCosts((Costs(0.1, 0.13, 0.07),) * stages)

    mesh = jaxpipe.make_mesh(pp=4)
    builders, _ = choose(monkeypatch, costs, mesh=mesh, schedules=["dualpipe"], microbatches=8)
    searched, _ = choose(monkeypatch, costs, mesh=mesh, schedules=["dualpipe"], microbatches=8, moves=500)
    assert searched.schedule.name == "improved_dualpipe"
    assert searched.bound <= searched.seconds < builders.seconds
    assert [row.name for row in searched.rows] == ["improved_dualpipe", "dualpipe"]


def test_parameters_in_rows_keep_the_number_of_stages(monkeypatch):
    choice, asked = choose(monkeypatch, alike, params_of(build("zbv", 2, 8)), microbatches=8)
    assert choice.schedule.num_stages == 4 and asked == [(4, 8)]
    reasons = {row.name: row.reason for row in choice.rows}
    assert reasons["1f1b"] == "it has 2 stages, and params has rows for [4]"


def test_the_table_says_why(monkeypatch):
    choice, _ = choose(monkeypatch, alike, schedules=["1f1b", "dualpipev"], microbatches=[2, 8, 32, 64])
    text = str(choice)
    lines = text.splitlines()
    assert lines[0] == "| schedule | microbatches | step ms | simulated ms | bubble % | memory GB | |"
    assert re.search(r"^\| \w+ \| 32 \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.e-]+ \| chosen \|$", text, re.MULTILINE)
    assert (
        "| dualpipev | 2 |  |  |  |  | dualpipev with num_microbatches=2: it must be an integer of at least 4 |" in text
    )
    assert "| 1f1b | 64 |  |  |  |  | a batch of 32 does not divide into 64 microbatches" in text
    assert lines[-1].startswith(f"Chosen: {choice.schedule.name} with 32 microbatches, ")


def test_bad_arguments_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"schedules=\['2f2b'\]: choose from gpipe, 1f1b"):
        choose(monkeypatch, alike, schedules=["2f2b"])
    for name, value in (("moves", -1), ("repeats", 0)):
        with pytest.raises(ValueError, match=f"choose with {name}={value}: it must be an integer of at least"):
            choose(monkeypatch, alike, **{name: value})
    with pytest.raises(ValueError, match=r"memory=0: bytes of a device"):
        choose(monkeypatch, alike, memory=0)
    with pytest.raises(ValueError, match=r"choose with microbatches=0: it must be an integer of at least 1"):
        choose(monkeypatch, alike, microbatches=[0, 8])
    with pytest.raises(ValueError, match=r"no schedule exists for 2 ranks and microbatches \[2\]: zbv with 2"):
        choose(monkeypatch, alike, schedules=["zbv"], microbatches=2)
    with pytest.raises(ValueError, match=r"axis='stages' is none of the mesh's axes \{'pp': 2\}"):
        choose(monkeypatch, alike, axis="stages")
    with pytest.raises(ValueError, match="give a mesh of devices"):
        jaxpipe.choose(stage, params_of, jnp.ones((8, WIDTH)), jaxpipe.make_mesh(pp=2).abstract_mesh, head=head)
    with pytest.raises(ValueError, match=r"make\(schedule\) returned \(None, None\)"):
        jaxpipe.choose_pipeline(lambda schedule: None, jnp.ones((8, WIDTH)), jaxpipe.make_mesh(pp=2), progress=False)


def test_a_flax_model_is_cut_for_each_number_of_stages(monkeypatch):
    """`from_nnx` is called once for one stage a rank and once for a V, and parameters may be made when needed."""
    made = []

    class Layers(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(i)) for i in range(4)])

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    def make(schedule):
        pipe = jaxpipe.flax.from_nnx(
            Layers, schedule, mesh, blocks="layers", loss=lambda model, x: (model(x) ** 2).mean()
        )
        made.append(schedule.num_stages)
        return pipe if schedule.num_stages == 2 else (pipe.pipeline, lambda: pipe.params)

    mesh = jaxpipe.make_mesh(pp=2)
    measured = lambda pipeline, *_, **__: alike(pipeline.program.schedule.num_stages, 4)  # noqa: E731
    monkeypatch.setattr(comparing, "measure_costs", measured)
    choice = jaxpipe.choose_pipeline(
        make, jnp.ones((8, WIDTH)), mesh, schedules=["1f1b", "zb1p", "zbv", "dualpipev"], microbatches=4, progress=False
    )
    assert made == [2, 4]
    assert choice.schedule.name == "zbv" and len(choice.rows) == 4


def test_costs_between_sizes_are_on_the_line():
    one, two = alike(2, 8), alike(2, 2, pair=0.5)
    found = between([1 / 8, 1 / 2], [one, two], 1 / 4)
    assert found.stages[0].forward == pytest.approx(1 / 2 / 4)
    assert found.stages[0].backward is None
    assert between([1 / 8, 1 / 2], [one, two], 1 / 8) is one


@pytest.mark.parametrize("name", ["1f1b", "zbv", "dualpipe", "dualpipev"])
def test_ticks_of_alike_stages_are_those_of_the_packing(name):
    schedule, costs = build(name, 4, 8), Costs(1, 1.5, 0.5)
    packing = pack(schedule, costs)
    assert lockstep_seconds(schedule, packing, costs) == pytest.approx(packing.makespan)
    with_messages = lockstep_seconds(schedule, packing, dataclasses.replace(costs, p2p=0.01))
    assert 0 < with_messages - packing.makespan <= 0.01 * packing.num_ticks + 1e-9


def test_a_pipeline_takes_another_schedule_of_the_same_stages():
    """As `jaxpipe.value_and_grad` would have made it."""
    mesh, costs = jaxpipe.make_mesh(pp=2), StageCosts((Costs(1, 2, 1),) * 4)
    first = jaxpipe.value_and_grad(stage, build("zbv", 2, 4), mesh, head=head)
    found, _ = on_schedule(first, build("dualpipev", 2, 8), costs)
    made = jaxpipe.value_and_grad(stage, build("dualpipev", 2, 8), mesh, head=head, costs=Costs(1, 2, 1))
    params, batch = params_of(made.program.schedule), jnp.ones((16, WIDTH))
    assert str(jax.make_jaxpr(found)(params, batch)) == str(jax.make_jaxpr(made)(params, batch))


def test_processes_measure_alike_and_choose_by_the_first(monkeypatch):
    """All call as often as the first one does, or they would wait for each other, and have its medians."""
    calls, told = [], []

    def broadcast(numbers):
        told.append(numbers)
        return np.full(len(numbers), 3.0)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(measuring.multihost_utils, "broadcast_one_to_all", broadcast)
    found = measuring.medians([lambda: calls.append("a"), lambda: calls.append("b")], 2)
    assert found == [3.0, 3.0] and len(told) == 2
    assert calls.count("a") == calls.count("b") == 2 + 2 * 3  # to warm up, to see how long one takes, and turns of 3


def test_one_rank_runs_what_the_schedule_runs_by_default(monkeypatch):
    """The layout's first schedule, GPipe, is too long to be unrolled; 1F1B is not."""
    chosen, _ = choose(
        monkeypatch, alike, mesh=jaxpipe.make_mesh(pp=1), rows=64, schedules=["gpipe", "1f1b"], microbatches=[64]
    )
    plain = jaxpipe.value_and_grad(stage, build("1f1b", 1, 64), jaxpipe.make_mesh(pp=1), head=head)
    dispatches = {row.name: on_schedule(chosen.pipeline, row.schedule, alike(1, 64))[0].dispatch for row in chosen.rows}
    assert plain.dispatch == "unrolled" and dispatches == {"gpipe": "sequential", "1f1b": "unrolled"}


def test_calls_on_cpu_devices_wait_for_each_other(monkeypatch):
    """Programs with collectives that share threads can otherwise wait for ever."""
    order = []
    monkeypatch.setattr(measuring.jax, "block_until_ready", lambda _: order.append("wait"))
    measuring.medians([lambda: order.append("call")], 1, queued=False)
    assert "call,call" not in ",".join(order) and order.count("call") > 3


@pytest.mark.parametrize("changes, message", [
    ({"memory": "80GB"}, "memory='80GB': bytes of a device"),
    ({"batch": {}, "microbatches": None}, "a batch that has examples"),
    ({"batch": jnp.zeros((0, WIDTH)), "microbatches": None}, "a batch that has examples"),
    ({"params": jaxpipe.Params({"w": jnp.float32(1.0)})}, r"params has rows for \[0\]"),
])  # fmt: skip
def test_what_cannot_be_chosen_from_is_named(changes, message):
    given = {"params": params_of, "batch": jnp.ones((8, WIDTH)), "microbatches": 4, "schedules": ["1f1b"]} | changes
    params, batch = given.pop("params"), given.pop("batch")
    with pytest.raises(ValueError, match=message):
        jaxpipe.choose(stage, params, batch, jaxpipe.make_mesh(pp=2), head=head, progress=False, **given)


def test_numbers_of_python_are_parameters(monkeypatch):
    params = jaxpipe.Params(params_of(build("1f1b", 2, 4)).stages, {"scale": 2.0})
    chosen, _ = choose(monkeypatch, alike, params, schedules=["1f1b"], microbatches=[4])
    assert chosen.schedule.name == "1f1b"


def test_shapes_of_masked_batches(monkeypatch):
    """All of their examples count."""

    def masked_head(outer, y, data, ctx):
        return jnp.where(data["mask"], (y**2).mean(-1), 0.0).sum()

    schedule, mesh = build("1f1b", 2, 2), jaxpipe.make_mesh(pp=2)
    pipeline = jaxpipe.value_and_grad(
        lambda w, x, ctx: jnp.tanh(x @ w), schedule, mesh, head=masked_head, embed=lambda outer, data, ctx: data["x"],
        example_mask="mask",
    )  # fmt: skip
    batch = {"x": jax.ShapeDtypeStruct((7, WIDTH), jnp.float32)}
    params = jaxpipe.Params(jnp.ones((2, WIDTH, WIDTH)))
    costs = measure_costs(pipeline, params, batch, None, None, num_microbatches=2, repeats=1)
    assert all(each.forward > 0 for each in costs.stages)


def test_what_is_done_once_is_no_bubble():
    """A rank that never waits: a second of ticks, a quarter of an optimizer."""
    schedule = build("1f1b", 1, 2)
    entry = comparing._Entry(schedule, None, alike(1, 2), ticks=1.0, simulated=1.0, busy=1.0, once=0.25)
    assert entry.row("").bubble == 0 and entry.seconds == 1.25
