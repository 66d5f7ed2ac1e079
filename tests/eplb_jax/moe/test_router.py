"""The router against plain loops: selection, weights, gradients, loads, the balance loss, the bias that balances."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax import RouterConfig, Routing, balance_loss, route, router_logits, update_bias
from tests.cases import cases
from tests.eplb_jax.moe.dense import choose

DEEPSEEK = RouterConfig()
SMALL = RouterConfig(12, top_k=3, num_groups=4, top_groups=2, scale=1.5)
run = jax.jit(route, static_argnums=1)


def random_case(seed):
    """A configuration and a number of tokens; groups of one expert and all groups allowed are among them."""
    rng = np.random.default_rng(seed)
    groups, size = int(rng.choice([1, 2, 3, 4, 8])), int(rng.integers(1, 7))
    top_groups = int(rng.integers(1, groups + 1))
    top_k = int(rng.integers(1, size * top_groups + 1))
    scoring, normalise = ("sigmoid", "softmax")[seed % 2], bool(seed // 2 % 2)
    config = RouterConfig(groups * size, top_k, groups, top_groups, scoring, normalise, scale=0.5 + seed % 3)
    return config, int(rng.integers(1, 40))


def random_logits(config, tokens, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((tokens, config.num_experts)) * 2, rng.standard_normal(config.num_experts) * 0.3


def scores_of(logits, config):
    if config.scoring == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def weights_of(logits, chosen, config):
    """Token by token."""
    out = []
    for score, experts in zip(scores_of(logits, config), chosen, strict=True):
        picked = score[experts]
        out.append(config.scale * (picked / picked.sum() if config.normalise else picked))
    return np.array(out)


@pytest.mark.parametrize("seed", [*range(10), "deepseek"])
def test_equals_a_loop_over_tokens(x64, seed):
    config, tokens = (DEEPSEEK, 64) if seed == "deepseek" else random_case(seed)
    logits, bias = random_logits(config, tokens)
    routing = run(jnp.asarray(logits), config, bias=jnp.asarray(bias))
    chosen = choose(logits, bias, config)
    assert routing.experts.tolist() == chosen.tolist()
    assert routing.loads.tolist() == np.bincount(chosen.ravel(), minlength=config.num_experts).tolist()
    assert routing.experts.dtype == routing.loads.dtype == jnp.int32
    np.testing.assert_allclose(routing.scores, scores_of(logits, config), rtol=1e-12)
    np.testing.assert_allclose(routing.weights, weights_of(logits, chosen, config), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_deepseeks_weights(x64, dtype):
    """They sum to the scale, and their experts are of at most four groups."""
    logits, bias = random_logits(DEEPSEEK, 64)
    routing = run(jnp.asarray(logits, dtype), DEEPSEEK, bias=jnp.asarray(bias, jnp.float32))
    assert routing.weights.dtype == routing.scores.dtype == dtype
    np.testing.assert_allclose(routing.weights.sum(-1), 2.5, rtol=1e-6)
    assert max(len(set(row)) for row in (routing.experts // 32).tolist()) == 4
    assert all(len(set(row)) == 8 for row in routing.experts.tolist())


@pytest.mark.parametrize("config", [SMALL, DEEPSEEK, RouterConfig(6, 4, 1, 1), RouterConfig(8, 3, 8, 4)])
def test_ties_go_to_the_first(config):
    """Few different logits, so that experts tie and groups do; no bias, so that ties are exact."""
    logits = np.random.default_rng(0).integers(0, 3, (48, config.num_experts)).astype(np.float32)
    logits[0] = 0
    routing = run(jnp.asarray(logits), config)
    assert routing.experts.tolist() == choose(logits, np.zeros(config.num_experts), config).tolist()
    assert routing.experts[0].tolist() == list(range(config.top_k))


def test_groups_count_by_their_best_expert_alone(x64):
    """As DeepSeek-V2's do, arXiv 2405.04434, 2.2.2; the default's two best choose otherwise."""
    config = dataclasses.replace(SMALL, group_best=1, scoring="softmax")
    logits, _ = random_logits(config, 64)
    routing = run(jnp.asarray(logits), config)
    for token, experts in zip(logits, routing.experts.tolist(), strict=True):
        best = sorted(range(4), key=lambda group: -token[3 * group : 3 * group + 3].max())[:2]
        allowed = [expert for expert in range(12) if expert // 3 in best]
        assert experts == sorted(allowed, key=lambda expert: -token[expert])[:3]
    assert (routing.experts != run(jnp.asarray(logits), dataclasses.replace(config, group_best=2)).experts).any()
    with pytest.raises(ValueError, match=r"group_best=0: a group counts by at least one"):
        dataclasses.replace(SMALL, group_best=0)


def test_bias_selects_but_does_not_weight(x64):
    logits, bias = random_logits(SMALL, 32)
    without, biased = (run(jnp.asarray(logits), SMALL, bias=b) for b in (None, jnp.asarray(bias)))
    assert np.array_equal(without.scores, biased.scores)
    assert without.experts.tolist() == choose(logits, 0 * bias, SMALL).tolist() != biased.experts.tolist()
    np.testing.assert_allclose(biased.weights, weights_of(logits, np.asarray(biased.experts), SMALL), rtol=1e-12)

    certain = jnp.where(jnp.isin(jnp.arange(12), jnp.array([1, 2, 9])), 5.0, 0.0)
    chosen = run(jnp.asarray(logits), SMALL, bias=certain).experts
    assert {tuple(sorted(row)) for row in chosen.tolist()} == {(1, 2, 9)}


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalise", [True, False])
def test_gradients_are_those_of_the_formula(x64, scoring, normalise):
    config = dataclasses.replace(SMALL, scoring=scoring, normalise=normalise)
    logits, bias = (jnp.asarray(a) for a in random_logits(config, 32))
    ct = jax.random.normal(jax.random.key(0), (32, config.top_k))
    chosen = choose(np.asarray(logits), np.asarray(bias), config)

    def formula(logits):
        scores = jax.nn.sigmoid(logits) if scoring == "sigmoid" else jax.nn.softmax(logits)
        picked = jnp.take_along_axis(scores, chosen, 1)
        return (ct * config.scale * (picked / picked.sum(1, keepdims=True) if normalise else picked)).sum()

    grads = jax.jit(jax.grad(lambda x, b: (ct * route(x, config, bias=b).weights).sum(), argnums=(0, 1)))(logits, bias)
    np.testing.assert_allclose(grads[0], jax.grad(formula)(logits), rtol=1e-12, atol=1e-15)
    assert not np.any(grads[1])


def test_masked_tokens_count_nowhere(x64):
    logits, bias = (jnp.asarray(a) for a in random_logits(SMALL, 32))
    mask = np.arange(32) % 3 != 0
    masked, short = run(logits, SMALL, bias=bias, mask=jnp.asarray(mask)), run(logits[mask], SMALL, bias=bias)
    assert (masked.experts[~mask] == -1).all() and (masked.weights[~mask] == 0).all()
    assert np.array_equal(masked.experts[mask], short.experts) and np.array_equal(masked.loads, short.loads)
    np.testing.assert_allclose(masked.weights[mask], short.weights, rtol=1e-15)
    gradient = jax.grad(lambda x: route(x, SMALL, mask=jnp.asarray(mask)).weights[:, 0].sum())(logits)
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any(1).all()
    assert run(logits, SMALL, mask=jnp.zeros(32, bool)).loads.sum() == 0


@pytest.mark.parametrize(("dtype", "wide"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_logits_are_wide(x64, dtype, wide):
    """As good as float64 from the same inputs, however narrow those are; gradients in their dtype."""
    x, kernel = jax.random.normal(jax.random.key(1), (2, 256, 256))
    x, kernel = x.astype(dtype), kernel.astype(wide)
    logits = router_logits(x, kernel)
    assert logits.dtype == wide
    np.testing.assert_allclose(logits, np.asarray(x, np.float64) @ np.asarray(kernel, np.float64), rtol=1e-5, atol=1e-4)
    grads = jax.grad(lambda x, kernel: router_logits(x, kernel).sum(), argnums=(0, 1))(x, kernel)
    assert [g.dtype for g in grads] == [x.dtype, kernel.dtype]


def loss_by_sequence(scores, chosen, sequences, top_k, mask):
    """Mean over real tokens of their sequence's loss."""
    tokens, experts = scores.shape
    length, total, count = tokens // sequences, 0.0, 0
    for sequence in range(sequences):
        real = [t for t in range(sequence * length, (sequence + 1) * length) if mask[t]]
        if not real:
            continue
        f = np.bincount(chosen[real].ravel(), minlength=experts) * experts / (top_k * len(real))
        p = sum(scores[t] / scores[t].sum() for t in real) / len(real)
        total, count = total + len(real) * (f * p).sum(), count + len(real)
    return total / count


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@cases("sequences", [1, 4, 24], quick=[4])
@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss_equals_a_loop_over_sequences(x64, scoring, sequences, masked):
    config = dataclasses.replace(SMALL, scoring=scoring)
    logits, bias = random_logits(config, 24, seed=1)
    mask = np.random.default_rng(2).random(24) < 0.6 if masked else np.ones(24, bool)
    mask[:6] &= not masked  # a sequence without any real token
    given = jnp.asarray(mask) if masked else None

    def loss(logits):
        routing = route(logits, config, bias=jnp.asarray(bias), mask=given)
        return balance_loss(routing, config, sequences=sequences)

    chosen = choose(logits, bias, config)
    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(logits))
    expected = loss_by_sequence(scores_of(logits, config), chosen, sequences, config.top_k, mask)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    # The choice is constant, so a difference of the loop's, choice held, is the derivative.
    step = np.random.default_rng(3).standard_normal(logits.shape) * 1e-5
    ends = [
        loss_by_sequence(scores_of(logits + sign * step, config), chosen, sequences, config.top_k, mask)
        for sign in (1, -1)
    ]
    np.testing.assert_allclose((gradient * step).sum(), (ends[0] - ends[1]) / 2, rtol=1e-6, atol=1e-14)


