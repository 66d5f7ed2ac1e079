"""What is summed over microbatches, devices and stages: losses, their weights, gradients and metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe._jax import Literal
from tests.cases import cases
from tests.plain import assert_trees_close

WIDTH = 4


def make_step(head, name="1f1b", ranks=2, microbatches=4, stage=lambda w, x, ctx: x @ w, mesh=None, **options):
    schedule = jaxpipe.schedule.build(name, ranks, microbatches)
    mesh = mesh or jaxpipe.make_mesh(pp=ranks)
    return schedule, jax.jit(jaxpipe.value_and_grad(stage, schedule, mesh, head=head, **options))


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def masked_mean(values, mask):
    """NaN, and so are its gradients, where nothing is unmasked."""
    return (values * mask).sum() / mask.sum()


def masked_embed(outer, data, ctx):
    mask = data["mask"][..., None]
    return data["x"] * outer["scale"] + jnp.sqrt((mask * data["x"] ** 2).sum())


def masked_stage(p, x, ctx):
    """Attends to the unmasked positions, so that without any all that it makes is NaN."""
    mask = ctx.data["mask"]
    scores = jnp.where(mask[:, None] > 0, jnp.einsum("btd,bsd->bts", x, x @ p["w"]), -jnp.inf)
    y = x + jnp.tanh(jax.nn.softmax(scores) @ x)
    return jaxpipe.Output(y, masked_mean((y**2).mean(-1), mask), {"tokens": mask.sum()})


def masked_head(outer, y, data, ctx):
    return masked_mean(((y * outer["scale"]) ** 2).mean(-1), data["mask"])


def masked_loss(params, data):
    """The plain mean over all real tokens of all microbatches that have any; each a dict."""
    total = 0.0
    for one in data:
        x, aux_losses = masked_embed(params.outer, one, None), 0.0
        for w in params.stages["w"]:
            ctx = jaxpipe.Context(None, None, None, one)
            x, aux_loss, _ = masked_stage({"w": w}, x, ctx)
            aux_losses += aux_loss
        total += one["mask"].sum() * (masked_head(params.outer, x, one, None) + aux_losses)
    return total / sum(one["mask"].sum() for one in data)


@cases(
    "name, ranks, dp, shared",
    [("1f1b", 1, 1, False), ("1f1b", 2, 1, False), ("zb1p", 2, 2, False), ("dualpipev", 2, 1, True)],
    quick=[("zb1p", 2, 2, False), ("dualpipev", 2, 1, True)],
)
def test_a_microbatch_without_tokens_means_nothing(x64, name, ranks, dp, shared):
    """Its loss, its activations and all their derivatives are NaN; on one device only where there are two."""
    schedule, step = make_step(
        masked_head, name, ranks, 4, masked_stage, jaxpipe.make_mesh(pp=ranks, dp=dp), embed=masked_embed,
        weight=lambda data: data["mask"].sum(), shared_ends=shared, data_axes=("dp",),
    )  # fmt: skip
    mask = np.ones((4 * dp, 1, 3))
    mask[[1, -1]] = 0
    mask[0, 0, 1] = 0
    batch = {"x": random(4 * dp, 3, WIDTH), "mask": jnp.asarray(mask[:, 0])}
    params = jaxpipe.Params({"w": random(schedule.num_stages, WIDTH, WIDTH)}, {"scale": random(WIDTH, seed=1)})
    (loss, aux), grads = step(params, batch)
    real = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch) for i in range(4 * dp) if mask[i].any()]
    expected, expected_grads = jax.value_and_grad(masked_loss)(params, real)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert_trees_close(grads, expected_grads, rtol=1e-10)
    assert int(aux["tokens"]) == mask.sum() * schedule.num_stages

    (loss, aux), grads = step(params, batch | {"mask": jnp.zeros_like(batch["mask"])})
    assert float(loss) == float(aux["aux_loss"]) == 0.0
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads))


def swapped_mean(x):
    return (x + jax.lax.ppermute(x, "dp", [(0, 1), (1, 0)])) / 2


@pytest.mark.parametrize("name, ranks, mean", [("zb1p", 2, lambda x: jax.lax.pmean(x, "dp")), ("zbv", 1, swapped_mean)])
def test_devices_that_exchange_activations_get_no_cotangents_without_weight(x64, name, ranks, mean):
    """Stages sum over dp; the head of a device's microbatch without tokens has cotangents that are NaN."""
    count = 4
    _, step = make_step(
        lambda outer, y, data, ctx: masked_mean((y**2).mean(-1), data["mask"]), name, ranks, count,
        lambda w, x, ctx: jnp.tanh(x @ w) + mean(x) @ w, jaxpipe.make_mesh(pp=ranks, dp=2),
        embed=lambda outer, data, ctx: data["x"], weight=lambda data: data["mask"].sum(), data_axes=("dp",),
    )  # fmt: skip
    mask = np.ones((2, count, 2))
    mask[0, 1] = mask[1, 2] = 0
    x, weights = random(2, count, 2, WIDTH), random(2, WIDTH, WIDTH, seed=1)

    def plain(weights):
        y = x
        for w in weights:
            y = jnp.tanh(y @ w) + y.mean(0, keepdims=True) @ w
        return masked_mean((y**2).mean(-1), mask)

    batch = {"x": x.reshape(-1, WIDTH), "mask": jnp.asarray(mask.reshape(-1))}
    (loss, _), grads = step(jaxpipe.Params(weights), batch)
    expected, expected_grads = jax.value_and_grad(plain)(weights)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert_trees_close(grads.stages, expected_grads, rtol=1e-10)


