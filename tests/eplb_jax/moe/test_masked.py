"""Masked tokens may hold anything; the balance loss of a masked batch does not depend on how it is divided."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from eplb_jax import ExpertParams, MoEParams, balance_loss, moe_layer, param_specs, route, working_copies
from tests.cases import cases
from tests.eplb_jax.moe import dense
from tests.eplb_jax.moe.test_layer import CONFIG, EXPERTS, FACTOR, WIDTH, make_mesh, make_params, random_placement
from tests.eplb_jax.moe.test_router import loss_by_sequence
from tests.plain import assert_trees_close

SEQUENCES, LENGTH = 8, 6


def masked_batch():
    """Tokens [sequences, length, D] and a mask; sequences of very different lengths, one without any real token."""
    lengths = np.array([6, 1, 0, 3, 6, 2, 5, 1])
    mask = np.arange(LENGTH) < lengths[:, None]
    return jax.random.normal(jax.random.key(3), (SEQUENCES, LENGTH, WIDTH)), jnp.asarray(mask)


@functools.cache
def make_all():
    """Parameters, tokens, mask, and of the plain program: loss, outputs of real tokens, gradients."""
    params, (x, mask) = make_params(), masked_batch()
    real, owner = np.asarray(mask).ravel(), np.repeat(np.arange(SEQUENCES), LENGTH)
    flat = x.reshape(-1, WIDTH)[real]
    chosen = dense.choose(np.asarray(flat @ params.router), np.asarray(params.bias), CONFIG.router)

    def plain(params, x):
        """Sums over real tokens: of the output's squares, and of each token's sequence's balance loss; their mean."""
        flat = x.reshape(-1, WIDTH)[real]
        y, losses = dense.layer(params, flat, CONFIG, chosen), jnp.zeros(())
        for sequence in np.unique(owner[real]):
            here = owner[real] == sequence
            losses += int(here.sum()) * dense.balance_loss(params, flat[here], CONFIG, chosen[here], 1)
        return ((y**2).sum() + FACTOR * losses) / int(real.sum()), y

    (expected, y), grads = jax.jit(jax.value_and_grad(plain, (0, 1), has_aux=True))(params, x)
    return params, x, mask, expected, y, grads


@cases(
    ("ep", "garbage"),
    [pytest.param(None, jnp.inf, marks=pytest.mark.slow), (1, jnp.nan), (2, jnp.inf), (4, jnp.nan)],
    quick=[(2, jnp.inf)],
)
def test_masked_tokens_may_hold_anything_on_any_number_of_devices(x64, ep, garbage):
    """Loss, output and gradients are the plain program's of real tokens; what is masked comes out as zeros."""
    params, x, mask, expected, y_plain, grads_plain = make_all()
    placement = jax.tree.map(jnp.asarray, random_placement(ep or 1, 8, 0))
    axis = None if ep is None else "ep"

    def body(params, x, mask):
        params = params._replace(experts=working_copies(params.experts, placement.phy2log, axis))
        y, stats = moe_layer(
            params, x.reshape(-1, WIDTH), CONFIG, placement=placement, axis=axis, sequences=len(x), mask=mask.ravel()
        )
        total, count, loss, loads = (y**2).sum(), mask.sum(dtype=x.dtype), stats.balance_loss, stats.loads
        if axis is not None:
            total, count, loads = jax.lax.psum((total, count, loads), axis)
            loss = jax.lax.pmean(loss, axis)
        return total / count + FACTOR * loss, (y.reshape(x.shape), loads)

    mapped = body
    if ep is not None:
        specs, out = (param_specs(CONFIG, "ep"), P("ep"), P("ep")), (P(), (P("ep"), P()))
        mapped = jax.shard_map(body, mesh=make_mesh(ep), in_specs=specs, out_specs=out)
    dirty = jnp.where(mask[..., None], x, garbage)
    (loss, (y, loads)), grads = jax.jit(jax.value_and_grad(mapped, (0, 1), has_aux=True))(params, dirty, mask)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(y[mask], y_plain, rtol=1e-10, atol=1e-12)
    assert not np.any(y[~mask]) and not np.any(grads[1][~mask])
    assert int(loads.sum()) == int(mask.sum()) * CONFIG.router.top_k
    assert_trees_close(grads, grads_plain, rtol=1e-10)


