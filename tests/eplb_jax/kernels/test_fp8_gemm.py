"""Products in FP8: each backend equals a plain loop over the groups in float64, whatever rows of no group hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from eplb_jax.kernels import registry
from eplb_jax.kernels.backend import HOPPER_SMS, Target, current_target
from eplb_jax.kernels.fp8_gemm import mosaic
from eplb_jax.kernels.fp8_gemm.interface import scaled_dot, scaled_dot_outer, scaled_matmul, scaled_outer
from eplb_jax.kernels.fp8_gemm.slots import ScaledTile
from eplb_jax.kernels.grouped_gemm.layout import FP8_ALIGN, group_starts, round_up, used_rows, valid_rows
from eplb_jax.kernels.scaled import E4M3, ScaledMatrices, ScaledRows, quantise_columns, quantise_matrices, quantise_rows
from tests.cases import cases
from tests.eplb_jax.kernels.interpreter import interpreted

SIZES = {
    "equal": [128, 128, 128],
    "uneven": [3, 130, 71],
    "empty": [0, 200, 0],
    "none": [0, 0, 0],
    "full": [256, 256, 128],
}
ROWS, K, N = 640, 256, 384
CPU = Target("cpu", "cpu", 4, False)
BOUND = {"float32": 1e-3 if current_target().hopper else 1e-5, "bfloat16": 4e-3}
"""Of the largest value: sums are float32, and a bfloat16 result is off by up to 2**-9.

Tensor cores, which multiply on a Hopper GPU, keep some 14 bits of a sum of 128 products.
"""


def spans(sizes):
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += -(-size // 128) * 128


def make(sizes, seed=0, rows=ROWS, k=K, n=N):
    """Quantised operands of a forward pass and of a weight gradient.

    Scales vary by rows, columns and blocks. Rows of no group are NaN in the first, and zeros in the second but for
    the blocks behind all groups.
    """
    rng = np.random.default_rng(seed)
    x, dout = np.zeros((rows, k), np.float32), np.zeros((rows, n), np.float32)
    for span in spans(sizes):
        for each in (x, dout):
            shape = each[span].shape
            each[span] = rng.standard_normal(shape) * np.exp(rng.standard_normal((shape[0], 1)))
            each[span] *= np.exp(rng.standard_normal(shape[1]))
    w = rng.standard_normal((len(sizes), n, k)) * np.exp(rng.standard_normal((1, n, 1)) + rng.standard_normal(k))
    used = np.asarray(used_rows(np.asarray(sizes), rows, FP8_ALIGN))
    behind = np.arange(rows) >= sum(-(-size // 128) * 128 for size in sizes)
    quantise = functools.partial(quantise_columns, power_of_two=False)
    lhs = quantise_rows(jnp.asarray(np.where(used[:, None], x, np.nan)), power_of_two=False)
    columns = [quantise(jnp.asarray(np.where(behind[:, None], np.nan, each))) for each in (x, dout)]
    return lhs, quantise_matrices(jnp.asarray(w, jnp.float32)), *columns, jnp.asarray(sizes, jnp.int32)


def rows_in_float64(rows):
    """What the numbers and scales stand for."""
    numbers, scales = (np.asarray(each).astype(np.float64) for each in rows)
    return (numbers.reshape(len(numbers), -1, 128) * scales.T[..., None]).reshape(numbers.shape)


def matrices_in_float64(matrices):
    numbers, scales = (np.asarray(each).astype(np.float64) for each in matrices)
    return numbers * scales.repeat(128, 1).repeat(128, 2)


def plain_matmul(lhs, rhs, sizes):
    parts = zip(spans(sizes.tolist()), matrices_in_float64(rhs), strict=True)
    return np.concatenate([rows_in_float64(lhs)[span] @ matrix.T for span, matrix in parts])


def plain_outer(lhs, dout, sizes):
    lhs, dout = rows_in_float64(lhs), rows_in_float64(dout)
    return np.stack([lhs[:, span] @ dout[:, span].T for span in spans(sizes.tolist())])


def used(x, sizes):
    """The rows of groups, one after the other."""
    return np.concatenate([np.asarray(x)[span] for span in spans(sizes.tolist())])


def assert_close(got, want, dtype, bound=None):
    bound = bound or BOUND[jnp.dtype(dtype).name]
    assert got.dtype == jnp.dtype(dtype) and got.shape == want.shape
    got = np.asarray(got).astype(np.float64)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=bound, atol=bound * max(np.abs(want).max(initial=0), 1e-30))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_a_plain_loop(sizes, dtype):
    lhs, rhs, columns, dout, sizes = make(sizes)
    got = jax.jit(functools.partial(scaled_matmul, backend="xla", dtype=dtype))(lhs, rhs, sizes)
    assert got.shape == (ROWS, N)
    assert_close(used(got, sizes), plain_matmul(lhs, rhs, sizes), dtype)
    got = jax.jit(functools.partial(scaled_outer, backend="xla", dtype=dtype))(columns, dout, sizes)
    assert_close(got, plain_outer(columns, dout, sizes), dtype)


@cases("rows", [5, 128, 200], quick=[200])
def test_dense_products_of_any_number_of_rows(rows):
    rng = np.random.default_rng(rows)
    x, w = rng.standard_normal((rows, K)).astype(np.float32), rng.standard_normal((1, N, K)).astype(np.float32)
    lhs, rhs = quantise_rows(jnp.asarray(x)), quantise_matrices(jnp.asarray(w))
    want = rows_in_float64(lhs) @ matrices_in_float64(rhs)[0].T
    assert_close(scaled_dot(lhs, rhs, dtype="float32"), want, "float32")
    assert_close(scaled_dot(lhs, rhs), want, "bfloat16")


def test_the_dense_weight_gradient():
    rng = np.random.default_rng(0)
    lhs, dout = (quantise_columns(jnp.asarray(rng.standard_normal((256, width)), jnp.float32)) for width in (K, N))
    want = rows_in_float64(lhs) @ rows_in_float64(dout).T
    assert_close(scaled_dot_outer(lhs, dout), want, "float32")
    assert_close(scaled_dot_outer(lhs, dout, dtype=jnp.bfloat16), want, "bfloat16")


def test_sums_of_each_128_are_scaled_and_added_in_float32():
    """A small number beside a large one of the next 128 is lost only where it is below float32's precision."""
    x = jnp.ones((128, 256)).at[:, 128:].set(2.0**12)
    lhs, rhs = quantise_rows(x), quantise_matrices(jnp.ones((1, 128, 256)))
    assert (scaled_dot(lhs, rhs, dtype=jnp.float32) == 128 + 128 * 2.0**12).all()


