"""Masks, names and norms of stacked parameters say what they say of the plain model's layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.flax import nnx_stages
from jaxpipe.nnx_model import from_nnx
from tests.plain import assert_trees_close

WIDTH, VOCABULARY, MICROBATCHES, LAYERS = 8, 16, 4, 5


class Norm(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.linspace(0.5, 1.5, WIDTH))

    def __call__(self, x):
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * self.scale[...]


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = Norm()
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
        return x + jnp.tanh(self.linear(self.norm(x)))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs, param_dtype=jnp.float64)
        self.layers = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = Norm()

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(self.norm(x))


def loss_of(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch), batch).mean()


def make_pipe(name="dualpipev", ranks=2, seed=0):
    schedule = jaxpipe.schedule.build(name, ranks, MICROBATCHES)
    return from_nnx(Model(nnx.Rngs(seed)), schedule, jaxpipe.make_mesh(pp=ranks), blocks="layers", loss=loss_of)


def make_batch():
    return jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (8, 3)))


def norm_of(tree):
    return jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(tree)))


def plain_params(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def test_the_mask_is_the_plain_models(x64):
    pipe, rule = make_pipe(), lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
    mask = pipe.stacking.weight_decay_mask(pipe.params)
    assert mask.stages == {"linear": {"bias": False, "kernel": True}, "norm": {"scale": False}}
    assert mask.outer == {"embed": {"embedding": True}, "norm": {"scale": False}}
    assert rule(pipe.params).stages["norm"]["scale"], "the usual rule is wrong on stacked rows"
    rows = jaxpipe.Params(*jax.tree.map(lambda leaf: np.zeros(leaf.shape), pipe.params))
    assert pipe.stacking.weight_decay_mask(rows) == mask


def test_each_way_of_stacking_has_the_same_mask(x64):
    schedule = jaxpipe.schedule.build("1f1b", 2, MICROBATCHES)
    for num_layers in (None, 2, 5):
        _, stages = nnx_stages(Block, schedule, nnx.Rngs(0), num_layers=num_layers)
        stacking = jaxpipe.Stacking(schedule, num_layers)
        mask = stacking.weight_decay_mask(jaxpipe.Params(stages, {"table": jnp.zeros((3, 2), jnp.int32)}))
        assert mask.stages == {"linear": {"bias": False, "kernel": True}, "norm": {"scale": False}}
        assert mask.outer == {"table": False}


@pytest.mark.parametrize("name", [pytest.param("dualpipev", marks=pytest.mark.slow), "1f1b"])
def test_adamw_clipped_equals_the_plain_models(x64, name):
    """Clipping, decay and a mask, three steps; gradients of padding are zero, so the global norm is the plain one."""
    pipe, batch = make_pipe(name), make_batch()
    model = Model(nnx.Rngs(0))
    step, plain_step = jax.jit(pipe), nnx.jit(nnx.grad(loss_of))

    def optimizer(mask):
        return optax.chain(optax.clip_by_global_norm(0.05), optax.adamw(1e-2, weight_decay=0.5, mask=mask))

    ours, theirs = (
        optimizer(pipe.stacking.weight_decay_mask), optimizer(lambda p: jax.tree.map(lambda leaf: leaf.ndim > 1, p))
    )  # fmt: skip
    params, plain = pipe.params, plain_params(model)
    state, plain_state = ours.init(params), theirs.init(plain)
    for _ in range(3):
        _, grads = step(params, batch)
        plain_grads = plain_params(plain_step(model, batch))
        assert float(pipe.stacking.global_norm(grads)) == pytest.approx(float(norm_of(grads)), rel=1e-12)
        with jax.numpy_dtype_promotion("standard"):  # as optax wants it
            updates, state = ours.update(grads, state, params)
            plain_updates, plain_state = theirs.update(plain_grads, plain_state, plain)
        params, plain = optax.apply_updates(params, updates), optax.apply_updates(plain, plain_updates)
        nnx.update(model, plain)
    assert_trees_close(plain_params(pipe.merge(params)), plain, rtol=1e-10)
    found = float(pipe.stacking.global_norm(params))
    assert found == pytest.approx(float(norm_of(plain)), rel=1e-12)
    cleared = pipe.stacking.without_padding(params)
    assert float(norm_of(cleared)) == pytest.approx(found, rel=1e-12)
    assert float(norm_of(params)) > found + 0.1, "padding counts in the norm of whole leaves"
    assert_trees_close(plain_params(pipe.merge(cleared)), plain, rtol=1e-10)


def test_norms_and_paths_name_the_plain_models_parameters(x64):
    pipe = make_pipe()
    model = pipe.merge(pipe.params)
    norms = jax.jit(pipe.stacking.norms)(pipe.params)
    assert set(norms) == {*(f"layers[{i}]" for i in range(LAYERS)), "outer"}
    for index, layer in enumerate(model.layers):
        expected = norm_of(plain_params(layer))
        assert float(norms[f"layers[{index}]"]) == pytest.approx(float(expected), rel=1e-12)
    each, paths = pipe.stacking.norms(pipe.params, each=True), pipe.stacking.paths(pipe.params)
    assert set(each) == set(paths)
    assert float(each["layers[3].linear.kernel"]) == pytest.approx(
        float(jnp.linalg.norm(model.layers[3].linear.kernel))
    )
    assert float(each["embed.embedding"]) == pytest.approx(float(jnp.linalg.norm(model.embed.embedding[...])))
    leaves = {f"{jax.tree_util.keystr(path)}": leaf for path, leaf in jax.tree_util.tree_leaves_with_path(pipe.params)}
    for name, (path, place) in paths.items():
        assert float(jnp.linalg.norm(leaves[path][place])) == pytest.approx(float(each[name])), name
    layers = pipe.stacking.by_layer(pipe.params)
    assert_trees_close(layers["layers[4]"], plain_params(model.layers[4]), rtol=0)
    assert layers["outer"] is pipe.params.outer


def test_the_trainable_mask_is_for_optax():
    """As labels of optax's partition, which sees frozen parameters then."""
    params = jaxpipe.Params({"w": jnp.ones((2, 3)), "lora": jnp.ones((2, 3))}, {"w": jnp.ones(2)})
    mask = jaxpipe.trainable_mask(lambda path, leaf: path != ".stages['w']", params)
    assert mask == jaxpipe.Params({"w": False, "lora": True}, {"w": True})
    labels = jax.tree.map(lambda trained: "on" if trained else "off", mask)
    optimizer = optax.partition({"on": optax.sgd(1.0), "off": optax.set_to_zero()}, labels)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    assert [float(leaf.sum()) for leaf in jax.tree.leaves(after)] == [0, 6, 0]


def test_what_is_not_stacked_so_is_refused():
    schedule = jaxpipe.schedule.build("1f1b", 2, MICROBATCHES)
    params = jaxpipe.Params({"w": jnp.ones((2, 3, 4))})
    with pytest.raises(ValueError, match=r"stages\['w'\] has shape \(2, 3, 4\), but 7 layers .* \[2, 4, \.\.\.\]"):
        jaxpipe.Stacking(schedule, 7).weight_decay_mask(params)
    with pytest.raises(ValueError, match=r"got a dict: give jaxpipe\.Params"):
        jaxpipe.Stacking(schedule).norms({"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="3 names for 2 layers"):
        jaxpipe.Stacking(schedule, names=("a", "b", "c"))
    with pytest.raises(ValueError, match="choose one of"):
        jaxpipe.Stacking(schedule, order="rank")
    with pytest.raises(ValueError, match="1 layers for 2 stages"):
        jaxpipe.Stacking(schedule, 1)
