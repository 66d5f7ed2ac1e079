"""`jaxpipe.plan` where stages differ: a row of gated layers after an embedding and before a head, divided by cost."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.layers import layered_stages
from jaxpipe.planning.chips import CHIPS
from jaxpipe.planning.planner import stages_text
from jaxpipe.schedule import Costs, StageCosts, simulate

TOKENS, WIDTH, HIDDEN, LAYERS = 64, 64, 128, 6
PRODUCT = 2 * TOKENS * WIDTH * HIDDEN
VOCABULARY = 6 * HIDDEN
"""A head then takes six times the forward of a layer, itself and both its gradients together."""

PRODUCTS_ALONE = dataclasses.replace(
    CHIPS["H200"], hbm=1e40, interconnect=1e40, internode=1e40, latency_us=0, tf32=2 * PRODUCT, f32=2 * PRODUCT
)
PERFECT = jaxpipe.Achieved(1.0, 1.0, 1.0, 1.0, 0.0)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def layer(w, x, ctx):
    return x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]


def embed(outer, data, ctx):
    return outer["embed"][data]


def head(outer, y, data, ctx):
    return jax.nn.logsumexp(y @ outer["head"], -1).mean()


def planned(name, layer_costs, *, microbatches=4, options=None, **pipeline):
    """The plan of six layers on two ranks without devices."""
    schedule = jaxpipe.schedule.build(name, 2, microbatches)
    sizes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    layers = [{leaf: jnp.zeros(size) for leaf, size in sizes.items()}] * LAYERS
    stage, stages = layered_stages(layer, layers, schedule, layer_costs=layer_costs)
    mesh = AbstractMesh((2,), ("pp",), axis_types=(AxisType.Auto,))
    step = jaxpipe.value_and_grad(stage, schedule, mesh, **{"embed": embed, "head": head, **pipeline})
    outer = {"embed": shape(VOCABULARY, WIDTH), "head": shape(WIDTH, VOCABULARY)}
    batch = shape(microbatches * TOKENS, dtype=jnp.int32)
    options = {"chip": PRODUCTS_ALONE, "achieved": PERFECT, **(options or {})}
    return jaxpipe.plan(step, jaxpipe.Params(stages, outer), batch, **options)


LAST_HEAVY = [1, 1, 1, 1, 1, 3]
"""Four layers and two."""


def test_work_of_each_kind_is_that_of_its_layers():
    """Three products a layer in F, in I and in W; whatever the other stages have."""
    for name, letters in (("zb1p", "FIW"), ("1f1b", "FBB")):
        found = planned(name, LAST_HEAVY)
        assert found.work.kind_of == (0, 1)
        for kind, layers in enumerate((4, 2)):
            assert {letter: work.flops for letter, work in found.work.kinds[kind].items()} == {
                letter: 3 * layers * PRODUCT * letters.count(letter) for letter in letters
            }
        assert set(found.work.ends) == {"E", "H", "G"} and found.work.ends["H"].flops == 3 * 6 * PRODUCT
        assert found.work.actions == {**found.work.kinds[0], **found.work.ends}
        assert found.flops == found.executed == 4 * (LAYERS * 9 + 18) * PRODUCT


def test_stages_on_one_rank_have_the_work_of_their_own_kind():
    """DualPipeV's first rank has the first stage and the last: two layers each and none of the middle's one."""
    found = planned("dualpipev", [1, 1, 2, 2, 1, 1])
    counts = (2, 1, 1, 2)
    assert [found.work.kinds[kind]["F"].flops / 3 / PRODUCT for kind in found.work.kind_of] == [*counts]
    assert [costs.forward for costs in found.stage_costs.stages] == pytest.approx([1.5 * count for count in counts])
    assert found.flops == found.executed == 4 * (LAYERS * 9 + 18) * PRODUCT


def test_the_step_is_a_simulation_by_hand():
    """A layer's F takes 1.5, its B 3, the head 9, of two microbatches in 1F1B.

    Rank 0 runs four layers: F until 6, F until 12, B from 24 to 36, and B from 42. Rank 1 runs two layers and the head:
    F and head from 6 to 18, B until 24, F and head until 36, B until 42.
    """
    found = planned("1f1b", LAST_HEAVY, microbatches=2)
    assert found.seconds == pytest.approx(54) and found.bubble == pytest.approx(18 / 54)
    assert [event.end for event in found.timeline.events[0]] == pytest.approx([6, 12, 36, 54])
    assert [event.end for event in found.timeline.events[1]] == pytest.approx([18, 24, 36, 42])
    assert found.head == pytest.approx(9) and found.embed == pytest.approx(0)
    assert found.costs == dataclasses.replace(found.stage_costs.stages[0], p2p=found.stage_costs.p2p)
    assert found.mfu == pytest.approx(2 * (LAYERS * 9 + 18) * PRODUCT / 54 / (2 * 2 * PRODUCT))


def test_work_of_the_ends_is_hidden_behind_longer_stages():
    """Of many microbatches only one head, at most, is not: the last stage and its head take as long as the first."""
    few, many = (planned("1f1b", LAST_HEAVY, microbatches=count).seconds for count in (8, 24))
    assert many - few == pytest.approx(16 * 18)


def test_ends_of_all_ranks_are_added():
    def in_parts(outer, y, data, ctx):
        return jnp.log(jax.lax.psum(jnp.exp(y @ outer["head"]).sum(-1), "pp")).mean()

    specs = jaxpipe.Params(P("pp"), {"embed": P(), "head": P(None, "pp")})
    found = planned("1f1b", LAST_HEAVY, microbatches=8, head=in_parts, shared_ends=True, specs=specs)
    alone = dataclasses.replace(found.stage_costs, embed=0.0, embed_grad=0.0, head=0.0)
    assert found.head == pytest.approx(4.5)
    assert found.timeline == simulate(found.timeline.schedule, alone)
    assert found.seconds == pytest.approx(found.timeline.makespan + 8 * (found.embed + found.head) + found.once)


def test_the_print_has_a_row_for_each_kind():
    rows = [line for line in str(planned("dualpipev", [1, 1, 2, 2, 1, 1])).splitlines() if line.startswith("  one run")]
    assert [row.partition(", B")[0] for row in rows] == [
        "  one run of stages 0, 3: F 3e+03",
        "  one run of stages 1-2: F 1.5e+03",
    ]
    assert "  one run: F 4.5e+03, " in str(planned("1f1b", None))
    assert stages_text([0, 1, 2, 5]) == "stages 0-2, 5"


def test_costs_of_each_stage_may_be_given():
    costs = StageCosts((Costs(2, 3, 4), Costs(1, 1, 1)), p2p=0.5, embed=0.25, embed_grad=0.75, head=5)
    found = planned("zb1p", LAST_HEAVY, options={"costs": costs})
    assert found.stage_costs == costs and found.timeline == simulate(found.timeline.schedule, costs)
    assert found.costs == Costs(2, 3, 4, p2p=0.5) and (found.embed, found.head) == (1, 5)
    assert found.seconds == pytest.approx(found.timeline.makespan)
    with pytest.raises(ValueError, match="costs are of 3 stages, the pipeline has 2: give each one's"):
        planned("zb1p", LAST_HEAVY, options={"costs": StageCosts((Costs(),) * 3)})


def test_unknown_kernels_count_where_their_kind_runs():
    def body(x, y):
        y[...] = x[...]

    @jax.custom_vjp
    def kernel(x):
        return pl.pallas_call(body, out_shape=x, name="my_kernel")(x)

    kernel.defvjp(lambda x: (kernel(x), None), lambda _, ct: (ct,))
    stage = jaxpipe.StageKinds([lambda w, x, ctx: x @ w, lambda w, x, ctx: kernel(kernel(x)) @ w], [0, 1, 0, 1])
    schedule = jaxpipe.schedule.build("dualpipev", 2, 4)
    mesh = AbstractMesh((2,), ("pp",), axis_types=(AxisType.Auto,))
    step = jaxpipe.value_and_grad(stage, schedule, mesh, head=lambda outer, y, data, ctx: y.sum())
    found = jaxpipe.plan(step, jaxpipe.Params(shape(4, WIDTH, WIDTH)), shape(4 * TOKENS, WIDTH), "H200")
    assert found.uncounted == (("my_kernel", 8.0),)  # twice in one of a rank's two stages, of four microbatches
