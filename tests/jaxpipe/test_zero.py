"""ZeRO-1: the same updates as the plain optimizer's, of which each data-parallel device computes a part."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from tests.plain import assert_trees_close, plain_value_and_grad

WIDTH, MICROBATCHES = 16, 4
SCHEDULE = jaxpipe.schedule.build("dualpipev", 2, MICROBATCHES)


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax multiplies floats by integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def stage(params, x, ctx):
    return x + jnp.tanh(x @ params["w"] + params["b"])


def embed(outer, data, ctx):
    return outer["in"][data]


def head(outer, y, data, ctx):
    return (jax.nn.log_softmax(y @ outer["in"].T)[..., 0] ** 2).mean()


def make():
    rng = np.random.default_rng(0)
    stages = {"w": jnp.asarray(rng.normal(size=(4, WIDTH, WIDTH)) / 4), "b": jnp.asarray(rng.normal(size=(4, WIDTH)))}
    stages |= {"index": jnp.arange(4), "keys": jax.random.split(jax.random.key(0), 4)}
    batch = jnp.asarray(rng.integers(0, 12, (MICROBATCHES * 8, 3)))
    return jaxpipe.Params(stages, {"in": jnp.asarray(rng.normal(size=(12, WIDTH)))}), batch


def pipeline(**options):
    given = {"embed": embed, "head": head, "data_axes": ("dp",), "zero1_axis": "dp", "min_shard_size": 64, **options}
    return jaxpipe.value_and_grad(stage, SCHEDULE, jaxpipe.make_mesh(pp=2, dp=4), **given)


def train(value_and_grad, optimizer, params, batch):
    """Two updates, compiled."""

    @jax.jit
    def update(params, state, batch):
        (_, _), grads = value_and_grad(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    compiled = update.lower(params, state, batch).compile()
    for _ in range(2):
        params, state = compiled(params, state, batch)
    return params, state, compiled


OPTIMIZERS = {
    "adamw": optax.adamw(0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(optax.linear_schedule(0.1, 0.01, 3))),
    "masked": optax.chain(optax.masked(optax.add_decayed_weights(0.1), lambda p: jax.tree.map(lambda x: x.ndim > 2, p)),
                          optax.lion(0.1)),
    "factored": optax.adafactor(0.1, min_dim_size_to_factor=8),
    "accumulated": optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2).gradient_transformation(),
}  # fmt: skip


def assert_trained_alike(found, expected, shardings):
    """Pairs of parameters, which are kept as the shardings say, and the optimizer's state."""
    stages = [dict(params.stages, keys=jax.random.key_data(params.stages["keys"])) for params, _ in (found, expected)]
    assert_trees_close(stages[0], stages[1], rtol=1e-10)
    assert_trees_close((found[0].outer, found[1]), (expected[0].outer, expected[1]), rtol=1e-10)
    for leaf, sharding in zip(jax.tree.leaves(found[0]), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


SLOW = ("adamw", "masked", "factored", "accumulated")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in OPTIMIZERS])
def test_any_optimizer_updates_as_it_does_alone(x64, name):
    params, batch = make()
    step, optimizer = pipeline(), jaxpipe.floating_only(OPTIMIZERS[name])
    placed = jax.device_put(params, step.shardings(params))
    found, state, compiled = train(step, jaxpipe.shard_optimizer(optimizer, step), placed, batch)
    expected, expected_state, _ = train(
        plain_value_and_grad(stage, SCHEDULE, embed=embed, head=head), optimizer, params, batch
    )
    assert_trained_alike((found, state), (expected, expected_state), step.shardings(params))
    specs = {leaf.sharding.spec for leaf in jax.tree.leaves(state) if leaf.shape == (4, WIDTH, WIDTH)}
    assert specs == {P("pp", "dp")} or name == "factored"
    assert "reduce-scatter" in compiled.as_text() and "all-gather" in compiled.as_text()


def test_parameters_kept_in_parts_are_updated_as_whole_ones(x64):
    """Masters of a step are a part of each on every device, and gathered once: DualPipe's copies are made of those."""
    params, batch = make()
    schedule = jaxpipe.schedule.build("dualpipe", 2, MICROBATCHES)
    params = params._replace(stages=jax.tree.map(lambda leaf: leaf[:2], params.stages))
    options = {"embed": embed, "head": head, "data_axes": ("dp",), "zero1_axis": "dp", "min_shard_size": 64}
    mesh = jaxpipe.make_mesh(pp=2, dp=4)
    step = jaxpipe.value_and_grad(stage, schedule, mesh, zero1_parameters=True, **options)
    optimizer = jaxpipe.floating_only(optax.adamw(0.1))
    shardings = step.shardings(params)
    assert shardings.stages["w"].spec == P("pp", "dp") and shardings.outer["in"].spec == P(None, "dp")
    assert shardings == step.grad_shardings(params)
    placed = jax.device_put(params, shardings)
    found, state, compiled = train(step, jaxpipe.shard_optimizer(optimizer, step), placed, batch)
    wanted, wanted_state, _ = train(
        plain_value_and_grad(stage, schedule, embed=embed, head=head), optimizer, params, batch
    )
    assert_trained_alike((found, state), (wanted, wanted_state), shardings)
    assert len(re.findall(r" all-gather(?:-start)?\(", compiled.as_text())) == 2  # of "w" and "in", not of updates
    loss, _ = jax.jit(step.evaluation)(found, batch)
    other, _ = jax.jit(jaxpipe.value_and_grad(stage, schedule, mesh, **options).evaluation)(wanted, batch)
    np.testing.assert_allclose(loss, other, rtol=1e-10)


