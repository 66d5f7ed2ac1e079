"""The model as stages: what it computes, where its layers are, and what changes its state."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from eplb_jax import Placement
from jaxpipe.deepseek import MODELS, Arrangement, build_model
from tests.jaxpipe.deepseek.models import SMALL, built, make_batch, small, with_zeros

CTX = jaxpipe.Context(jnp.int32(0), jnp.int32(0), None, None)


def test_ends_are_shared_where_that_leaves_less_to_the_busiest_rank():
    """moe-1b: nine layers that cost the same and a head that costs 1.3; two ranks get 5 and 4 + 1.3, not 5.65.

    Of eight ranks the last has the head alone: others have 2 at most, not 2 + 1.3 / 8. Of sixteen, nine have a layer:
    that and 1.3 / 16, not 1.3 for one.
    """
    apart, alone, together = (build(MODELS["moe-1b"], "1f1b", ranks) for ranks in (2, 8, 16))
    assert not apart.shared_ends and apart.arrangement.counts == (5, 4)
    assert not alone.shared_ends and alone.arrangement.counts[-1] == 0 and max(alone.arrangement.counts) == 2
    assert together.shared_ends
    told = build(dataclasses.replace(MODELS["moe-1b"], shared_ends=True), "1f1b")
    assert told.shared_ends and told.arrangement.counts == (4, 5)
    odd = build(dataclasses.replace(MODELS["moe-1b"], vocab=32001), "dualpipev")
    assert not odd.shared_ends


def build(config, schedule, ranks=2):
    """A model without arrays."""
    return build_model(config, jaxpipe.schedule.build(schedule, ranks, 16), 0, axis="ep", abstract=True)


TWO_LAYERS = small(layers=2)


@functools.cache
def one_stage(config=TWO_LAYERS):
    """(model, function of tokens -> the stack's output) with one stage on one device."""
    model = built(config, "gpipe", 1, 1)

    def run(params, tokens):
        return features(model, params, {"tokens": tokens})

    return model, functools.partial(jax.jit(run), model.params)


def features(model, params, data):
    """What a model of one stage hands to its head."""
    x = model.embed(params.outer, data, CTX)
    return model.stage(jax.tree.map(lambda leaf: leaf[0], params.stages), x, CTX).value


def parameters(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating))


@pytest.mark.parametrize(
    "config", [MODELS["tiny"], SMALL, small(query_rank=None, mtp=True, dense_layers=2, redundant=0)]
)
def test_counts_are_those_of_the_initialised_trees(config):
    model = build_model(config, jaxpipe.schedule.build("1f1b", 2, 2), 0, abstract=True)
    tree = jax.eval_shape(lambda: model.to_layers(model.init(0)))
    assert parameters(tree) == config.total + config.mtp_parameters
    routed = config.moe_layers * (config.experts - config.moe.router.top_k) * config.expert_parameters
    assert config.active == config.total - routed


def test_the_future_does_not_change_the_past():
    _, run = one_stage()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (1, 8)), jnp.int32)
    before, after = run(tokens), run(tokens.at[0, 5].add(1))
    np.testing.assert_allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert float(jnp.abs(before[:, 5:] - after[:, 5:]).max()) > 1e-4


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


@pytest.mark.parametrize("name", ["mtp", pytest.param("padded", marks=pytest.mark.slow)])
def test_filling_takes_no_expert(name):
    """Sequences filled up to twice their length are to experts, balance and losses what they are without."""
    config = small(layers=1, mtp=name == "mtp", dense_layers=0, redundant=0, sequence=4)
    # Where there are more places than layers, these have a mask already.
    model = built(config, "gpipe", 2 if name == "padded" else 1, 2, abstract=True)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(leaf.dtype), model.params)
    assert (model.arrangement.alike and model.arrangement.padded) == (name == "padded")
    short = make_batch(0, 3, config)
    long = {name: np.concatenate([array, random.integers(0, 2, array.shape, array.dtype)
            if array.dtype == np.int32 else 0 * array], 1) for name, array in short.items()}  # fmt: skip
    real = np.arange(8) < np.full((3, 1), 4)

    @jax.jit
    def run(params, data):
        x, aux, loads = model.embed(params.outer, data, CTX), 0.0, 0
        rows = {stage: row for row, stage in enumerate(model.arrangement.storage_order)}
        for stage in range(model.arrangement.stages):
            ctx = jaxpipe.Context(jnp.int32(stage), jnp.int32(0), None, data)
            own = jax.tree.map(lambda leaf, row=rows[stage]: leaf[row], params.stages)
            x, more, metrics = model.stage_of(stage)(own, x, ctx)
            aux, loads = aux + more, loads + model.loads_of(metrics)
        return model.head(params.outer, x, data, CTX), aux, loads

    expected, found = run(params, short), run(params, long | {"real": real})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
    assert expected[2].sum() == len(expected[2]) * 3 * 4 * 2


