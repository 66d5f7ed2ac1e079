"""13 layers of three kinds in an irregular order on 4 ranks: equal to the plain model, every weight product in W."""

import collections
import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.flax import nnx_stages, unstack_layers
from jaxpipe.stage import matmul_flops, split_stage
from tests.cases import cases
from tests.plain import assert_trees_close

ROWS, WIDTH, HIDDEN, MICROBATCHES = 5, 4, 6, 8
KINDS = ("tanh", "gated", "attention")
ORDER = (0, 2, 1, 1, 0, 2, 2, 0, 1, 2, 0, 1, 2)
SCHEDULES = {name: jaxpipe.schedule.build(name, 4, MICROBATCHES) for name in ("zb1p", "dualpipev")}


class Layer(nnx.Module):
    """A layer of one of three kinds, all with the same parameters; ``twin`` is the same but for a sign."""

    def __init__(self, rngs, kind, *, twin=False):
        linear = functools.partial(
            nnx.Linear, rngs=rngs, use_bias=False, dtype=jnp.float64, param_dtype=jnp.float64,
            kernel_init=nnx.initializers.normal(0.2),
        )  # fmt: skip
        self.a, self.b, self.out = linear(WIDTH, HIDDEN), linear(WIDTH, HIDDEN), linear(HIDDEN, WIDTH)
        self.kind, self.twin = kind, twin

    def __call__(self, x):
        a, b = self.a(x), self.b(x)
        match self.kind:
            case "tanh":
                h = jnp.tanh(a) + jnp.sin(b)
            case "gated":
                h = jax.nn.silu(a) * b
            case "attention":
                h = jax.nn.softmax(a @ jnp.swapaxes(b, -1, -2)) @ b
        return x + self.out(-h if self.twin else h)


def make_stages(schedule):
    kinds = iter(ORDER)
    stage, stacked = nnx_stages(
        lambda rngs: Layer(rngs, KINDS[next(kinds)]), schedule, nnx.Rngs(0), num_layers=len(ORDER)
    )
    return stage, stacked


def head(outer, y, data, ctx):
    return jnp.mean((y - jnp.cos(data)) ** 2)


@pytest.mark.parametrize("name", ["zb1p", pytest.param("dualpipev", marks=pytest.mark.slow)])
def test_the_pipeline_is_the_plain_model(x64, name):
    schedule = SCHEDULES[name]
    stage, stacked = make_stages(schedule)
    batch = jnp.asarray(np.random.default_rng(1).normal(size=(2 * MICROBATCHES, ROWS, WIDTH)))
    step = jaxpipe.value_and_grad(stage, schedule, jaxpipe.make_mesh(pp=4), head=head)
    (loss, _), grads = jax.jit(step)(jaxpipe.Params(stacked), batch)

    rngs = nnx.Rngs(0)
    modules = [Layer(rngs, KINDS[kind]) for kind in ORDER]
    graphdefs, params = zip(*(nnx.split(module, nnx.Param) for module in modules), strict=True)

    @jax.jit
    @jax.value_and_grad
    def plain(params):
        x = batch
        for graphdef, each in zip(graphdefs, params, strict=True):
            x = nnx.merge(graphdef, each)(x)
        return head(None, x, batch, None)

    expected, expected_grads = plain(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    got = unstack_layers(grads.stages, len(ORDER), schedule)
    assert_trees_close(got, [nnx.to_pure_dict(grad) for grad in expected_grads], rtol=1e-10)


@cases("name", SCHEDULES, quick=["dualpipev"])
def test_every_weight_product_is_in_the_weights_half(x64, name):
    """For each kind FLOPs(I) + FLOPs(W) = FLOPs(backward), and W is the layers' own products, once each."""
    schedule = SCHEDULES[name]
    stage, stacked = make_stages(schedule)
    params, x = jaxpipe.unstack_stages(stacked, schedule)[0], jnp.ones((2, ROWS, WIDTH))
    ctx = jaxpipe.Context.make(0, 0, None, None, num_stages=schedule.num_stages)
    split = split_stage(stage, params, x, ctx)
    assert split.opaque == ()

    out_ct = jnp.ones_like(x)
    prepared = split.prepare(params)
    residuals = split.forward(prepared, x, ctx)[-1]
    crossing = split.backward_input(prepared, residuals, out_ct)[1]
    vjp = jax.vjp(lambda params, x: stage(params, x, ctx), params, x)[1]
    slots = -(-len(ORDER) // schedule.num_stages)
    weights = 2 * 2 * ROWS * WIDTH * HIDDEN * 3
    scores = 2 * 2 * ROWS * ROWS * HIDDEN * 2
    halves = []
    for kind in range(len(KINDS)):
        flops = functools.partial(matmul_flops, branch=kind)
        first = flops(split.backward_input, prepared, residuals, out_ct)
        second = flops(split.backward_weight, prepared, residuals.weight, crossing)
        assert first + second == flops(vjp, out_ct)
        halves.append((first // slots, second // slots))
    # Each product with a matrix of weights has one for the input and one for the weights; attention's two have two
    # each, both on the way to the input.
    assert sorted(halves) == sorted([(weights, weights), (weights, weights), (weights + 2 * scores, weights)])
    # On the way from layer to layer nothing of the size of parameters is kept.
    matrices = {leaf.shape for leaf in jax.tree.leaves(params)}
    kept = jax.tree.leaves((split.residuals, split.crossing))
    assert matrices.isdisjoint(leaf.shape for leaf in kept)


def test_a_plan_counts_divided_layers_as_whole_ones(x64):
    """The work of I and W is that of the whole backward, with layers of several kinds, too."""
    batch = jnp.ones((2 * MICROBATCHES, ROWS, WIDTH))

    def planned(name):
        schedule = jaxpipe.schedule.build(name, 4, MICROBATCHES)
        stage, stacked = make_stages(schedule)
        pipeline = jaxpipe.value_and_grad(stage, schedule, jaxpipe.make_mesh(pp=4), head=head)
        return jaxpipe.plan(pipeline, jaxpipe.Params(stacked), batch, chip="H100")

    divided, whole = planned("zb1p").work.actions, planned("1f1b").work.actions
    assert 0 < divided["W"].flops < divided["I"].flops
    assert divided["I"].flops + divided["W"].flops == whole["B"].flops
    assert divided["F"].flops == whole["F"].flops


def test_a_stash_is_that_of_the_largest_kind(x64):
    """Of each shape, layers of all kinds together keep and hand over as many arrays as the kind with most of them.

    A kind is alone beside its twin, so that a conditional chooses there, too.
    """

    def shapes(order):
        kinds, schedule = itertools.cycle(order), SCHEDULES["zb1p"]
        stage, stacked = nnx_stages(lambda rngs: Layer(rngs, **next(kinds)), schedule, nnx.Rngs(0), num_layers=13)
        params, x = jaxpipe.unstack_stages(stacked, schedule)[0], jnp.ones((2, ROWS, WIDTH))
        split = split_stage(stage, params, x, jaxpipe.Context.make(0, 0, None, None, num_stages=4))
        floating = [leaf for leaf in jax.tree.leaves(split.residuals) if leaf.dtype == jnp.float64]
        return [collections.Counter(leaf.shape for leaf in leaves) for leaves in (floating, split.crossing)]

    twins = [[{"kind": kind}, {"kind": kind, "twin": True}] for kind in KINDS]
    for together, *alone in zip(shapes([{"kind": KINDS[i]} for i in ORDER]), *map(shapes, twins), strict=True):
        assert together == functools.reduce(operator.or_, alone)
