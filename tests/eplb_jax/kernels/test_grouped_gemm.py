"""Grouped GEMM: each backend equals a plain loop over the groups, whatever the rows of no group hold."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from eplb_jax import grouped_matmul
from eplb_jax.kernels import registry
from eplb_jax.kernels.backend import HOPPER_SMS, Target, current_target
from eplb_jax.kernels.fallback import log_fallback
from eplb_jax.kernels.grouped_gemm import mosaic
from eplb_jax.kernels.grouped_gemm.layout import ALIGN, group_starts
from eplb_jax.kernels.grouped_gemm.mosaic_outer import outer_products
from eplb_jax.kernels.grouped_gemm.mosaic_rows import assign_tiles, rows_times_matrices
from eplb_jax.kernels.grouped_gemm.ring import Tile
from eplb_jax.kernels.grouped_gemm.tiles import TABLE, tile_for
from tests.cases import cases
from tests.eplb_jax.kernels.interpreter import interpreted


def marks_of(backend):
    """Skips a backend where it says that it cannot run."""
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((256, 256), (2, 256, 256))]
    reason = registry.BACKENDS[backend].why_not("grouped_matmul", current_target(), *operands)
    return pytest.mark.skipif(reason is not None, reason=f"{backend}: {reason}")


needs_hopper = pytest.mark.skipif(not current_target().hopper, reason="Mosaic kernels run on Hopper GPUs")
BACKENDS = ["xla"] + [pytest.param(name, marks=marks_of(name)) for name in registry.BACKENDS]
SIZES = {
    "equal": [64, 64, 64, 64],
    "uneven": [3, 130, 17, 71],
    "empty": [0, 100, 0, 45],
    "one": [0, 0, 256, 0],
    "none": [0, 0, 0, 0],
    "tiny": [1, 1, 1, 1],
}
ROWS, K, N = 264, 128, 192
BOUND = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 8e-3, "float16": 1e-3}
"""Of the norm: a bfloat16 result is off by up to 2**-9, and its inputs are exact."""


def spans(sizes):
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += -(-size // ALIGN) * ALIGN


def make(sizes, dtype, transpose_rhs=False, seed=0, rows=ROWS, k=K, n=N):
    """Operands and output gradient whose rows of no group are NaN."""
    rng = np.random.default_rng(seed)
    lhs, dout = np.full((rows, k), np.nan), np.full((rows, n), np.nan)
    for span in spans(sizes):
        lhs[span] = rng.standard_normal(lhs[span].shape)
        dout[span] = rng.standard_normal(dout[span].shape)
    rhs = rng.standard_normal((len(sizes), n, k) if transpose_rhs else (len(sizes), k, n))
    return *(jnp.asarray(x, dtype) for x in (lhs, rhs, dout)), jnp.asarray(sizes, jnp.int32)


def plain(lhs, rhs, dout, sizes, transpose_rhs=False):
    """Result and both gradients in float64 by a loop over the groups, for the rows of groups."""
    lhs, rhs, dout = (np.asarray(x).astype(np.float64) for x in (lhs, rhs, dout))
    matrices = rhs.swapaxes(1, 2) if transpose_rhs else rhs
    parts = list(zip(spans(sizes.tolist()), matrices, strict=True))
    out = np.concatenate([lhs[span] @ matrix for span, matrix in parts])
    dlhs = np.concatenate([dout[span] @ matrix.T for span, matrix in parts])
    drhs = np.stack([lhs[span].T @ dout[span] for span, _ in parts])
    return out, dlhs, drhs.swapaxes(1, 2) if transpose_rhs else drhs


def used(x, sizes):
    """The rows of groups, one after the other; what is in the others may not even be a number to cast."""
    return np.concatenate([np.asarray(x)[span].astype(np.float64) for span in spans(sizes.tolist())])


def assert_close(got, want, dtype):
    bound = BOUND[jnp.dtype(dtype).name]
    got = np.asarray(got).astype(np.float64)
    assert got.shape == want.shape and np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=bound, atol=bound * max(np.abs(want).max(initial=0), 1e-30))


def check_all(sizes, dtype, backend, transpose_rhs=False, **shape):
    lhs, rhs, dout, sizes = make(sizes, dtype, transpose_rhs, **shape)
    call = functools.partial(grouped_matmul, backend=backend, transpose_rhs=transpose_rhs)

    @jax.jit
    def step(lhs, rhs, dout, sizes):
        out, pullback = jax.vjp(lambda lhs, rhs: call(lhs, rhs, sizes), lhs, rhs)
        return out, *pullback(dout)

    out, dlhs, drhs = step(lhs, rhs, dout, sizes)
    assert out.dtype == dlhs.dtype == drhs.dtype == jnp.dtype(dtype)
    expected = plain(lhs, rhs, dout, sizes, transpose_rhs)
    for got, want in zip((used(out, sizes), used(dlhs, sizes), drhs), expected, strict=True):
        assert_close(got, want, dtype)


@cases("transpose_rhs", [False, True], quick=[True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_a_plain_loop(x64, sizes, transpose_rhs):
    check_all(sizes, jnp.float64, "xla", transpose_rhs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transpose_rhs", [False, True])
@cases("sizes", SIZES.values(), quick=[SIZES["uneven"], SIZES["none"]], ids=SIZES)
def test_half_precision_is_as_good_as_its_result(sizes, transpose_rhs, backend):
    check_all(sizes, jnp.bfloat16, backend, transpose_rhs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16(backend):
    check_all(SIZES["uneven"], jnp.float16, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_x64(x64, backend):
    check_all(SIZES["uneven"], jnp.bfloat16, backend)


def test_float32():
    with jax.default_matmul_precision("highest"):
        check_all(SIZES["uneven"], jnp.float32, "xla")


@needs_hopper
@pytest.mark.parametrize("rows, k, n", [(128, 128, 192), (1024, 2048, 512), (4096, 512, 1024), (16384, 1024, 2048)])
@pytest.mark.parametrize("groups", [1, 8, 32])
def test_shapes_of_every_size(rows, k, n, groups):
    """Every line of the table of tiles, with full and partial tiles."""
    sizes = np.random.default_rng(rows).multinomial(
        rows * 3 // 4, np.arange(1, groups + 1) / (groups * (groups + 1) / 2)
    )
    while int((-(-sizes // ALIGN) * ALIGN).sum()) > rows:
        sizes = sizes // 2
    check_all(sizes.tolist(), jnp.bfloat16, "mosaic", rows=rows, k=k, n=n)
    check_all(sizes.tolist(), jnp.bfloat16, "mosaic", True, rows=rows, k=k, n=n)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inside_shard_map(backend):
    """Rows and sizes are split, the matrices are not: their gradient is summed over the devices."""
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    parts = [make(SIZES[name], jnp.bfloat16, seed=i) for i, name in enumerate(("uneven", "empty"))]
    rhs = parts[0][1]
    lhs, dout, sizes = (jnp.concatenate([part[i] for part in parts]) for i in (0, 2, 3))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("data"), P(), P("data"), P("data")),
                       out_specs=(P("data"), P("data"), P()))  # fmt: skip
    def step(lhs, rhs, dout, sizes):
        out, pullback = jax.vjp(lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes, backend=backend), lhs, rhs)
        return out, *pullback(dout)

    out, dlhs, drhs = step(lhs, rhs, dout, sizes)
    expected = [plain(part[0], rhs, part[2], part[3]) for part in parts]
    for i, part in enumerate(parts):
        rows = slice(i * ROWS, (i + 1) * ROWS)
        assert_close(used(out[rows], part[3]), expected[i][0], jnp.bfloat16)
        assert_close(used(dlhs[rows], part[3]), expected[i][1], jnp.bfloat16)
    assert_close(drhs, expected[0][2] + expected[1][2], jnp.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_separate_equations(backend):
    """Each of the two gradients can be had without the work of the other."""
    lhs, rhs, dout, sizes = make(SIZES["uneven"], jnp.bfloat16)

    def gradient(which):
        def compute(lhs, rhs, dout):
            return jax.vjp(lambda *pair: grouped_matmul(*pair, sizes, backend=backend), lhs, rhs)[1](dout)[which]

        return jax.jit(compute).lower(lhs, rhs, dout).compile()

    products = {"xla": "dot(", "mosaic": "mosaic_gpu"}[backend]
    assert [gradient(i).as_text().count(products) > 0 for i in (0, 1)] == [True, True]
    closed = jax.make_jaxpr(lambda *a: jax.vjp(lambda *p: grouped_matmul(*p, sizes, backend="xla"), *a[:2])[1](a[2]))(
        lhs, rhs, dout
    )
    assert [str(e).count("ragged_dot_general[") for e in closed.jaxpr.eqns if "ragged_dot" in str(e)] == [1, 1, 1]


@cases(
    "rows, k, n",
    [(64, 128, 128), (72, 128, 192), (1024, 256, 320), (32768, 7168, 4096)],
    quick=[(72, 128, 192), (32768, 7168, 4096)],
)
@cases("groups", [1, 8, 32], quick=[8])
def test_kernels_can_be_lowered_without_a_gpu(rows, k, n, groups):
    """With the tile that each shape gets; the tile is no larger than the result."""
    lhs, dout = (jax.ShapeDtypeStruct((rows, side), jnp.bfloat16) for side in (k, n))
    rhs = jax.ShapeDtypeStruct((groups, k, n), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    assert mosaic.why_not(lhs, rhs) is None

    def every(lhs, rhs, dout, sizes):
        out, dlhs = mosaic.matmul(lhs, rhs, sizes), mosaic.matmul(dout, rhs, sizes, transpose_rhs=True)
        return out, dlhs, mosaic.outer(lhs, dout, sizes), mosaic.outer(lhs, dout, sizes, dtype=jnp.float32)

    text = jax.jit(every).trace(lhs, rhs, dout, sizes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 4 and "output_operand_alias<" not in text
    total = jax.ShapeDtypeStruct((groups, k, n), jnp.float32)
    text = jax.jit(mosaic.added_outer).trace(lhs, dout, sizes, total).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == text.count("output_operand_alias<") == 1
    kinds = ("matmul", rows, k), ("matmul", rows, n), ("outer", k, n), ("added_outer", k, n)
    for kind, height, columns in kinds:
        tile = tile_for(kind, rows, groups, height, columns)
        assert tile.m <= height and tile.n * tile.cluster <= columns and min(tile.part) >= 64


def test_lowering_decides_where_the_device_is_a_hopper_gpu(monkeypatch):
    monkeypatch.setattr(registry, "current_target", lambda: Target("gpu", "NVIDIA H200", HOPPER_SMS, True))
    lhs, rhs, dout, sizes = make(SIZES["uneven"], jnp.bfloat16)

    def gradients(lhs, rhs, dout, sizes):
        return jax.vjp(lambda *pair: grouped_matmul(*pair, sizes), lhs, rhs)[1](dout)

    traced = jax.jit(gradients).trace(lhs, rhs, dout, sizes)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 2
    assert "mosaic" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("kind", ["mosaic", "auto"])
def test_results_vary_as_their_operands_do(monkeypatch, kind):
    """Within shard_map with its check of varying values; lowered for a GPU, no GPU needed."""
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices")
    monkeypatch.setattr(registry, "current_target", lambda: Target("gpu", "NVIDIA H200", HOPPER_SMS, True))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def product(lhs, rhs, sizes):
        return jax.value_and_grad(lambda *pair: grouped_matmul(*pair, sizes, backend=kind).sum(), (0, 1))(lhs, rhs)

    def body(lhs, rhs, sizes):
        value, (dlhs, drhs) = product(lhs, rhs, sizes)
        return jax.lax.psum(value, "data"), dlhs, drhs

    mapped = jax.shard_map(body, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=(P(), P("data"), P()))
    shape = jax.ShapeDtypeStruct
    arguments = shape((256, 128), jnp.bfloat16), shape((2, 128, 128), jnp.bfloat16), shape((4,), jnp.int32)
    text = jax.jit(mapped).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 3


def test_fallback_on_a_gpu_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(registry, "current_target", lambda: Target("gpu", "NVIDIA A100", 108, False))
    log_fallback.cache_clear()
    for _ in range(2):
        grouped_matmul(jnp.ones((16, 4)), jnp.ones((2, 4, 6)), jnp.array([8, 8]))
    assert [record.getMessage() for record in caplog.records if record.name == registry.logger.name] == [
        "grouped_matmul runs on XLA's ragged dot, which is slow on GPUs: the device is 'NVIDIA A100', no Hopper GPU"
    ]


@pytest.mark.parametrize("tile", [Tile(256, 128, width=2), Tile(256, 128, cut=2), Tile(128, 256), Tile(64, 256)])
def test_tiles_are_assigned_once_and_evenly(tile):
    """All rows of all groups in every column, once; high and low tiles differ by at most one between workers."""
    sizes, columns, workers = [3, 70, 0, 130, 300, 700, 0, 1, 256, 513, 0], 3, 5
    seen, counts = set(), []
    for worker in range(workers):
        tiles = []
        with jax.disable_jit():
            turns = assign_tiles(jnp.array(sizes, jnp.int32), len(sizes), columns, jnp.int32(worker), workers, tile,
                         lambda *tile, tiles=tiles: tiles.append(tuple(map(int, tile))))  # fmt: skip
        assert [turn for turn, *_ in tiles] == list(range(turns))
        for _, group, row, valid, column in tiles:
            rows = {(group, row + i, column) for i in range(valid)}
            assert 0 < valid <= tile.m and not rows & seen
            seen |= rows
        high = sum(valid > tile.m // 2 or tile.m == 64 for *_, valid, _ in tiles)
        counts.append((high, len(tiles) - high))
    groups = enumerate(spans(sizes))
    assert seen == {(g, i, column) for g, span in groups for i in range(span.start, span.stop) for column in range(3)}
    assert (np.ptp(counts, axis=0) <= 1).all()


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter of jax 0.10 knows no transposed operands")
@pytest.mark.parametrize("tile", [
    *(tile for tiles in TABLE.values() for tile in tiles.values()),
    Tile(128, 256, 64, 3, "n", 2, 2),
    Tile(128, 128, 64, 3, "tiles", 2, 1),
])  # fmt: skip
def test_kernels_in_the_interpreter(tile):
    """Four multiprocessors, simulated on the CPU: results and barriers; waits for wgmma are not checked."""
    lhs, rhs, dout, sizes = make([3, 70, 0, 130], jnp.bfloat16)
    with interpreted():
        out = rows_times_matrices(lhs, rhs, sizes, False, tile, 4)
        dlhs = rows_times_matrices(dout, rhs, sizes, True, tile, 4)
        drhs = outer_products(lhs, dout, sizes, tile, 4) if tile.m >= 128 else None
    expected = plain(lhs, rhs, dout, sizes)
    for got, want in zip((used(out, sizes), used(dlhs, sizes), drhs), expected, strict=True):
        if got is not None:
            assert_close(got, want, jnp.bfloat16)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter of jax 0.10 knows no transposed operands")
@pytest.mark.parametrize("k", [256, 320])
@cases("tile", [
    *TABLE["added_outer"].values(), Tile(128, 128, 64, 3, "tiles", 1, 1), Tile(128, 128, 64, 3, "n", 2, 2)
], quick=[*TABLE["added_outer"].values()])  # fmt: skip
def test_kernels_that_add_in_the_interpreter(tile, k):
    """Results end within a tile or where it does; the total of a group without rows is bit for bit what it was."""
    lhs, rhs, dout, sizes = make([3, 70, 0, 130], jnp.bfloat16, k=k)
    total = jnp.asarray(np.random.default_rng(1).standard_normal(rhs.shape), jnp.float32)
    with interpreted():
        wide = outer_products(lhs, dout, sizes, tile, 4, dtype=jnp.float32)
        added = outer_products(lhs, dout, sizes, tile, 4, total=total)
    product = plain(lhs, rhs, dout, sizes)[2]
    assert_close(wide, product, jnp.float32)
    assert_close(added, product + np.asarray(total), jnp.float32)
    np.testing.assert_array_equal(added[2], total[2])


@needs_hopper
@pytest.mark.parametrize("k, n", [(1024, 512), (320, 192)])
def test_a_loop_adds_in_place(k, n):
    """Three times to one total, of which no copy is made; that of a group without rows is bit for bit what it was."""
    lhs, rhs, dout, sizes = make([300, 0, 1000, 71], jnp.bfloat16, rows=1408, k=k, n=n)
    total = jnp.asarray(np.random.default_rng(1).standard_normal(rhs.shape), jnp.float32)
    want = np.asarray(total) + 3 * plain(lhs, rhs, dout, sizes)[2]
    before = np.asarray(total[1])

    def steps(total):
        return jax.lax.scan(lambda total, _: (mosaic.added_outer(lhs, dout, sizes, total), None), total, length=3)[0]

    compiled = jax.jit(steps, donate_argnums=0).lower(total).compile()
    shape = ",".join(map(str, total.shape))
    assert not re.findall(rf"f32\[{shape}\]\S* copy\(", compiled.as_text())
    got = compiled(total)
    assert_close(got, want, jnp.float32)
    np.testing.assert_array_equal(got[1], before)


def test_sizes_of_any_integer_dtype():
    lhs, rhs, _, sizes = make(SIZES["uneven"], jnp.float32)
    want = used(grouped_matmul(lhs, rhs, sizes), sizes)
    for dtype in (jnp.int8, jnp.uint8, jnp.int16):
        small = (sizes // 2).astype(dtype)
        other = grouped_matmul(lhs, rhs, small)
        assert np.array_equal(used(other, small), used(grouped_matmul(lhs, rhs, sizes // 2), small), equal_nan=True)
    assert np.array_equal(want, used(grouped_matmul(lhs, rhs, np.asarray(sizes, np.int64)), sizes))


def test_starts_are_aligned():
    assert group_starts(jnp.array([3, 0, 8, 9])).tolist() == [0, 8, 8, 16]
    assert group_starts(jnp.array([1], jnp.uint8)).dtype == jnp.int32


@pytest.mark.parametrize("change, message", [
    (dict(lhs=(2, 8, 4)), "flatten batch"),
    (dict(sizes=(3,)), "rhs has 2 matrices for 3 group sizes"),
    (dict(rhs=(2, 6, 4)), "transpose_rhs=True would fit"),
    (dict(rhs=(2, 5, 6)), r"lhs \(16, 4\) does not fit rhs \(2, 5, 6\)"),
])  # fmt: skip
def test_wrong_shapes_are_named(change, message):
    shapes = dict(lhs=(16, 4), rhs=(2, 4, 6), sizes=(2,)) | change
    with pytest.raises(ValueError, match=message):
        grouped_matmul(jnp.ones(shapes["lhs"]), jnp.ones(shapes["rhs"]), jnp.ones(shapes["sizes"], jnp.int32))


def test_wrong_dtypes_and_sizes_are_named():
    lhs, rhs, sizes = jnp.ones((16, 4)), jnp.ones((2, 4, 6)), jnp.array([8, 8])
    with pytest.raises(ValueError, match="lhs has dtype float32 and rhs bfloat16"):
        grouped_matmul(lhs, rhs.astype(jnp.bfloat16), sizes)
    with pytest.raises(ValueError, match="lhs has dtype int32"):
        grouped_matmul(lhs.astype(jnp.int32), rhs.astype(jnp.int32), sizes)
    with pytest.raises(ValueError, match="group_sizes has dtype float32"):
        grouped_matmul(lhs, rhs, sizes.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"group_sizes \[9, 1\] need 24 rows"):
        grouped_matmul(lhs, rhs, np.array([9, 1]))
    with pytest.raises(ValueError, match="sizes are at least zero"):
        grouped_matmul(lhs, rhs, np.array([-8, 8]))
    with pytest.raises(ValueError, match="backend='fast'"):
        grouped_matmul(lhs, rhs, sizes, backend="fast")


def test_mosaic_says_what_it_cannot_do():
    with pytest.raises(ValueError, match=r'backend="mosaic" cannot run this: .*; take backend="auto"'):
        grouped_matmul(jnp.ones((16, 4)), jnp.ones((2, 4, 6)), jnp.array([8, 8]), backend="mosaic")
