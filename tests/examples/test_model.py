"""Sizes, layers and arrangement of the pretraining example's model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.examples.sizes import SMALL, make_batch, small  # first: it makes the example importable

from pretraining import trainer  # isort: skip
from pretraining.model import build_model
from pretraining.model.arrange import Arrangement
from pretraining.model.layers import rotate

import jaxpipe
from eplb_jax import Placement
from jaxpipe.deepseek.config import MODELS, ModelConfig, model_config
from tests.plain import assert_trees_close

CTX = jaxpipe.Context(jnp.int32(0), jnp.int32(0), None, None)


@functools.cache
def built(config, name, ranks, microbatches, **options):
    return build_model(config, jaxpipe.schedule.build(name, ranks, microbatches), 0, **options)


@functools.cache
def one_stage(config=SMALL, **options):
    """(model, function of tokens -> the stack's output) with one stage on one device."""
    model = built(config, "gpipe", 1, 1, **options)

    def run(params, tokens):
        x = model.embed(params.outer, {"tokens": tokens}, CTX)
        return model.stage(jax.tree.map(lambda leaf: leaf[0], params.stages), x, CTX).value

    return model, functools.partial(jax.jit(run), model.params)


def with_zeros(config, name, ranks, microbatches):
    """A model for what does not depend on most parameters' values: all are zero."""
    model = built(config, name, ranks, microbatches, abstract=True)
    return dataclasses.replace(model, params=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.params))


def parameters(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating))


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("dsv3-671b", (671.0, 671.1), (37, 38)),
        ("moe-16b", (15.65, 15.75), (2.4, 2.7)),
        ("moe-1b", (1, 1.2), (0.4, 0.6)),
    ],
)
def test_published_sizes(name, total, active):
    config = model_config(name)
    assert total[0] <= config.total / 1e9 <= total[1]
    assert active[0] <= config.active / 1e9 <= active[1]


@pytest.mark.parametrize(
    "config", [MODELS["tiny"], SMALL, small(query_rank=None, mtp=True, dense_layers=2, redundant=0)]
)
def test_counts_are_those_of_the_initialised_trees(config):
    model = build_model(config, jaxpipe.schedule.build("1f1b", 2, 2), 0, abstract=True)
    tree = jax.eval_shape(lambda: model.to_layers(model.init(0)))
    assert parameters(tree) == config.total + config.mtp_parameters
    routed = config.moe_layers * (config.experts - config.moe.router.top_k) * config.expert_parameters
    assert config.active == config.total - routed


def test_unknown_model_and_bad_sizes():
    with pytest.raises(ValueError, match=r"no model 'huge': known are tiny"):
        model_config("huge")
    for changes, message in (
        ({"rotary": 3}, "rotary is even"),
        ({"dense_layers": 5}, r"dense_layers=5 of layers=5"),
        ({"query_rank": 0}, r"query_rank=0: at least 1, or None"),
        ({"redundant": -1}, r"redundant=-1"),
        ({"remat": "some"}, r"remat='some' is one of"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**changes)
    assert isinstance(MODELS["tiny"], ModelConfig)


def test_slots_divide_over_the_devices_or_say_which_would():
    """`tiny` as it is on one to four devices, the flag for others."""
    tiny = MODELS["tiny"]
    assert [tiny.over_devices(devices).redundant for devices in (1, 2, 4)] == [tiny.redundant] * 3
    assert tiny.over_devices(8, 16).redundant == 8 and tiny.over_devices(4, 8).redundant == 0
    for devices, slots, message in (
        (8, None, r"8 experts in 12 slots on the 8 devices of axis ep: .* take --slots 16"),
        (4, 6, r"8 experts in 6 slots .* take --slots 8"),
        (4, 10, r"8 experts in 10 slots .* take --slots 12"),
        (3, 9, r"8 experts do not divide over the 3 devices of axis ep: take a divisor of 8"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.over_devices(devices, slots)
    spread = dataclasses.replace(tiny, moe=dataclasses.replace(tiny.moe, masters=9))
    assert spread.over_devices(3, 12).redundant == 4


def test_the_future_does_not_change_the_past():
    _, run = one_stage()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (1, 8)), jnp.int32)
    before, after = run(tokens), run(tokens.at[0, 5].add(1))
    np.testing.assert_allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert float(jnp.abs(before[:, 5:] - after[:, 5:]).max()) > 1e-4


def test_rotations_depend_on_distance_alone():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(np.tile(rng.normal(size=(1, 1, 1, 8)), (1, 9, 1, 1)), jnp.float32) for _ in range(2))
    scores = jnp.einsum("btnh,bsnh->ts", rotate(q), rotate(k), precision="highest")
    np.testing.assert_allclose(scores[2:, 2:], scores[:-2, :-2], rtol=1e-4, atol=1e-5)


