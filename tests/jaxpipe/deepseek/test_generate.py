"""Answers: cached equals uncached, on one device and on a mesh, whatever the placement; how tokens are chosen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax import Placement
from jaxpipe.deepseek import MODELS, Rope, Sampling, Server, Yarn, serve, serving_mesh
from jaxpipe.deepseek.block import first_placement
from jaxpipe.deepseek.generate import sample
from jaxpipe.deepseek.serving import decode, head_logits, prefill, serve_random, served_specs, token_features
from tests.jaxpipe.deepseek.models import built, make_batch, small

YARN = Yarn(factor=4.0, original=4, mscale=1.0, mscale_all_dim=0.5)
PROMPTS = [[3, 1, 4], list(range(17)), [5], [9, 2, 6, 5, 3, 5, 8, 9]]


@functools.cache
def parameters(config):
    """Normal numbers of an eighth and ones for scales, in the order of the model; nothing is compiled for them."""
    model, rng = built(config, "1f1b", 1, 1, abstract=True), np.random.default_rng(0)

    def fill(path, leaf):
        if path[-1].key in ("phy2log", "log2phy", "logcnt"):
            return np.broadcast_to(getattr(first_placement(config.experts, config.redundant), path[-1].key), leaf.shape)
        made = 1 + rng.normal(size=leaf.shape) / 8 if path[-1].key == "scale" else rng.normal(size=leaf.shape) / 4
        return made.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(model.to_layers, model.params))


@functools.cache
def plain():
    return server(small(layers=2))


def server(config, dtype=jnp.float32, mesh=None, placements=None):
    return Server(config, serve(config, parameters(config), dtype=dtype, mesh=mesh, placements=placements), mesh)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"query_rank": None, "redundant": 0, "tied": True, "norm_eps": 1e-3, "rope": Rope(interleaved=True, yarn=YARN)},
    ],
)
def test_cached_tokens_equal_whole_sequences_in_float64(changes):
    config = small(layers=2, **changes)
    with jax.enable_x64(True):
        model = serve(config, parameters(config), dtype=jnp.float64)
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (3, 9)), jnp.int32)
        features, loads = jax.jit(token_features, static_argnums=3)(model, tokens, jnp.ones((3, 9), bool), config)
        whole = head_logits(model, features, config)
        lengths = jnp.array([2, 5, 1], jnp.int32)
        step = jax.jit(decode, static_argnums=5)
        found = jax.jit(prefill, static_argnums=(3, 4))(model, tokens[:, :5], lengths, 9, config)
        counted = found.loads
        for _ in range(4):
            for row, length in enumerate(lengths):
                logits = head_logits(model, found.features[row], config)
                np.testing.assert_allclose(logits, whole[row, length - 1], atol=1e-12)
            following = tokens[jnp.arange(3), lengths]
            found = step(model, following, found.caches, lengths, jnp.ones(3, bool), config)
            lengths, counted = lengths + 1, counted + found.loads
        assert counted.sum() == lengths.sum() * 2 * config.moe_layers and loads.sum() == 27 * 2 * config.moe_layers


def test_a_prompt_is_answered_alike_alone_and_beside_others():
    one = plain()
    made = one.generate(PROMPTS, 8)
    np.testing.assert_array_equal(one.generate(PROMPTS[3:], 8).tokens[0], made.tokens[3])
    prompt, tokens = PROMPTS[1], made.tokens[1]
    whole = one.logits(np.array([[*prompt, *tokens]]))[0]
    np.testing.assert_array_equal(whole[len(prompt) - 1 : -1].argmax(-1), tokens)
    assert made.decoded == 28 and made.loads.sum() == (sum(map(len, PROMPTS)) + 28) * 2
    first = one.generate(PROMPTS, 1)
    assert [len(tokens) for tokens in first.tokens] == [1] * 4 and first.tokens_per_second == 0


@pytest.mark.slow
def test_a_mesh_and_copies_of_experts_change_no_answer():
    config = small(layers=2, redundant=0)
    with jax.enable_x64(True):
        one = server(config, jnp.float64)
        mesh = serving_mesh(jax.make_mesh((2, 2), ("pp", "ep")))
        rng = np.random.default_rng(0)
        slots = np.stack([np.append(rng.permutation(4), rng.integers(0, 4, 4)) for _ in range(config.moe_layers)])
        spread = server(config, jnp.float64, mesh, Placement.from_phy2log(slots, 4))
        assert spread.model.layers[1].moe.experts.w_in.sharding.shard_shape((8, 16, 16)) == (2, 16, 16)
        expected, made = (each.generate([*PROMPTS, [7]], 5, Sampling(0.8, 0.9, seed=3)) for each in (one, spread))
        for tokens, others in zip(expected.tokens, made.tokens, strict=True):
            np.testing.assert_array_equal(tokens, others)
        np.testing.assert_array_equal(expected.loads, made.loads)
        batch = make_batch(0, 3, config)
        left, right = (each.score(batch["tokens"], batch["targets"], batch["mask"]) for each in (one, spread))
        np.testing.assert_allclose(left.losses, right.losses, rtol=1e-12)
        np.testing.assert_array_equal(left.loads, right.loads)
        np.testing.assert_array_equal(left.counts, batch["mask"].sum(1))
    specs = served_specs(spread.model)
    assert specs.layers[1].moe.experts.w_in == jax.sharding.PartitionSpec("ep")


def test_a_token_that_ends_an_answer_is_its_last():
    one = plain()
    every = one.generate(PROMPTS, 8).tokens
    stop = int(every[1][2])
    made = one.generate(PROMPTS, 8, stop=[stop])
    for tokens, whole in zip(made.tokens, every, strict=True):
        ends = np.flatnonzero(whole == stop)
        np.testing.assert_array_equal(tokens, whole[: ends[0] + 1] if ends.size else whole)
    assert len(made.tokens[1]) <= 3 and made.decoded == sum(map(len, made.tokens)) - 4


def test_seeds_choose_and_rows_differ():
    draw = functools.partial(plain().generate, PROMPTS, 8)
    first, again, other = (draw(Sampling(1.0, seed=seed)).tokens for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.array(first) != other).any()
    assert (sample(jnp.zeros((9, 64)), Sampling(1.0), jnp.arange(9), jnp.int32(0)) != first[0][0]).any()


def test_choices_have_the_odds_they_should():
    logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
    rows = jnp.arange(4000, dtype=jnp.int32)
    many = jnp.broadcast_to(logits, (4000, 4))
    for sampling, odds in (
        (Sampling(1.0), [0.4, 0.3, 0.2, 0.1]),
        (Sampling(1.0, 0.69), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(1.0, 0.71), [4 / 9, 3 / 9, 2 / 9, 0]),
        (Sampling(1e-6, seed=2**31 - 1), [1, 0, 0, 0]),
        (Sampling(0.5, seed=-(2**31)), np.array([16, 9, 4, 1]) / 30),
        (Sampling(1.0, 1e-6), [1, 0, 0, 0]),
        (Sampling(), [1, 0, 0, 0]),
    ):
        chosen = np.bincount(sample(many, sampling, rows, jnp.int32(2)), minlength=4) / 4000
        np.testing.assert_allclose(chosen, odds, atol=0.03)


def test_layers_go_to_the_device_one_by_one(monkeypatch):
    """Nothing that is compiled takes the stack of all layers."""
    config, taken = small(layers=4), []
    jit = jax.jit

    def noted(function):
        compiled = jit(function)

        def call(*arguments):
            taken.extend(leaf.shape for leaf in jax.tree.leaves(arguments))
            return compiled(*arguments)

        return call

    monkeypatch.setattr(jax, "jit", noted)
    served = serve(config, parameters(config))
    monkeypatch.undo()
    stack = jax.tree.leaves(parameters(config)["layers"])
    assert taken.count((4, 16, 16)) == 3 and not any(leaf.shape in taken for leaf in stack if leaf.ndim > 2)
    wanted = parameters(config)["layers"]["moe"]["router"]
    for layer, router in zip(served.layers[1:], wanted, strict=True):
        np.testing.assert_array_equal(layer.moe.router, router)


@pytest.mark.slow
def test_random_parameters_are_served_layer_by_layer():
    config = small(layers=3, redundant=0)
    made = serve_random(config, 0, dtype=jnp.bfloat16)
    shapes = jax.tree.map(jnp.shape, serve(config, parameters(config), dtype=jnp.bfloat16))
    assert jax.tree.map(jnp.shape, made) == shapes
    first, second = made.layers[1].moe.router, made.layers[2].moe.router
    assert (first != second).any()


@pytest.mark.slow
def test_fp8_is_kept_in_8_bits():
    plain = dataclasses.replace(MODELS["tiny-128"], layers=2)
    config = plain.in_precision("fp8")
    exact, scaled = (serve_random(each, 0) for each in (plain, config))
    assert scaled.layers[1].attention.query_up.numbers.dtype == jnp.float8_e4m3fn
    tokens = np.arange(12).reshape(1, 12)
    one, other = (Server(sizes, made).logits(tokens) for sizes, made in ((plain, exact), (config, scaled)))
    assert np.linalg.norm(one - other) < 0.15 * np.linalg.norm(one)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda one: one.generate([], 3), r"prompts of \[\] tokens"),
        (lambda one: one.generate([[1], []], 3), r"prompts of \[1, 0\] tokens"),
        (lambda one: one.generate([[64]], 3), r"prompt 0 has tokens from 64 to 64: the vocabulary has 64"),
        (lambda one: one.generate([[1.5]], 3), r"prompt 0 is float64"),
        (lambda one: one.generate([[1]], 0), r"new_tokens=0"),
        (lambda one: one.logits(np.zeros(3, int)), r"tokens have shape \(3,\)"),
        (lambda one: one.score(np.zeros((1, 3), int), np.zeros((1, 2), int), np.ones((1, 3))), r"one shape for all"),
        (lambda one: Sampling(-1.0), r"temperature=-1.0"),
        (lambda one: Sampling(1e-7), r"temperature=1e-07: .* between 1e-6 and 3e38"),
        (lambda one: Sampling(1e39), r"temperature=1e\+39"),
        (lambda one: Sampling(float("nan")), r"temperature=nan"),
        (lambda one: Sampling(1.0, 0.0), r"top_p=0.0"),
        (lambda one: Sampling(1.0, seed=2**31), r"seed=2147483648: a whole number from -2147483648 to 2147483647"),
        (lambda one: Sampling(1.0, seed=1.5), r"seed=1.5"),
        (
            lambda one: Server(one.config, one.model, jax.make_mesh((1,), ("pp",))),
            r"take jaxpipe.deepseek.serving_mesh",
        ),
        (
            lambda one: server(one.config, mesh=serving_mesh(jax.make_mesh((4,), ("ep",)))),
            r"6 slots of experts do not divide over 4 devices: give placements of 8 slots",
        ),
        (
            lambda one: server(one.config, placements=Placement.from_phy2log(np.tile(np.arange(4), (2, 1)), 4)),
            r"placements of 2 layers and 4 experts: the model has 1 and 4",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(plain())