def test_gradients_that_are_nan_where_tokens_are_masked(x64):
    """A cotangent that holds NaN in masked rows reaches no parameter."""
    params, x, mask, *_ = make_all()
    x, mask = x.reshape(-1, WIDTH), mask.ravel()

    @jax.jit
    def pull(ct):
        return jax.vjp(lambda params, x: moe_layer(params, x, CONFIG, mask=mask)[0], params, x)[1](ct)

    ct = jax.random.normal(jax.random.key(5), x.shape)
    dirty, clean = (pull(jnp.where(mask[:, None], ct, other)) for other in (jnp.nan, 0.0))
    assert_trees_close(dirty, clean, rtol=0)
    assert not np.any(clean[1][~mask])


@cases(
    ("ep", "microbatches"),
    [(1, 2), pytest.param(1, 4, marks=pytest.mark.slow), (2, 1), (2, 4), pytest.param(4, 2, marks=pytest.mark.slow)],
    quick=[(2, 4)],
)
def test_a_masked_batch_divided_into_microbatches_and_over_devices(x64, ep, microbatches):
    """A pipeline that weighs microbatches by their real tokens, some of which have none on some devices."""
    params, x, mask, expected, _, grads_plain = make_all()
    schedule = jaxpipe.schedule.build("gpipe", 1, microbatches)

    def stage(params, x, ctx):
        rows = MoEParams(
            params["router"], params["bias"], ExpertParams(*params["experts"]), ExpertParams(*params["shared"])
        )
        mask = ctx.data["mask"]
        y, stats = moe_layer(rows, x.reshape(-1, WIDTH), CONFIG, axis="ep", sequences=len(x), mask=mask.ravel())
        return jaxpipe.Output(y.reshape(x.shape), FACTOR * stats.balance_loss)

    def head(outer, y, data, ctx):
        return (y**2).sum() / jnp.maximum(data["mask"].sum(dtype=y.dtype), 1)

    stages = {"router": params.router, "bias": params.bias, "experts": [*params.experts], "shared": [*params.shared]}
    stages = jax.tree.map(lambda leaf: leaf[None], stages)
    specs = {"router": P("pp"), "bias": P("pp"), "experts": P("pp", "ep"), "shared": P("pp")}
    step = jaxpipe.value_and_grad(
        stage,
        schedule,
        jaxpipe.make_mesh(pp=1, ep=ep),
        embed=lambda outer, data, ctx: jnp.where(data["mask"][..., None], data["x"], jnp.nan),
        head=head,
        weight=lambda data: data["mask"].sum(),
        data_axes=("ep",),
        specs=jaxpipe.Params(specs, P()),
    )
    (loss, _), grads = jax.jit(step)(jaxpipe.Params(stages), {"x": x, "mask": mask})
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    found = jax.tree.map(lambda leaf: leaf[0], grads.stages)
    want = grads_plain[0]
    want = {"router": want.router, "bias": want.bias, "experts": [*want.experts], "shared": [*want.shared]}
    assert_trees_close(found, want, rtol=1e-10)


def test_the_router_alone_looks_at_no_masked_logits(x64):
    rng = np.random.default_rng(0)
    logits, mask = rng.standard_normal((24, EXPERTS)), rng.random(24) < 0.6
    dirty = jnp.asarray(np.where(mask[:, None], logits, np.nan))

    def loss(logits):
        routing = route(logits, CONFIG.router, mask=jnp.asarray(mask))
        return balance_loss(routing, CONFIG.router, sequences=4) + routing.weights.sum(), routing

    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    ((_, routing), gradient), ((_, other), other_gradient) = both(dirty), both(jnp.asarray(logits))
    assert_trees_close((routing, gradient), (other, other_gradient), rtol=0)
    assert not np.any(routing.scores[~mask]) and not np.any(gradient[~mask])
    scores = 1 / (1 + np.exp(-logits))
    expected = loss_by_sequence(scores, np.asarray(other.experts), 4, CONFIG.router.top_k, mask)
    np.testing.assert_allclose(balance_loss(routing, CONFIG.router, sequences=4), expected, rtol=1e-12)
