"""The layer in FP8: on any devices that of one, close to bfloat16's, divided as bfloat16's is, and in fewer bytes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eplb_jax import MoEConfig, RouterConfig, init_moe, moe_layer, param_specs, working_copies_for
from eplb_jax.kernels import hopper, quantise, registry
from eplb_jax.kernels.backend import HOPPER_SMS, Target
from eplb_jax.kernels.blockwise import Blockwise
from eplb_jax.kernels.fp8_gemm import xla as products
from eplb_jax.kernels.gated import gradients
from eplb_jax.kernels.quantise import GateGradients
from eplb_jax.kernels.recipe import RECIPES, Recipe
from eplb_jax.kernels.scaled import BLOCK, ScaledMatrices, ScaledRows, dequantise_rows
from eplb_jax.moe.dispatchers import DISPATCHERS
from eplb_jax.moe.fp8_experts import ScaledExperts
from eplb_jax.moe.permute import add_rows_by_xla, copy_rows_by_xla
from jaxpipe.stage import split_stage
from jaxpipe.stage.flops import matmul_flops
from tests.eplb_jax.moe import dense
from tests.eplb_jax.moe.test_fp8 import zero
from tests.eplb_jax.moe.test_fp8_experts import relative
from tests.eplb_jax.moe.test_layer import make_mesh
from tests.eplb_jax.test_seams import Shifts

ROUTER = RouterConfig(8, 3, 4, 2, scale=1.5)
CONFIG = MoEConfig(width=256, hidden=128, router=ROUTER, backend="xla", precision="fp8")
PLAIN = dataclasses.replace(CONFIG, precision="bf16")
TOKENS = 128


def make(dtype, config=CONFIG, tokens=TOKENS):
    params = init_moe(jax.random.key(0), config, jnp.dtype(dtype))
    params = params._replace(bias=0.1 * jax.random.normal(jax.random.key(2), params.bias.shape))
    x, ct = jax.random.normal(jax.random.key(1), (2, tokens, config.width)).astype(dtype)
    return params, x, ct


def gradients_of(function, arguments, ct):
    """((y, stats), gradients) of a function of a layer's arguments."""
    (y, stats), pull = jax.vjp(function, *arguments)
    return (y, stats), pull((ct, jax.tree.map(zero, stats)))


def run(config, ep, params, x, ct, placement=None):
    """(y, stats summed over devices, gradients of parameters and x); ep=None: no axis."""
    return compiled(config, ep)(params, x, ct, placement)


@functools.cache
def compiled(config, ep):
    """Once for all tests."""

    def layer(axis, placement):
        def function(params, x):
            if placement is not None:
                copies = working_copies_for(params.experts, placement.phy2log, config, axis)
                params = params._replace(experts=copies)
            return moe_layer(params, x, config, placement=placement, axis=axis)

        return function

    if ep is None:
        return jax.jit(lambda params, x, ct, placement: gradients_of(layer(None, placement), (params, x), ct))

    def body(params, x, ct, placement):
        (y, stats), grads = gradients_of(layer("ep", placement), (params, x), ct)
        return (y, jax.lax.psum(stats, "ep")), grads

    specs = param_specs(config, "ep")
    mapped = jax.shard_map(
        body,
        mesh=make_mesh(ep),
        in_specs=(specs, P("ep"), P("ep"), P()),
        out_specs=((P("ep"), P()), (specs, P("ep"))),
    )
    return jax.jit(mapped)


def cosine(a, b):
    a, b = (np.asarray(leaf, np.float64).ravel() for leaf in (a, b))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@functools.cache
def on_one_device():
    return run(CONFIG, None, *make("float32"))


