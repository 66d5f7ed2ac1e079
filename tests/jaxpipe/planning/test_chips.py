"""Data sheets, and what is made of them."""

import dataclasses

import pytest

from jaxpipe.planning.chips import CHIPS, Achieved, chip


def test_ratios_that_the_data_sheets_agree_on():
    for name, one in CHIPS.items():
        assert one.name == name
        assert one.bf16 == pytest.approx(2 * one.tf32, rel=1e-3)
        assert one.fp8 == pytest.approx(one.bf16 if name == "A100" else 2 * one.bf16, rel=1e-3)
        assert one.internode < one.interconnect < one.hbm < one.f32 < one.tf32
    assert CHIPS["H200"].bf16 == CHIPS["H100"].bf16 == CHIPS["H800"].bf16
    assert [chip(name).interconnect for name in ("A100", "H100", "H800", "b200")] == [300e9, 450e9, 200e9, 900e9]


def test_rates_by_dtype():
    h100 = chip("H100")
    assert [h100.flops(d) for d in ("fp8", "bf16", "tf32", "f32")] == [h100.fp8, h100.bf16, h100.tf32, h100.f32]
    assert h100.flops("f64") == h100.f32 / 2
    with pytest.raises(ValueError, match=r"flops\('int4'\): a product is one of fp8, bf16"):
        h100.flops("int4")


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="no chip 'V100': known are H100, H200"):
        chip("V100")
    with pytest.raises(ValueError, match="H100: hbm=0 must be positive"):
        dataclasses.replace(chip("H100"), hbm=0)
    with pytest.raises(ValueError, match=r"matmul=1\.5 must be a share above 0"):
        Achieved(matmul=1.5)
    with pytest.raises(ValueError, match="kernel_us=-1"):
        Achieved(kernel_us=-1)
    assert dataclasses.replace(chip("H100"), latency_us=0).latency_us == 0
