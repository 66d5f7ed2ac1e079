"""A pipeline within a budget: gradients of every schedule as without one, collectives run again, memory as allowed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.runtime.stash import slots_of
from tests.plain import assert_trees_close

WIDTH, ROWS = 8, 16
EXPERTS = 2


def stage(params, x, ctx):
    """Two layers that exchange rows over the mesh axis of experts, as a dispatch and a combine do."""
    for layer in range(2):
        sent = jax.nn.silu(x @ params["in"][layer]).reshape(EXPERTS, -1, WIDTH)
        received = jax.lax.all_to_all(sent, "ep", 0, 0) * params["scale"]
        back = jax.lax.all_to_all(jnp.tanh(received), "ep", 0, 0).reshape(-1, WIDTH)
        x = x + back @ params["out"][layer]
    return x


def head(outer, y, data, ctx):
    return (jnp.sin(y) ** 2).mean()


def arguments(schedule):
    rng, stages = np.random.default_rng(0), schedule.num_stages
    shapes = {"in": (stages, 2, WIDTH, WIDTH), "out": (stages, 2, WIDTH, WIDTH), "scale": (stages, WIDTH)}
    rows = schedule.num_microbatches * EXPERTS * ROWS
    params = jaxpipe.Params({name: jnp.asarray(rng.normal(size=shape) / 2) for name, shape in shapes.items()})
    return params, jnp.asarray(rng.normal(size=(rows, WIDTH)))


def pipeline(schedule, **options):
    mesh = jaxpipe.make_mesh(pp=schedule.num_ranks, ep=EXPERTS)
    return jaxpipe.value_and_grad(stage, schedule, mesh, head=head, data_axes=("ep",), **options)


@functools.cache
def unlimited(name, ranks):
    schedule = jaxpipe.schedule.build(name, ranks, 2 * ranks)
    return jax.jit(pipeline(schedule))(*arguments(schedule))


# The least of dualpipev: a microbatch's input, and with half as many slots its output's cotangent.
SLOW = pytest.mark.slow
BUDGETS = [
    ("zb1p", 2, 2100),
    pytest.param("dualpipev", 4, 1600, marks=SLOW),
    pytest.param("dualpipev", 4, 3000, marks=SLOW),
    pytest.param("dualpipev", 4, 8000, marks=SLOW),
    pytest.param("dualpipe", 4, 2100, marks=SLOW),
    pytest.param("zbv", 4, 2100, marks=SLOW),
    pytest.param("zbv", 4, 4000, marks=SLOW),
    pytest.param("zb1p", 4, 2100, marks=SLOW),
    pytest.param("1f1b", 4, 1100, marks=SLOW),
    pytest.param("1f1b", 4, 3000, marks=SLOW),
    pytest.param("interleaved", 4, 1100, marks=SLOW),
]


@pytest.mark.parametrize("name, ranks, stash", BUDGETS)
def test_gradients_are_those_without_a_budget(x64, name, ranks, stash):
    schedule = jaxpipe.schedule.build(name, ranks, 2 * ranks)
    found = jax.jit(pipeline(schedule, stash=stash))(*arguments(schedule))
    assert_trees_close(found, unlimited(name, ranks), rtol=1e-11)


@pytest.mark.parametrize("name", ["dualpipev", "1f1b"])
def test_slots_take_what_the_budget_allows(x64, name):
    """The planner reads the buffers of the traced step: they grow with the budget and stay within it."""
    schedule = jaxpipe.schedule.build(name, 4, 8)
    sizes = []
    for stash in (1600, 4000, 1 << 40):
        step = pipeline(schedule, stash=stash)
        sizes.append(jaxpipe.plan(step, *arguments(schedule), "H100", cpu=True).memory.stash)
        assert sizes[-1] <= stash * slots_of(step.program).microbatches
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] / 3


def test_too_small_a_budget_is_refused_with_the_least(x64):
    schedule = jaxpipe.schedule.build("1f1b", 4, 8)
    least = ROWS * WIDTH * 8
    with pytest.raises(ValueError, match=f"stash=1,000 bytes .* is {least:,} for each of 4 slots"):
        jax.eval_shape(pipeline(schedule, stash=1000), *arguments(schedule))
    jax.eval_shape(pipeline(schedule, stash=least), *arguments(schedule))
    with pytest.raises(ValueError, match="a pipeline with stash='auto': it must be an integer of at least 0"):
        pipeline(schedule, stash="auto")


@SLOW
def test_kinds_of_stages_share_a_budget(x64):
    """Slots hold what any kind keeps, so all are divided at one price; gradients are those without a budget."""

    def wide(params, x, ctx):
        return x + jnp.tanh(jnp.concatenate([x, jnp.sin(x)], -1) @ params["wide"])

    def deep(params, x, ctx):
        for layer in range(2):
            x = x + jnp.tanh(x @ params["deep"][layer])
        return x

    schedule = jaxpipe.schedule.build("zb1p", 2, 4)
    rng = np.random.default_rng(0)
    shapes = {"wide": (2, 2 * WIDTH, WIDTH), "deep": (2, 2, WIDTH, WIDTH)}
    params = jaxpipe.Params({name: jnp.asarray(rng.normal(size=shape) / 2) for name, shape in shapes.items()})
    x = jnp.asarray(rng.normal(size=(4 * ROWS, WIDTH)))
    make = functools.partial(
        jaxpipe.value_and_grad,
        jaxpipe.StageKinds([wide, deep], [0, 1]),
        schedule,
        jaxpipe.make_mesh(pp=2),
        head=head,
    )
    one, two = (jax.jit(make(stash=stash))(params, x) for stash in (None, 2048))
    assert_trees_close(two, one, rtol=1e-11)
    step = make(stash=2048)
    taken = jaxpipe.plan(step, params, x, "H100", cpu=True).memory.stash
    assert taken <= 2048 * slots_of(step.program).microbatches


def test_a_kind_that_most_stages_are_of_has_what_it_would_have_by_itself():
    """Beside one stage whose three layers keep more: what fits alone is not made again because of that one."""
    width, schedule = 64, jaxpipe.schedule.build("1f1b", 4, 8)

    def wide(params, x, ctx):
        for layer in range(2):
            x = x + jnp.tanh(jnp.concatenate([x, jnp.sin(x)], -1) @ params["wide"][layer])
        return x

    def deep(params, x, ctx):
        for layer in range(3):
            x = x + jnp.tanh(jnp.tanh(x @ params["up"][layer]) @ params["down"][layer])
        return x

    shapes = {"wide": (2, 2 * width, width), "up": (3, width, 2 * width), "down": (3, 2 * width, width)}
    params = jaxpipe.Params({name: jax.ShapeDtypeStruct((4, *shape), "float32") for name, shape in shapes.items()})
    batch = jax.ShapeDtypeStruct((8 * ROWS, width), "float32")
    mesh = jax.sharding.AbstractMesh((4,), ("pp",), axis_types=(jax.sharding.AxisType.Auto,))

    def made_again(*kinds):
        stages = jaxpipe.StageKinds(kinds, [0, 0, 0, 1])
        step = jaxpipe.value_and_grad(stages, schedule, mesh, head=head, stash=16000)
        found = jaxpipe.plan(step, params, batch, "H100")
        assert found.memory.stash <= 16000 * slots_of(step.program).microbatches
        return [sum(kernel.flops for kernel in kind["B"].kernels if kernel.recomputed) for kind in found.work.kinds]

    assert made_again(wide, wide)[0] == 0
    beside, few = made_again(wide, deep)
    assert beside == 0 and few > 0