def test_parameters_in_parts_take_a_part_of_the_planned_memory():
    mesh = jaxpipe.make_mesh(pp=2, dp=4)
    params, batch = jaxpipe.Params(jnp.ones((4, 64, 64))), jnp.ones((MICROBATCHES * 8, 64))
    plans = {
        parts: jaxpipe.plan(
            jaxpipe.value_and_grad(
                lambda w, x, ctx: jnp.tanh(x @ w), SCHEDULE, mesh, head=lambda outer, y, data, ctx: (y**2).mean(),
                data_axes=("dp",), zero1_axis="dp", zero1_parameters=parts, min_shard_size=0,
                compute_dtype=jnp.bfloat16,
            ),
            params, batch, "H100", optimizer=optax.adamw(0.1),
        )
        for parts in (False, True)
    }  # fmt: skip
    whole, parts = (plans[parts].memory for parts in (False, True))
    assert whole.masters == 2 * 64 * 64 * 4 and parts.masters == whole.masters // 4
    assert parts.working <= whole.working + 2 * 64 * 64 * 2 and parts.optimizer == whole.optimizer
    gathered = [message for message in plans[True].work.once.messages if message.kind == "all-gather"]
    assert [message.nbytes for message in gathered] == [2 * 64 * 64 * 2]  # in bfloat16


def test_parameters_in_parts_need_an_axis():
    with pytest.raises(ValueError, match=r"zero1_parameters=True without zero1_axis: .* such as zero1_axis=\('dp',\)"):
        pipeline(zero1_axis=None, zero1_parameters=True)


def test_one_reduce_scatter_and_one_all_gather_for_each_parameter():
    """No parameter's gradient is all-reduced over dp, and nothing is gathered but updates."""
    params, batch = make()
    params = params._replace(stages={"w": params.stages["w"]})

    def stage(params, x, ctx):
        return x + jnp.tanh(x @ params["w"])

    step = jaxpipe.value_and_grad(
        stage, SCHEDULE, jaxpipe.make_mesh(pp=2, dp=4), embed=embed, head=head,
        data_axes=("dp",), zero1_axis="dp", min_shard_size=64, order="storage",
    )  # fmt: skip
    placed = jax.device_put(params, step.shardings(params))
    _, _, compiled = train(step, jaxpipe.shard_optimizer(optax.adamw(0.1), step), placed, batch)
    text = compiled.as_text()
    for name, count in (("reduce-scatter", 2), ("all-gather", 2)):
        assert len(re.findall(rf" {name}(?:-start)?\(", text)) == count, name
    reduced = re.findall(r"(\w+\[[\d,]*\])\S* all-reduce(?:-start)?\(", text)
    assert not [shape for shape in reduced if f",{WIDTH}]" in shape and "[12" in shape]


def test_zero1_beside_fsdp_and_what_stays_whole():
    params, _ = make()
    step = pipeline(fsdp_axis="dp", min_shard_size=0)
    specs = jax.tree.map(lambda sharding: sharding.spec, step.grad_shardings(params))
    assert specs == jax.tree.map(lambda sharding: sharding.spec, step.shardings(params))
    step = pipeline(min_shard_size=64)
    assert step.shardings(params).stages["w"].spec == P("pp")
    assert step.grad_shardings(params).stages["w"].spec == P("pp", "dp")
    assert step.grad_shardings(params).stages["b"].spec == P("pp")
    with pytest.raises(ValueError, match=r"zero1_axis='tp': name axes of data_axes, \['dp'\] here"):
        pipeline(zero1_axis="tp")


def test_plans_count_shards():
    """Of the optimizer's state with ZeRO-1, and of parameters, working copies and sums with FSDP."""
    shapes = jaxpipe.Params(jax.ShapeDtypeStruct((2, 64, 64), jnp.float32), None)
    batch = jax.ShapeDtypeStruct((MICROBATCHES * 8, 64), jnp.float32)
    schedule, mesh = jaxpipe.schedule.build("1f1b", 2, MICROBATCHES), jaxpipe.make_mesh(pp=2, dp=4)
    memory = {}
    for name in ("none", "zero1_axis", "fsdp_axis"):
        options = {} if name == "none" else {name: "dp", "min_shard_size": 0}
        step = jaxpipe.value_and_grad(
            lambda w, x, ctx: x @ w, schedule, mesh, head=lambda outer, y, data, ctx: (y**2).mean(),
            data_axes="dp", **options,
        )  # fmt: skip
        memory[name] = jaxpipe.plan(step, shapes, batch, "H200", optimizer=optax.adam(0.1)).memory
    whole = 64 * 64 * 4
    assert memory["none"].optimizer == 2 * whole + 4 and memory["none"].masters == whole
    assert memory["zero1_axis"].optimizer == 2 * whole // 4 + 4 and memory["zero1_axis"].masters == whole
    assert memory["fsdp_axis"].optimizer == 2 * whole // 4 + 4
    assert memory["fsdp_axis"].masters == memory["fsdp_axis"].gradients == whole // 4
