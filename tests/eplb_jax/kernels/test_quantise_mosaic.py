"""Quantisation by the Mosaic kernels equals XLA's, bit for bit: interpreted here, compiled on Hopper GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eplb_jax.kernels import gate_mosaic, quantise_mosaic, registry, scaled
from eplb_jax.kernels import quantise as quantisation
from eplb_jax.kernels.backend import HOPPER_SMS, Target, current_target
from eplb_jax.kernels.fallback import log_fallback
from eplb_jax.kernels.quantise import columns_of, gate, gate_backward, quantise, quantise_rows, quantise_weights
from eplb_jax.kernels.scaled import ScaledRows
from eplb_jax.kernels.scaled_tiles import TilePlan
from tests.cases import cases
from tests.eplb_jax.kernels.interpreter import interpreted

needs_hopper = pytest.mark.skipif(not current_target().hopper, reason="Mosaic kernels run on Hopper GPUs")
HOPPER = Target("gpu", "NVIDIA H200", HOPPER_SMS, True)
OPERATIONS = {
    "quantise_rows": (quantise_mosaic.quantise_rows, scaled.quantise_rows),
    "quantise": (quantise_mosaic.quantise, quantisation.quantise_by_xla),
    "columns_of": (quantise_mosaic.columns_of, quantisation.columns_of_by_xla),
    "quantise_weights": (quantise_mosaic.quantise_weights, quantisation.quantise_weights_by_xla),
    "gate": (gate_mosaic.gate, quantisation.gate_by_xla),
    "gate_backward": (gate_mosaic.gate_backward, quantisation.gate_backward_by_xla),
}


def operands(name, rows, width, dtype="bfloat16"):
    """Values of many sizes, among them zeros, infinity and NaN; the last block of rows is no group's but for 50."""
    rng = np.random.default_rng(rows + width)
    x = rng.standard_normal((rows, width)) * np.exp2(rng.integers(-9, 9, (rows, 1)) + rng.integers(-5, 5, (1, width)))
    x[: rows // 2, :128] = 0
    x[3, 7], x[rows - 30, 5], x[0, -1] = np.nan, np.inf, 1e-38
    x = jnp.asarray(x, dtype)
    valid = jnp.full(rows // 128, 128, jnp.int32).at[-1].set(50)
    weight = jnp.asarray(rng.random(rows), jnp.float32)
    ct = jnp.asarray(rng.standard_normal((rows, width // 2)), dtype)
    return {
        "quantise_rows": (x,),
        "quantise": (x, valid),
        "columns_of": (*scaled.quantise_rows(x), valid),
        "quantise_weights": (x[: rows // 128 * 128].reshape(-1, 128, width),),
        "gate": (x, weight),
        "gate_backward": (*scaled.quantise_rows(x), weight, ct, valid),
    }[name]


def check_same(found, wanted, *, exact=True, rounded=1e-5):
    """Every bit; without ``exact`` a share of ``rounded`` numbers may be others, and sums are equal up to float32's."""
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        if want.ndim == 1:
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.nanmax(np.abs(want)))
        elif exact:
            np.testing.assert_array_equal(got, want)
        else:
            same = (got == want) | (np.isnan(got) & np.isnan(want))
            assert same.mean() > 1 - rounded
            np.testing.assert_allclose(got, want, rtol=2**-3 * 1.01, atol=0)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="JAX's interpreter knows no layouts before 0.11")
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("name, rows, width, dtype, plan", [
    ("quantise_rows", 192, 256, "bfloat16", TilePlan(2, 1)),
    ("quantise", 256, 384, "bfloat16", TilePlan(2, 1)),
    ("quantise", 256, 256, "float32", TilePlan(4, 2, down=True)),
    ("columns_of", 384, 256, "bfloat16", TilePlan(3, 2)),
    ("quantise_weights", 512, 256, "bfloat16", TilePlan(2, 2)),
    ("gate", 128, 512, "bfloat16", TilePlan(2, 1)),
    ("gate_backward", 256, 512, "bfloat16", TilePlan(2, 1)),
])  # fmt: skip
def test_kernels_in_the_interpreter(name, rows, width, dtype, plan, power_of_two):
    """Two multiprocessors, simulated on the CPU, some with more tiles than slots."""
    kernel, by_xla = OPERATIONS[name]
    arguments = operands(name, rows, width, dtype)
    with interpreted(uninitialized_memory="zero"):
        found = kernel(*arguments, cores=2, power_of_two=power_of_two, plan=plan)
    check_same(found, by_xla(*arguments, power_of_two=power_of_two), exact=name != "gate_backward")


@needs_hopper
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rows, width", [(4096, 7168), (1280, 2816), (128 * 133, 256), (256, 256)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_kernels_equal_xla(name, rows, width, dtype, power_of_two):
    kernel, by_xla = (functools.partial(of, power_of_two=power_of_two) for of in OPERATIONS[name])
    arguments = operands(name, rows, width, dtype)
    kernel = functools.partial(kernel, cores=current_target().cores)
    # A gate's derivative is not the same to its last bit, so a scale that is no power of two is another for its block.
    rounded = 1e-5 if power_of_two else 1e-2
    check_same(jax.jit(kernel)(*arguments), jax.jit(by_xla)(*arguments), exact=name != "gate_backward", rounded=rounded)


@cases("dtype", ["bfloat16", "float32"], quick=["bfloat16"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_lowering(name, dtype):
    """Finds errors of shapes and layouts without a GPU, also in the usual plans."""
    kernel = functools.partial(OPERATIONS[name][0], cores=HOPPER_SMS, power_of_two=True)
    traced = jax.jit(kernel).trace(*operands(name, 512, 512, dtype))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 1


def test_lowering_decides_where_the_device_is_a_hopper_gpu(monkeypatch):
    monkeypatch.setattr(registry, "current_target", lambda: HOPPER)

    def every(x, w, weight):
        act, kept = gate(x, weight)
        rows, columns = quantise(x)
        return (
            quantise_rows(x),
            columns,
            columns_of(rows),
            quantise_weights(w),
            gate_backward(kept, weight, x[:, :256]),
            act,
        )

    shapes = (256, 512), (2, 128, 128), (256,)
    traced = jax.jit(every).trace(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 6
    assert "mosaic" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_mosaic_says_what_it_cannot_do_and_auto_does_it(monkeypatch):
    monkeypatch.setattr(registry, "current_target", lambda: HOPPER)
    hidden, weight = jnp.ones((72, 256), jnp.bfloat16), jnp.ones(72)
    with pytest.raises(ValueError, match=r"cannot quantise this: 72 rows are no multiple of 64; take backend="):
        quantise_rows(hidden, backend="mosaic")
    with pytest.raises(ValueError, match=r"cannot gate these rows in 8 bits: 72 rows are no multiple of 64"):
        gate(hidden, weight, backend="mosaic")
    check_same(gate(hidden, weight), quantisation.gate_by_xla(hidden, weight, power_of_two=True))


def test_fallback_on_a_gpu_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(registry, "current_target", lambda: Target("gpu", "NVIDIA A100", 108, False))
    log_fallback.cache_clear()
    for _ in range(2):
        assert isinstance(quantise_rows(jnp.ones((128, 128))), ScaledRows)
    assert [record.getMessage() for record in caplog.records if record.name == registry.logger.name] == [
        "numbers of 8 bits are made by XLA's fusions, not by our kernels: the device is 'NVIDIA A100', no Hopper GPU"
    ]


def test_inside_shard_map(monkeypatch):
    """Results vary over the mesh axis, also where no valid rows are given."""
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices")
    monkeypatch.setattr(registry, "current_target", lambda: HOPPER)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def body(x, weight):
        act, kept = gate(x, weight)
        return act, quantise(x), gate_backward(kept, weight, x[:, :256]), quantise_weights(x[None])

    out = jax.shard_map(lambda *of: [leaf[None] for leaf in jax.tree.leaves(body(*of))], mesh=mesh,
                        in_specs=(P("data"), P("data")), out_specs=P("data"))  # fmt: skip
    shapes = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16), jax.ShapeDtypeStruct((512,), jnp.float32)
    assert jax.jit(out).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 4
