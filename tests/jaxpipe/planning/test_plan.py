"""`jaxpipe.plan` against plain arithmetic, against XLA's own analysis, and against the simulation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.planning.chips import CHIPS
from jaxpipe.schedule.simulator import closed_form_bubble, simulate
from tests.cases import cases

TOKENS, WIDTH, HIDDEN = 64, 128, 512
PRODUCT = 2 * TOKENS * WIDTH * HIDDEN

MEGATRON = jaxpipe.Params({"up": P("pp", None, "tp"), "down": P("pp", "tp")}, P())
"""The hidden activations over "tp", which the compiler has."""


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def abstract(**sizes):
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def mlp(params, x, ctx):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def mean_square(outer, y, data, ctx):
    return jnp.mean(y.astype(jnp.float32) ** 2)


def planned(
    name="1f1b", ranks=4, microbatches=8, stage=mlp, head=mean_square, axes=(), chip="H100", options=None, **pipeline
):
    """The plan of a pipeline of MLPs, on a mesh of "pp" and further axes without devices."""
    schedule = jaxpipe.schedule.build(name, ranks, microbatches)
    sizes = {"pp": ranks, **dict(axes)}
    mesh = abstract(**sizes)
    step = jaxpipe.value_and_grad(stage, schedule, mesh, head=head, **pipeline)
    stages = schedule.num_stages
    params = jaxpipe.Params({"up": shape(stages, WIDTH, HIDDEN), "down": shape(stages, HIDDEN, WIDTH)})
    return jaxpipe.plan(step, params, shape(microbatches * TOKENS, WIDTH), chip, **(options or {}))


def test_products_are_those_of_the_model():
    """Two in F, four in a backward, half of these in either half of it, and three times F's in the model."""
    found = planned("dualpipev")
    flops = {letter: work.flops for letter, work in found.work.actions.items()}
    assert [flops[letter] for letter in "FBIW"] == [2 * PRODUCT, 4 * PRODUCT, 2 * PRODUCT, 2 * PRODUCT]
    assert found.flops == found.executed == 8 * 8 * 6 * PRODUCT
    assert found.uncounted == ()


def test_parameters_gradients_and_optimizer():
    optax = pytest.importorskip("optax")
    found = planned(options={"optimizer": optax.adam(1e-3)})
    parameters = 2 * WIDTH * HIDDEN * 4
    assert (found.memory.masters, found.memory.gradients) == (parameters, parameters)
    assert 0 <= found.memory.optimizer - 2 * parameters <= 8  # two moments and a count
    assert found.memory.batch == 8 * TOKENS * WIDTH * 4
    assert found.seconds > planned().seconds


def test_integers_have_no_gradients():
    """As a placement of experts: it is a parameter, and nothing else of the memory is different."""

    def stage(params, x, ctx):
        return mlp({name: params[name] for name in ("up", "down")}, x, ctx)[params["order"]]

    step = jaxpipe.value_and_grad(stage, jaxpipe.schedule.build("1f1b", 4, 8), abstract(pp=4), head=mean_square)
    weights = {"up": shape(4, WIDTH, HIDDEN), "down": shape(4, HIDDEN, WIDTH)}
    params = jaxpipe.Params(
        {**weights, "order": shape(4, TOKENS, dtype=jnp.int32)}, {"table": shape(3, dtype=jnp.int32)}
    )
    found, without = jaxpipe.plan(step, params, shape(8 * TOKENS, WIDTH), "H100").memory, planned().memory
    assert found.gradients == without.gradients == 2 * WIDTH * HIDDEN * 4
    assert found.masters == without.masters + 4 * (TOKENS + 3)
    assert found.stash == without.stash


def test_frozen_parameters_have_no_gradients():
    """Half of the weights' products, of their gradients and of what an optimizer updates."""
    found = planned("zb1p", trainable=lambda path, leaf: "up" in path)
    flops = {letter: work.flops for letter, work in found.work.actions.items()}
    assert [flops[letter] for letter in "FIW"] == [2 * PRODUCT, 2 * PRODUCT, PRODUCT]
    assert found.flops == found.executed == 4 * 8 * 5 * PRODUCT
    assert found.memory.gradients == WIDTH * HIDDEN * 4
    assert found.memory.masters == planned("zb1p").memory.masters == 2 * WIDTH * HIDDEN * 4


def test_stash_is_what_the_schedule_holds():
    """Gpipe keeps all microbatches, 1f1b as many as there are ranks, whatever their number."""
    one = 4 * TOKENS * (WIDTH + HIDDEN)  # x and the hidden activations

    def stash(name, microbatches):
        return planned(name, microbatches=microbatches).memory.stash

    assert stash("1f1b", 8) == stash("1f1b", 16)
    # jax 0.12 keeps the derivative of tanh beside its value.
    assert stash("gpipe", 16) - stash("gpipe", 8) in (8 * one, 8 * (one + 4 * TOKENS * HIDDEN))
    assert stash("1f1b", 16) < stash("gpipe", 16)


