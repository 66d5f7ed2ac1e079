"""Rows moved by the Mosaic kernels equal those moved by XLA: interpreted here, compiled where there is a Hopper GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eplb_jax.kernels import registry
from eplb_jax.kernels.backend import HOPPER_SMS, Target, current_target
from eplb_jax.kernels.fallback import log_fallback
from eplb_jax.kernels.permute import COPIES, DTYPES, SUMS, Ring, add_rows, copy_rows, divide, why_not
from eplb_jax.kernels.scaled import ScaledRows
from eplb_jax.moe.dispatch import sort_by_slot
from eplb_jax.moe.permute import RowMap, permute, permute_scaled, unpermute
from tests.cases import cases
from tests.eplb_jax.kernels.interpreter import interpreted

needs_hopper = pytest.mark.skipif(not current_target().hopper, reason="Mosaic kernels run on Hopper GPUs")
HOPPER = Target("gpu", "NVIDIA H200", HOPPER_SMS, True)


def operands(tokens, choices, slots, num_rows, width, dtype, missing=0.2):
    """Tokens, rows that are NaN where they hold none, and moves; some choices are missing, some lack capacity."""
    rng = np.random.default_rng(tokens)
    chosen = np.argsort(rng.random((tokens, slots)), axis=1)[:, :choices].astype(np.int32)
    chosen[rng.random(chosen.shape) < missing] = -1
    moves = sort_by_slot(jnp.asarray(chosen), slots, num_rows).moves
    x, rows = (jnp.asarray(rng.standard_normal((n, width)), dtype) for n in (tokens, num_rows))
    return x, jnp.where((moves.source < tokens)[:, None], rows, jnp.nan), moves


def forced_to(backend):
    """Both moves and both gradients."""

    def step(x, rows, moves):
        copied, back = jax.vjp(lambda x: permute(x, moves, backend=backend), x)
        summed, forth = jax.vjp(lambda rows: unpermute(rows, moves, backend=backend), rows)
        return copied, back(rows)[0], summed, forth(x)[0]

    return jax.jit(step)


@pytest.mark.parametrize("dtype, shape, copies, sums", [
    pytest.param("bfloat16", (9, 3, 4, 32, 512), COPIES, SUMS, marks=pytest.mark.slow),
    ("float32", (7, 2, 3, 24, 384), Ring(512, 3, 1, 1), Ring(1024, 2, 1)),
    pytest.param("float16", (2, 1, 2, 24, 512), Ring(512, 5, 2, 3), Ring(1, 3, 2), marks=pytest.mark.slow),
])  # fmt: skip
def test_kernels_in_the_interpreter(dtype, shape, copies, sums):
    """Two multiprocessors, simulated on the CPU, of which the copy engine's zeros out of bounds are asked for."""
    x, rows, moves = operands(*shape, dtype)
    with interpreted(out_of_bounds_reads="uninitialized", uninitialized_memory="zero"):
        copied = copy_rows(x, moves.source, moves.rows, 2, copies)
        added = add_rows(rows, moves.rows, 2, sums)
    assert copied.dtype == added.dtype == x.dtype
    np.testing.assert_array_equal(copied, permute(x, moves))
    np.testing.assert_array_equal(added, unpermute(rows, moves))


def test_bytes_are_copied_in_the_interpreter():
    """Numbers of 8 bits, each of the 256 there are among them."""
    shape, plan = (7, 2, 3, 24, 384), Ring(256, 3, 1, 1)
    _, _, moves = operands(*shape, "float32")
    numbers = np.random.default_rng(0).integers(0, 256, (shape[0], shape[-1]), np.uint8)
    x = jax.lax.bitcast_convert_type(jnp.asarray(numbers), jnp.float8_e4m3fn)
    scales = jnp.arange(1.0, 1 + shape[-1] // 128 * shape[0]).reshape(shape[-1] // 128, shape[0])
    with interpreted(out_of_bounds_reads="uninitialized", uninitialized_memory="zero"):
        copied = copy_rows(x, moves.source, moves.rows, 2, plan)
    by_xla = permute_scaled(ScaledRows(x, scales), moves, backend="xla")
    held = np.asarray(moves.source) < shape[0]
    for found in (copied, by_xla.numbers):
        found = np.asarray(jax.lax.bitcast_convert_type(found, jnp.uint8))
        np.testing.assert_array_equal(found[held], numbers[np.asarray(moves.source)[held]])
        assert not found[~held].any()
    np.testing.assert_array_equal(by_xla.scales[:, held], scales[:, np.asarray(moves.source)[held]])
    assert not np.asarray(by_xla.scales)[:, ~held].any()


def test_bytes_are_copied_by_the_kernel(monkeypatch):
    monkeypatch.setattr(registry, "current_target", lambda: HOPPER)
    _, _, moves = operands(9, 3, 4, 48, 256, "float32")

    def copied(numbers, scales):
        return permute_scaled(ScaledRows(numbers, scales), moves)

    for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2):
        traced = jax.jit(copied).trace(jnp.ones((9, 256), dtype), jnp.ones((2, 9)))
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 1


