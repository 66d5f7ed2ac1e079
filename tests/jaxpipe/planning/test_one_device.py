"""One device of a mesh runs alone what it runs among the others, as far as they send it what it makes up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.planning.chips import CHIPS, Achieved
from jaxpipe.planning.one_device import one_device
from jaxpipe.planning.rank_time import rank_seconds
from jaxpipe.planning.without_mesh import WithoutMesh
from jaxpipe.schedule import bound_deferred, build

DEVICES, PLACE, MESSAGE = 4, 2, 0.5


def mesh_of(**sizes):
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def alone(function, x, place=PLACE):
    """The function of one device's part, of which others have what `test_collectives` says."""
    jaxpr = jax.make_jaxpr(function, axis_env=[("x", DEVICES)])(jax.ShapeDtypeStruct(x.shape, x.dtype))

    def run(place, x):
        return WithoutMesh({"x": DEVICES}, {"x": place}, lambda sent: sent + 1).run(jaxpr.jaxpr, jaxpr.consts, [x])

    (result,) = jax.jit(run)(jnp.int32(place), x)
    return result


def together(function, parts):
    """What the device at `PLACE` computes of its part."""
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("x",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        lambda part: function(part[0])[None], mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False
    )
    return jax.jit(mapped)(parts)[PLACE]


def scanned(x):
    def turn(carry, row):
        return carry + lax.psum(row, "x"), lax.all_gather(carry, "x", tiled=True)

    carry, rows = lax.scan(turn, x[0], x)
    return jnp.concatenate([carry[None].repeat(DEVICES, 1), rows])


def looped(x):
    turns = 3 + jnp.isnan(x).any().astype(jnp.int32)  # as many on all devices, and not known when it is traced
    return lax.fori_loop(0, turns, lambda i, carry: carry * 2 + lax.psum(x, "x") * i.astype(x.dtype), x)


def chosen(x):
    index = 2 + jnp.isnan(x).any().astype(jnp.int32)  # the same on all devices
    return lax.switch(index, [lambda x: x, lambda x: -x, lambda x: lax.psum(x, "x") * 3, jnp.zeros_like], x)


def within_calls(x):
    inner = jax.jit(lambda x: lax.psum(x, "x") + lax.axis_index("x").astype(x.dtype))
    return jax.checkpoint(lambda x: jnp.sin(inner(x)))(x)


ZEROS, SAME, SYMMETRIC = "zeros", "same", "symmetric"
CASES = {
    "psum": (lambda x: lax.psum(x, "x"), ZEROS),
    "pmax": (lambda x: lax.pmax(x, "x"), ZEROS),
    "all_gather": (lambda x: lax.all_gather(x, "x"), SAME),
    "all_gather, another dimension": (lambda x: lax.all_gather(x, "x", axis=1), SAME),
    "all_gather, tiled": (lambda x: lax.all_gather(x, "x", axis=1, tiled=True), SAME),
    "psum_scatter": (lambda x: lax.psum_scatter(x, "x"), ZEROS),
    "psum_scatter, tiled": (lambda x: lax.psum_scatter(x, "x", scatter_dimension=1, tiled=True), ZEROS),
    "all_to_all": (lambda x: lax.all_to_all(x, "x", 0, 0, tiled=True), SYMMETRIC),
    "all_to_all, another dimension": (lambda x: lax.all_to_all(x, "x", 0, 1, tiled=True), SYMMETRIC),
    "all_to_all, not tiled": (lambda x: lax.all_to_all(x, "x", 0, 1), SYMMETRIC),
    "scan": (scanned, ZEROS),
    "while": (looped, ZEROS),
    "cond": (chosen, ZEROS),
    "calls": (within_calls, ZEROS),
}


@pytest.mark.parametrize("name", CASES)
def test_collectives(name, x64):
    """As among others that have zeros, the same, or for this device what this one has for them."""
    function, others = CASES[name]
    rng = np.random.default_rng(3)
    mine = rng.random((DEVICES, 8))
    parts = np.zeros((DEVICES, *mine.shape))
    if others == SAME:
        parts[:] = mine
    elif others == SYMMETRIC:
        parts[:, PLACE] = mine
    parts[PLACE] = mine
    if name == "scan":  # a gather of zeros that the others carry
        expected = together(function, jnp.asarray(parts))[0, :8]
        np.testing.assert_allclose(alone(function, jnp.asarray(mine))[0, :8], expected)
        return
    np.testing.assert_allclose(alone(function, jnp.asarray(mine)), together(function, jnp.asarray(parts)))


def test_what_a_permute_brings_is_made_up():
    found = alone(lambda x: lax.ppermute(x, "x", [(0, 1), (1, 0)]), jnp.zeros(3))
    np.testing.assert_array_equal(found, 1)


def test_unknown_collectives_are_refused():
    groups = [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match=r"a psum over groups of \('x',\): without the other devices it cannot run"):
        alone(lambda x: lax.psum(x, "x", axis_index_groups=groups), jnp.zeros(3))


def stage(params, x, ctx):
    """Hands x on, and so every cotangent; its own parameters get their gradient from an auxiliary loss."""
    aux = (jnp.tanh(lax.stop_gradient(x) @ params) ** 2).sum() * (ctx.stage + 1).astype(x.dtype)
    return jaxpipe.Output(x, aux_loss=aux)


def pipeline_of(schedule, mesh):
    """All messages between its ranks hold `MESSAGE`, there and back."""

    def head(outer, y, data, ctx):
        return (y * outer).sum() * MESSAGE * schedule.num_microbatches

    return jaxpipe.value_and_grad(stage, schedule, mesh, head=head, order="storage")