@pytest.mark.parametrize(
    ("ep", "spare", "exchange"),
    [
        pytest.param(2, 0, "dense", marks=pytest.mark.slow),
        pytest.param(8, 8, "dense", marks=pytest.mark.slow),
        (4, 4, "shifts"),
    ],
)
def test_on_several_devices_as_on_one(monkeypatch, ep, spare, exchange):
    """The same numbers are multiplied, whatever carries them and however many copies experts have."""
    monkeypatch.setitem(DISPATCHERS, "shifts", Shifts())
    params, x, ct = make("float32")
    extra = np.random.default_rng(ep).integers(0, 8, spare)
    order = np.random.default_rng(0).permutation(np.r_[np.arange(8), extra])
    placement = jax.tree.map(jnp.asarray, dense.placement_of(order, 8)) if spare else None
    (y, stats), grads = run(dataclasses.replace(CONFIG, exchange=exchange), ep, params, x, ct, placement)
    (expected, stats_of_one), grads_of_one = on_one_device()
    assert stats.loads.tolist() == stats_of_one.loads.tolist() and int(stats.not_finite) == 0
    # A last bit of a routing weight may differ, and an activation then rounds to the next number of 8 bits. Copies of
    # an expert have other rows in a block of 128, which are scaled together for its weight gradient.
    same, experts = 2e-3, 0.03 if spare else 2e-3
    assert relative(y, expected) < same
    for (path, a), b in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(grads_of_one), strict=True):
        name = jax.tree_util.keystr(path)
        assert not np.asarray(b).any() or relative(a, b) < (experts if "experts" in name else same), name


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_close_to_what_is_not_rounded(dtype):
    """A rounding to e4m3 is 2.6% of a number on average; at most eight of them are added up in any result.

    Forward: tokens and first matrices enter gate and value, then activations and last matrices: 2 * 2 + 2. So the
    errors are at most sqrt(8) * 2.6% = 7.4%, and 1 - cosine at most half the square of that, 0.27%. The router's
    gradient is made of differences between experts and may be off by more.
    """
    params, x, ct = make(dtype)
    (y, _), grads = run(CONFIG, None, params, x, ct)
    (exact, _), exact_grads = run(PLAIN, None, params, x, ct)
    for (path, a), b in zip(jax.tree.leaves_with_path((y, grads)), jax.tree.leaves((exact, exact_grads)), strict=True):
        name = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype
        assert not np.asarray(b).any() or (0.995 if "router" in name else 0.9966) < cosine(a, b) < 0.9999, name


def test_drops_as_bf16_does():
    params, x, ct = make("float32")
    params = params._replace(bias=params.bias - 10 * jnp.arange(8, dtype=jnp.float32))
    results = [run(dataclasses.replace(each, capacity_factor=1.0), 4, params, x, ct)[0] for each in (CONFIG, PLAIN)]
    (y, stats), (exact, plain_stats) = results
    assert int(stats.dropped) == int(plain_stats.dropped) > 0
    assert stats.loads.tolist() == plain_stats.loads.tolist()
    assert relative(y, exact) < 0.08


def test_what_is_not_finite_is_counted_and_reaches_its_token_alone():
    params, x, ct = make("bfloat16")
    x = x.at[5, 200].set(jnp.nan).at[9, 3].set(jnp.inf)
    (y, stats), (grads, dx) = run(CONFIG, None, params, x, ct)
    assert np.flatnonzero(np.isnan(np.asarray(y, np.float32)).any(1)).tolist() == [5, 9]
    # Of each of the tokens' rows, four with the shared expert's: a block of two of its own, one of the activations and
    # two of the gate's input. The second token has no choices left of a router that knows no numbers.
    assert int(stats.not_finite) > 10
    assert np.isnan(np.asarray(grads.experts.w_in, np.float32)).any()
    assert np.isnan(np.asarray(dx, np.float32)).any(1).sum() == 2
    assert int(run(PLAIN, None, params, x, ct)[0][1].not_finite) == 0
    weights = params.experts._replace(w_out=params.experts.w_out.at[2, 0, 0].set(jnp.inf))
    params, x, ct = make("bfloat16")
    assert int(run(CONFIG, None, params._replace(experts=weights), x, ct)[0][1].not_finite) == 1