def test_no_part_of_memory_is_less_than_nothing():
    """Where a step is busiest when little is stashed any more: as gradients of a stage's second copy come back."""
    memory = planned("dualpipe", 2, 4, dispatch="unrolled").memory
    assert min(dataclasses.astuple(memory)) >= 0


@cases("name", ["1f1b", "dualpipev"], quick=["dualpipev"])
@pytest.mark.parametrize("axis", ["dp", "tp"])
def test_memory_is_that_of_the_compiled_program(name, axis):
    """Over a data axis by hand, and with parameters over an axis of the compiler's."""
    if jax.device_count() < 8:
        pytest.skip(f"8 devices are needed, there are {jax.device_count()}")
    mesh, schedule = jaxpipe.make_mesh(pp=4, **{axis: 2}), jaxpipe.schedule.build(name, 4, 8)
    options = {"data_axes": ("dp",)} if axis == "dp" else {"specs": MEGATRON}
    step = jaxpipe.value_and_grad(mlp, schedule, mesh, head=mean_square, **options)
    stages, batch = schedule.num_stages, shape(8 * 512 * (1 + (axis == "dp")), WIDTH)
    params = jaxpipe.Params({"up": shape(stages, WIDTH, HIDDEN), "down": shape(stages, HIDDEN, WIDTH)})
    found = jaxpipe.plan(step, params, batch, "H100", cpu=True).memory

    specs = jaxpipe.Params({"up": P("pp"), "down": P("pp")}) if axis == "dp" else MEGATRON._replace(outer=None)
    shardings = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), (specs, P("dp" if axis == "dp" else None)))
    actual: Any = jax.jit(step, in_shardings=shardings).lower(params, batch).compile().memory_analysis()
    total = actual.argument_size_in_bytes + actual.temp_size_in_bytes + actual.output_size_in_bytes
    print(f"{name}, {axis}: {found.total} planned of {total}")
    assert found.arguments == actual.argument_size_in_bytes
    assert found.total == pytest.approx(total, rel=0.11)


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_bubble_is_the_simulations(name):
    """Messages that take no time leave the published form, and the head what the others wait for it."""
    fast = dataclasses.replace(CHIPS["H100"], interconnect=1e30, internode=1e29, latency_us=0.0)
    found = planned(name, chip=fast)
    assert found.costs.p2p < 1e-15 and found.timeline == simulate(found.timeline.schedule, found.stage_costs)
    assert found.bubble == pytest.approx(max(found.timeline.bubble) / found.seconds)
    alone = simulate(found.timeline.schedule, dataclasses.replace(found.stage_costs, embed=0.0, head=0.0))
    assert alone.events == simulate(found.timeline.schedule, found.costs).events
    assert max(alone.bubble) == pytest.approx(closed_form_bubble(name, 4, found.costs))


def test_more_microbatches_leave_a_smaller_bubble():
    """Where embedding and head take next to nothing of a stage."""
    costs = jaxpipe.schedule.Costs(1.0, 1.0, 1.0)
    bubbles = [planned(microbatches=count, options={"costs": costs}).bubble for count in (4, 8, 16, 32)]
    assert bubbles == sorted(bubbles, reverse=True) and bubbles[-1] < bubbles[0] / 3


def test_twice_the_layers_take_twice_the_time():
    """A stage that runs its layers in a scan, as often as it does; wide, so that products are all there is."""

    def layers(count):
        def stage(w, x, ctx):
            return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=count)[0]

        schedule = jaxpipe.schedule.build("zb1p", 2, 4)
        step = jaxpipe.value_and_grad(stage, schedule, abstract(pp=2), head=mean_square)
        params = jaxpipe.Params(shape(2, 4096, 4096, dtype=jnp.bfloat16))
        return jaxpipe.plan(step, params, shape(4 * 4096, 4096, dtype=jnp.bfloat16), "H200").costs

    one, two = layers(4), layers(8)
    assert two.forward == pytest.approx(2 * one.forward, rel=0.1)
    assert two.backward_input == pytest.approx(2 * one.backward_input, rel=0.1)
    assert two.weight == pytest.approx(2 * one.weight, rel=0.1)


