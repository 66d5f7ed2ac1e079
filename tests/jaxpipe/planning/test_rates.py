"""What plans assume of kernels, against what was measured, and against the arithmetic of tiles and clocks."""

import functools
import json
import pathlib

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import pytest

import jaxpipe
from eplb_jax.kernels.fp8_gemm import mosaic as fp8_gemm
from eplb_jax.kernels.grouped_gemm import mosaic as grouped_gemm
from jaxpipe._jax import HEAVY
from jaxpipe.planning import rates
from jaxpipe.planning.chips import CHIPS, Achieved, KernelShare
from jaxpipe.planning.work import DeviceWork, Kernel
from jaxpipe.stage.kernel_flops import kernel_depth, kernel_name

RECORDS = json.loads((pathlib.Path(__file__).parents[3] / "docs/measured.json").read_text(encoding="utf-8"))
H200, RATES = CHIPS["H200"], rates.PROGRAMS
GAP = 0.7
"""Microseconds between two kernels, which the plan counts with each."""
CLEARED = 1.0 + 2 * GAP
"""Microseconds in which the workspace of a product is cleared, and the gaps round that."""
PLAIN = Achieved(1.0, 1.0, kernel_us=0.0)


def measured(key):
    return RECORDS[key]["value"]


def recorded(prefix, column):
    """{label: figure} of a table's column."""
    start, end = f"{prefix}/", f"/{column}"
    return {
        key[len(start) : -len(end)]: measured(key) for key in RECORDS if key.startswith(start) and key.endswith(end)
    }


def planned(stage, kernels=None):
    """The kernels of a stage's forward, which takes and gives rows of 256 numbers; ``kernels``: rules by name."""
    mesh = jax.sharding.AbstractMesh((1,), ("pp",), axis_types=(jax.sharding.AxisType.Auto,))
    step = jaxpipe.forward(stage, jaxpipe.schedule.build("gpipe", 1, 2), mesh)
    weights = jax.ShapeDtypeStruct((1, 256, 256), "bfloat16")
    batch = jax.ShapeDtypeStruct((8192, 256), "bfloat16")
    found = jaxpipe.plan(step, jaxpipe.Params(weights), batch, "H200", kernels=kernels or {})
    return [one for one in found.work.of("F", 0).kernels if one.nbytes > 2**20 and not one.scope.endswith("write")]


def test_products_without_a_pause_have_the_lowest_clock():
    """Twice as much other work as products lets them run faster, at most at the chip's highest clock."""
    achieved = Achieved(relief=0.25, most_clock=1.3)
    assert achieved.clock(1.0, 0.0) == 1.0 and Achieved().clock(1.0, 9.0) == 1.0
    clock = achieved.clock(1.0, 0.5)
    share = (1 / clock) / (1 / clock + 0.5)
    assert clock == pytest.approx(1 + 0.5 * (1 - share)) and 1.15 < clock < 1.2
    assert achieved.clock(1.0, 9.0) == 1.3
    with pytest.raises(ValueError, match=r"relief=-1 must be at least 0, most_clock=1\.0 at least 1"):
        Achieved(relief=-1)


def test_a_mix_of_products_and_others_runs_at_the_clock_of_both():
    achieved = Achieved(1.0, 1.0, kernel_us=0.0, relief=0.25, most_clock=1.3)
    product, copy = Kernel("dot_general", "bf16", H200.bf16, 0.0, 1.0), Kernel("copy", "", 0.0, H200.hbm / 2, 1.0)
    clock = achieved.clock(1.0, 0.5)
    assert DeviceWork((product, copy)).compute(H200, achieved) == pytest.approx(1 / clock + 0.5)
    assert DeviceWork((product,)).compute(H200, achieved) == pytest.approx(1.0)


def test_tiles_take_as_long_as_their_sums_and_what_fills_them():
    """A tile of 1,024 products and 256 that fill it takes 5/4 of its products; of 4,096 17/16."""
    achieved = Achieved(1.0, 1.0, kernel_us=0.0, kernels={"mine": KernelShare(fill=256)})
    times = [Kernel("mine", "bf16", H200.bf16, 0.0, 1.0, depth=depth).seconds(H200, achieved) for depth in (1024, 4096)]
    assert times == pytest.approx([5 / 4, 17 / 16])
    with pytest.raises(ValueError, match="fill of kernel mine is -1"):
        Achieved(kernels={"mine": KernelShare(fill=-1)})


def test_numbers_of_two_bytes_reach_less_of_the_memory():
    kernel = Kernel("add", "", 0.0, H200.hbm, 1.0, narrow=H200.hbm / 4)
    assert kernel.seconds(H200, PLAIN) == pytest.approx(1.0)
    assert kernel.seconds(H200, Achieved(memory=0.8, narrow=0.5, kernel_us=0.0)) == pytest.approx(0.75 / 0.8 + 0.5)