class Kernels:
    """XLA's forms behind the switch that kernels are behind, which a division of the backward pass cannot open."""

    platform = "cpu"

    def why_not(self, task, device, *operands):
        """Nothing."""

    def kernel(self, name):
        """XLA's form."""
        here = {
            "scaled_matmul": products.matmul, "scaled_outer": products.outer,
            "copy_rows": copy_rows_by_xla, "add_rows": add_rows_by_xla,
        }  # fmt: skip
        return here.get(name) or getattr(quantise, f"{name}_by_xla")


def divided(config, dtype="bfloat16", tokens=TOKENS):
    params = jax.eval_shape(lambda: init_moe(jax.random.key(0), config, jnp.dtype(dtype)))
    x = jax.ShapeDtypeStruct((tokens, config.width), dtype)
    return split_stage(lambda params, x: moe_layer(params, x, config)[0], params, x), params, x


def bytes_of(leaves):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves))


def test_weight_products_wait_and_no_product_is_made_twice():
    split, params, x = divided(CONFIG)
    prepared = jax.eval_shape(split.prepare, params)
    y, residuals = jax.eval_shape(split.forward, prepared, x)
    _, crossing = jax.eval_shape(split.backward_input, prepared, residuals, y)
    first = matmul_flops(split.backward_input, prepared, residuals, y)
    second = matmul_flops(split.backward_weight, prepared, residuals.weight, crossing)
    forward = matmul_flops(split.forward, prepared, x)

    def whole(params, x, ct):
        return jax.vjp(lambda params, x: moe_layer(params, x, CONFIG)[0], params, x)[1](ct)

    assert first + second == matmul_flops(whole, params, x, y) - forward
    rows = 3 * TOKENS + 7 * 8 + 120 * 8  # with room for the starts of groups, of the first multiple of 128 after
    rows = rows + -rows % 128 + TOKENS
    assert first >= 2 * rows * 256 * 3 * 128 and second >= 2 * (rows - TOKENS) * 256 * 3 * 128
    assert forward < 1.05 * first


def test_weights_are_quantised_once_a_step():
    """Both layouts, from bfloat16; no other parameter of that size is read for a microbatch, and none is stashed."""
    split, params, x = divided(CONFIG)
    prepared = jax.eval_shape(split.prepare, params)
    large = sorted((leaf.shape, leaf.dtype.name) for leaf in prepared if leaf.ndim == 3 and leaf.size > 10_000)
    layouts = [(1, 128, 256), (1, 256, 128), (1, 256, 256), (1, 256, 256)]
    layouts += [(8, *shape[1:]) for shape in layouts]
    assert large == sorted((shape, "float8_e4m3fn") for shape in layouts)
    assert not any(leaf.ndim == 3 and leaf.shape[0] == 8 for leaf in jax.tree.leaves(split.residuals))
    text = str(jax.make_jaxpr(split.forward)(prepared, x))
    assert not re.search(r"f8_e4m3fn\[8,[^=]*= convert_element_type", text)


def test_kernels_leave_8_bits_to_keep_and_to_hand_over(monkeypatch):
    """At DeepSeek-V3's sizes, beside bfloat16: what is kept is a third less, what waits for weight gradients 22%."""
    monkeypatch.setitem(registry.BACKENDS, "mosaic", Kernels())
    large = MoEConfig(router=RouterConfig(32, 8, 8, 4), capacity_factor=1.0, precision="fp8")
    split, params, x = divided(large, tokens=4096)
    plain, _, _ = divided(dataclasses.replace(large, precision="bf16", backend="xla"), tokens=4096)
    assert 0.6 < bytes_of(split.residuals) / bytes_of(plain.residuals) < 0.68
    assert bytes_of(split.crossing) < 0.79 * bytes_of(plain.crossing)
    wide = [leaf for leaf in jax.tree.leaves((split.residuals, split.crossing)) if leaf.size > 4096 * 1024]
    assert {leaf.dtype for leaf in wide} == {jnp.dtype(RECIPES["fp8"].kept), jnp.dtype("bfloat16")}
    assert [leaf.shape for leaf in wide if leaf.dtype == jnp.bfloat16] == [x.shape]  # which the router reads, too
    prepared = jax.eval_shape(split.prepare, params)
    assert {leaf.dtype for leaf in prepared if leaf.size > 2**24} == {jnp.dtype("float8_e4m3fn")}


