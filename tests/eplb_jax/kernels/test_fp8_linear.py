"""Linear layers in FP8: products of quantised operands, gradients near the exact ones, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax.kernels import backend, fp8_linear, hopper, registry
from eplb_jax.kernels.fp8_linear import keep_matrix, scaled_feed_forward, scaled_linear, scaled_linears
from eplb_jax.kernels.quantise import quantise
from eplb_jax.kernels.scaled import dequantise_matrices, dequantise_rows, quantise_matrices, quantise_rows


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def exact(x):
    return np.asarray(x, np.float64)


def rows_of(x):
    """What `quantise_rows` made of rows, in float64."""
    return exact(dequantise_rows(quantise_rows(x)))


def columns_of(x):
    """Rows as a weight gradient reads them, zeros added up to 128."""
    x = jnp.pad(x, ((0, -x.shape[0] % 128), (0, 0)))
    return exact(dequantise_rows(quantise(x)[1])).T


def close(found, wanted, tolerance=1e-3):
    error = np.linalg.norm(exact(found) - wanted) / np.linalg.norm(wanted)
    assert error < tolerance, error


def cosine(found, wanted):
    found, wanted = exact(found).ravel(), exact(wanted).ravel()
    return found @ wanted / np.sqrt((found @ found) * (wanted @ wanted))


@pytest.mark.parametrize("rows", [pytest.param(128, marks=pytest.mark.slow), 200])
def test_the_three_products_are_those_of_the_quantised_operands(rows):
    x, w, ct = normal(0, rows, 256), normal(1, 256, 384) * jnp.linspace(0.01, 1, 384), normal(2, rows, 384)
    y, pull = jax.vjp(scaled_linear, x, w)
    dx, dw = pull(ct)
    matrix = exact(dequantise_matrices(quantise_matrices(w[None]))[0])
    close(y, rows_of(x) @ matrix)
    close(dx, rows_of(ct) @ matrix.T)
    close(dw, columns_of(dequantise_rows(quantise_rows(x))).T @ columns_of(ct))
    assert y.dtype == dx.dtype == dw.dtype == jnp.float32
    for found, wanted in ((y, x @ w), (dx, ct @ w.T), (dw, x.T @ ct)):
        assert 0.999 < cosine(found, wanted) < 1 - 1e-9


def test_dtypes_are_those_of_the_arguments():
    x, w = normal(0, 5, 128, dtype=jnp.bfloat16), normal(1, 128, 128, dtype=jnp.bfloat16)
    y, pull = jax.vjp(lambda x, w: scaled_linear(x, w, dtype=jnp.float32), x, w)
    dx, dw = pull(y)
    assert (y.dtype.name, dx.dtype, dw.dtype) == ("float32", x.dtype, w.dtype)


@pytest.mark.parametrize("wide", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_several_matrices_read_one_x(wide, monkeypatch):
    """576 columns are padded; values and gradients are those of each by itself, dx but for the sum's rounding."""
    monkeypatch.setattr(fp8_linear, "WIDE", 128 if wide else 4096)
    x, a, b = normal(0, 128, 128), normal(1, 128, 128), normal(2, 128, 576)
    both, pull = jax.vjp(lambda x, a, b: scaled_linears(x, (a, b)), x, a, b)
    dx, *cts = pull(both)
    total = 0.0
    for y, ct, w in zip(both, cts, (a, b), strict=True):
        alone, pull_alone = jax.vjp(scaled_linear, x, w)
        np.testing.assert_array_equal(y, alone)
        dx_alone, dw = pull_alone(y)
        np.testing.assert_array_equal(ct, dw)
        total = total + exact(dx_alone)
    close(dx, total, 1e-6)
    text = str(jax.make_jaxpr(lambda x: scaled_linears(x, (keep_matrix(a), keep_matrix(b))))(x))
    assert text.count("f8_e4m3fn[128,128] = reshape") <= 2  # x once, and the matrix of that shape


def test_wide_matrices_are_neither_joined_nor_their_results_cut_apart():
    """A head's keys and values of DeepSeek-V3 are 16,384 columns each: gradients need not be put side by side."""
    x, keys, values = (jnp.zeros(shape, jnp.bfloat16) for shape in ((128, 128), (128, 4096), (128, 4096)))

    def both(x, keys, values):
        ys, pull = jax.vjp(lambda *given: scaled_linears(given[0], given[1:]), x, keys, values)
        return pull(ys)

    def sizes(*given):
        """Columns of what is padded or put side by side."""
        eqns = jax.make_jaxpr(both)(*given).eqns
        return [eqn.outvars[0].aval.shape for eqn in eqns if eqn.primitive.name in ("pad", "concatenate")]

    assert not sizes(x, keys, values)
    assert (128, 4096 + 256) in sizes(x, keys, values[:, :256])