def test_balance_loss_of_known_cases():
    """1 where scores are equal, whatever the counts, or counts are, whatever the scores; else more."""
    config = RouterConfig(8, 2, 1, 1)
    equal = jnp.arange(32, dtype=jnp.int32).reshape(16, 2) % 8
    one = jnp.tile(jnp.arange(2, dtype=jnp.int32), (16, 1))
    flat, steep = jnp.full((16, 8), 0.3), jnp.tile(jnp.where(jnp.arange(8) < 2, 0.5, 0.0), (16, 1))

    def loss(experts, scores):
        loads = jnp.bincount(experts.ravel(), length=8).astype(jnp.int32)
        return float(balance_loss(Routing(experts, jnp.ones(experts.shape), scores, loads), config))

    assert [loss(equal, flat), loss(one, flat), loss(equal, steep)] == pytest.approx([1, 1, 1])
    assert loss(one, steep) == pytest.approx(4)


def test_update_bias_balances_a_skewed_router():
    """From most tokens on few experts to nearly even loads, without an auxiliary loss; fresh tokens each step."""
    config = RouterConfig(16, 2, 4, 2)
    skew = jnp.linspace(2.0, -2.0, 16)

    def step(bias, key):
        logits = jax.random.normal(key, (1024, 16)) + skew
        loads = route(logits, config, bias=bias).loads
        return update_bias(bias, loads, rate=5e-3), loads

    bias, loads = jax.jit(lambda keys: jax.lax.scan(step, jnp.zeros(16), keys))(
        jax.random.split(jax.random.key(0), 400)
    )
    assert (loads.sum(1) == 2048).all()
    ratio = np.asarray(loads).max(1) / np.asarray(loads).mean(1)
    assert ratio[0] > 3 and ratio[-50:].mean() < 1.25 and ratio[-50:].max() < 1.4
    assert float(bias[0]) < 0 < float(bias[-1])