def test_a_block_that_is_not_finite_shows():
    x = jnp.ones((256, 128)).at[130, 5].set(jnp.inf)
    lhs, rhs, sizes = quantise_rows(x), quantise_matrices(jnp.ones((2, 128, 128))), jnp.array([128, 3])
    assert jnp.isnan(scaled_matmul(lhs, rhs, sizes)).all(1)[:131].tolist() == [False] * 130 + [True]
    columns = quantise_columns(x)
    assert jnp.isnan(scaled_outer(columns, columns, sizes)).any((1, 2)).tolist() == [False, True]


def test_inside_shard_map():
    """Rows and sizes are split, the matrices are not."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    parts = [make(SIZES[name], seed=i) for i, name in enumerate(("uneven", "empty"))]
    rhs = parts[0][1]
    numbers = [jnp.concatenate([part[i].numbers for part in parts], axis) for i, axis in ((0, 0), (2, 1), (3, 1))]
    scales = [jnp.concatenate([part[i].scales for part in parts], axis) for i, axis in ((0, 1), (2, 0), (3, 0))]
    rows, lasts = ScaledRows(P("data"), P(None, "data")), ScaledRows(P(None, "data"), P("data"))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(rows, lasts, lasts, P(), P("data")), out_specs=P("data"))
    def step(lhs, columns, dout, rhs, sizes):
        return scaled_matmul(lhs, rhs, sizes, dtype="float32"), scaled_outer(columns, dout, sizes)

    out, drhs = step(*map(ScaledRows, numbers, scales), rhs, jnp.concatenate([part[4] for part in parts]))
    for i, (lhs, _, columns, dout, sizes) in enumerate(parts):
        assert_close(used(out[i * ROWS : (i + 1) * ROWS], sizes), plain_matmul(lhs, rhs, sizes), "float32")
        assert_close(drhs[3 * i : 3 * (i + 1)], plain_outer(columns, dout, sizes), "float32")


def test_vmap_makes_one_product_after_the_other():
    made = [make(SIZES[name], seed=i) for i, name in enumerate(("uneven", "empty"))]
    lhs, rhs, columns, dout, sizes = jax.tree.map(lambda *each: jnp.stack(each), *made)
    out = jax.vmap(functools.partial(scaled_matmul, dtype="float32"))(lhs, rhs, sizes)
    drhs = jax.vmap(scaled_outer)(columns, dout, sizes)
    for i, (lhs, rhs, columns, dout, sizes) in enumerate(made):
        assert_close(used(out[i], sizes), plain_matmul(lhs, rhs, sizes), "float32")
        assert_close(drhs[i], plain_outer(columns, dout, sizes), "float32")


def test_memory_is_not_that_of_all_pairs_of_groups_and_rows():
    """Of many groups, XLA's form takes a few times the result's memory."""
    rows, k, n, groups = 4096, 256, 256, 32
    shape = jax.ShapeDtypeStruct
    lhs = ScaledRows(shape((rows, k), E4M3), shape((k // 128, rows), jnp.float32))
    rhs = ScaledMatrices(shape((groups, n, k), E4M3), shape((groups, n // 128, k // 128), jnp.float32))
    sizes = shape((groups,), jnp.int32)
    compiled = jax.jit(functools.partial(scaled_matmul, backend="xla")).lower(lhs, rhs, sizes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 4 * rows * n


def test_layout_of_fp8():
    assert round_up(np.array([0, 1, 128, 129]), FP8_ALIGN).tolist() == [0, 128, 128, 256]
    assert group_starts(jnp.array([3, 0, 130, 1]), FP8_ALIGN).tolist() == [0, 128, 128, 384]
    assert np.flatnonzero(used_rows(jnp.array([2, 0, 1]), 256, FP8_ALIGN)).tolist() == [0, 1, 128]
    assert valid_rows(np.array([3, 0, 257, 128]), 768).tolist() == [3, 128, 128, 1, 128, 0]
    with pytest.raises(ValueError, match="200 rows do not divide into blocks of 128"):
        valid_rows(jnp.array([3]), 200)


def rows_of(*shape, dtype=E4M3, scales=None):
    return ScaledRows(jnp.zeros(shape, dtype), jnp.zeros(scales or (shape[-1] // 128, shape[0]), jnp.float32))


def matrices_of(*shape, scales=None):
    return ScaledMatrices(
        jnp.zeros(shape, E4M3), jnp.zeros(scales or (shape[0], shape[1] // 128, shape[2] // 128), jnp.float32)
    )


@pytest.mark.parametrize("change, message", [
    (dict(lhs=rows_of(2, 128, 256)), "flatten batch"),
    (dict(lhs=rows_of(256, 200)), "K, the contraction, must be a multiple of 128"),
    (dict(lhs=rows_of(200, 256)), "lhs has 200 rows: groups of rows start at multiples of 128 in FP8; pad lhs"),
    (dict(lhs=rows_of(256, 256, dtype=jnp.bfloat16)), "numbers of dtype bfloat16: they must be float8_e4m3fn"),
    (dict(lhs=rows_of(256, 256, scales=(256, 2))), r"scales float32\[256, 2\].*must be float32\[2, 256\]"),
    (dict(lhs=rows_of(256, 384)), r"lhs \(256, 384\) does not fit rhs \(2, 384, 256\).*transposed\(\) would fit"),
    (dict(rhs=matrices_of(2, 200, 256)), "matrices of 200 x 256: both sides must be multiples of 128"),
    (dict(rhs=matrices_of(2, 384, 256, scales=(2, 2, 3))), r"must be float32\[2, 3, 2\]"),
    (dict(sizes=jnp.array([1])), "rhs has 2 matrices for 1 group sizes"),
    (dict(sizes=jnp.array([1.0, 2.0])), "group_sizes has dtype float32"),
    (dict(sizes=np.array([129, 1])), r"group_sizes \[129, 1\] need 384 rows when each is rounded up to 128"),
    (dict(dtype=jnp.float16), "dtype=float16: results are bfloat16 or float32"),
    (dict(backend="fast"), "backend='fast'"),
    (dict(backend="mosaic"), 'backend="mosaic" cannot multiply these: .*; take backend="auto"'),
])  # fmt: skip
def test_what_does_not_fit_is_named(monkeypatch, change, message):
    monkeypatch.setattr(registry, "current_target", lambda: CPU)
    operands = dict(lhs=rows_of(256, 256), rhs=matrices_of(2, 384, 256), sizes=jnp.array([1, 2])) | change
    options = {name: operands.pop(name) for name in ("dtype", "backend") if name in operands}
    with pytest.raises(ValueError, match=message):
        scaled_matmul(*operands.values(), **options)


@pytest.mark.parametrize("change, message", [
    (dict(lhs=rows_of(256, 200)), "rows, the contraction, must be a multiple of 128"),
    (dict(dout=rows_of(200, 256)), "the first side must be a multiple of 128, too"),
    (dict(dout=rows_of(384, 512)), "both have the rows last"),
    (dict(sizes=np.array([129, 1])), "need 384 rows"),
    (dict(sizes=jnp.zeros((1, 2), jnp.int32)), r"group_sizes has shape \(1, 2\)"),
])  # fmt: skip
def test_what_does_not_fit_a_weight_gradient_is_named(change, message):
    operands = dict(lhs=rows_of(256, 256), dout=rows_of(384, 256), sizes=jnp.array([1, 2])) | change
    with pytest.raises(ValueError, match=message):
        scaled_outer(*operands.values())


def test_a_dense_product_has_one_matrix():
    with pytest.raises(ValueError, match="rhs has 2 matrices: a dense product has one; scaled_matmul"):
        scaled_dot(rows_of(256, 256), matrices_of(2, 384, 256))


needs_casts = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="the interpreter of earlier jax casts no layouts"
)
needs_hopper = pytest.mark.skipif(not current_target().hopper, reason="Mosaic kernels run on Hopper GPUs")
TILES = [
    *(item for item in mosaic.TILES.items() if not item[0].startswith("added")),
    ("scaled_matmul", ScaledTile(128, 128, 128, 5, cluster=2, width=1)),
    ("scaled_matmul", ScaledTile(128, 128, 128, 5, pieces=2, together=2)),
    ("scaled_matmul", ScaledTile(128, 128, 256, 3, pieces=0, splits=2)),
    ("scaled_outer", ScaledTile(128, 128, 128, 2, cluster=2, width=1)),
    ("scaled_outer", ScaledTile(256, 128, 128, 3, pieces=4)),
]


@needs_casts
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name, tile", TILES)
def test_kernels_in_the_interpreter(monkeypatch, name, tile, dtype):
    """Four multiprocessors, simulated on the CPU: results and barriers; waits for wgmma are not checked.

    The contraction ends within a slot of two steps, groups are empty, and full to a half of a block and beyond.
    """
    monkeypatch.setattr(mosaic, "current_target", lambda: Target("gpu", "NVIDIA H200", 4, True))
    lhs, rhs, columns, dout, sizes = make([3, 250, 0, 71], k=384 if name == "scaled_matmul" else 512, n=512)
    if name == "scaled_matmul":
        with interpreted():
            got = mosaic.matmul(lhs.numbers, lhs.scales, rhs.numbers, rhs.scales, sizes, dtype=dtype, tile=tile)
        assert_close(used(got, sizes), plain_matmul(lhs, rhs, sizes), dtype)
    else:
        with interpreted():
            got = mosaic.outer(
                columns.numbers, columns.scales, dout.numbers, dout.scales, sizes, dtype=dtype, tile=tile
            )
        assert_close(got, plain_outer(columns, dout, sizes), dtype)


@needs_casts
@cases("tile", [mosaic.TILES["added_scaled_outer"], ScaledTile(256, 128, 128, 3, pieces=0), ScaledTile(
    128, 128, 128, 2, cluster=2, width=1, pieces=0)], quick=[mosaic.TILES["added_scaled_outer"]])  # fmt: skip
def test_a_kernel_that_adds_in_the_interpreter(monkeypatch, tile):
    """To a total that is as large as the product; that of a group without rows is bit for bit what it was."""
    monkeypatch.setattr(mosaic, "current_target", lambda: Target("gpu", "NVIDIA H200", 4, True))
    _, _, columns, dout, sizes = make([3, 250, 0, 71], k=256, n=256)
    product = plain_outer(columns, dout, sizes)
    scale = np.abs(product).max()
    total = jnp.asarray(scale * np.random.default_rng(1).standard_normal(product.shape), jnp.float32)
    with interpreted():
        got = mosaic.added_outer(*columns, *dout, sizes, total, tile=tile)
    assert_close(got, product + np.asarray(total), "float32")
    np.testing.assert_array_equal(got[2], total[2])


@needs_hopper
@pytest.mark.parametrize("k, n", [(512, 512), (384, 640)])
def test_a_kernel_adds_to_a_total(k, n):
    """Twice, in its place."""
    _, _, columns, dout, sizes = make([3, 250, 0, 71], k=k, n=n)
    product = plain_outer(columns, dout, sizes)
    scale = np.abs(product).max()
    total = jnp.asarray(scale * np.random.default_rng(1).standard_normal(product.shape), jnp.float32)
    want, before = 2 * product + np.asarray(total), np.asarray(total[2])
    add = jax.jit(lambda total: mosaic.added_outer(*columns, *dout, sizes, total), donate_argnums=0)
    got = add(add(total))
    assert_close(got, want, "float32")
    np.testing.assert_array_equal(got[2], before)


@needs_casts
@pytest.mark.parametrize("rows, k, cores, dtype", [
    (200, K, 4, "float32"), (200, K, 4, "bfloat16"), (24, K, 4, "bfloat16"), (24, 1024, 6, "bfloat16"),
])  # fmt: skip
def test_a_dense_kernel_in_the_interpreter(monkeypatch, rows, k, cores, dtype):
    """The last block has fewer than 128 rows; the last case divides the contraction."""
    monkeypatch.setattr(mosaic, "current_target", lambda: Target("gpu", "NVIDIA H200", cores, True))
    assert (mosaic.for_rows(rows, k, 1, N, cores).splits > 1) == (k > K)
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((rows, k)).astype(np.float32), rng.standard_normal((1, N, k)).astype(np.float32)
    lhs, rhs = quantise_rows(jnp.asarray(x)), quantise_matrices(jnp.asarray(w))
    with interpreted():
        got = mosaic.matmul(*lhs, *rhs, jnp.array([rows]), dtype=dtype)
    assert_close(got, rows_in_float64(lhs) @ matrices_in_float64(rhs)[0].T, dtype)


@pytest.mark.parametrize("rows, k, n, groups, divided", [
    (64, 7168, 4096, 1, True), (64, 7168, 640, 1, True), (64, 640, 128, 1, True), (64, 128, 128, 1, False),
    (64, 1536, 24576, 1, False), (4096, 7168, 4096, 1, False), (64, 7168, 4096, 2, False),
])  # fmt: skip
def test_few_rows_share_the_contraction_between_multiprocessors(rows, k, n, groups, divided):
    """Enough to use more of them, no more than there are, and none for nothing."""
    tile = mosaic.for_rows(rows, k, groups, n, HOPPER_SMS)
    tiles = -(-rows // 128) * n // 128
    assert (tile.splits > 1) == divided
    assert tiles * tile.splits <= HOPPER_SMS or not divided
    assert tile.splits <= max(k // tile.k, 1)


@cases(
    "rows, k, n",
    [(128, 128, 128), (1024, 384, 640), (32768, 7168, 4096), (32768, 2048, 7168)],
    quick=[(1024, 384, 640), (32768, 7168, 4096)],
)
@cases("dtype", ["float32", "bfloat16"], quick=["bfloat16"])
def test_kernels_can_be_lowered_without_a_gpu(rows, k, n, dtype):
    shape = jax.ShapeDtypeStruct
    lhs, dout = (rows_of_shape(*each) for each in ((rows, k), (n, rows)))
    columns, sizes = rows_of_shape(k, rows), shape((8,), jnp.int32)
    rhs = ScaledMatrices(shape((8, n, k), E4M3), shape((8, n // 128, k // 128), jnp.float32))
    assert mosaic.why_not(lhs.numbers, rhs.numbers) is None and mosaic.why_not(columns.numbers, dout.numbers) is None

    def both(lhs, rhs, columns, dout, sizes):
        out = mosaic.matmul(*lhs, *rhs, sizes, dtype=dtype)
        return out, mosaic.outer(*columns, *dout, sizes, dtype=dtype)

    traced = jax.jit(both).trace(lhs, rhs, columns, dout, sizes)
    assert [each.dtype for each in traced.out_info] == [jnp.dtype(dtype)] * 2
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 2
    traced = jax.jit(mosaic.added_outer).trace(*columns, *dout, sizes, shape((8, k, n), jnp.float32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == text.count("output_operand_alias<") == 1


def rows_of_shape(rows, width):
    shape = jax.ShapeDtypeStruct
    return ScaledRows(shape((rows, width), E4M3), shape((width // 128, rows), jnp.float32))


def test_lowering_decides_where_the_device_is_a_hopper_gpu(monkeypatch):
    monkeypatch.setattr(registry, "current_target", lambda: Target("gpu", "NVIDIA H200", HOPPER_SMS, True))
    operands = rows_of(256, 256), matrices_of(2, 384, 256), jnp.array([1, 2])

    def every(lhs, rhs, sizes):
        dense = ScaledMatrices(rhs.numbers[:1], rhs.scales[:1])
        out = scaled_matmul(lhs, rhs, sizes), scaled_dot(lhs, dense)
        return *out, scaled_outer(lhs, lhs, sizes), scaled_dot_outer(lhs, lhs)

    traced = jax.jit(every).trace(*operands)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 4
    assert "mosaic" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("backend", ["mosaic", "auto"])
def test_results_vary_as_their_operands_do(monkeypatch, backend):
    """Within shard_map with its check of varying values; lowered for a GPU, no GPU needed."""
    monkeypatch.setattr(registry, "current_target", lambda: Target("gpu", "NVIDIA H200", HOPPER_SMS, True))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows, lasts = ScaledRows(P("data"), P(None, "data")), ScaledRows(P(None, "data"), P("data"))

    def step(lhs, columns, rhs, sizes):
        out = scaled_matmul(lhs, rhs, sizes, backend=backend)
        return out, scaled_outer(columns, columns, sizes, backend=backend)

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(rows, lasts, P(), P("data")), out_specs=P("data"))
    arguments = rows_of(512, 256), rows_of(256, 512), matrices_of(2, 384, 256), jnp.array([1, 2, 3, 4])
    text = jax.jit(mapped).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 2


def test_no_rows():
    out = scaled_matmul(rows_of(0, 256), matrices_of(2, 384, 256), jnp.array([0, 0]))
    assert out.shape == (0, 384) and scaled_dot(rows_of(0, 256), matrices_of(1, 384, 256)).shape == (0, 384)
    assert (scaled_outer(rows_of(256, 0), rows_of(384, 0), jnp.array([0, 0])) == jnp.zeros((2, 256, 384))).all()


def test_mosaic_says_what_it_cannot_do(monkeypatch):
    monkeypatch.setattr(registry, "current_target", lambda: CPU)
    with pytest.raises(ValueError, match=r"the device is .*, no Hopper GPU; take backend="):
        scaled_dot(rows_of(256, 256), matrices_of(1, 384, 256), backend="mosaic")
    monkeypatch.setattr(registry, "current_target", lambda: Target("gpu", "NVIDIA H200", HOPPER_SMS, True))
    with pytest.raises(ValueError, match=r"lhs \(100, 256\) has a number of rows that is no multiple of 8; pad it"):
        scaled_dot(rows_of(100, 256), matrices_of(1, 384, 256), backend="mosaic")
    with pytest.raises(ValueError, match=r"lhs \(256, 0\) and rhs \(1, 384, 0\) leave nothing to multiply"):
        scaled_dot(rows_of(256, 0), matrices_of(1, 384, 0), backend="mosaic")


@needs_hopper
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_kernels_equal_a_plain_loop(sizes, dtype):
    lhs, rhs, columns, dout, sizes = make(sizes)
    got = used(scaled_matmul(lhs, rhs, sizes, backend="mosaic", dtype=dtype), sizes)
    assert_close(got, plain_matmul(lhs, rhs, sizes), dtype)
    got = scaled_outer(columns, dout, sizes, backend="mosaic", dtype=dtype)
    assert_close(got, plain_outer(columns, dout, sizes), dtype)