def test_masked_targets_do_not_count():
    model, _ = one_stage()
    y = jnp.asarray(np.random.default_rng(2).normal(size=(2, 8, 16)), jnp.float32)
    targets, mask = jnp.zeros((2, 8), jnp.int32), jnp.ones((2, 8)).at[1].set(0)
    whole = model.head(model.params.outer, y[:1], {"targets": targets[:1], "mask": mask[:1]}, CTX)
    np.testing.assert_allclose(model.head(model.params.outer, y, {"targets": targets, "mask": mask}, CTX), whole, 1e-6)
    assert float(model.head(model.params.outer, y, {"targets": targets, "mask": jnp.zeros((2, 8))}, CTX)) == 0
    losses, counts = model.losses(model.params.outer, y, {"targets": targets, "mask": mask}, CTX)
    np.testing.assert_allclose(losses.sum() / counts.sum(), whole, rtol=1e-6)
    assert counts.tolist() == [8, 0]


def test_no_features_give_the_loss_of_a_uniform_guess():
    model, _ = one_stage()
    batch = {"targets": jnp.arange(16, dtype=jnp.int32).reshape(2, 8), "mask": jnp.ones((2, 8))}
    loss = model.head(model.params.outer, jnp.zeros((2, 8, 16)), batch, CTX)
    np.testing.assert_allclose(loss, np.log(64), rtol=1e-6)
    assert loss.dtype == jnp.float32 and loss.shape == ()


def test_the_second_head_predicts_the_token_after_the_next():
    model, run = one_stage(small(mtp=True))
    batch = {name: jnp.asarray(value) for name, value in make_batch(0, 1).items()} | {"mask": jnp.ones((1, 8))}
    y = run(batch["tokens"])

    @jax.jit
    def second(batch):
        return model.head(model.params.outer, y, batch, CTX).aux_loss

    start = float(second(batch))
    assert float(second(batch | {"mask": batch["mask"].at[0, 0].set(0)})) != pytest.approx(start, rel=1e-6)
    only = jnp.zeros((1, 8)).at[0, 3:5].set(1)  # position 3 alone has both targets
    target = {**batch, "mask": only}
    changed = target | {"targets": batch["targets"].at[0, 4].add(1)}
    assert float(second(changed)) != pytest.approx(float(second(target)), rel=1e-6)
    later = target | {"targets": batch["targets"].at[0, 5].add(1)}
    assert second(later) == second(target)
    assert second(batch | {"mask": jnp.zeros((1, 8)).at[0, 7].set(1)}) == 0


def test_bfloat16_activations_and_float32_masters():
    model, run = one_stage(dtype=jnp.bfloat16)
    y = run(jnp.zeros((1, 8), jnp.int32))
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"float32", "int32"}


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["attention", "layer"])
def test_what_is_computed_again_is_the_same(remat):
    batch = {name: jnp.asarray(value) for name, value in make_batch(0, 2).items()}
    results = []
    for choice in ("none", remat):
        model, _ = one_stage(small(remat=choice, layers=2))
        plain = trainer.plain_value_and_grad(model, parts=1)
        (loss, _), grads = jax.jit(plain)(model.params, batch)
        floats = [g for g in jax.tree.leaves(grads) if g.dtype == jnp.float32]
        results.append((loss, floats))
    assert_trees_close(results[1], results[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "ranks", "shared_ends"),
    [("1f1b", 3, False), pytest.param("dualpipe", 2, True, marks=pytest.mark.slow), ("dualpipev", 2, True)],
)
def test_initial_parameters_and_their_order_do_not_depend_on_the_schedule(name, ranks, shared_ends):
    config = dataclasses.replace(SMALL, shared_ends=shared_ends)
    one = built(config, "gpipe", 1, 1)
    model = build_model(config, jaxpipe.schedule.build(name, ranks, 2 * ranks), 0, axis="ep")
    layers = model.to_layers(model.params)
    expected = one.to_layers(one.params)
    jax.tree.map(np.testing.assert_array_equal, layers, expected)
    again = model.from_layers(jax.device_get(layers))
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(model.params))

    optimizer = trainer.make_optimizer(trainer.TrainConfig(steps=2), model)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(model.params)
    (moments,) = (node for node in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(node))
    back = model.from_layers(model.to_layers(moments.mu))
    assert jax.tree.structure(back) == jax.tree.structure(moments.mu)
    trained = sum(leaf.size for leaf in jax.tree.leaves(model.to_layers(moments.mu)))
    assert trained == SMALL.total - SMALL.moe_layers * SMALL.experts  # all but the routers' biases