def test_every_operation_has_its_kernel(monkeypatch):
    """Lowered for a Hopper GPU: one for each product, gate, move of rows, and what no other could write."""
    target = Target("gpu", "NVIDIA H200", HOPPER_SMS, True)
    monkeypatch.setattr(registry, "current_target", lambda: target)
    monkeypatch.setattr(hopper, "current_target", lambda: target)
    config = dataclasses.replace(CONFIG, width=512, hidden=256, backend="auto")
    split, params, x = divided(config)
    prepared = jax.eval_shape(split.prepare, params)
    y, residuals = jax.eval_shape(split.forward, prepared, x)
    _, crossing = jax.eval_shape(split.backward_input, prepared, residuals, y)

    def kernels(function, *arguments):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("@mosaic_gpu_v2")

    assert kernels(split.prepare, params) == 4  # matrices
    assert kernels(split.forward, prepared, x) == 4 + 2 + 2  # products, gates, moves
    assert kernels(split.backward_input, prepared, residuals, y) == 4 + 2 + 2
    # Tokens and the result's gradient, of routed experts and the shared one, and the shared one's activations.
    assert kernels(split.backward_weight, prepared, residuals.weight, crossing) == 4 + 5 + 2  # columns in between


def test_rows_travel_in_8_bits_with_scales():
    """Forward and backward; results, and gradients of tokens, as they are."""
    params, x, ct = make("bfloat16")
    jaxpr = str(jax.make_jaxpr(lambda *arrays: run(CONFIG, 4, *arrays))(params, x, ct))
    kinds = re.findall(r":(\w+)\[[\d,]*\](?:\{[^}]*\})? = all_to_all", jaxpr)
    assert sorted(kinds) == ["bf16", "bf16", "f32", "f32", "f32", "f8_e4m3fn", "f8_e4m3fn", "i32"]


