"""Residuals in the host's memory: the same gradients, fewer bytes of the device, as many transfers as planned."""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

import jaxpipe
from jaxpipe.arguments import check_host_memory
from jaxpipe.planning.chips import chip
from jaxpipe.runtime.by_rank import as_dispatched
from jaxpipe.runtime.offload import choose_offloaded
from jaxpipe.schedule import build
from jaxpipe.stage import split_stage
from jaxpipe.stage.stash import Slots
from tests.cases import cases
from tests.plain import assert_trees_close, plain_value_and_grad

ALL = 10**12
WIDTH, ROWS = 8, 8


def stage(params, x, ctx):
    """Layers with dropout: what is kept has numbers, bools and keys."""
    for layer in range(2):
        inner = jnp.tanh(x @ params["up"][layer])
        keep = jax.random.bernoulli(jax.random.fold_in(ctx.rng, layer), 0.8, inner.shape)
        x = x + jnp.where(keep, inner, 0) @ params["down"][layer]
    return x


def head(outer, y, data, ctx):
    return (jnp.sin(y) ** 2).mean()


def arguments(schedule):
    rng, stages = np.random.default_rng(0), schedule.num_stages
    shapes = {"up": (stages, 2, WIDTH, 3 * WIDTH), "down": (stages, 2, 3 * WIDTH, WIDTH)}
    params = jaxpipe.Params({name: jnp.asarray(rng.normal(size=shape) / 2) for name, shape in shapes.items()})
    x = jnp.asarray(rng.normal(size=(2 * ROWS * schedule.num_microbatches, WIDTH)))
    return params, x, jax.random.key(0)


RUNS = [
    ("1f1b", 2, "by_rank"),
    ("dualpipe", 2, "unrolled"),
    ("1f1b", 4, "stretches"),
    ("dualpipev", 2, "by_rank"),
    ("dualpipe", 4, "stretches"),
    ("dualpipe", 4, "switch"),
    ("dualpipev", 4, "stretches"),
    ("dualpipev", 4, "sequential"),
    ("zb1p", 4, "loops"),
    ("dualpipev", 8, "sequential"),
]


@cases(("name", "ranks", "dispatch"), RUNS, quick=RUNS[:3])
def test_gradients_are_the_plain_programs(x64, name, ranks, dispatch):
    schedule = build(name, ranks, 2 * ranks)
    mesh, given = jaxpipe.make_mesh(pp=ranks), arguments(schedule)
    make = functools.partial(jaxpipe.value_and_grad, stage, schedule, mesh, head=head, dispatch=dispatch)
    (loss, _), grads = jax.jit(make(offload=ALL))(*given)
    (expected_loss, _), expected = plain_value_and_grad(stage, schedule, head=head)(*given)
    assert_trees_close((loss, grads), (expected_loss, expected), rtol=1e-11)
    lowered = jax.jit(make(offload=ALL)).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert '"pinned_host"' in lowered and '"device"' in lowered


def test_stages_of_several_kinds_share_slots_in_both_memories(x64):
    def wide(params, x, ctx):
        return x + jnp.tanh(x @ params["up"][0]) @ params["down"][0]

    schedule = build("zb1p", 2, 4)
    kinds = jaxpipe.StageKinds([wide, stage], [0, 1])
    given, mesh = arguments(schedule), jaxpipe.make_mesh(pp=2)
    make = functools.partial(jaxpipe.value_and_grad, kinds, schedule, mesh, head=head)
    found = jax.jit(make(offload=2 * ROWS * WIDTH * 8 * 4))(*given)
    assert_trees_close(found, jax.jit(make())(*given), rtol=1e-12)


def planned(offload, *, dispatch="stretches", stash=None, name="zb1p", **options):
    """The plan of products of 1024 x 4096 in bfloat16 on 8192 rows, two layers a stage."""
    schedule = build(name, 4, 8)
    mesh = AbstractMesh((4,), ("pp",), axis_types=(AxisType.Auto,))

    def layers(w, x, ctx):
        for layer in range(2):
            x = x + jnp.tanh(x @ w[layer]) @ w[layer].T
        return x

    def loss(outer, y, data, ctx):
        return (y.astype(jnp.float32) ** 2).mean()

    step = jaxpipe.value_and_grad(
        layers, schedule, mesh, head=loss, dispatch=dispatch, offload=offload, stash=stash, order="storage"
    )
    shapes = (
        jaxpipe.Params(jax.ShapeDtypeStruct((schedule.num_stages, 2, 1024, 4096), jnp.bfloat16)),
        jax.ShapeDtypeStruct((8 * 8192, 1024), jnp.bfloat16),
    )
    return jaxpipe.plan(step, *shapes, options.pop("chip", "H200"), **options), as_dispatched(step.program, dispatch)


def test_what_is_on_the_host_is_not_on_the_device():
    """Of each layer its input and tanh's result are kept, one of them of 1024 numbers a row and one of 4096."""
    (here, program), (there, _) = planned(0), planned(ALL)
    kept = 2 * 8192 * (1024 + 4096) * 2
    slots = program.num_weight_stash_slots
    assert here.memory.host == 0 and there.memory.host == kept * slots
    assert here.memory.stash - there.memory.stash == kept * slots
    assert here.memory.total - there.memory.total >= 0.9 * kept * slots
    assert planned(ALL, cpu=True)[0].memory.stash == planned(0, cpu=True)[0].memory.stash


@pytest.mark.parametrize("budget", [0, 10**7, 10**8])
def test_no_more_goes_there_than_the_budget(budget):
    found, program = planned(budget)
    assert found.memory.host <= budget * program.num_weight_stash_slots
    assert (found.memory.host > 0) == (budget >= 2 * 8192 * 1024)