def test_no_features_give_the_loss_of_a_uniform_guess():
    model, _ = one_stage()
    batch = {"targets": jnp.arange(16, dtype=jnp.int32).reshape(2, 8), "mask": jnp.ones((2, 8))}
    loss = model.head(model.params.outer, jnp.zeros((2, 8, 16)), batch, CTX)
    np.testing.assert_allclose(loss, np.log(64), rtol=1e-6)
    assert loss.dtype == jnp.float32 and loss.shape == ()


def test_the_second_head_predicts_the_token_after_the_next():
    model, _ = one_stage(small(mtp=True, layers=2))
    batch = {name: jnp.asarray(value) for name, value in make_batch(0, 1).items()} | {"mask": jnp.ones((1, 8))}

    @jax.jit
    def second(batch):
        return model.head(model.params.outer, features(model, model.params, batch), batch, CTX).aux_loss

    start = float(second(batch))
    assert float(second(batch | {"mask": batch["mask"].at[0, 0].set(0)})) != pytest.approx(start, rel=1e-6)
    only = jnp.zeros((1, 8)).at[0, 3:5].set(1)  # position 3 alone has both targets
    target = {**batch, "mask": only}
    changed = target | {"targets": batch["targets"].at[0, 4].add(1)}
    assert float(second(changed)) != pytest.approx(float(second(target)), rel=1e-6)
    later = target | {"targets": batch["targets"].at[0, 5].add(1)}
    assert float(second(later)) == pytest.approx(float(second(target)), rel=1e-6)
    assert second(batch | {"mask": jnp.zeros((1, 8)).at[0, 7].set(1)}) == 0


def test_bfloat16_activations_and_float32_masters():
    model = built(SMALL, "gpipe", 1, 1, dtype=jnp.bfloat16, abstract=True)
    y = jax.eval_shape(functools.partial(features, model), model.params, {"tokens": jnp.zeros((1, 8), jnp.int32)})
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"float32", "int32"}


def test_stages_without_layers_hand_on_what_they_get():
    model = build_model(SMALL, jaxpipe.schedule.build("gpipe", 8, 8), 0, abstract=True)
    assert model.arrangement.counts == (1, 1, 1, 1, 1, 0, 0, 0)
    row = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), model.params.stages)
    x = jnp.arange(6.0).reshape(1, 2, 3)
    y, loss, metrics = model.stage_of(6)(row, x, jaxpipe.Context.make(6, 0, None, None, num_stages=8))
    assert y is x and not loss and not metrics["loads"].any() and metrics["loads"].shape == (8, 8, 1, 4)


def test_places():
    shape = Arrangement.of(("moe",) * 5, jaxpipe.schedule.build("dualpipev", 2, 4))
    assert shape.counts == (2, 1, 1, 1) and shape.layer_of.tolist() == [[0, 1], [4, -1], [2, -1], [3, -1]]


def test_biases_move_towards_equal_loads():
    model = with_zeros(small(bias_update_speed=0.5), "dualpipev", 2, 4)
    loads = jnp.zeros((4, 4), jnp.int32).at[2, 1].set(8)
    layers = jax.jit(lambda params: model.to_layers(model.with_bias(params, loads)))(model.params)["layers"]
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


def test_experts_of_multi_token_prediction_are_balanced_too():
    model = with_zeros(small(mtp=True, bias_update_speed=0.5), "dualpipev", 2, 4)
    loads = jnp.zeros((5, 4), jnp.int32).at[4, 1].set(8)
    tree = jax.jit(lambda params: model.to_layers(model.with_bias(params, loads)))(model.params)
    assert tree["outer"]["mtp"]["block"]["moe"]["bias"].tolist() == [0.5, -0.5, 0.5, 0.5]
    assert not tree["layers"]["moe"]["bias"].any()
    slots = np.array([[0, 1, 2, 3, layer % 4, 3] for layer in range(5)])
    placement = Placement.from_phy2log(slots, 4).padded()
    params = model.with_placements(model.params, placement)
    jax.tree.map(np.testing.assert_array_equal, model.placements(params), placement)
    assert model.to_layers(params)["outer"]["mtp"]["block"]["moe"]["phy2log"].tolist() == [0, 1, 2, 3, 0, 3]


def test_profilers_see_layers_and_their_parts():
    model, run = one_stage()
    text = run.func.lower(model.params, jnp.zeros((1, 8), jnp.int32)).as_text(debug_info=True)
    for scope in ("layer_0/attention/core", "layer_1/attention", "layer_1/mlp/experts", "embedding"):
        assert scope in text, scope
