"""The overlap found in real programs: one compiled here, and two stored ones, which say nothing of today's library."""

import dataclasses
import pathlib

import jax
import pytest

from eplb_jax import MoEConfig, RouterConfig
from jaxpipe.planning.chips import chip
from profiling import metrics
from profiling.hlo.hiding import overlap
from profiling.hlo.text import read
from tests.profiling import scheduled

DATA = pathlib.Path(__file__).parents[1] / "data"
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


@pytest.fixture(scope="module")
def stored():
    """What XLA for GPUs writes, which no CPU can: texts for the reader and the analysis, with answers by hand.

    Compiled by tests/profiling/scheduled.py for eight GPUs of one node: jax 0.11.2, a machine with one H100.
    """
    return {name: read(DATA / f"{name}.hlo.gz") for name in scheduled.PROGRAMS}


def test_in_a_stored_body_all_sends_are_found_hidden(stored):
    found = overlap(stored["dualpipe_body"], chip("H200"))
    assert found.synchronous == () and found.notes == ()
    (loop,) = {one.computation for one in found.collectives if one.kind == "collective-permute"}
    steady = found.select(computation=f"^{loop}$")
    assert {one.count for one in steady.collectives} == {scheduled.STEPS}
    exchanges, sends = steady.select(kind="all-to-all"), steady.select(kind="collective-permute")
    assert (len(exchanges.collectives), len(sends.collectives)) == (2 * 3 * scheduled.LAYERS, 2)
    # Rows of 7168 bfloat16 numbers, 4096 of each of 4 devices, three of which are others; 4096 between stages.
    assert max(one.bytes for one in exchanges.collectives) == 3 * 4096 * 7168 * 2
    assert {one.bytes for one in sends.collectives} == {4096 * 7168 * 2}
    assert exchanges.hidden_share() > 0.99 and sends.hidden_share() > 0.99
    assert {one.place for one in sends.collectives} == {"last"}
    # One direction's exchanges lie under products of the other.
    for direction, others in (("F", ("/I/", "/W/")), ("I", ("/F/", "/W/"))):
        own = steady.select(kind="all-to-all", label=f"/{direction}/").collectives
        assert any(other in label for one in own for label in one.products for other in others), direction


def test_in_a_stored_layer_exchanges_are_found_partly_hidden(stored):
    """Only the shared expert waits for nobody, and it is too short: 168 MB of products for 338 MB that travel."""
    found = overlap(stored["moe_layer"], chip("H200")).select(kind="all-to-all")
    assert found.synchronous == () and len(found.collectives) == 6
    wide = [one for one in found.collectives if one.bytes > 1e8]
    assert [one.bytes for one in wide] == [8 * 3368 * 7168 * 2 * 7 / 8] * 4
    assert [one.verdict for one in wide] == ["partial", "partial", "partial", "hidden"]
    dispatch = wide[0]
    assert all("shared_expert" in label for label in dispatch.products) and dispatch.products
    assert dispatch.between_flops == 2 * 4096 * 7168 * 4096
    assert dispatch.could_hide_us < dispatch.us
    assert 0.4 < found.hidden_share() < 0.5


def test_slower_links_expose_more(stored):
    h200 = chip("H200")
    shares = [
        overlap(stored["dualpipe_body"], dataclasses.replace(h200, interconnect=rate)).hidden_share("all-to-all")
        for rate in (450e9, 200e9, 50e9, 5e9)
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.99 and 0.7 < shares[1] < 0.9 and shares[3] < 0.5  # H800s have 200 GB/s


def test_nodes_of_four_are_found_to_send_through_the_network(stored):
    found = overlap(stored["dualpipe_body"], chip("H200"), node_size=4)
    assert {one.kind for one in found.collectives if one.remote_bytes} == {"collective-permute"}
    sends = found.select(kind="collective-permute").collectives
    assert all(one.remote_bytes == one.bytes for one in sends)


@pytest.mark.parametrize("name", scheduled.PROGRAMS)
def test_every_report_finds_the_same_share(stored, name):
    found = overlap(stored[name], dataclasses.replace(chip("H200"), interconnect=100e9))
    measured = metrics.overlap(found.trace().events)
    assert measured.ratio == pytest.approx(found.hidden_share(), rel=1e-6)
