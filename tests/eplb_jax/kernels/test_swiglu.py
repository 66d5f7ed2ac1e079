"""The gate's gradient by the Mosaic kernel equals XLA's: interpreted here, compiled where there is a Hopper GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eplb_jax import ExpertParams, grouped_matmul
from eplb_jax.kernels import registry
from eplb_jax.kernels.backend import HOPPER_SMS, Target, current_target
from eplb_jax.kernels.dtypes import wide
from eplb_jax.kernels.fallback import log_fallback
from eplb_jax.kernels.grouped_gemm.layout import used_rows
from eplb_jax.kernels.permute import DTYPES, Ring
from eplb_jax.kernels.swiglu import GATED, gated_backward, why_not
from eplb_jax.moe import experts
from eplb_jax.moe.experts import apply_experts, gated_backward_by_xla, init_experts, swiglu
from tests.cases import cases
from tests.eplb_jax.kernels.interpreter import interpreted

needs_hopper = pytest.mark.skipif(not current_target().hopper, reason="Mosaic kernels run on Hopper GPUs")
HOPPER = Target("gpu", "NVIDIA H200", HOPPER_SMS, True)
ULPS = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 1e-5}
SIZES = jnp.array([5, 0, 24, 9], jnp.int32)


def operands(rows, width, dtype, unused=()):
    """Hidden activations, weights and the gradient of what is behind the gate; unused rows hold NaN."""
    rng = np.random.default_rng(rows)
    hidden, ct = (rng.standard_normal((rows, n)) for n in (2 * width, width))
    hidden[list(unused)] = ct[list(unused)] = np.nan
    return jnp.asarray(hidden, dtype), jnp.asarray(rng.random(rows), jnp.float32), jnp.asarray(ct, dtype)


def check_close(found, wanted, dtype):
    """Gradients and activations up to their dtype's rounding, sums up to float32's."""
    for got, want, ulp in zip(found, wanted, (ULPS[dtype], ULPS[dtype], 1e-5), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        np.testing.assert_allclose(got, want, rtol=ulp, atol=ulp * np.nanmax(np.abs(want)) * 2**-4)


def operands_of_experts(dtype, width=16, hidden=24, rows=56):
    """Parameters, rows that are NaN where they are no slot's, weights, and a gradient that is NaN there, too."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = init_experts(keys[0], len(SIZES), width, hidden, dtype)
    x, ct = (jax.random.normal(key, (rows, width), dtype) for key in keys[1:3])
    used = used_rows(SIZES, rows)[:, None]
    weight = jax.random.uniform(keys[3], (rows,), wide(dtype))
    return params, jnp.where(used, x, jnp.nan), weight, jnp.where(used, ct, jnp.nan)


def layer(params, rows, weight):
    return apply_experts(params, rows, weight, SIZES)


def composition(params, rows, weight):
    hidden = grouped_matmul(rows, params.w_in, SIZES)
    return grouped_matmul(swiglu(hidden, weight), params.w_out, SIZES)


def with_gradients(function):
    """Its value and the gradients of all its arguments."""

    def both(params, rows, weight, ct):
        out, pull = jax.vjp(function, params, rows, weight)
        return out, *pull(ct)

    return both


@pytest.mark.parametrize("rows, width, dtype, plan", [
    (9, 512, "bfloat16", GATED),
    pytest.param(7, 384, "float16", Ring(4 * 1024, 3, 1, 1), marks=pytest.mark.slow),
    (5, 768, "float32", Ring(3 * 1024, 3, 2, 2)),
    pytest.param(1, 128, "float32", Ring(1, 2, 1), marks=pytest.mark.slow),
])  # fmt: skip
def test_kernel_in_the_interpreter(rows, width, dtype, plan):
    """Two multiprocessors, simulated on the CPU; the last rows come twice where they do not fill a slot."""
    arguments = operands(rows, width, dtype, range(1, rows, 3))
    with interpreted(uninitialized_memory="zero"):
        found = gated_backward(*arguments, 2, plan)
    check_close(found, gated_backward_by_xla(*arguments), dtype)


@needs_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", [
    (8192, 2048), (4099, 2048), (1001, 512), (999, 1408), (257, 7168), (37, 384), (3, 128), (1, 256),
])  # fmt: skip
def test_kernel_equals_xla(rows, width, dtype):
    arguments = operands(rows, width, dtype, range(1, rows, 3))
    by = [jax.jit(experts.gated_backward, static_argnums=3)(*arguments, backend) for backend in ("mosaic", "xla")]
    check_close(*by, dtype)