class PerTensor(Blockwise):
    """One scale for all of an array, not rounded, and gradients in e5m2: products by XLA alone."""

    def rows(self, x, *, backend):
        """In e4m3."""
        return whole(x, jnp.float8_e4m3fn)

    def gradient_rows(self, ct, *, backend):
        """In e5m2."""
        return whole(ct, jnp.float8_e5m2)

    def columns(self, rows, valid, *, backend):
        """The same numbers, since all have one scale."""
        used = (jnp.arange(BLOCK) < valid[:, None]).reshape(-1)
        numbers = jnp.where(used[:, None], rows.numbers, jnp.zeros((), rows.numbers.dtype)).T
        return ScaledRows(numbers, jnp.full((len(used) // BLOCK, len(numbers)), rows.scales.max()))

    def weights(self, w, *, backend):
        """A scale for all experts."""
        found = whole(w.reshape(-1, w.shape[-1]), jnp.float8_e4m3fn)
        shape = w.shape[0], w.shape[1] // BLOCK, w.shape[2] // BLOCK
        matrices = ScaledMatrices(found.numbers.reshape(w.shape), jnp.full(shape, found.scales[0, 0]))
        return matrices.transposed(), matrices

    def gate(self, hidden, weight, *, backend):
        """The product in e4m3, and the gate's input too."""
        gate, value = jnp.split(hidden.astype(jnp.float32), 2, axis=-1)
        return self.rows(jax.nn.silu(gate) * value * weight[:, None], backend=backend), self.rows(hidden, backend="xla")

    def gate_backward(self, hidden, weight, ct, valid, *, backend):
        """The gradient in e5m2."""
        gate, value = jnp.split(dequantise_rows(hidden), 2, axis=-1)
        found = gradients(gate, value, jnp.broadcast_to(weight[:, None], ct.shape), ct.astype(jnp.float32))
        rows = self.gradient_rows(jnp.concatenate([found.gate, found.value], -1), backend=backend)
        act = self.columns(self.rows(found.act, backend=backend), valid, backend=backend)
        return GateGradients(rows, self.columns(rows, valid, backend=backend), act, found.weight.sum(-1))

    def matmul(self, lhs, rhs, sizes, *, backend, dtype=jnp.bfloat16):
        """Of any numbers."""
        return products.matmul(*lhs, *rhs, sizes, dtype=dtype)

    def outer(self, lhs, dout, sizes, *, backend, dtype=jnp.float32):
        """Of any numbers."""
        return products.outer(*lhs, *dout, sizes, dtype=dtype)


def whole(x, dtype):
    """Rows in a dtype; their largest becomes the largest that it has. Rows that hold none are zeros here."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max() / float(jnp.finfo(dtype).max), 1e-30)
    return ScaledRows((x / scale).astype(dtype), jnp.full((x.shape[1] // BLOCK, len(x)), scale))


def test_a_recipe_of_other_numbers(monkeypatch):
    """One class, and one line of the table."""
    monkeypatch.setitem(RECIPES, "per-tensor", Recipe("per-tensor", PerTensor(), kept=jnp.float8_e4m3fn))
    params, x, ct = make("bfloat16")
    config = dataclasses.replace(CONFIG, precision="per-tensor")
    (y, stats), grads = run(config, None, params, x, ct)
    (exact, _), exact_grads = run(PLAIN, None, params, x, ct)
    assert int(stats.not_finite) == 0
    for (path, a), b in zip(jax.tree.leaves_with_path((y, grads)), jax.tree.leaves((exact, exact_grads)), strict=True):
        assert a.dtype == b.dtype
        assert not np.asarray(b).any() or 0.98 < cosine(a, b) < 0.9999, jax.tree_util.keystr(path)
    jaxpr = str(jax.make_jaxpr(lambda *arrays: run(config, None, *arrays))(params, x, ct))
    assert "f8_e5m2" in jaxpr
    (remote, _), _ = run(config, 2, params, x, ct)
    assert 0.98 < cosine(remote, exact) < 0.9999


def test_experts_may_be_quantised_before_the_layer():
    params, x, _ = make("bfloat16")
    slots = jnp.arange(8, dtype=jnp.int32)
    experts = jax.jit(lambda masters: working_copies_for(masters, slots, CONFIG))(params.experts)
    assert isinstance(experts, ScaledExperts)
    layer = jax.jit(lambda experts, x: moe_layer(params._replace(experts=experts), x, CONFIG)[0])
    np.testing.assert_array_equal(layer(experts, x), layer(params.experts, x))
    with pytest.raises(ValueError, match="experts are quantised, and bf16 multiplies plain numbers"):
        moe_layer(params._replace(experts=experts), x, PLAIN)


def test_refusals():
    params, x, _ = make("bfloat16")
    with pytest.raises(ValueError, match=r"fp8 needs hidden to be a multiple of 128, not 100: pad it, or take prec"):
        dataclasses.replace(CONFIG, hidden=100)
    with pytest.raises(ValueError, match="fp8 takes tokens of bfloat16 or float32, not float16: cast x, or take"):
        moe_layer(params, x.astype(jnp.float16), CONFIG)
    with pytest.raises(ValueError, match="recipe mine: encoding and product_dtype are for products of plain numbers"):
        Recipe("mine", Blockwise(), product_dtype=jnp.float16)
    with pytest.raises(ValueError, match="recipe mine: gather=True needs an arithmetic"):
        Recipe("mine", gather=True)


def test_float64_is_refused(x64):
    params, x, _ = make("float64")
    with pytest.raises(ValueError, match="fp8 takes tokens of bfloat16 or float32, not float64: cast x, or take"):
        moe_layer(params, x, CONFIG)
