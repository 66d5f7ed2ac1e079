"""Who sends what where, as plain loops: sends, rows by slot, capacities, moves and transposes, replicas, copies."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from eplb_jax import MoEConfig, most_fetched, working_copies
from eplb_jax.kernels.grouped_gemm.layout import ALIGN, group_starts
from eplb_jax.moe.dispatch import make_capacities, plan_sends, sort_by_slot
from eplb_jax.moe.fetch import plan_fetches
from eplb_jax.moe.permute import RowMap, permute, permute_each, unpermute
from eplb_jax.moe.replica import choose_replicas
from tests.cases import cases
from tests.eplb_jax.moe.dense import placement_of
from tests.eplb_jax.moe.test_layer import make_mesh, random_placement

quick = settings(derandomize=True, deadline=None, max_examples=15)
# Tokens, choices, devices, slots of each, capacity. Few shapes, as each is compiled.
SENDS = [(1, 1, 1, 1, 1), (7, 3, 4, 2, 2), (24, 4, 3, 4, 24), (40, 6, 5, 3, 9), (33, 2, 8, 1, 5)]
# Tokens, choices, slots, rows.
SORTS = [(1, 1, 1, 8), (16, 3, 4, 40), (50, 2, 9, 176), (30, 4, 6, 16), (64, 4, 5, 120)]
send = jax.jit(plan_sends, static_argnums=(1, 2, 3))
sort = jax.jit(sort_by_slot, static_argnums=(1, 2))


@st.composite
def choices(draw, shapes, slots_of):
    """A shape and slots [T, k], different ones for each token as a router's are, more of the first, some -1."""
    shape = draw(st.sampled_from(shapes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    missing, skew = draw(st.sampled_from([0.0, 0.3, 1.0])), draw(st.sampled_from([0.0, 1.0, 4.0]))
    tokens, top_k, total = shape[0], shape[1], slots_of(*shape)
    noise = rng.gumbel(size=(tokens, max(total, top_k))) - skew * np.arange(max(total, top_k))
    slots = np.argsort(-noise, axis=1)[:, :top_k]
    slots = np.where((slots >= total) | (rng.random(slots.shape) < missing), -1, slots)
    return shape, slots.astype(np.int32)


@quick
@given(choices(SENDS, lambda tokens, top_k, devices, slots, capacity: devices * slots))
def test_sends_are_those_of_a_loop(case):
    (tokens, top_k, devices, num_slots, capacity), slots = case
    sends = jax.tree.map(np.asarray, send(jnp.asarray(slots), devices, num_slots, capacity))
    sent, dropped = [[] for _ in range(devices)], 0
    for token, wanted in enumerate(slots.tolist()):
        for device in {slot // num_slots for slot in wanted if slot >= 0}:
            if len(sent[device]) < capacity:
                sent[device].append(token)
            else:
                dropped += sum(slot >= 0 and slot // num_slots == device for slot in wanted)
    source = [going + [tokens] * (capacity - len(going)) for going in sent]
    assert sends.counts.tolist() == [len(going) for going in sent]
    assert sends.moves.source.reshape(devices, capacity).tolist() == source
    assert int(sends.dropped) == dropped
    for token in range(tokens):
        rows = [row for row in sends.moves.rows[token].tolist() if row < devices * capacity]
        assert sorted(rows) == np.flatnonzero(np.ravel(source) == token).tolist()

    listed = np.full((devices, capacity, top_k), -1)
    entries, assigned = np.full((tokens, top_k), listed.size), np.full(listed.shape, tokens * top_k)
    for device, going in enumerate(sent):
        for place, token in enumerate(going):
            for j, slot in enumerate(slots[token]):
                if slot >= 0 and slot // num_slots == device:
                    listed[device, place, j] = slot % num_slots
            here = listed[device, place] >= 0
            assigned[device, place] = np.where(here, token * top_k + np.arange(top_k), tokens * top_k)
            entries[token, here] = (device * capacity + place) * top_k + np.flatnonzero(here)
    assert np.array_equal(sends.slots, listed)
    assert np.array_equal(sends.choices, assigned)
    assert np.array_equal(sends.entries, entries)
    assert (sends.entries < listed.size).sum() == (slots >= 0).sum() - dropped


def sizes_of(wanted, rows):
    """At most as many blocks for a slot as fit if all slots may have that many."""
    blocks = [-(-w // ALIGN) for w in wanted]
    level = max(n for n in range(max(blocks) + 1) if sum(min(b, n) for b in blocks) * ALIGN <= rows)
    return [min(w, level * ALIGN) for w in wanted]


@quick
@given(choices(SORTS, lambda tokens, top_k, slots, rows: slots))
def test_rows_by_slot_are_those_of_a_loop(case):
    (tokens, top_k, num_slots, num_rows), slots = case
    found = jax.tree.map(np.asarray, sort(jnp.asarray(slots), num_slots, num_rows))
    flat = slots.ravel()
    wanted = [int((flat == slot).sum()) for slot in range(num_slots)]
    sizes = sizes_of(wanted, num_rows)
    assert found.sizes.tolist() == sizes
    assert int(found.dropped) == sum(wanted) - sum(sizes)
    assignment, start = np.full(num_rows, tokens * top_k), 0
    for slot, size in enumerate(sizes):
        assert start % ALIGN == 0 and start == group_starts(jnp.asarray(sizes))[slot]
        assignment[start : start + size] = np.flatnonzero(flat == slot)[:size]
        start += -(-size // ALIGN) * ALIGN
    assert start <= num_rows
    assert found.assignment.tolist() == assignment.tolist()
    assert found.moves.source.tolist() == np.where(assignment < tokens * top_k, assignment // top_k, tokens).tolist()
    rows = np.full(tokens * top_k, num_rows)
    rows[assignment[assignment < tokens * top_k]] = np.flatnonzero(assignment < tokens * top_k)
    assert found.moves.rows.ravel().tolist() == rows.tolist()


@quick
@given(st.lists(st.integers(0, 70), min_size=6, max_size=6), st.sampled_from([0, 8, 64, 128, 400]))
def test_too_few_rows_are_shared_like_water(wanted, rows):
    """Never more than there are, never fewer than could be; only slots with most rows lose."""
    slots = np.repeat(np.arange(6), wanted).astype(np.int32)
    slots = np.r_[slots, np.full(420 - len(slots), -1, np.int32)][:, None]
    sizes = np.asarray(sort(jnp.asarray(slots), 6, rows).sizes)
    blocks, given_blocks = -(-np.array(wanted) // ALIGN), -(-sizes // ALIGN)
    left = rows // ALIGN - given_blocks.sum()
    short = blocks > given_blocks
    assert left >= 0 and (sizes <= wanted).all() and (sizes[~short] == np.array(wanted)[~short]).all()
    if short.any():
        assert left < short.sum()  # not one block more for each of them
        assert len(set(given_blocks[short])) == 1 and given_blocks.max() == given_blocks[short][0]
        assert (sizes[short] % ALIGN == 0).all()


@pytest.mark.slow
def test_many_assignments_are_sorted_too():
    """Where slot and assignment no longer fit one int32; on CPUs this takes gigabytes."""
    tokens, top_k, num_slots, rows = 2**17, 4, 4096, 2**13
    slots = np.random.default_rng(0).integers(-1, 64, (tokens, top_k), dtype=np.int32)
    assert (num_slots + 1) * slots.size >= 2**31
    found = sort(jnp.asarray(slots), num_slots, rows)
    flat, sizes = slots.ravel(), np.asarray(found.sizes)
    assert sizes[:64].tolist() == [rows // 64] * 64 and sizes[64:].sum() == 0
    expected = [np.flatnonzero(flat == slot)[: rows // 64] for slot in range(64)]
    assert np.array_equal(found.assignment, np.concatenate(expected))


@cases(
    "shape",
    [(8, 2, 4, 2), (16, 4, 2, 3), (5, 3, 1, 4), (9, 1, 8, 1), (8, 8, 4, 2)],
    quick=[(16, 4, 2, 3), (5, 3, 1, 4)],
)
def test_capacities_without_a_factor_drop_nothing(shape):
    """Whatever is chosen; all tokens on one device too."""
    tokens, top_k, devices, num_slots = shape
    capacities = make_capacities(*shape, None)
    assert capacities.exchange == tokens and capacities.rows % ALIGN == 0
    rng = np.random.default_rng(0)
    total, most = devices * num_slots, min(top_k, num_slots)
    for skew in (0, 0, 100, 100):
        noise = rng.gumbel(size=(devices * tokens, total)) - skew * (np.arange(total) // num_slots)
        slots = np.argsort(-noise, axis=1)[:, :top_k].astype(np.int32)
        sends = [send(jnp.asarray(part), devices, num_slots, capacities.exchange) for part in np.split(slots, devices)]
        assert [int(s.dropped) for s in sends] == [0] * devices
        for device in range(devices):
            received = jnp.concatenate([s.slots[device] for s in sends])
            found = sort(received, num_slots, capacities.rows)
            assert int(found.dropped) == 0
            assert int(found.sizes.sum()) == (slots // num_slots == device).sum()
        if skew:
            assert (slots // num_slots == 0).sum() == devices * tokens * most


def test_capacities_of_a_factor():
    """What evenly spread choices need: the tokens that choose any of a device's experts, T * k rows and gaps."""
    for factor in (1, 1.25, 2):
        capacities = make_capacities(4096, 8, 8, 32, factor)
        fewest = factor * 4096 * (1 - math.comb(224, 8) / math.comb(256, 8))  # 32 of 256 experts on a device
        assert min(fewest, 4096) <= capacities.exchange <= min(fewest + ALIGN, 4096)
        assert factor * 4096 * 8 <= capacities.rows - 7 * 32 < factor * 4096 * 8 + ALIGN
    assert make_capacities(64, 4, 4, 4, 100.0) == make_capacities(64, 4, 4, 4, None)
    assert make_capacities(64, 4, 1, 16, 1.0) == make_capacities(64, 4, 1, 16, None)


def naive_permute(x, moves):
    return np.array([x[source] if source < len(x) else 0 * x[0] for source in moves.source])


def naive_gather(rows, moves):
    total = np.zeros((len(moves.rows), *rows.shape[1:]))
    for row, source in enumerate(moves.source):
        if source < len(total):
            total[source] += rows[row]
    return total


@jax.jit
def transposes(x, rows, values, ct, found):
    moved, back = jax.vjp(lambda x: permute(x, found.moves), x)
    summed, forth = jax.vjp(lambda rows: unpermute(rows, found.moves), rows)
    each, pull = jax.vjp(lambda values: permute_each(values, found.assignment, found.moves.rows), values)
    return moved, back(rows)[0], summed, forth(x)[0], each, pull(ct)[0]


@quick
@given(choices(SORTS[2:], lambda tokens, top_k, slots, rows: slots), st.integers(0, 9))
def test_moves_and_their_transposes(case, seed):
    """Equal naive gathers and scatters; each is the other's transpose, and rows of no token are not looked at."""
    (tokens, top_k, num_slots, num_rows), slots = case
    with jax.enable_x64(True):
        found = sort(jnp.asarray(slots), num_slots, num_rows)
        rng = np.random.default_rng(seed)
        x, rows = rng.standard_normal((tokens, 3)), rng.standard_normal((num_rows, 3))
        values, ct = rng.standard_normal((tokens, top_k)), rng.standard_normal(num_rows)
        moves = jax.tree.map(np.asarray, found.moves)
        rows[moves.source == tokens], ct[moves.source == tokens] = np.nan, np.nan
        results = transposes(*(jnp.asarray(a) for a in (x, rows, values, ct)), found)
    moved, back, summed, forth, each, pull = (np.asarray(a) for a in results)
    assert np.array_equal(moved, naive_permute(x, moves)) and np.array_equal(forth, moved)
    np.testing.assert_allclose(summed, naive_gather(rows, moves), rtol=1e-13, atol=1e-13)
    assert np.array_equal(back, summed)
    known = np.asarray(found.assignment) < values.size
    assert np.array_equal(each[known], values.ravel()[found.assignment[known]]) and not each[~known].any()
    expected = np.zeros(values.size)
    expected[found.assignment[known]] = ct[known]
    assert np.array_equal(pull.ravel(), expected)
    np.testing.assert_allclose((moved[known] * rows[known]).sum(), (x * summed).sum(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose((each[known] * ct[known]).sum(), (values * pull).sum(), rtol=1e-10, atol=1e-12)


def test_moves_of_sends(x64):
    """A token's rows on several devices sum; the transposes agree with finite differences."""
    slots = np.random.default_rng(0).permuted(np.tile(np.arange(8), (12, 1)), axis=1)[:, :3].astype(np.int32)
    sends = send(jnp.asarray(slots), 4, 2, 5)
    x, rows = (jax.random.normal(jax.random.key(i), (n, 2)) for i, n in enumerate((12, 20)))
    np.testing.assert_allclose(unpermute(rows, sends.moves), naive_gather(np.asarray(rows), sends.moves), rtol=1e-14)
    for function, argument in (
        (lambda x: permute(x, sends.moves), x),
        (lambda rows: unpermute(rows, sends.moves), rows),
        (lambda x: permute_each(x, sends.choices.reshape(-1), sends.entries), jnp.tile(x[:, :1], (1, 3))),
    ):
        check_grads(jax.jit(function), (argument,), order=1, modes=["rev"])


def test_sums_are_wide():
    """bfloat16 rows are added in float32, in either direction."""
    moves = RowMap(jnp.zeros(3, jnp.int32), jnp.array([[0, 1, 2]]))
    rows = jnp.array([[1.0], [2.0**-8], [2.0**-8]], jnp.bfloat16)
    assert unpermute(rows, moves).tolist() == [[1 + 2**-7]]
    (back,) = jax.vjp(lambda x: permute(x, moves), jnp.ones((1, 1), jnp.bfloat16))[1](rows)
    assert back.tolist() == [[1 + 2**-7]] and back.dtype == jnp.bfloat16


@pytest.mark.parametrize("stride", [1, 2, 3, 64, 4096])
def test_hash_uses_all_replicas_alike(stride):
    """Of tokens one after the other, and of every so many, as the first tokens of sequences are."""
    placement = placement_of(np.r_[0, np.full(2, 1), np.full(3, 2), np.full(8, 3)], 4)
    experts = jnp.tile(jnp.arange(4, dtype=jnp.int32), (1, 1))
    pick = jax.jit(jax.vmap(lambda first: choose_replicas(experts, placement, first_token=first)[0]))
    slots = np.asarray(pick(jnp.arange(8192, dtype=jnp.int32) * stride))
    assert (placement.phy2log[slots] == np.arange(4)).all()
    counts = np.bincount(slots.ravel(), minlength=14)
    assert np.abs(counts * placement.logcnt[placement.phy2log] / 8192 - 1).max() < 0.1


def test_hash_is_of_the_global_index():
    """The same slots however tokens are divided over devices, and whoever asks."""
    placement = random_placement(4, 16, seed=1)
    experts = np.random.default_rng(2).integers(-1, 16, (64, 3), dtype=np.int32)
    whole = np.asarray(choose_replicas(jnp.asarray(experts), placement))
    for devices in (2, 4):
        parts = [
            choose_replicas(jnp.asarray(part), placement, first_token=i * len(part), device=i, num_devices=devices)
            for i, part in enumerate(np.split(experts, devices))
        ]
        assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(whole < 0, experts < 0)
    assert np.array_equal(placement.phy2log[whole[experts >= 0]], experts[experts >= 0])
    assert np.unique(whole).size == 33  # all 32 slots, and -1


@pytest.mark.parametrize("per_node", [1, 2, 4, None])
def test_nearest_prefers_device_then_node(per_node):
    """Among equally near replicas all are used, so that no more bytes travel than must."""
    devices, capacity = 4, 8
    placement = random_placement(devices, 16, seed=3)
    experts = jnp.asarray(np.random.default_rng(4).integers(-1, 16, (256, 4), dtype=np.int32))
    options = dict(choice="nearest", num_devices=devices, devices_per_node=per_node, first_token=7)
    pick = jax.jit(lambda device: choose_replicas(experts, placement, device=device, **options))
    for device in range(devices):
        slots = np.asarray(pick(jnp.int32(device)))
        used = {}
        for expert, slot in zip(np.asarray(experts).ravel().tolist(), slots.ravel().tolist(), strict=True):
            if expert < 0:
                assert slot == -1
            else:
                used.setdefault(expert, set()).add(slot)
        for expert, chosen in used.items():
            replicas = np.flatnonzero(placement.phy2log == expert)
            holder, node = replicas // capacity, per_node or devices
            distance = np.where(holder == device, 0, np.where(holder // node == device // node, 1, 2))
            assert chosen == set(replicas[distance == distance.min()].tolist())


@pytest.mark.parametrize(("ep", "fetched"), [(1, None), (2, None), (4, None), (4, 1), (8, 1), (2, 3)])
def test_working_copies_and_the_sum_of_their_gradients(x64, ep, fetched):
    """Any placement, slots of dead devices among them: those hold zeros and have no gradient.

    So also where experts are exchanged, and where a placement needs more than that.
    """
    rng = np.random.default_rng(ep)
    masters = {"a": rng.standard_normal((8, 3)), "b": rng.standard_normal((8, 2, 2))}
    placements = [np.r_[rng.permutation(8), rng.integers(0, 8, 8)], rng.integers(-1, 3, 16), np.full(16, 7)]
    placements.append(np.roll(np.repeat(np.arange(8), 2), 2) if fetched else np.arange(16) % 8)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=make_mesh(ep), in_specs=(P("ep"), P(), P("ep")), out_specs=P("ep"))
    def both(masters, phy2log, ct):
        copies, pull = jax.vjp(lambda masters: working_copies(masters, phy2log, "ep", fetched=fetched), masters)
        return copies, pull(ct)[0]

    for phy2log in placements:
        ct = {name: rng.standard_normal((16, *leaf.shape[1:])) for name, leaf in masters.items()}
        copies, grads = both(*jax.tree.map(jnp.asarray, (masters, phy2log.astype(np.int32), ct)))
        for name, leaf in masters.items():
            expected = np.zeros_like(leaf)
            np.add.at(expected, phy2log[phy2log >= 0], ct[name][phy2log >= 0])
            held = (phy2log >= 0).reshape(-1, *[1] * (leaf.ndim - 1))
            assert np.array_equal(copies[name], np.where(held, leaf[phy2log], 0))
            np.testing.assert_allclose(grads[name], expected, rtol=1e-13, atol=1e-13)


def test_only_experts_of_other_devices_are_exchanged():
    """How many the program counts for each pair of devices is what a plain loop counts."""
    rng = np.random.default_rng(0)
    taken = set()
    for phy2log in [np.roll(np.repeat(np.arange(8), 2), 2), *(rng.integers(-1, 8, 16) for _ in range(20))]:
        held = [set(slots.tolist()) - {-1} for slots in phy2log.reshape(4, 4)]
        counts = [len([e for e in held[d] if e // 2 == o]) for d in range(4) for o in range(4) if o != d]
        fetches = plan_fetches(jnp.asarray(phy2log, jnp.int32), 1, 4, 2, 1)
        assert fetches.most == max(counts)
        assert most_fetched(phy2log, 8, 4) == max(counts)
        taken.add(max(counts))
        for device, sent in enumerate(np.where(fetches.is_sent, fetches.sent, -1).tolist()):
            wanted = [e - 2 for e in phy2log.reshape(4, 4)[device].tolist() if e // 2 == 1 and device != 1]
            assert sent == (wanted[:1] or [-1])
    assert taken == {1, 2}


def test_bounds_of_exchanged_experts_that_are_refused():
    with pytest.raises(ValueError, match="fetched=0: it must be an integer of at least 1, experts, or None"):
        MoEConfig(fetched=0)
    with pytest.raises(ValueError, match="or None to gather all"):
        working_copies(jnp.ones(4), jnp.arange(4), fetched=0)
    with pytest.raises(ValueError, match=r"fetched=1\.5: it must be an integer"):
        working_copies(jnp.ones(4), jnp.arange(4), fetched=1.5)
    with pytest.raises(ValueError, match="phy2log has experts 0 to 4, and there are num_masters=4 of all devices"):
        most_fetched(np.array([0, 1, 4, 2]), 4, 2)
    with pytest.raises(ValueError, match="6 slots and 4 masters must divide over num_devices=4"):
        most_fetched(np.arange(6) % 4, 4, 4)


def test_working_copies_without_an_axis(x64):
    masters, phy2log = jnp.arange(6.0).reshape(3, 2), jnp.array([2, 0, 1, 2, -1])
    copies, pull = jax.vjp(lambda masters: working_copies(masters, phy2log), masters)
    assert copies.tolist() == [[4, 5], [0, 1], [2, 3], [4, 5], [0, 0]]
    assert pull(jnp.ones((5, 2)))[0].tolist() == [[1, 1], [1, 1], [2, 2]]
