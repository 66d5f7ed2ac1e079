"""Leaves of parameters that are not floating: integers, bools and keys work and stay; gradients are JAX's float0."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from tests.cases import cases
from tests.plain import assert_trees_close, plain_value_and_grad

WIDTH = 4


def leaves(rng, *rows):
    """One leaf of every kind that is not differentiated, each with the leading dimensions ``rows``."""
    return {
        "permutation": jnp.asarray(rng.permuted(np.broadcast_to(np.arange(WIDTH), (*rows, WIDTH)), axis=-1), jnp.int32),
        "mask": jnp.asarray(rng.random((*rows, WIDTH)) < 0.6),
        "key": jax.random.split(jax.random.key(int(rng.integers(100))), rows) if rows else jax.random.key(7),
        "raw": jnp.asarray(rng.integers(0, 2**32, (*rows, 2)), jnp.uint32),
        "byte": jnp.asarray(rng.integers(0, 256, (*rows, WIDTH)), jnp.uint8),
        "nibble": jnp.asarray(rng.integers(-8, 8, (*rows, WIDTH)), jnp.int4),
    }


def use(p, x):
    """X changed by every one of the leaves."""
    noise = jax.random.normal(p["key"], (WIDTH,), x.dtype) + jax.random.normal(p["raw"], (WIDTH,), x.dtype)
    small = (p["byte"].astype(jnp.int32) + p["nibble"].astype(jnp.int32)).astype(x.dtype) / 256
    return jnp.where(p["mask"], x[..., p["permutation"]], x) + noise + small


def stage(p, x, ctx):
    return x + jnp.tanh(use(p, x) @ p["w"])


def embed(outer, data, ctx):
    turned = outer["complex"] * jnp.exp(1j * data.astype(outer["complex"].dtype))
    return use(outer, data * outer["scale"] + turned.real.astype(data.dtype))


def head(outer, y, data, ctx):
    return jnp.mean(use(outer, y * outer["scale"]) ** 2)


def make_params(schedule, dtype=np.float64):
    rng = np.random.default_rng(0)
    stages = leaves(rng, schedule.num_stages) | {
        "w": jnp.asarray(rng.normal(size=(schedule.num_stages, WIDTH, WIDTH)) / 2, dtype)
    }
    outer = leaves(rng) | {
        "scale": jnp.asarray(rng.normal(size=WIDTH), dtype),
        "complex": jnp.asarray(rng.normal(size=WIDTH) + 1j * rng.normal(size=WIDTH), jnp.result_type(complex)),
    }
    return jaxpipe.Params(stages, outer)


@cases(
    "name, ranks, dispatch",
    [
        ("1f1b", 1, "unrolled"),
        ("dualpipe", 2, "stretches"),
        ("zbv", 2, "switch"),
    ],
    quick=[("zbv", 2, "switch")],
)
def test_equal_the_plain_program(x64, name, ranks, dispatch):
    """DualPipe fetches the leaves of its mirrored stages from other ranks."""
    schedule = jaxpipe.schedule.build(name, ranks, 4)
    params, batch = make_params(schedule), jnp.asarray(np.random.default_rng(1).normal(size=(8, WIDTH)))
    step = jaxpipe.value_and_grad(
        stage, schedule, jaxpipe.make_mesh(pp=ranks), embed=embed, head=head, dispatch=dispatch
    )
    (loss, _), grads = jax.jit(step)(params, batch)
    (expected, _), expected_grads = plain_value_and_grad(stage, schedule, embed=embed, head=head)(params, batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert_trees_close(grads, expected_grads, rtol=1e-10)


def test_beside_data_parallelism_and_shared_ends(x64):
    """Integer leaves sharded over the pipeline and over data-parallel devices; the forward pass has the same values."""
    schedule, mesh = jaxpipe.schedule.build("dualpipev", 2, 4), jaxpipe.make_mesh(pp=2, dp=2)
    params, batch = make_params(schedule), jnp.asarray(np.random.default_rng(1).normal(size=(16, WIDTH)))
    rows = jnp.arange(8, dtype=jnp.int8)
    params = params._replace(outer=params.outer | {"rows": rows})
    specs = jaxpipe.Params(P("pp"), dict.fromkeys(params.outer, P()) | {"rows": P("pp")})

    def shared_head(outer, y, data, ctx):
        return head(outer, y, data, ctx) * jax.lax.psum(outer["rows"].sum(dtype=jnp.int32), "pp").astype(y.dtype)

    step = jaxpipe.value_and_grad(
        stage, schedule, mesh, embed=embed, head=shared_head, specs=specs, data_axes=("dp",), shared_ends=True
    )
    (loss, _), grads = jax.jit(step)(params, batch)
    plain = plain_value_and_grad(stage, schedule, embed=embed, head=lambda *args: 28 * head(*args))
    (expected, _), expected_grads = plain(params, batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert_trees_close(grads, expected_grads, rtol=1e-10)

    run = jaxpipe.forward(
        stage, schedule, mesh, embed=embed, specs=specs, data_axes=("dp",), shared_ends=True,
        head=lambda outer, y, data, ctx: (use(outer, y * outer["scale"]) ** 2).mean(-1),
    )  # fmt: skip
    losses, _ = jax.jit(run)(params, batch)
    assert float(losses.mean()) * 28 == pytest.approx(float(loss), rel=1e-12)


@cases("shared", [False, True], quick=[True])
def test_activations_that_are_not_floating(x64, shared):
    """Keys, bools and small integers travel with the activations, and out of a forward pass."""
    schedule, mesh = jaxpipe.schedule.build("dualpipev", 2, 4), jaxpipe.make_mesh(pp=2)

    def start(outer, data, ctx):
        kinds = {
            "key": jax.random.key(3),
            "mask": data[0] > 0,
            "two": jnp.full(WIDTH, 2, jnp.int2 if shared else jnp.int4),
        }
        return kinds | {"h": data}

    def noisy(w, x, ctx):
        factor = jnp.where(x["mask"], x["two"].astype(jnp.int32), 1).astype(w.dtype)
        return x | {"h": jnp.tanh(x["h"] @ w) * factor + jax.random.normal(x["key"], (WIDTH,), w.dtype)}

    def end(outer, y, data, ctx):
        return (y["h"] ** 2).mean() + jax.random.normal(y["key"], dtype=y["h"].dtype)

    params, batch = (
        jaxpipe.Params(jnp.ones((4, WIDTH, WIDTH))),
        jnp.asarray(np.random.default_rng(1).normal(size=(8, 4))),
    )
    step = jaxpipe.value_and_grad(noisy, schedule, mesh, embed=start, head=end, shared_ends=shared)
    (loss, _), grads = jax.jit(step)(params, batch)
    (expected, _), expected_grads = plain_value_and_grad(noisy, schedule, embed=start, head=end)(params, batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert_trees_close(grads, expected_grads, rtol=1e-10)

    run = jaxpipe.forward(
        noisy, schedule, mesh, embed=start, shared_ends=shared,
        head=lambda outer, y, data, ctx: (jax.random.split(y["key"], 2), y["h"] > 0, y["h"]),
    )  # fmt: skip
    (keys, signs, h), _ = jax.jit(run)(params, batch)
    key_data = jax.random.key_data
    np.testing.assert_array_equal(key_data(keys).reshape(4, 2, -1), [key_data(jax.random.split(jax.random.key(3)))] * 4)
    np.testing.assert_array_equal(signs, h > 0)


def test_compute_dtype_leaves_them_alone():
    """A byte is 255 and an index past 256 right, whatever the floating leaves are cast to."""
    schedule = jaxpipe.schedule.build("1f1b", 2, 2)
    params = jaxpipe.Params(
        {"w": jnp.ones((2, 1)), "row": jnp.array([[255], [1]], jnp.uint8)}, jnp.array([299], jnp.int32)
    )

    def pick(p, x, ctx):
        return x * p["w"] * (p["row"] == jnp.where(ctx.stage == 0, 255, 1).astype(jnp.uint8)).astype(x.dtype)

    def end(outer, y, data, ctx):
        return jnp.mean(y) * (outer[0] == 299).astype(y.dtype)

    step = jaxpipe.value_and_grad(pick, schedule, jaxpipe.make_mesh(pp=2), head=end, compute_dtype=jnp.bfloat16)
    (loss, _), grads = jax.jit(step)(params, jnp.ones((4, 1)))
    assert float(loss) == 1.0 and grads.stages["w"].tolist() == [[1.0], [1.0]]
    assert grads.stages["row"].dtype == grads.outer.dtype == jax.dtypes.float0


@cases("jitted", [True, False], quick=[True])
def test_an_optimizer_leaves_them_as_they_are(jitted):
    """Decay that would halve them, momentum, clipping: every bit of every other leaf stays, keys included under jit."""
    schedule = jaxpipe.schedule.build("1f1b", 1, 2)
    params = make_params(schedule, np.float32)
    if not jitted:  # optax casts what it adds, which jax's keys do not support eagerly
        del params.stages["key"], params.outer["key"]

    def end(outer, y, data, ctx):
        return jnp.mean((y * outer["scale"] * outer["complex"].real) ** 2)

    step = jax.jit(jaxpipe.value_and_grad(lambda p, x, ctx: x @ p["w"], schedule, jaxpipe.make_mesh(pp=1), head=end))
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=5.0))
    optimizer = jaxpipe.floating_only(adam)

    def train(params, state):
        _, grads = step(params, jnp.ones((4, WIDTH)))
        with jax.numpy_dtype_promotion("standard"):  # optax promotes
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

    after, _ = (jax.jit(train) if jitted else train)(params, optimizer.init(params))
    before, after = (
        jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree) for tree in (params, after)
    )
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        assert old.dtype == new.dtype
        assert np.array_equal(old, new) != jnp.issubdtype(old.dtype, jnp.inexact), jax.tree_util.keystr(path)


def test_no_optimizer_takes_them_by_mistake():
    """Plain AdamW would decay an expert placement [0 5 7 2] to [0 4 6 1]: it raises instead, as do sums and norms."""
    placement = jnp.array([0, 5, 7, 2], jnp.int32)
    schedule = jaxpipe.schedule.build("1f1b", 1, 2)
    step = jaxpipe.value_and_grad(
        lambda w, x, ctx: x @ w, schedule, jaxpipe.make_mesh(pp=1),
        head=lambda outer, y, data, ctx: jnp.mean(y[:, outer] ** 2),
    )  # fmt: skip
    params = jaxpipe.Params(jnp.eye(8)[None], placement)
    _, grads = jax.jit(step)(params, jnp.ones((2, 8)))
    optimizer = optax.adamw(0.1, weight_decay=0.5)
    with jax.numpy_dtype_promotion("standard"):
        with pytest.raises(TypeError):
            optimizer.update(grads, optimizer.init(params), params)
        with pytest.raises(TypeError, match="float0"):
            optax.tree.norm(grads)
    with pytest.raises(TypeError):
        jax.tree.map(lambda a, b: a + b, grads, grads)


def is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