def test_kept_matrices_give_the_same_and_have_no_gradient():
    x, w = normal(0, 3, 256), normal(1, 256, 192)
    kept = keep_matrix(w)
    np.testing.assert_array_equal(scaled_linear(x, kept)[:, :192], scaled_linear(x, w))
    with pytest.raises(ValueError, match="keep_matrix made have no gradient"):
        jax.grad(lambda x: scaled_linear(x, kept).sum())(x)


@pytest.mark.parametrize("hidden", [pytest.param(128, marks=pytest.mark.slow), 240])
def test_swiglu_is_near_the_exact_one_and_so_are_its_gradients(hidden):
    x, w_in, w_out = normal(0, 2, 70, 128), normal(1, 128, 2 * hidden) * 0.1, normal(2, hidden, 128) * 0.1

    def plain(x, w_in, w_out):
        gate, value = jnp.split(x @ w_in, 2, -1)
        return (jax.nn.silu(gate) * value) @ w_out

    found, pull = jax.vjp(scaled_feed_forward, x, w_in, w_out)
    wanted, pull_plain = jax.vjp(plain, x, w_in, w_out)
    ct = normal(3, *x.shape)
    for one, other in zip((found, *pull(ct)), (wanted, *pull_plain(ct)), strict=True):
        assert one.shape == other.shape and 0.997 < cosine(one, other) < 1 - 1e-9


def test_parts_over_a_mesh_axis_are_gathered_and_give_the_same():
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices")
    x, w_in, w_out = normal(0, 256, 128), normal(1, 128, 512) * 0.1, normal(2, 256, 128) * 0.1

    def both(function):
        def run(*arguments):
            y, pull = jax.vjp(function, *arguments)
            return y, pull(y)

        return run

    parts = jax.sharding.PartitionSpec("ep")
    mesh = jax.make_mesh((2,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    run = jax.shard_map(
        both(lambda *a: scaled_feed_forward(*a, axis="ep")), mesh=mesh, in_specs=(parts,) * 3, out_specs=parts
    )
    found, wanted = jax.jit(run)(x, w_in, w_out), both(scaled_feed_forward)(x, w_in, w_out)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), found, wanted)
    assert all(float(abs(leaf).max()) > 0.0 for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((jnp.ones((2, 128), jnp.float16), jnp.ones((128, 128))), "x is float16: a Linear in FP8 has bfloat16 or"),
        ((jnp.ones((2, 128)), jnp.ones((128, 128), jnp.int8)), "w is int8"),
        ((jnp.ones((2, 128)), jnp.ones((256, 128))), r"w \(256, 128\) does not fit x \(2, 128\).*reshape it"),
        ((jnp.ones((2, 256)), keep_matrix(jnp.ones((128, 128)))), r"kept matrix of \(1, 128, 128\) does not fit"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        scaled_linear(*arguments)


def test_refusals_of_several(monkeypatch):
    monkeypatch.setattr(registry, "current_target", lambda: backend.Target("cpu", "cpu", 4, False))
    x, w_in, w_out = jnp.ones((2, 128)), jnp.ones((128, 512)), jnp.ones((128, 128))
    with pytest.raises(ValueError, match="0 weights: give one or more"):
        scaled_linears(x, ())
    with pytest.raises(ValueError, match="2 weights: give one or more, all matrices or all from keep_matrix"):
        scaled_linears(x, (w_out, keep_matrix(w_out)))
    with pytest.raises(ValueError, match=r"w_out \(128, 128\) do not fit x"):
        scaled_feed_forward(x, w_in, w_out)
    with pytest.raises(ValueError, match="axis='ep' is not bound"):
        scaled_feed_forward(x, w_in, w_out, axis="ep")
    with pytest.raises(ValueError, match='backend="mosaic" cannot'):
        scaled_linear(x, w_out, backend="mosaic")


def test_a_linear_and_swiglu_lower_for_hopper_gpus(monkeypatch):
    """All kernels, forward and backward, without a GPU."""
    target = backend.Target("gpu", "NVIDIA H200", 132, True)
    for module in (registry, hopper):
        monkeypatch.setattr(module, "current_target", lambda: target)

    def step(x, w_in, w_out):
        y = scaled_linear(scaled_feed_forward(x, w_in, w_out), w_out.T)
        return (y.astype(jnp.float32) ** 2).sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((384, 512), (512, 512), (256, 512))]
    text = jax.jit(jax.grad(step, (0, 1, 2))).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    # Three quantised matrices; rows of two gradients; columns of two inputs; gate and its gradient; nine products.
    assert text.count("@mosaic_gpu_v2") == 18


def test_requests_of_any_number_take_the_kernels(monkeypatch):
    target = backend.Target("gpu", "NVIDIA H200", 132, True)
    for module in (registry, hopper):
        monkeypatch.setattr(module, "current_target", lambda: target)
    kept = jax.eval_shape(lambda: keep_matrix(jnp.ones((256, 128))))
    for rows in (3, 100):
        traced = jax.jit(scaled_linear).trace(jax.ShapeDtypeStruct((rows, 256), jnp.bfloat16), kept)
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 1