def test_update_bias_by_hand():
    bias = update_bias(jnp.array([0.5, 0.0, -1.0, 0.0]), jnp.array([7, 1, 4, 4]), rate=0.25)
    assert bias.tolist() == [0.25, 0.25, -1.0, 0.0]
    assert bias.dtype == jnp.float32
    assert update_bias(jnp.zeros(2), jnp.array([0.5, 0.25])).tolist() == pytest.approx([-1e-3, 1e-3])


@pytest.mark.parametrize("config", [RouterConfig(balanced=True), RouterConfig(16, 3, 4, 2, balanced=True)])
def test_balanced_choices_are_distinct_equal_in_number_and_of_few_groups(config):
    tokens = 4 * config.num_experts
    logits = jax.random.normal(jax.random.key(0), (tokens, config.num_experts))
    routing = route(logits, config)
    experts = np.asarray(routing.experts)
    assert all(len(set(row)) == config.top_k for row in experts.tolist())
    groups = experts // (config.num_experts // config.num_groups)
    assert max(len(set(row)) for row in groups.tolist()) <= config.top_groups
    if config.top_k % config.top_groups == 0:
        assert set(np.asarray(routing.loads).tolist()) == {tokens * config.top_k // config.num_experts}
    by_score = np.take_along_axis(np.asarray(routing.scores), experts, 1)
    np.testing.assert_allclose(routing.weights, by_score / by_score.sum(1, keepdims=True) * config.scale, rtol=1e-6)


def test_bfloat16_activations_have_float32_logits_and_gradients(x64):
    """Three bfloat16 products are as good as a float32 one; the gradient of x is as good as bfloat16 can tell."""
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(keys[0], (64, 512), jnp.float32).astype(jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (512, 32), jnp.float32)
    ct = jax.random.normal(keys[2], (64, 32), jnp.float32) * jnp.logspace(-3, 3, 32, dtype=jnp.float32)
    logits, pull = jax.jit(lambda *arguments: jax.vjp(router_logits, *arguments))(x, kernel)
    x_ct, kernel_ct = jax.jit(pull)(ct)
    assert (logits.dtype, x_ct.dtype, kernel_ct.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    exact_x, exact_kernel, exact_ct = (np.asarray(array).astype(np.float64) for array in (x, kernel, ct))

    def off(found, left, right):
        """Largest error over the sum of absolute products, which float32 rounds by about 1e-7."""
        return np.max(np.abs(np.asarray(found).astype(np.float64) - left @ right) / (np.abs(left) @ np.abs(right)))

    assert off(logits, exact_x, exact_kernel) < 2e-7
    assert off(kernel_ct, exact_x.T, exact_ct) < 2e-7
    assert off(x_ct, exact_ct, exact_kernel.T) < 2**-8
    nearest = np.asarray(jnp.asarray(exact_ct @ exact_kernel.T).astype(jnp.bfloat16)).astype(np.float64)
    assert np.mean(np.asarray(x_ct).astype(np.float64) == nearest) > 0.99