@cases("dtype", DTYPES, quick=["bfloat16"])
@pytest.mark.parametrize("rows, width", [(131072, 2048), (4099, 512), (999, 1408), (257, 7168), (1, 128)])
def test_kernel_can_be_lowered_without_a_gpu(rows, width, dtype):
    hidden, ct = (jax.ShapeDtypeStruct((rows, n), dtype) for n in (2 * width, width))
    assert why_not(hidden) is None

    def kernel(hidden, weight, ct):
        return gated_backward(hidden, weight, ct, HOPPER_SMS)

    traced = jax.jit(kernel).trace(hidden, jax.ShapeDtypeStruct((rows,), jnp.float32), ct)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 1


def test_gradients_equal_those_of_the_composition(x64):
    arguments = operands_of_experts(jnp.float64)
    used = used_rows(SIZES, arguments[1].shape[0])
    found, wanted = (with_gradients(function)(*arguments) for function in (layer, composition))
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert got.dtype == want.dtype == jnp.float64
        got, want = (array[used] if len(array) == len(used) else array for array in (got, want))
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_weights_gradient_has_the_weights_dtype(dtype):
    params, rows, weight, ct = operands_of_experts(jnp.bfloat16)
    weight = weight.astype(dtype)
    _, params_ct, rows_ct, weight_ct = with_gradients(layer)(params, rows, weight, ct)
    assert weight_ct.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves((params_ct, rows_ct))} == {jnp.dtype("bfloat16")}


def test_no_product_is_made_twice():
    """Two products forward, two of the input gradient, two of the weights' gradient."""

    def count(function, *arguments):
        return str(jax.make_jaxpr(function)(*arguments)).count(" ragged_dot_general[")

    *arguments, ct = operands_of_experts(jnp.float32)
    assert count(layer, *arguments) == 2
    assert count(with_gradients(layer), *arguments, ct) == 6
    assert count(jax.vjp(layer, *arguments)[1], ct) == 4


def on_hopper(monkeypatch):
    monkeypatch.setattr(registry, "current_target", lambda: HOPPER)


def large_operands():
    shape = jax.ShapeDtypeStruct
    params = ExpertParams(shape((4, 256, 512), jnp.bfloat16), shape((4, 256, 256), jnp.bfloat16))
    rows = shape((128, 256), jnp.bfloat16)
    return params, rows, shape((128,), jnp.float32), rows


def test_lowering_decides_where_the_device_is_a_hopper_gpu(monkeypatch):
    on_hopper(monkeypatch)
    traced = jax.jit(with_gradients(layer)).trace(*large_operands())
    on_cuda = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert on_cuda.count("@mosaic_gpu_v2") == 7  # six products and the gate
    assert "mosaic" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("backend", ["auto", "mosaic"])
def test_inside_shard_map(monkeypatch, backend):
    """Results vary over the mesh axis; gradients of weights that do not are summed over it."""
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices")
    on_hopper(monkeypatch)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    body = with_gradients(lambda *of: apply_experts(*of, SIZES, backend))
    rows = P("data")
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(P(), rows, rows, rows), out_specs=(rows, P(), rows, rows))
    params, *rest = large_operands()
    twice = [jax.ShapeDtypeStruct((2 * array.shape[0], *array.shape[1:]), array.dtype) for array in rest]
    text = jax.jit(mapped).trace(params, *twice).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 7 and text.count("all_reduce") >= 2


@pytest.mark.parametrize("shape, dtype, message", [
    ((8, 256), "float64", "dtype float64"),
    ((8, 192), "bfloat16", "half of the width 192"),
    ((0, 256), "bfloat16", "shape is (0, 256)"),
])  # fmt: skip
def test_what_the_kernel_does_not_take(shape, dtype, message):
    assert message in why_not(jax.ShapeDtypeStruct(shape, dtype))


def test_mosaic_says_what_it_cannot_do_and_auto_does_it(monkeypatch):
    monkeypatch.setattr(registry, "current_target", lambda: HOPPER)
    arguments = operands(4, 96, "float32")
    with pytest.raises(ValueError, match=r"cannot make the gate's gradient: half of the width 192 .*; take backend="):
        experts.gated_backward(*arguments, "mosaic")
    for got, want in zip(experts.gated_backward(*arguments), gated_backward_by_xla(*arguments), strict=True):
        np.testing.assert_array_equal(got, want)


def test_fallback_on_a_gpu_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(registry, "current_target", lambda: Target("gpu", "NVIDIA A100", 108, False))
    log_fallback.cache_clear()
    for _ in range(2):
        experts.gated_backward(*operands(4, 128, "float32"))
    assert [record.getMessage() for record in caplog.records if record.name == registry.logger.name] == [
        "the gate's gradient is made by XLA's fusions, not by our kernel: the device is 'NVIDIA A100', no Hopper GPU"
    ]
