"""FLOPs, bytes and times of single instructions; answers by hand."""

import json

import pytest

from jaxpipe.planning.chips import Achieved, Chip
from profiling.hlo.cost import Product, bytes_moved, cost, products
from profiling.hlo.text import parse

CHIP = Chip("toy", bf16=1e12, fp8=2e12, tf32=5e11, f32=1e11, hbm=1e9, interconnect=1e9, internode=1e9, latency_us=0.0,
            sms=1, memory=1e9)  # fmt: skip
FUSED = """
sliced {
  stack = f32[5,10,10] parameter(0)
  i = s32[] parameter(1)
  x = bf16[4,10] parameter(2)
  one = f32[1,10,10] dynamic-slice(stack, i, i, i)
  w = f32[10,10] bitcast(one)
  y = f32[4,10] dot(x, w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
add {
  a = f32[] parameter(0)
  b = f32[] parameter(1)
  sum = f32[] add(a, b)
}
updated {
  whole = f32[5,10,10] parameter(0)
  part = f32[1,10,10] parameter(1)
  i = s32[] parameter(2)
  put = f32[5,10,10] dynamic-update-slice(whole, part, i, i, i)
  both = (f32[5,10,10], f32[1,10,10]) tuple(put, part)
}
"""


def instruction(lines, computations=""):
    text = "\n".join(f"  {line.strip()}" for line in lines.strip().splitlines())
    module = parse(f"HloModule m\n{computations}\nENTRY e {{\n{text}\n}}")
    return module, module["e"], module["e"].root


@pytest.mark.parametrize(
    ("dtypes", "attributes", "unit", "passes"),
    [
        (("bf16", "bf16"), "", "bf16", 1),
        (("f8e4m3fn", "f8e5m2"), "", "fp8", 1),
        (("s8", "s8"), "", "fp8", 1),
        (("bf16", "f32"), "", "tf32", 1),
        (("f32", "f32"), "", "tf32", 1),
        (("f32", "f32"), ", operand_precision={highest,highest}", "f32", 1),
        (("f32", "f32"), ", algorithm=dot_bf16_bf16_f32_x3", "bf16", 3),
        (("f32", "f32"), ", algorithm=dot_tf32_tf32_f32", "tf32", 1),
        (("f32", "f32"), ", algorithm=dot_f32_f32_f32", "f32", 1),
        (("f64", "f64"), "", "f64", 1),
    ],
)
def test_dot(dtypes, attributes, unit, passes):
    found = products(
        *instruction(f"""
        a = {dtypes[0]}[3,4,5] parameter(0)
        b = {dtypes[1]}[3,5,6] parameter(1)
        c = f32[3,4,6] dot(a, b), lhs_batch_dims={{0}}, lhs_contracting_dims={{2}}, rhs_batch_dims={{0}}, \
rhs_contracting_dims={{1}}{attributes}""")
    )
    assert found == (Product(unit, 2 * 3 * 4 * 5 * 6, passes),)


@pytest.mark.parametrize("target", ["__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8"])
@pytest.mark.parametrize(("precision", "unit"), [({}, "tf32"), ({"operand_precision": ["HIGHEST"]}, "f32")])
def test_cublas(target, precision, unit):
    dims = {"lhs_contracting_dimensions": ["1"], "rhs_contracting_dimensions": ["0"]}
    config = json.dumps({"gemm_backend_config": {"dot_dimension_numbers": dims, "precision_config": precision}})
    found = products(
        *instruction(f"""
        a = f32[4,5] parameter(0)
        b = f32[5,6] parameter(1)
        c = (f32[4,6], s8[100]) custom-call(a, b), custom_call_target="{target}", backend_config={config}""")
    )
    assert found == (Product(unit, 2 * 4 * 5 * 6),)


def test_convolution():
    """Each of 1 x 6 x 6 x 8 outputs is a sum over a window of 3 x 3 and 4 input features."""
    found = products(
        *instruction("""
        x = bf16[1,8,8,4] parameter(0)
        k = bf16[3,3,4,8] parameter(1)
        y = bf16[1,6,6,8] convolution(x, k), window={size=3x3}, dim_labels=b01f_01io->b01f""")
    )
    assert found == (Product("bf16", 2 * 36 * 8 * 9 * 4),)