def test_sums_of_the_same_numbers_are_one_pass():
    """A mean of rows and one of columns, made of the same product, read it once."""

    def stage(w, x, ctx):
        y = x @ w
        return x + (jnp.mean(y, 0) + jnp.mean(jnp.square(y), 0)).astype(x.dtype)

    sums = [kernel for kernel in planned(stage) if kernel.name == "reduce_sum"]
    assert len(sums) == 1 and sums[0].nbytes == pytest.approx(8192 // 2 * 256 * 2, rel=0.01)


def test_rows_are_summed_where_they_are_read_again():
    """A norm of rows is one pass: it reads what it norms once, and writes it."""

    def stage(w, x, ctx):
        square = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
        return (x * jax.lax.rsqrt(square).astype(x.dtype)) @ w

    (norm,) = [kernel for kernel in planned(stage) if not kernel.unit]
    assert norm.nbytes == pytest.approx(2 * 4096 * 256 * 2, rel=0.02)
    assert norm.narrow == pytest.approx(norm.nbytes, rel=0.02)


def test_what_is_added_to_a_product_is_part_of_it():
    """A residual is added by the product that it is added to, and read by the next product."""
    kernels = planned(lambda w, x, ctx: (x + x @ w) @ w)
    assert [kernel.name for kernel in kernels] == ["dot_general"] * 2


def test_tables_of_constants_cost_nothing():
    """Angles of places are made once, not by each microbatch; what multiplies them is not."""

    def stage(w, x, ctx):
        table = jnp.cos(jnp.arange(4096 * 256, dtype=jnp.float32)).reshape(4096, 256).astype(x.dtype)
        return x + jnp.tanh(table @ w)

    kernels = planned(stage)
    assert [kernel.name for kernel in kernels if kernel.unit] == ["dot_general"]
    assert {kernel.name for kernel in kernels if not kernel.unit} == {"add"}


def test_products_of_a_step_take_as_long_as_measured():
    """Six shapes of which the largest has sixty times the work of the least; products take 70% of that step."""
    flops, us = (recorded("step of moe-1b/products", column) for column in ("GFLOP", "us"))
    clock = RATES.clock(1.0, 0.37)
    for shape, count in flops.items():
        seconds = Kernel("dot_general", "bf16", count * 1e9, 0.0, 1.0).seconds(H200, RATES, clock)
        assert 1e6 * seconds == pytest.approx(us[shape] + CLEARED, rel=0.06), shape
    assert len(flops) == 6


@pytest.mark.parametrize(("kernel", "width"), [
    ("a gradient added to its float32 sum", 4), ("AdamW, float32", 4), ("SwiGLU", 2), ("residual added", 2),
    ("norm", 2), ("queries put together behind the rotation", 2),
])  # fmt: skip
def test_elementwise_kernels_take_as_long_as_measured(kernel, width):
    nbytes = measured(f"step of moe-1b/bytes/{kernel}/MB") * 1e6
    one = Kernel("add", "", 0.0, nbytes, 1.0, narrow=nbytes * (width == 2))
    seconds = one.seconds(H200, RATES)
    assert 1e6 * seconds == pytest.approx(GAP + measured(f"step of moe-1b/bytes/{kernel}/us"), rel=0.15)


def test_attention_takes_as_long_as_measured_at_both_lengths():
    """Four sequences of 2,048 tokens and 16 heads in a step, one of 4,096 and 128 heads alone, at a higher clock."""
    short, long = 4 * 16 * 2048**2 / 2, 128 * 4096**2 / 2
    cleared = measured("step of moe-1b/beside attention's backward us")
    for name, widths, key in (
        ("forward", 192 + 128, "forward"),
        ("backward", 3 * 192 + 2 * 128, "backward"),
    ):
        us = measured(f"step of moe-1b/attention, {key} us")
        one = Kernel(f"attention_{name}", "bf16", 2 * short * widths, 0.0, 1.0, depth=1024)
        assert 1e6 * one.seconds(H200, RATES, clock=1.17) == pytest.approx(us, rel=0.05)
        ms = measured(f"pair/attention, {key} of a layer ms")
        one = Kernel(f"attention_{name}", "bf16", 2 * long * widths, 0.0, 1.0, depth=2048)
        casts = 4 * (cleared - 58.4) / 1e3 * (name == "backward")  # in that profile sums are not cleared by its kernels
        assert 1e3 * one.seconds(CHIPS["H100"], RATES, clock=1.2) + casts == pytest.approx(ms, rel=0.05)
    numbers = 4 * 16 * 2048
    beside = Kernel("beside_attention_backward", "", 0.0, numbers * (192 * 10 + 128 * 4), 1.0)
    assert 1e6 * beside.seconds(H200, RATES) == pytest.approx(cleared, rel=0.05)


@pytest.mark.parametrize(("shape", "way", "depth"), [
    ("32768 x 7168 → 4096", "forward", 7168), ("32768 x 7168 → 4096", "dx", 4096),
    ("32768 x 2048 → 7168", "forward", 2048), ("32768 x 2048 → 7168", "dx", 7168),
])  # fmt: skip
def test_products_in_fp8_take_as_long_as_measured(shape, way, depth):
    """Sums of 2,048, 4,096 and 7,168 products, of uneven groups, without a pause."""
    rate = measured(f"fp8_gemm/8/{shape}/{way}/uneven/fp8 TFLOP/s") * 1e12
    one = Kernel("scaled_rows", "fp8", rate, 0.0, 1.0, depth=depth)
    assert one.seconds(H200, RATES) == pytest.approx(1.0, rel=0.06)


@pytest.mark.parametrize(("groups", "depth"), [(8, 4096), (32, 1024)])
@pytest.mark.parametrize("shape", ["32768 x 7168 → 4096", "32768 x 2048 → 7168"])
def test_weight_gradients_in_fp8_take_as_long_as_measured(groups, depth, shape):
    """Sums of a group's rows in float32, of uneven groups, without a pause."""
    rate = measured(f"fp8_gemm/{groups}/{shape}/dw float32/uneven/fp8 TFLOP/s") * 1e12
    one = Kernel("scaled_outer", "fp8", rate, 0.0, 1.0, depth=depth)
    assert one.seconds(H200, RATES) == pytest.approx(1.0, rel=0.02)


def test_products_of_a_layer_in_fp8_take_as_long_as_in_its_profile():
    """16,384 tokens, 8 of 32 experts each and a shared one, at the clock of all that the layer does."""
    rows, outer, whole = (
        measured(f"fp8_layers/profile/fp8/{name} ms")
        for name in ("products, forward and input gradient", "products, weight gradient", "whole")
    )
    kernels = []
    for count, group in ((8 * 16384, 8 * 16384 / 32), (16384, 16384)):
        for deep, wide in ((7168, 4096), (2048, 7168)):
            one = Kernel("scaled_rows", "fp8", 2.0 * count * deep * wide, 0.0, 1.0)
            kernels += [one._replace(depth=deep), one._replace(depth=wide)]
            kernels.append(one._replace(name="scaled_outer", depth=group))
    seconds = sum(one.multiplied(H200, RATES) for one in kernels)
    clock = RATES.clock(seconds, (whole - rows - outer) / 1e3)
    assert 1e3 * seconds / clock == pytest.approx(rows + outer, rel=0.04)


@pytest.mark.parametrize(("rows", "height"), [(512, 256), (256, 1024)])
def test_weight_gradients_are_sums_of_the_rows_of_a_group(rows, height):
    """Also where a matrix has more rows than there are tokens."""
    groups, columns = 2, 128
    shape, sizes = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((groups,), jnp.int32)
    blocks = rows // 128
    scaled = [
        operand
        for width in (height, columns)
        for operand in (shape((width, rows), jnp.float8_e4m3fn), shape((blocks, width), jnp.float32))
    ]
    plain = [shape((rows, width), jnp.bfloat16) for width in (height, columns)]
    for name, outer, operands in (
        ("scaled_outer", functools.partial(fp8_gemm.outer, dtype=jnp.float32), scaled),
        ("grouped_outer", grouped_gemm.outer, plain),
    ):
        found = [eqn for eqn in equations(jax.make_jaxpr(outer)(*operands, sizes).jaxpr) if kernel_name(eqn) == name]
        assert [kernel_depth(eqn) for eqn in found] == [rows / groups]


def equations(jaxpr):
    """Those of a jaxpr and of what it calls, but for the bodies of kernels."""
    for eqn in jaxpr.eqns:
        yield eqn
        inner = eqn.params.get("jaxpr", eqn.params.get("call"))
        if eqn.primitive.name not in HEAVY and inner is not None:
            yield from equations(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("name", ["attention_forward", "attention_backward"])
def test_a_kernel_of_anybody_may_be_called_attention(name):
    """Nothing is known of the sums and passes of one that takes others than queries, keys and values."""

    def body(x_ref, scale_ref, out_ref):
        out_ref[...] = x_ref[...] * scale_ref[0]

    def stage(w, x, ctx):
        call = pl.pallas_call(body, jax.ShapeDtypeStruct(x.shape, x.dtype), name=name)
        return call(x @ w, jnp.ones(1, x.dtype))

    (found,) = [kernel for kernel in planned(stage, {name: lambda operands, results: 1e9}) if kernel.name == name]
    assert (found.flops, found.depth) == (1e9, 0.0)


def test_every_plan_is_within_five_percent_of_its_measured_step():
    """But for moe-1b in FP8, which takes less time than planned: small errors of all its parts add up."""
    ratios = recorded("plan_errors", "measured / planned")
    assert len(ratios) == 12
    short = ratios.pop("moe-1b, one GPU, fp8")
    assert {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > 0.05} == {}
    assert abs(short - 1) < 0.06