@pytest.mark.parametrize(
    "name, ranks, slots",
    [
        ("dualpipev", 2, None),
        pytest.param("dualpipev", 4, 1, marks=pytest.mark.slow),
        pytest.param("zb1p", 4, 1, marks=pytest.mark.slow),
        pytest.param("zbv", 4, None, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_each_rank_are_those_on_the_mesh(x64, name, ranks, slots):
    schedule = build(name, ranks, 2 * ranks)
    schedule = schedule if slots is None else bound_deferred(schedule, slots)
    rng = np.random.default_rng(5)
    params = jaxpipe.Params(jnp.asarray(rng.normal(size=(schedule.num_stages, 6, 6))), jnp.float64(1.0))
    batch = jnp.full((16, 6), MESSAGE)
    _, expected = jax.jit(pipeline_of(schedule, jaxpipe.make_mesh(pp=ranks)))(params, batch)
    device = one_device(pipeline_of(schedule, mesh_of(pp=ranks)), params, batch)
    rows = schedule.num_stages // ranks
    assert device.params.stages.shape == (rows, 6, 6) and device.batch.shape == batch.shape

    @jax.jit
    def run(rank, params, batch):
        return device({"pp": rank}, params, batch, received=lambda x: jnp.full_like(x, MESSAGE))

    for rank in range(ranks):
        own = slice(rank * rows, (rank + 1) * rows)
        _, grads = run(rank, params._replace(stages=params.stages[own]), batch)
        np.testing.assert_allclose(grads.stages, expected.stages[own], rtol=1e-12)


@pytest.mark.slow
def test_dualpipe_gets_its_other_copy_of_itself(x64):
    """With the same parameters in all stages, the mirrored rank's copy and gradient are its own."""
    schedule = build("dualpipe", 2, 4)
    weights = jnp.asarray(np.random.default_rng(6).normal(size=(6, 6)))

    def same(params, x, ctx):
        return stage(params, x, ctx._replace(stage=jnp.int32(0)))

    def make(mesh):
        return jaxpipe.value_and_grad(
            same, schedule, mesh, head=pipeline_of(schedule, mesh).model.head, order="storage"
        )

    params, batch = jaxpipe.Params(jnp.stack([weights] * 2), jnp.float64(1.0)), jnp.full((8, 6), MESSAGE)
    _, expected = jax.jit(make(jaxpipe.make_mesh(pp=2)))(params, batch)
    device = one_device(make(mesh_of(pp=2)), params, batch)

    def received(sent):
        return sent if sent.shape == weights.shape else jnp.full_like(sent, MESSAGE)

    run = functools.partial(device, {"pp": 1}, received=received)
    _, grads = jax.jit(run)(params._replace(stages=weights[None]), batch)
    np.testing.assert_allclose(grads.stages[0], expected.stages[1], rtol=1e-12)


@pytest.mark.slow
def test_the_whole_of_a_mesh_of_one(x64):
    schedule = build("dualpipev", 1, 4)
    params = jaxpipe.Params(jnp.asarray(np.random.default_rng(7).normal(size=(2, 6, 6))), jnp.float64(2.0))
    batch = jnp.asarray(np.random.default_rng(8).normal(size=(8, 6)))
    pipeline = pipeline_of(schedule, jaxpipe.make_mesh(pp=1))
    (loss, aux), grads = jax.jit(pipeline)(params, batch)
    (found, found_aux), found_grads = jax.jit(functools.partial(one_device(pipeline, params, batch), {"pp": 0}))(
        params, batch
    )
    for a, b in zip(jax.tree.leaves((found, found_aux, found_grads)), jax.tree.leaves((loss, aux, grads)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_bad_places_and_meshes_are_refused():
    schedule = build("1f1b", 2, 2)
    params, batch = jaxpipe.Params(jnp.ones((2, 6, 6)), jnp.float32(1.0)), jnp.ones((4, 6))
    device = one_device(pipeline_of(schedule, mesh_of(pp=2)), params, batch)
    for places in ({}, {"pp": 2}):
        with pytest.raises(ValueError, match="on axis 'pp' of size 2: give each of"):
            device(places, device.params, device.batch)
    with pytest.raises(ValueError, match=r"mesh axes \{'tp': 2\} are the compiler's"):
        one_device(pipeline_of(schedule, mesh_of(pp=2, tp=2)), params, batch)


def test_seconds_of_a_rank():
    """Without kernels' gaps a rank's products and bytes, by hand: three products of each microbatch and stage."""
    width, rows, count = 4096, 8192, 8
    schedule = build("1f1b", 4, count)
    pipeline = jaxpipe.value_and_grad(
        lambda w, x, ctx: jnp.tanh(x @ w), schedule, mesh_of(pp=4), head=lambda outer, y, data, ctx: (y**2).mean()
    )
    params = jaxpipe.Params(jax.ShapeDtypeStruct((4, width, width), "bfloat16"))
    batch = jax.ShapeDtypeStruct((count * rows, width), "bfloat16")
    achieved = Achieved(matmul=0.5, memory=1.0, kernel_us=0.0)
    plan = jaxpipe.plan(pipeline, params, batch, "H100", achieved=achieved)
    products = 3 * 2 * count * rows * width**2 / (0.5 * CHIPS["H100"].bf16)
    found = [rank_seconds(pipeline, plan, rank, achieved=achieved) for rank in range(4)]
    assert products < found[1] < 1.3 * products
    assert found[1] == pytest.approx(found[2]) and found[3] > found[1]  # the head's
    assert plan.update == 0
    with pytest.raises(ValueError, match="rank=4 of 4 ranks: they are numbered from 0 to 3"):
        rank_seconds(pipeline, plan, 4)
