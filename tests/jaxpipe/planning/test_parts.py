"""Times by part: nothing is lost and nothing counts twice; rates of single kernels, links within groups, dead work."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

import jaxpipe
from eplb_jax.kernels.fp8_gemm import mosaic as fp8_mosaic
from eplb_jax.kernels.grouped_gemm import mosaic
from jaxpipe.planning import parts, rates
from jaxpipe.planning.chips import CHIPS, Achieved, KernelShare
from jaxpipe.planning.mesh import Network
from jaxpipe.planning.work import DeviceWork, HostTransfer, Kernel, Message
from jaxpipe.stage.kernel_flops import kernel_flops, kernel_name, multiplying_unit
from tests.jaxprs import equations

WIDTH, MICROBATCHES = 256, 4
NETWORK = Network((("pp", 2), ("ep", 8)), 4, 100.0, 10.0, 0.0)


def layer(params, x, ctx):
    """Attention, experts that are dispatched, and a collective whose result nobody reads."""
    with jax.named_scope("attention"), jax.named_scope("core"):
        x = x + x @ params["w"]
    with jax.named_scope("mlp"):
        with jax.named_scope("dispatch"):
            rows = jax.lax.all_to_all(x, "ep", 0, 0, tiled=True)
        with jax.named_scope("experts"):
            rows = jnp.tanh(rows) @ params["v"]
        with jax.named_scope("combine"):
            y = jax.lax.all_to_all(rows, "ep", 0, 0, tiled=True)
    jax.lax.psum(x * 2, "ep")
    return x + y


def planned(name="dualpipev", **options):
    mesh = AbstractMesh((2, 8), ("pp", "ep"), axis_types=(AxisType.Auto,) * 2)
    schedule = jaxpipe.schedule.build(name, 2, MICROBATCHES)
    step = jaxpipe.value_and_grad(
        layer, schedule, mesh, head=lambda outer, y, data, ctx: (y**2).mean(), data_axes=("ep",)
    )
    rows = {key: jax.ShapeDtypeStruct((schedule.num_stages, WIDTH, WIDTH), jnp.bfloat16) for key in "wv"}
    batch = jax.ShapeDtypeStruct((8 * MICROBATCHES * 64, WIDTH), jnp.bfloat16)
    return jaxpipe.plan(step, jaxpipe.Params(rows), batch, "H800", **options)


def test_parts_add_up_to_the_action():
    found = planned()
    (actions,) = found.work.kinds
    given = found.chip, found.achieved, found.network
    for letter, work in actions.items():
        spent = parts.spent_by_part(work, *given)
        assert sum(one.compute for one in spent.values()) == pytest.approx(work.compute(*given[:2]))
        assert sum(one.communicate for one in spent.values()) == pytest.approx(work.communicate(found.network))
        assert {part for part, one in spent.items() if one.communicate} <= {"exchange"}, letter
    forward = parts.spent_by_part(actions["F"], *given)
    assert {"attention", "experts", "exchange"} <= set(forward)
    size = 64 * WIDTH * 2
    assert forward["exchange"].communicate == pytest.approx(2 * found.network.seconds("all-to-all", ["ep"], size))
    assert parts.imbalance(found) >= 1.0
    text = "\n".join(parts.detail_lines(found))
    assert "| exchange |" in text and "One run of stages 0-3" in text and "160 GB/s" in text and "F and B" in text


def test_collectives_that_nobody_reads_take_no_time():
    """The compiler removes them, as it removes all whose results are not used."""
    kinds = {message.kind for work in planned().work.kinds[0].values() for message in work.messages}
    assert kinds == {"all-to-all"}


def test_collectives_take_multiprocessors_from_the_kernels_of_a_pair():
    free, taken = (planned(achieved=Achieved(occupied=share)) for share in (0.0, 0.25))
    actions, chip = free.work.kinds[0], free.chip
    computes = sum(actions[letter].compute(chip, free.achieved) for letter in "FB")
    communicates = sum(actions[letter].communicate(free.network) for letter in "FB")
    assert free.costs.overlapped == pytest.approx(max(computes, communicates))
    assert taken.costs.overlapped == pytest.approx(max(computes + 0.25 * communicates, communicates))
    assert taken.costs.forward == free.costs.forward  # alone, one runs after the other


def test_kernels_have_rates_of_their_own():
    """A kernel of 989.4 GFLOP takes a millisecond on an H100, and two at half of its best."""
    work = DeviceWork((Kernel("mine", "bf16", 989.4e9, 0.0, 1.0), Kernel("copy", "", 0.0, 3.35e9, 3.0)))
    plain = Achieved(1.0, 1.0, kernel_us=0.0)
    assert work.compute(CHIPS["H100"], plain) == pytest.approx(4e-3)
    own = dataclasses.replace(plain, kernels={"mine": KernelShare(matmul=0.5), "copy": KernelShare(memory=0.25)})
    assert work.compute(CHIPS["H100"], own) == pytest.approx(14e-3)
    with pytest.raises(ValueError, match=r"memory of kernel copy=1\.5 must be a share"):
        Achieved(kernels={"copy": KernelShare(memory=1.5)})
    with pytest.raises(ValueError, match=r"occupied=1\.0 must be a share of at least 0, below 1"):
        Achieved(occupied=1.0)


def test_groups_of_an_exchange_have_their_own_links():
    """Of eight devices on two nodes: across them a half goes over the slow link, within a node nothing does."""
    across, within = tuple((place, place + 4) for place in range(4)), ((0, 1, 2, 3), (4, 5, 6, 7))
    seconds = [NETWORK.seconds("all-to-all", ["ep"], 80.0, groups) for groups in (None, across, within)]
    assert seconds == pytest.approx([40 / 10, 40 / 10, 60 / 100])
    message = Message("all-to-all", ("ep",), 80.0, 3.0, groups=within)
    assert DeviceWork(messages=(message,)).communicate(NETWORK) == pytest.approx(1.8)


RECORDS = json.loads((pathlib.Path(__file__).parents[3] / "docs/measured.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("kernel", "key"),
    [
        ("quantise_rows", "quantise_rows"), ("quantise", "quantise"), ("columns_of", "columns_of"),
        ("scaled_gate", "gate"), ("scaled_gate_backward", "gate_backward"), ("quantise_weights", "quantise_weights"),
    ],
)  # fmt: skip
def test_rates_of_casts_are_those_measured(kernel, key):
    measured = RECORDS[f"fp8_quantise/{key}/kernel/GB/s"]["value"] * 1e9 / CHIPS["H200"].hbm
    assert rates.KERNELS[kernel].memory == pytest.approx(measured, abs=0.006)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_kernel_that_adds_to_a_sum_counts_as_its_product(precision):
    """The sum that it writes over is neither an operand of the product nor what says which unit multiplies."""
    rows, k, n, shape = 512, 128, 256, jax.ShapeDtypeStruct
    sizes, total = shape((4,), jnp.int32), shape((4, k, n), jnp.float32)
    if precision == "bf16":
        operands, function = [shape((rows, side), jnp.bfloat16) for side in (k, n)], mosaic.added_outer
    else:
        scaled = ((shape((side, rows), jnp.float8_e4m3fn), shape((rows // 128, side), jnp.float32)) for side in (k, n))
        operands, function = [each for pair in scaled for each in pair], fp8_mosaic.added_outer
    jaxpr = jax.make_jaxpr(function)(*operands, sizes, total).jaxpr
    found = [eqn for eqn, _ in equations(jaxpr) if kernel_name(eqn) in ("grouped_outer", "scaled_outer")]
    assert [kernel_flops(eqn, {}) for eqn in found] == [2 * rows * k * n]
    assert [multiplying_unit(eqn) for eqn in found] == [precision]


@pytest.mark.parametrize(
    ("moves", "exposed"),
    [
        ([(True, 1.0, 1)], 0.0),  # behind the second of two kernels of 1 ms
        ([(True, 1.0, 2)], 1.0),  # what the last kernel makes has nothing behind it
        ([(True, 1.5, 1), (True, 1.0, 2)], 1.5),  # one after the other: from 1 to 2.5, and to 3.5
        ([(False, 1.0, 1)], 0.0),  # asked for when the action begins
        ([(False, 1.0, 0)], 1.0),  # which the first kernel waits for
        ([(False, 0.5, 0), (False, 1.0, 1)], 0.5),
        ([(False, 0.5, 0), (True, 1.0, 2)], 1.5),  # both ways at once, and each alone here
        ([(False, 3.0, 1), (True, 2.5, 1)], 2.0),  # the second kernel runs from 3 to 4, the link out from 1 to 3.5
    ],
)
def test_transfers_hide_behind_kernels_and_what_does_not_is_time(moves, exposed):
    """By hand: two kernels of 1 ms, arrays of so many ms, and the kernels that stand before each."""
    network, chip = Network((("pp", 1),), 8, 1.0, 1.0, 0.0), CHIPS["H100"]
    achieved = Achieved(matmul=1.0, host=0.5, kernel_us=0.0)
    kernels = (Kernel("dot_general", "bf16", chip.bf16 / 1e3, 8.0, 1.0),) * 2
    transfers = tuple(HostTransfer(out, ms * 32e6, 1.0, place) for out, ms, place in moves)
    work = DeviceWork(kernels, transfers=transfers)
    assert work.exposed(chip, achieved, network) == pytest.approx(exposed / 1e3, abs=1e-9)
    spent = parts.spent_by_part(work, chip, achieved, network)
    assert spent[parts.TRANSFERS].total == work.exposed(chip, achieved, network)
    ways = [sum(ms for out, ms, _ in moves if out is way) / 1e3 for way in (True, False)]
    assert work.transfer(chip, achieved) == pytest.approx(tuple(ways))
