"""The overlap of real programs: DualPipe's steady state and an MoE layer, as scheduled here and for eight GPUs."""

import jax
import pytest

from eplb_jax.moe import MoEConfig
from eplb_jax.router import RouterConfig
from profiling.chips import chip
from profiling.hlo_overlap import overlap
from tests.profiling import scheduled

SMALL = MoEConfig(width=64, hidden=32, router=RouterConfig(16, 2, 4, 2), capacity_factor=1.25)


@pytest.fixture(scope="module")
def body():
    if jax.device_count() < 8:
        pytest.skip(f"8 devices are needed, there are {jax.device_count()}")
    return scheduled.lower_body(jax.devices()[:8], SMALL, 64).compile().as_text()


def test_every_collective_of_the_body_is_found(body):
    """Three all-to-alls a layer and direction, and two sends, in a loop of eight steps."""
    found = overlap(body, chip("H200"))
    steady = found.select(
        computation=next(one.computation for one in found.synchronous if one.label.endswith("ppermute"))
    )
    exchanges = [one for one in (*steady.collectives, *steady.synchronous) if one.kind == "all-to-all"]
    assert {(one.count, one.devices) for one in exchanges} == {(scheduled.STEPS, 4)}
    for direction in "FI":
        labels = [one.label for one in exchanges if f"/{direction}/" in one.label]
        assert len(labels) == 3 * scheduled.LAYERS, labels
    assert not any("/W/" in one.label for one in exchanges)
    sends = [one for one in (*steady.collectives, *steady.synchronous) if one.kind == "collective-permute"]
    assert [one.bytes // (64 * 64) in (2, 4) for one in sends] == [True, True]  # XLA sends bfloat16 as float32 on CPU
    # Another microbatch computes meanwhile: a schedule could hide every one of them.
    assert all(one.could_hide_us > 0 for one in exchanges)