def test_slow_memory_counts_where_there_are_no_products():
    """An elementwise stage takes what reading and writing take."""

    def stage(w, x, ctx):
        return x * w

    slow = dataclasses.replace(CHIPS["H100"], hbm=CHIPS["H100"].hbm / 10)
    schedule = jaxpipe.schedule.build("1f1b", 2, 4)
    step = jaxpipe.value_and_grad(stage, schedule, abstract(pp=2), head=mean_square)
    arguments = jaxpipe.Params(shape(2)), shape(4 * 2**20, 256)
    fast, slower = (jaxpipe.plan(step, *arguments, chip).costs.forward for chip in ("H100", slow))
    # x is read, y written, and both once more for its slot and the stash's.
    assert 2 * 2**28 * 4 / CHIPS["H100"].hbm < fast < 6 * 2**28 * 4 / CHIPS["H100"].hbm
    assert slower == pytest.approx(10 * fast, rel=0.1)


def test_collectives_take_the_time_of_the_slowest_link():
    def stage(params, x, ctx):
        return mlp(params, jax.lax.all_to_all(x, "ep", 0, 0, tiled=True), ctx)

    apart, together = (
        planned(stage=stage, axes={"ep": 4}, replicated_axes=("ep",), options={"devices_per_node": node})
        for node in (2, 16)
    )
    (message,) = together.work.actions["F"].messages
    assert (message.kind, message.axes, message.nbytes) == ("all-to-all", ("ep",), TOKENS * WIDTH * 4)
    assert apart.costs.forward > together.costs.forward > planned().costs.forward


def test_axes_of_the_compiler_divide_products():
    whole, divided = (
        planned(),
        planned(axes={"tp": 2}, specs=jaxpipe.Params({"up": P("pp", None, "tp"), "down": P("pp", "tp")}, P())),
    )
    assert divided.memory.masters == whole.memory.masters // 2
    assert divided.memory.gradients == whole.memory.gradients // 2
    assert divided.work.actions["F"].flops == whole.work.actions["F"].flops / 2
    assert [(m.kind, m.axes) for m in divided.work.actions["F"].messages] == [("all-reduce", ("tp",))]
    assert divided.flops == whole.flops and divided.seconds > 0


def test_kernels_that_no_rule_knows_are_named():
    def body(x, y):
        y[...] = x[...]

    def stage_of(**options):
        @jax.custom_vjp
        def kernel(x):
            return pl.pallas_call(body, out_shape=x, name="my_kernel", **options)(x)

        kernel.defvjp(lambda x: (kernel(x), None), lambda _, ct: (ct,))
        return lambda params, x, ctx: mlp(params, kernel(x), ctx)

    found = planned(stage=stage_of())
    assert found.uncounted == (("my_kernel", 8.0),)
    assert "not counted: my_kernel, 8 times a step on a device" in str(found)
    ruled = planned(stage=stage_of(), options={"kernels": {"my_kernel": lambda operands, results: 7.0}})
    estimate = pl.CostEstimate(flops=7, bytes_accessed=0, transcendentals=0)
    for other in (ruled, planned(stage=stage_of(cost_estimate=estimate))):
        assert other.uncounted == () and other.work.actions["F"].flops == 2 * PRODUCT + 7


def test_ends_count_where_they_run():
    """Shared by all ranks, a vocabulary is in parts: the model's FLOPs stay, the time of an end falls."""
    schedule, vocabulary = jaxpipe.schedule.build("1f1b", 4, 8), 32768
    params = jaxpipe.Params(
        {"up": shape(4, WIDTH, HIDDEN), "down": shape(4, HIDDEN, WIDTH)}, {"head": shape(vocabulary, WIDTH)}
    )
    mesh = abstract(pp=4)

    def head(outer, y, data, ctx):
        logits = y @ outer["head"].T
        return jnp.mean(jax.nn.logsumexp(logits, -1))

    def head_in_parts(outer, y, data, ctx):
        sums = jnp.exp(y @ outer["head"].T).sum(-1)
        return jnp.mean(jnp.log(jax.lax.psum(sums, "pp")))

    batch = shape(8 * TOKENS, WIDTH)
    alone = jaxpipe.plan(jaxpipe.value_and_grad(mlp, schedule, mesh, head=head), params, batch, "H100")
    options = dict(shared_ends=True, specs=jaxpipe.Params(P("pp"), P("pp")))
    shared = jaxpipe.value_and_grad(mlp, schedule, mesh, head=head_in_parts, **options)
    shared = jaxpipe.plan(shared, params, batch, "H100")
    assert alone.flops == shared.flops == 8 * (4 * 6 * PRODUCT + 6 * TOKENS * WIDTH * vocabulary)
    assert shared.work.actions["H"].flops == alone.work.actions["H"].flops / 4


def test_forward_alone():
    schedule = jaxpipe.schedule.build("1f1b", 4, 8)
    run = jaxpipe.forward(mlp, schedule, abstract(pp=4))
    params = jaxpipe.Params({"up": shape(4, WIDTH, HIDDEN), "down": shape(4, HIDDEN, WIDTH)})
    found = jaxpipe.plan(run, params, shape(8 * TOKENS, WIDTH), "H100")
    assert found.flops == found.executed == 8 * 4 * 2 * PRODUCT
    assert found.memory.stash == 0 and set(found.work.actions) <= {"F", "E", "H"}
    assert found.seconds < planned().seconds