@cases("microbatches", [8, 12, 100], quick=[12])
@pytest.mark.parametrize("weight", [None, lambda data: 7])
def test_shares_are_not_rounded_to_the_losses_dtype(microbatches, weight):
    """1/12 in bfloat16 is 0.2% too large, and so were loss and gradients; here all but the losses is float32."""

    def stage(w, x, ctx):
        y = x @ w
        return jaxpipe.Output(y, jnp.mean(y**2).astype(jnp.bfloat16))

    _, step = make_step(lambda outer, y, data, ctx: jnp.mean((y * outer) ** 2).astype(jnp.bfloat16), "zb1p", 2,
                        microbatches, stage, weight=weight)  # fmt: skip
    x, params = jnp.ones((microbatches, WIDTH)), jaxpipe.Params(jnp.stack([jnp.eye(WIDTH)] * 2), jnp.float32(1))
    (loss, aux), _ = step(params, x)
    assert loss.dtype == aux["aux_loss"].dtype == jnp.float32
    assert float(loss) == pytest.approx(3, rel=1e-6) and float(aux["aux_loss"]) == pytest.approx(2, rel=1e-6)

    def plain(params):
        y = x @ params.stages[0]
        z = y @ params.stages[1]
        return jnp.mean(y**2) + jnp.mean(z**2) + jnp.mean((z * params.outer) ** 2)

    x, params = random(microbatches, WIDTH).astype(jnp.float32), params._replace(stages=random(2, WIDTH, WIDTH) * 0.3)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    with jax.default_matmul_precision("highest"):
        assert_trees_close(step(params, x)[1], jax.grad(plain)(params), rtol=3e-6)


@pytest.mark.parametrize("weight", [
    lambda data: data["mask"].sum(),
    lambda data: (data["mask"] > 0).sum(),
    lambda data: data["mask"].sum(dtype=jnp.uint8),
    lambda data: data["mask"].sum(dtype=jnp.bfloat16),
])  # fmt: skip
def test_weights_of_any_real_dtype(weight):
    mask = np.array([[1, 1], [1, 0], [0, 0], [1, 1]], np.float32)
    _, step = make_step(
        lambda outer, y, data, ctx: masked_mean(y.mean(-1), data["mask"][0]), ranks=1,
        embed=lambda outer, data, ctx: data["x"][0], weight=weight,
    )  # fmt: skip
    x = random(4, 2, WIDTH).astype(jnp.float32)
    (loss, _), _ = step(jaxpipe.Params(jnp.eye(WIDTH)[None]), {"x": x, "mask": jnp.asarray(mask)})
    assert float(loss) == pytest.approx(float((x.mean(-1) * mask).sum() / mask.sum()), rel=1e-5)