def test_transfers_take_the_link_as_long_as_their_bytes_do():
    """Each rank writes what 8 microbatches keep once; I and W, where they run apart, both read it."""
    found, _ = planned(ALL)
    kept = 2 * 8192 * (1024 + 4096) * 2
    seconds = 8 * kept / (0.85 * 64e9)
    works = found.work.kinds[0]
    assert sum(each.nbytes for each in works["F"].transfers) == kept
    for there, back, exposed in found.transfers:
        assert there == pytest.approx(seconds)
        assert seconds * 0.99 < back <= 2 * seconds
        assert 0 <= exposed <= there + back
    assert "memory of the host for a device" in str(found) and "memory of the host" not in str(planned(0)[0])


def test_what_nothing_hides_makes_the_step_longer():
    """A link that takes no time costs none; one that is slower than all kernels costs what it takes beyond them."""
    chips = [chip("H200"), *(dataclasses.replace(chip("H200"), host=rate) for rate in (1e18, 1e9))]
    here = planned(0)[0].seconds
    usual, fast, slow = (planned(ALL, chip=each)[0] for each in chips)
    # Beside the device's own memory, into whose slots nothing is copied then.
    assert 0.9 * here < fast.seconds < here and max(each for *_, each in fast.transfers) < 1e-6
    assert fast.seconds < usual.seconds < slow.seconds
    there, back, exposed = slow.transfers[0]
    assert exposed > 0.8 * (there + back)
    assert slow.seconds > fast.seconds + 0.8 * max(each for *_, each in slow.transfers)


def test_within_a_budget_the_host_has_a_part_of_it():
    """``stash`` bounds what both memories have."""
    stash = 10**8
    found, program = planned(5 * 10**7, stash=stash)
    assert found.memory.host > 0
    assert found.memory.stash + found.memory.host <= stash * max(
        program.num_stash_slots, program.num_weight_stash_slots
    )


def test_a_stash_is_fitted_beside_what_is_on_the_host():
    schedule = build("1f1b", 4, 8)
    mesh = AbstractMesh((4,), ("pp",), axis_types=(AxisType.Auto,))

    def layers(w, x, ctx):
        for layer in range(3):
            x = x + jnp.tanh(x @ w[layer]) @ w[layer]
        return x

    def step(**options):
        return jaxpipe.value_and_grad(
            layers, schedule, mesh, head=lambda outer, y, data, ctx: (y.astype(jnp.float32) ** 2).mean(), **options
        )

    shapes = (
        jaxpipe.Params(jax.ShapeDtypeStruct((4, 3, 512, 512), jnp.bfloat16)),
        jax.ShapeDtypeStruct((8 * 4096, 512), jnp.bfloat16),
    )
    memory = 0.8 * jaxpipe.plan(step(), *shapes, "H100").memory.total
    alone, beside = (jaxpipe.fit_stash(step(offload=o), *shapes, "H100", memory=memory) for o in (0, ALL))
    assert beside.plan.memory.total <= memory
    assert beside.plan.executed < alone.plan.executed  # nothing is computed again where the host has room


def test_what_frees_most_for_its_transfers_goes_first():
    """Whole arrays within the budget, in the order in which they are made."""

    def layer(w, x):
        return jnp.sin(x @ w[0]) @ w[1]  # the product's sine is made again of the product

    w, x = (jnp.ones((16, 32)), jnp.ones((32, 16))), jnp.ones((64, 16))
    split = split_stage(layer, w, x)
    residuals = split.residuals
    assert sorted(leaf.shape for leaf in (*residuals.input, *residuals.weight)) == [(64, 16), (64, 32)]

    def shapes(offload, slots):
        chosen = choose_offloaded(split, offload, slots)
        pairs = zip(jax.tree.leaves(residuals), jax.tree.leaves(chosen), strict=True)
        return [leaf.shape for leaf, goes in pairs if goes]

    assert shapes(64 * 32 * 4, Slots()) == shapes(64 * 16 * 4, Slots()) == [(64, 16)]  # which is made first
    assert len(shapes(64 * 48 * 4, Slots())) == len(shapes(ALL, Slots())) == 2
    assert shapes(64 * 16 * 4 - 1, Slots()) == []


def test_what_is_read_once_goes_before_what_comes_back_twice():
    def layer(w, x):
        return jnp.sin(jnp.sin(x @ w) + jnp.cumsum(x, 1) ** 2)

    w, x = jnp.ones((16, 16)), jnp.ones((64, 16))
    split = split_stage(layer, w, x)
    assert split.residuals.input and split.residuals.weight
    whole = sum(leaf.size * 4 for leaf in split.residuals.input)
    apart = choose_offloaded(split, whole, Slots(stash=4, weight=4, apart=1.0))
    assert all(apart.input) and not any(apart.weight)
    more = choose_offloaded(split, whole, Slots(stash=4, weight=16, apart=1.0))
    assert any(more.weight)  # which have slots for four times as long


def test_bad_input_is_refused():
    mesh, schedule = jaxpipe.make_mesh(pp=2), build("1f1b", 2, 4)
    wrong: Any
    for wrong in (-1, 1.5, "all"):
        with pytest.raises(ValueError, match=f"a pipeline with offload={wrong!r}: it must be an integer of at least 0"):
            jaxpipe.value_and_grad(stage, schedule, mesh, head=head, offload=wrong)
    memories = [types.SimpleNamespace(kind="device"), types.SimpleNamespace(kind="unpinned_host")]
    device = types.SimpleNamespace(platform="METAL", addressable_memories=lambda: memories)
    with pytest.raises(ValueError, match=r"offload=9: devices of METAL have memories \['device', .* smaller stash="):
        check_host_memory(9, device)