def test_what_is_computed_again_is_no_work_of_the_model():
    plain, again = planned(), planned(stage=jax.checkpoint(mlp, static_argnums=()))
    assert again.flops == plain.flops and again.executed > plain.executed


def test_measured_costs_replace_those_worked_out():
    costs = jaxpipe.schedule.Costs(1.0, 1.0, 1.0)
    found = planned(options={"costs": costs})
    assert found.costs == costs and found.seconds > 8 * 3


def test_prints_and_says_whether_it_fits():
    found = planned("dualpipev")
    assert found.fits
    assert str(found).startswith("dualpipev_4x8 on 4 H100, mesh {'pp': 4}\nmemory of a device, GB:")
    assert "F&B" in str(found) and "TOO MUCH" not in str(found)
    assert "TOO MUCH" in str(planned(chip=dataclasses.replace(CHIPS["H100"], memory=1e5)))


def test_arrays_and_a_mesh_of_devices_do_too():
    """As shapes and an abstract mesh; fake CPUs stand for GPUs."""
    if jax.device_count() < 4:
        pytest.skip(f"4 devices are needed, there are {jax.device_count()}")
    schedule = jaxpipe.schedule.build("1f1b", 4, 8)
    step = jaxpipe.value_and_grad(mlp, schedule, jaxpipe.make_mesh(pp=4), head=mean_square)
    params = jaxpipe.Params({"up": np.ones((4, WIDTH, HIDDEN), "f"), "down": np.ones((4, HIDDEN, WIDTH), "f")})
    assert str(jaxpipe.plan(step, params, jnp.ones((8 * TOKENS, WIDTH)), "h100")) == str(planned())


def test_refusals_name_the_remedy():
    schedule = jaxpipe.schedule.build("1f1b", 4, 8)
    step = jaxpipe.value_and_grad(mlp, schedule, abstract(pp=4), head=mean_square)
    batch, params = shape(8 * TOKENS, WIDTH), jaxpipe.Params({"up": shape(3, WIDTH, HIDDEN)})
    with pytest.raises(ValueError, match="no chip 'V100': known are H100"):
        planned(chip="V100")
    with pytest.raises(ValueError, match="has 4 stages: stack the parameters"):
        jaxpipe.plan(step, params, batch, "H100")
    with pytest.raises(ValueError, match=r"pass jaxpipe.Params\(stages"):
        jaxpipe.plan(step, {"up": 1.0}, batch, "H100")
    with pytest.raises(ValueError, match=r"pass what jaxpipe.value_and_grad or jaxpipe.forward returned"):
        jaxpipe.plan(mlp, params, batch, "H100")
    with pytest.raises(ValueError, match="a node has at least 1"):
        planned(options={"devices_per_node": 0})
    with pytest.raises(ValueError, match="does not divide into 8 microbatches"):
        jaxpipe.plan(step, jaxpipe.Params({"up": shape(4, WIDTH, HIDDEN)}), shape(3, WIDTH), "H100")


def test_a_flax_transformer_with_dropout():
    """Through `jaxpipe.flax`, parameters as arrays, with a key and an optimizer; every product is counted."""
    nnx, optax = pytest.importorskip("flax.nnx"), pytest.importorskip("optax")
    from jaxpipe.flax import nnx_stages  # noqa: PLC0415

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm, self.attention = nnx.LayerNorm(32, rngs=rngs), nnx.MultiHeadAttention(4, 32, rngs=rngs)
            self.mlp, self.dropout = nnx.Linear(32, 32, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(self.norm(x), decode=False)
            return x + self.dropout(nnx.gelu(self.mlp(x)))

    schedule = jaxpipe.schedule.build("zbv", 2, 4)
    stage, stages = nnx_stages(Block, schedule, nnx.Rngs(0))
    step = jaxpipe.value_and_grad(stage, schedule, abstract(pp=2), head=mean_square)
    key, batch = jax.eval_shape(lambda: jax.random.key(0)), shape(4 * 2, 16, 32)
    found = jaxpipe.plan(step, jaxpipe.Params(stages), batch, "A100", optimizer=optax.adamw(1e-3), rng=key)
    tokens = 2 * 16
    products = 2 * tokens * 32 * 32 * 5 + 2 * 2 * tokens * 16 * 32  # five matrices; scores and what they weigh
    assert found.work.actions["F"].flops == products and found.flops == 4 * 4 * 3 * products
    assert found.uncounted == () and found.memory.optimizer > 1.9 * found.memory.masters