@pytest.mark.parametrize("returned, words", [
    (lambda data: data.sum(-1), r"weight returned float32\[2\].*one real number"),
    (lambda data: data.sum().astype(jnp.complex64), r"weight returned complex64\[\].*one real number"),
    (lambda data: (1.0, 2.0), r"weight returned \(float32\[\], float32\[\]\).*one real number"),
    (lambda data: None, "weight returned None.*one real number"),
])  # fmt: skip
def test_weights_that_are_not_one_number(returned, words):
    _, step = make_step(lambda outer, y, data, ctx: y.mean(), weight=returned)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(step, jaxpipe.Params(jnp.ones((2, WIDTH, WIDTH))), jnp.ones((8, WIDTH)))


METRICS = {
    "flag": (lambda x: jnp.any(x > 0), 1, jnp.int32),
    "constant": (lambda x: True, 1, jnp.int32),
    "bytes": (lambda x: jnp.uint8(100), 100, jnp.uint32),
    "signed": (lambda x: jnp.full(2, -100, jnp.int8), -100, jnp.int32),
    "nibble": (lambda x: jnp.int4(-8), -8, jnp.int32),
    "words": (lambda x: np.uint16(60000), 60000, jnp.uint32),
    "count": (lambda x: jnp.int32(7), 7, jnp.int32),
    "python": (lambda x: 3, 3, jnp.int32),
    "half": (lambda x: jnp.float16(60000), 60000, jnp.float32),
    "float": (lambda x: 0.5, 0.5, jnp.float32),
    "odd": (lambda x: jnp.bfloat16(257), 256, jnp.float32),
}


@pytest.mark.parametrize("forward_only", [False, True])
def test_metrics_are_summed_in_a_dtype_that_holds_them(forward_only):
    """Over 2 stages, 4 microbatches and 2 devices; of the head over microbatches and devices."""

    def metrics(x, end=""):
        return {name + end: make(x) for name, (make, _, _) in METRICS.items()}

    def stage(w, x, ctx):
        return jaxpipe.Output(x @ w, metrics=metrics(x))

    def head(outer, y, data, ctx):
        return jaxpipe.Output(y.mean(), metrics=metrics(y, " of the head"))

    mesh, schedule = jaxpipe.make_mesh(pp=2, dp=2), jaxpipe.schedule.build("1f1b", 2, 4)
    params, x = jaxpipe.Params(jnp.stack([jnp.eye(WIDTH)] * 2)), jnp.ones((8, WIDTH))
    if forward_only:
        run = jaxpipe.forward(stage, schedule, mesh, data_axes=("dp",))
        _, found = jax.jit(run)(params, x)
    else:
        run = jaxpipe.value_and_grad(stage, schedule, mesh, head=head, data_axes=("dp",))
        (_, found), _ = jax.jit(run)(params, x)
    for name, (_, value, dtype) in METRICS.items():
        assert found[name].dtype == dtype and np.all(np.asarray(found[name]) == 16 * value), name
        if not forward_only:
            assert np.all(np.asarray(found[name + " of the head"]) == 8 * value), name
    assert len(found) == len(METRICS) * (1 if forward_only else 2)