@pytest.mark.parametrize(
    ("target", "mask", "count"),
    [("Softmax", "NO_MASK", 2), ("Softmax", "CAUSAL", 1), ("SoftmaxBackward", "NO_MASK", 5)],
)
def test_attention(target, mask, count):
    config = {"intermediate_tensor_shape": {"dimensions": ["2", "3", "16", "32"]}, "mask_type": mask}
    found = products(
        *instruction(f"""
        q = bf16[2,16,3,64] parameter(0)
        k = bf16[2,32,3,64] parameter(1)
        y = (bf16[2,16,3,64], u8[0]) custom-call(q, k, k), custom_call_target="__cudnn$fmha{target}", \
backend_config={json.dumps({"cudnn_fmha_backend_config": config})}""")
    )
    assert found == (Product("bf16", 2 * count * 2 * 3 * 16 * 32 * 64),)


@pytest.mark.parametrize(
    "line",
    [
        "y = bf16[40,6] custom-call(n, rows, matrices)",
        "y = bf16[3,5,6] custom-call(n, rows, other)",
    ],
)
def test_grouped_products_by_their_shapes(line):
    found = products(
        *instruction(f"""
        n = s32[3] parameter(0)
        rows = bf16[40,5] parameter(1)
        other = bf16[40,6] parameter(2)
        matrices = bf16[3,5,6] parameter(3)
        {line}, custom_call_target="mosaic_gpu_v2\"""")
    )
    assert found == (Product("bf16", 2 * 40 * 5 * 6),)


def test_other_kernels_are_known_by_their_bytes():
    found = instruction("""
        x = bf16[2,40,5] parameter(0)
        y = bf16[2,40,5] custom-call(x, x), custom_call_target="mosaic_gpu_v2\"""")
    spent = cost(*found, CHIP, Achieved(1.0, 1.0, kernel_us=3.0))
    assert (spent.flops, spent.bytes, spent.is_known) == (0, 3 * 800, False)
    assert spent.us == pytest.approx(3.0 + 2.4)
    measured = cost(*found, CHIP, Achieved(), times=[("^z", 1.0), ("^y", lambda one: 10.0 * len(one.operands))])
    assert (measured.us, measured.is_known) == (20.0, True)


def test_bytes_are_those_of_the_part_that_is_used():
    fused = """
        stack = f32[5,10,10] parameter(0)
        i = s32[] parameter(1)
        x = bf16[4,10] parameter(2)
        y = f32[4,10] fusion(stack, i, x), kind=kCustom, calls=sliced"""
    assert bytes_moved(*instruction(fused, FUSED)) == 400 + 4 + 80 + 160
    assert products(*instruction(fused, FUSED)) == (Product("tf32", 2 * 4 * 10 * 10),)
    put = """
        whole = f32[5,10,10] parameter(0)
        part = f32[1,10,10] parameter(1)
        i = s32[] parameter(2)
        y = (f32[5,10,10], f32[1,10,10]) fusion(whole, part, i), kind=kLoop, calls=updated"""
    assert bytes_moved(*instruction(put, FUSED)) == 0 + 400 + 4 + 400 + 400


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("y = f32[100] negate(x)", 800),
        ("y = f32[10] slice(x), slice={[0:10]}", 80),
        ("y = f32[100] dynamic-update-slice(x, part, i)", 80),
        ("y = f32[100] scatter(x, i, part), to_apply=add", 80),
        ("y = f32[10,10] bitcast(x)", 0),
        ("y = (f32[100], f32[10]) tuple(x, part)", 0),
        ("y = f32[100] fusion-done(x)", 0),
        ("y = f32[100] custom-call-start(x)", 800),
    ],
)
def test_bytes_of_single_instructions(line, expected):
    found = instruction(
        f"""
        x = f32[100] parameter(0)
        part = f32[10] parameter(1)
        i = s32[] parameter(2)
        {line}""",
        FUSED,
    )
    assert bytes_moved(*found) == expected


def test_time_is_the_longer_of_products_and_bytes():
    dot = instruction("""
        a = bf16[100,100] parameter(0)
        y = bf16[100,100] dot(a, a), lhs_contracting_dims={1}, rhs_contracting_dims={0}""")
    assert cost(*dot, CHIP, Achieved(0.5, 0.5, kernel_us=1.0)).us == pytest.approx(1.0 + 60_000 / 500)
    assert cost(*dot, CHIP, Achieved(0.01, 1.0, kernel_us=0.0)).us == pytest.approx(200.0)
    free = instruction("a = f32[4] parameter(0)")
    assert cost(*free, CHIP, Achieved()).us == 0