@needs_hopper
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [
    (4096, 8, 32, 33024, 7168), (1000, 8, 8, 8192, 7168), (37, 3, 5, 200, 384), (300, 2, 8, 704, 4736),
    (512, 4, 8, 2112, 128 * 131), (2, 1, 2, 24, 128),
])  # fmt: skip
def test_kernels_equal_xla(dtype, shape):
    arguments = operands(*shape, dtype)
    for got, want in zip(forced_to("mosaic")(*arguments), forced_to("xla")(*arguments), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


@cases("dtype", DTYPES, quick=["bfloat16"])
@pytest.mark.parametrize("tokens, choices, num_rows, width", [
    (16384, 8, 131296, 7168), (128, 64, 1280, 256), (5, 3, 40, 384), (64, 2, 200, 128 * 131),
])  # fmt: skip
def test_kernels_can_be_lowered_without_a_gpu(dtype, tokens, choices, num_rows, width):
    while choices * 256 * jnp.dtype(dtype).itemsize > SUMS.part:
        choices //= 2
    x, rows = (jax.ShapeDtypeStruct((n, width), dtype) for n in (tokens, num_rows))
    source, index = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((num_rows,), (tokens, choices)))
    assert why_not(x, source, index) is None

    def both(x, rows, source, index):
        return copy_rows(x, source, index, HOPPER_SMS), add_rows(rows, index, HOPPER_SMS)

    text = jax.jit(both).trace(x, rows, source, index).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 2


def test_lowering_decides_where_the_device_is_a_hopper_gpu(monkeypatch):
    monkeypatch.setattr(registry, "current_target", lambda: HOPPER)
    traced = forced_to("auto").trace(*operands(9, 3, 4, 48, 256, "bfloat16"))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 4
    assert "mosaic" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "mosaic" not in forced_to("xla").lower(*operands(9, 3, 4, 48, 256, "bfloat16")).as_text()


def test_inside_shard_map(monkeypatch):
    """What the kernels give varies over the mesh axis, as what XLA gives does."""
    monkeypatch.setattr(registry, "current_target", lambda: HOPPER)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    x, rows, moves = operands(9, 3, 4, 48, 256, "bfloat16")
    twice = jax.tree.map(lambda array: jnp.concatenate([array, array]), (x, rows, moves))
    for backend in ("auto", "mosaic"):
        step = jax.shard_map(forced_to(backend), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
        traced = jax.jit(step).trace(*twice)
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 4
    found = jax.jit(jax.shard_map(forced_to("auto"), mesh=mesh, in_specs=P("data"), out_specs=P("data")))(*twice)
    for got, want in zip(found, forced_to("xla")(x, rows, moves), strict=True):
        np.testing.assert_array_equal(got, jnp.concatenate([want, want]))


def test_auto_runs_everywhere_and_mosaic_says_what_it_cannot_do():
    x, rows, moves = operands(9, 3, 4, 48, 100, "float32")
    for got, want in zip(forced_to("auto")(x, rows, moves), forced_to("xla")(x, rows, moves), strict=True):
        np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match=r'backend="mosaic" cannot move these rows: .*; take backend="auto"'):
        permute(x, moves, backend="mosaic")
    with pytest.raises(ValueError, match="backend='fast'"):
        unpermute(rows, moves, backend="fast")


def test_fallback_on_a_gpu_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(registry, "current_target", lambda: Target("gpu", "NVIDIA A100", 108, False))
    log_fallback.cache_clear()
    x, _, moves = operands(9, 3, 4, 48, 128, "float32")
    for _ in range(2):
        permute(x, moves, backend="auto")
    assert [record.getMessage() for record in caplog.records if record.name == registry.logger.name] == [
        "rows are moved by XLA's fusions, not by our kernels: the device is 'NVIDIA A100', no Hopper GPU"
    ]


@pytest.mark.parametrize("shape, index, dtype, message", [
    ((4, 128), (8, 2), "float64", "dtype float64"),
    ((4, 96), (8, 2), "float32", "width 96"),
    ((1, 128), (1, 2), "float32", "8 rows for 1 tokens"),
    ((4, 128), (4, 65), "bfloat16", "65 choices"),
])  # fmt: skip
def test_what_the_kernels_do_not_take(shape, index, dtype, message):
    moves = RowMap(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((8,), index)))
    reason = why_not(jax.ShapeDtypeStruct(shape, dtype), moves.source, moves.rows)
    assert reason is not None and message in reason


def test_parts_make_up_a_row():
    for height in (1, 5, 28, 131, 1000):
        for most in (1, 512, 4096, 1 << 20):
            lines, parts = divide(height, 512, most)
            assert 1 <= lines <= min(max(most // 512, 1), 256) and lines * parts == height