@pytest.mark.parametrize("metrics, words", [
    ({"a": {"b": 1.0}}, r"metric 'a' is {'b': 1.0}: metrics are a flat dict"),
    ({"a": None}, "metric 'a' is None"),
    ({"a": "text"}, "metric 'a' is 'text'"),
    ({"a": 2**40}, "metric 'a' is 1099511627776"),
    (None, "stage's metrics are None: give a flat dict"),
    ([1.0], r"stage's metrics are \[1.0\]: give a flat dict"),
])  # fmt: skip
def test_metrics_that_cannot_be_summed(metrics, words):
    def stage(w, x, ctx):
        return jaxpipe.Output(x @ w, metrics=metrics)

    schedule, step = make_step(lambda outer, y, data, ctx: y.mean(), stage=stage)
    params, x = jaxpipe.Params(jnp.ones((2, WIDTH, WIDTH))), jnp.ones((8, WIDTH))
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(step, params, x)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(jaxpipe.forward(stage, schedule, jaxpipe.make_mesh(pp=2)), params, x)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("loss, words", [
    (lambda y: (y.mean(), {"n": 1.0}), r"type tuple, \(float32\[\], {'n': .*}\).*jaxpipe.Output\(value.*metrics"),
    (lambda y: {"loss": y.mean()}, r"type dict, {'loss': float32\[\]}"),
    (lambda y: None, "type NoneType, None"),
    (lambda y: (y > 0).sum(), r"dtype int32, int32\[\].*floating scalar.*metrics"),
    (lambda y: (y > 0).all(), "dtype bool"),
    (lambda y: y.mean().astype(jnp.complex64), r"dtype complex64.*real floating"),
    (lambda y: jaxpipe.Output(3), "dtype int32"),
    (lambda y: jaxpipe.Output(y.mean(), aux_loss=1), "head's aux_loss has dtype int32, 1"),
])  # fmt: skip
def test_heads_that_return_no_loss(loss, words, shared):
    _, step = make_step(lambda outer, y, data, ctx: loss(y), shared_ends=shared)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(step, jaxpipe.Params(jnp.ones((2, WIDTH, WIDTH))), jnp.ones((8, WIDTH)))


@pytest.mark.parametrize("returned, words", [
    (lambda y: jaxpipe.Output(y, 0), "aux_loss has dtype int32, 0: .*0.0"),
    (lambda y: jaxpipe.Output(y, jnp.any(y > 0)), "aux_loss has dtype bool"),
    (lambda y: jaxpipe.Output(y, {"balance": 0.0}), "aux_loss has type dict"),
    (lambda y: (y, 0.0), r"maps float32\[2, 4\] to .*jaxpipe.Output\(y, aux_loss, metrics\)"),
    (lambda y: {"y": y, "name": "layer"}, r"returned 'layer' at \['name'\]: return a pytree of arrays"),
])  # fmt: skip
def test_stages_that_return_something_else(returned, words):
    _, step = make_step(lambda outer, y, data, ctx: y.mean(), stage=lambda w, x, ctx: returned(x @ w))
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(step, jaxpipe.Params(jnp.ones((2, WIDTH, WIDTH))), jnp.ones((8, WIDTH)))


def test_losses_that_are_pythons_numbers():
    """As dense layers return beside layers with a balance loss."""
    _, step = make_step(
        lambda outer, y, data, ctx: jaxpipe.Output(y.mean(), aux_loss=0.25),
        stage=lambda w, x, ctx: jaxpipe.Output(x @ w, 0.0),
    )
    (loss, aux), grads = step(jaxpipe.Params(jnp.stack([jnp.eye(WIDTH)] * 2)), jnp.ones((8, WIDTH)))
    assert float(loss) == 1.25 and float(aux["aux_loss"]) == 0.0
    np.testing.assert_allclose(grads.stages, 1 / WIDTH, rtol=1e-6)


def test_sums_begin_as_no_constant():
    """Zeros that are a constant XLA makes once with the zeros that are gradients, and keeps them all step long."""

    def stage(p, x, ctx):
        return jnp.tanh(x @ p["used"])

    def zeros_of(name):
        schedule, mesh = jaxpipe.schedule.build(name, 2, 4), jaxpipe.make_mesh(pp=2)
        step = jaxpipe.value_and_grad(stage, schedule, mesh, head=lambda outer, y, data, ctx: (y**2).mean())
        params = {name: random(schedule.num_stages, WIDTH, WIDTH) for name in ("used", "not used")}
        closed = jax.make_jaxpr(step)(jaxpipe.Params(params), random(8, WIDTH))
        (body,) = (eqn.params["jaxpr"] for eqn in closed.eqns if eqn.primitive.name == "shard_map")
        return [eqn for eqn in body.eqns if "sums" in str(eqn.source_info.name_stack).split("/")]

    for name in ("1f1b", "dualpipev"):
        found = zeros_of(name)
        assert found
        assert not any(isinstance(atom, Literal) for eqn in found for atom in eqn.invars)
