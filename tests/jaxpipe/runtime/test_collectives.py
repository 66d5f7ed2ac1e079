"""Collectives over the pipeline axis: refused, when traced, in whatever one rank runs alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpipe

SCHEDULE = jaxpipe.schedule.build("zb1p", 2, 4)
W, X = jnp.ones((2, 4, 4)), jnp.ones((16, 4))


def plain(w, x, ctx):
    return jnp.tanh(x @ w)


def head(outer, y, data, ctx):
    return jnp.mean(y**2)


def trace(stage=plain, make=jaxpipe.value_and_grad, **options):
    mesh = jaxpipe.make_mesh(pp=2, dp=2)
    return jax.eval_shape(make(stage, SCHEDULE, mesh, data_axes=("dp",), **options), jaxpipe.Params(W), X)


def in_backward(x, axis):
    """x, whose cotangent is summed over an axis."""

    @jax.custom_vjp
    def same(x):
        return x

    same.defvjp(lambda x: (x, None), lambda _, ct: (lax.psum(ct, axis),))
    return same(x)


def nested(x, axis):
    inner = functools.partial(lax.psum, axis_name=(axis, "dp"))
    return lax.scan(lambda x, _: (jax.checkpoint(lambda x: jnp.sin(inner(x)))(x), None), x, length=2)[0]


def ring(x, axis):
    return lax.ppermute(x, axis, [(0, 1), (1, 0)])


WAYS = {
    "psum": lax.psum,
    "pmean": lax.pmean,
    "pmax": lambda x, axis: lax.pmax(lax.stop_gradient(x), axis) + x,
    "all_gather": lambda x, axis: lax.all_gather(x, axis).sum(0),
    "psum_scatter": lambda x, axis: jnp.tile(lax.psum_scatter(x, axis, tiled=True), (2, 1)),
    "all_to_all": lambda x, axis: lax.all_to_all(x, axis, 0, 0, tiled=True),
    "ppermute": ring,
    "two axes, in remat in a scan": nested,
    "cond": lambda x, axis: lax.cond(x.sum() > 0, lambda x: ring(x, axis), lambda x: x, x),
    "while": lambda x, axis: x + lax.while_loop(lambda c: lax.psum(c, axis) < 1, lambda c: c + 1, jnp.float32(0)),
    "jit": lambda x, axis: jax.jit(lambda x: ring(x, axis))(x),
    "vmap": lambda x, axis: jax.vmap(lambda row: ring(row, axis))(x),
    "custom_vjp": in_backward,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_stage_may_not_wait_for_other_ranks(way):
    def stage(w, x, ctx):
        return plain(w, WAYS[way](x, "pp"), ctx)

    with pytest.raises(ValueError, match=r"stage uses mesh axis 'pp'.*for ever.*any other axis"):
        trace(stage, head=head)
    if way != "custom_vjp":
        with pytest.raises(ValueError, match="stage uses mesh axis 'pp'"):
            trace(stage, jaxpipe.forward)


def test_a_stage_may_not_gather_its_parameters_over_ranks():
    """What depends on parameters alone is computed once a step, outside of the loop; it is refused all the same."""
    with pytest.raises(ValueError, match="stage uses mesh axis 'pp'"):
        trace(lambda w, x, ctx: plain(lax.pmean(w, "pp"), x, ctx), head=head)


@pytest.mark.parametrize("way", ["ppermute", "custom_vjp"])
def test_lone_ends_may_not_wait_for_other_ranks(way):
    def embed(outer, data, ctx):
        return WAYS[way](data * outer, "pp")

    def summed(outer, y, data, ctx):
        return head(outer, WAYS[way](y, "pp"), data, ctx)

    mesh = jaxpipe.make_mesh(pp=2)
    for name, functions in {"embed": {"embed": embed, "head": head}, "head": {"head": summed}}.items():
        step = jaxpipe.value_and_grad(plain, SCHEDULE, mesh, **functions)
        with pytest.raises(ValueError, match=f"{name} uses mesh axis 'pp'.*shared_ends=True"):
            jax.eval_shape(step, jaxpipe.Params(W, jnp.ones(4)), X)


@pytest.mark.parametrize("weight", [lambda data: lax.psum(data.sum(), "pp"), lambda data: lax.axis_index("pp")])
def test_a_weight_is_the_same_on_all_ranks(weight):
    with pytest.raises(ValueError, match=r"weight uses mesh axis 'pp'.*same on all pipeline ranks"):
        trace(head=head, weight=weight)


def test_what_waits_for_nobody_is_allowed():
    """The rank's number, the number of ranks, and collectives over other axes, whatever their names are bound to."""

    def stage(w, x, ctx):
        x = jnp.where(lax.axis_index("pp") == 0, x, x) * lax.axis_size("pp") + lax.pmean(x, "dp")
        return plain(w, x, ctx) + jax.vmap(lambda row: lax.psum(row, "pp"), axis_name="pp")(x)

    def last(outer, y, data, ctx):
        return head(outer, jnp.where(lax.axis_index("pp") == 0, y, y), data, ctx)

    trace(stage, head=last)
    trace(stage, jaxpipe.forward)


def swapped(w, x, ctx):
    """Half of a ring over another axis, as in ring attention."""
    return plain(w, x, ctx) + ring(x, "dp")


def test_permutes_over_other_axes_need_all_ranks_too():
    """XLA pairs them with the messages between stages: the numbers were others on CPU."""
    recipe = r"uses ppermute over mesh axis 'dp'.*all 2 ranks of 'pp'.*all_gather\(x, 'dp'\)\[source\]"
    with pytest.raises(ValueError, match="stage " + recipe):
        trace(swapped, head=head)
    with pytest.raises(ValueError, match="stage " + recipe):
        trace(swapped, jaxpipe.forward)

    def last(outer, y, data, ctx):
        return head(outer, ring(y, "dp"), data, ctx)

    with pytest.raises(ValueError, match="head " + recipe):
        trace(head=last)
    trace(head=last, shared_ends=True)


def test_what_the_message_says_instead_of_a_permute(x64):
    """A gather and the source's part, on two ranks; a permute, on one."""

    def gathered(w, x, ctx):
        return plain(w, x, ctx) + lax.all_gather(x, "dp")[1 - lax.axis_index("dp")]

    x = jax.random.normal(jax.random.key(0), (16, 4), jnp.float64)
    losses = []
    for stage, ranks in ((gathered, 2), (swapped, 1)):
        schedule = jaxpipe.schedule.build("interleaved" if ranks == 1 else "zb1p", ranks, 4)
        step = jaxpipe.value_and_grad(stage, schedule, jaxpipe.make_mesh(pp=ranks, dp=2), data_axes="dp", head=head)
        losses.append(jax.jit(step)(jaxpipe.Params(W.astype(x.dtype) / 4), x)[0][0])
    np.testing.assert_allclose(*losses, rtol=1e-12)