@pytest.mark.slow
def test_places_without_a_layer_change_nothing():
    """Four layers over three stages are four layers: output, loads and gradients; the padding's gradients are zero."""
    model = build_model(SMALL, jaxpipe.schedule.build("gpipe", 3, 1), 0)
    assert model.arrangement.padded and model.arrangement.counts == (2, 1, 1)
    whole = built(SMALL, "gpipe", 1, 1)
    batch = {name: jnp.asarray(value) for name, value in make_batch(0, 2).items()}
    results = []
    for each in (model, whole):
        (loss, aux), grads = jax.jit(trainer.plain_value_and_grad(each, parts=1))(each.params, batch)
        floats = jax.tree.map(lambda g: g if g.dtype == jnp.float32 else None, grads)
        results.append((loss, each.to_layers(floats), each.loads_of(aux), each.dropped_of(aux), aux["aux_loss"]))
        empty = [leaf[each.arrangement.layer_of[:, 1] < 0] for leaf in jax.tree.leaves(floats.stages["layer_1"])]
        assert not any(np.asarray(leaf).any() for leaf in empty)
    assert_trees_close(results[0], results[1], rtol=1e-5, atol=1e-9)
    assert results[0][2].sum(1).tolist() == [2 * 8 * 2] * 4


def test_fewer_layers_than_stages():
    with pytest.raises(ValueError, match="4 layers for 8 stages"):
        build_model(SMALL, jaxpipe.schedule.build("gpipe", 8, 8), 0)


def test_places():
    shape = Arrangement.of(5, jaxpipe.schedule.build("dualpipev", 2, 4))
    assert shape.counts == (2, 1, 1, 1) and shape.layer_of.tolist() == [[0, 1], [4, -1], [2, -1], [3, -1]]


def test_biases_move_towards_equal_loads():
    model = with_zeros(small(bias_update_speed=0.5), "dualpipev", 2, 4)
    loads = jnp.zeros((4, 4), jnp.int32).at[2, 1].set(8)
    layers = model.to_layers(model.with_bias(model.params, loads))["layers"]
    assert layers["moe"]["bias"].tolist() == [[0.0] * 4, [0.0] * 4, [0.5, -0.5, 0.5, 0.5], [0.0] * 4]
    still = built(small(bias_update_speed=0.0), "dualpipev", 2, 4, abstract=True)
    assert still.with_bias(still.params, loads) is still.params


def test_placements_in_and_out():
    model = with_zeros(SMALL, "dualpipev", 2, 4)
    slots = np.array([[0, 1, 2, 3, layer % 4, 3] for layer in range(4)])
    placement = Placement.from_phy2log(slots, 4).padded()
    params = model.with_placements(model.params, placement)
    jax.tree.map(np.testing.assert_array_equal, model.placements(params), placement)
    with pytest.raises(ValueError, match=r"take Placement\.padded"):
        model.with_placements(model.params, Placement.from_phy2log(np.arange(6)[None].repeat(4, 0) % 4, 4))
    fixed = built(small(redundant=0), "dualpipev", 2, 4, abstract=True)
    assert fixed.placements(fixed.params) is None
    with pytest.raises(ValueError, match="redundant=0"):
        fixed.with_placements(fixed.params, placement)


def test_profilers_see_layers_and_their_parts():
    model, run = one_stage()
    text = run.func.lower(model.params, jnp.zeros((1, 8), jnp.int32)).as_text(debug_info=True)
    for scope in ("layer_0/attention/core", "layer_3/attention", "layer_3/mlp/experts", "embedding"):
        assert scope in text, scope


def _is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)
