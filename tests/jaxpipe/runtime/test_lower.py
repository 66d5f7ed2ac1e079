"""Lowered tables, run by a plain interpreter that carries names instead of arrays."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpipe.runtime.lower import forwards, lower
from jaxpipe.runtime.pack import pack_naive
from jaxpipe.runtime.program import Field, Op, Program
from jaxpipe.schedule import BUILDERS, build
from jaxpipe.schedule.action import Action, Group, Kind
from jaxpipe.schedule.schedule import Schedule
from jaxpipe.schedule.simulator import Costs, simulate
from tests.cases import cases

SIZES = [
    *[(name, ranks, m) for name in ("gpipe", "1f1b", "zb1p") for ranks, m in ((1, 2), (2, 4), (3, 6), (4, 8), (8, 24))],
    *[("interleaved", ranks, m) for ranks, m in ((2, 4), (3, 6), (4, 8), (8, 16))],
    *[("zbv", ranks, m) for ranks, m in ((2, 4), (3, 7), (4, 8), (8, 20))],
    *[("dualpipe", ranks, m) for ranks, m in ((2, 4), (4, 8), (4, 20), (6, 14), (8, 20))],
    *[("dualpipev", ranks, m) for ranks, m in ((2, 4), (3, 7), (4, 10), (8, 20))],
]
SIZES += [case for name in BUILDERS if (case := (name, 4, 8)) not in SIZES]
SMALL = [size for size in SIZES if size[1] < 8]


ENDS = (Op.EMBED, Op.HEAD, Op.EMBED_GRAD)


class Pool:
    """Slots of one rank that know what they hold, and refuse to lose it."""

    def __init__(self, size: int) -> None:
        self.dummy = size
        self.held: list[object] = [None] * size

    def read(self, slot: int, expected: object, free: bool = True) -> None:
        assert slot != self.dummy and self.held[slot] == expected, (slot, self.held, expected)
        if free:
            self.held[slot] = None

    def write(self, slot: int, value: object) -> None:
        assert slot != self.dummy and self.held[slot] is None, (slot, self.held, value)
        self.held[slot] = value


def interpret(program: Program) -> list[list[tuple[tuple[Op, int, int], ...]]]:
    """Runs the tables, asserting that every operation finds what it needs; returns what each rank ran, in order."""
    ranks, last = program.num_ranks, program.schedule.num_stages - 1
    embed_grad = any(op is Op.EMBED_GRAD for branch in program.branches for op, _ in branch)
    in_flight = [Pool(program.num_message_slots) for _ in range(ranks)]
    stash = [Pool(program.num_stash_slots) for _ in range(ranks)]
    weight = [Pool(program.num_weight_stash_slots) for _ in range(ranks)]
    cross = [Pool(program.num_cross_slots) for _ in range(ranks)]
    ran: list[list[tuple[tuple[Op, int, int], ...]]] = [[] for _ in range(ranks)]
    for step in range(program.num_steps):
        for rank in range(ranks):
            branch = program.branches[program.branch[step, rank]]
            rows = [dict(zip(Field, map(int, row), strict=True)) for row in program.operands[step, rank]]
            assert all(set(r.values()) - {0} <= dummies(program) for r in rows[len(branch) :])
            work = tuple(
                (op, row[Field.STAGE], row[Field.MICROBATCH]) for (op, _), row in zip(branch, rows, strict=False)
            )
            shared = program.shared_ends and bool(branch) and branch[0][0] in ENDS
            if shared:
                assert all(program.branch[step] == program.branch[step, rank])
                assert all(
                    (program.operands[step, :, 0, : Field.SOURCE] == list(rows[0].values())[: Field.SOURCE]).flat
                )
            for (op, chunk), (_, stage, microbatch) in zip(branch, work, strict=True):
                holder = program.schedule.rank_of(stage, microbatch)
                assert holder == rank or shared
                assert chunk == 0 if op in ENDS else program.schedule.rank_stages[rank][chunk] == stage
            if shared and holder != rank:
                assert set(list(rows[0].values())[Field.SOURCE :]) <= dummies(program)
                assert rows[0][Field.SOURCE] == rows[0][Field.TARGET] == in_flight[rank].dummy
                continue
            for (op, s, m), row in zip(work, rows, strict=False):  # all reads of in_flight come before any write
                reads = {
                    Op.F: ("act", s, m), Op.HEAD: ("act", s + 1, m), Op.B: ("grad", s + 1, m),
                    Op.I: ("grad", s + 1, m), Op.EMBED_GRAD: ("grad", s, m),
                }  # fmt: skip
                if op in reads:
                    in_flight[rank].read(row[Field.SOURCE], reads[op])
                else:
                    assert row[Field.SOURCE] == in_flight[rank].dummy
            for (op, s, m), row in zip(work, rows, strict=False):
                writes = {
                    Op.F: ("act", s + 1, m), Op.HEAD: ("grad", s + 1, m), Op.B: ("grad", s, m),
                    Op.I: ("grad", s, m), Op.EMBED: ("act", s, m),
                }  # fmt: skip
                to_nobody = (op is Op.HEAD and program.forward_only) or (op in (Op.B, Op.I) and s == 0)
                if op not in writes or (to_nobody and not (s == 0 and embed_grad and op is not Op.HEAD)):
                    assert row[Field.TARGET] == in_flight[rank].dummy
                else:
                    in_flight[rank].write(row[Field.TARGET], writes[op])
                assert (op is Op.EMBED) <= (s == 0) and (op is Op.HEAD) <= (s == last)
                assert (op is Op.EMBED_GRAD) <= (s == 0)
                if op is Op.F and not program.forward_only:
                    stash[rank].write(row[Field.STASH], (s, m))
                    weight[rank].write(row[Field.WEIGHT_STASH], (s, m))
            for (op, s, m), row in zip(work, rows, strict=False):  # stashes are free only after the step
                if op in (Op.B, Op.I):
                    stash[rank].read(row[Field.STASH], (s, m))
                    weight[rank].read(row[Field.WEIGHT_STASH], (s, m), free=op is Op.B)
                elif op is not Op.F or program.forward_only:
                    assert row[Field.STASH] == stash[rank].dummy
                if op is Op.I:
                    cross[rank].write(row[Field.CROSS], (s, m))
                elif op is Op.W:
                    weight[rank].read(row[Field.WEIGHT_STASH], (s, m))
                    cross[rank].read(row[Field.CROSS], (s, m))
                else:
                    assert row[Field.CROSS] == cross[rank].dummy
                if op in (Op.EMBED, Op.HEAD, Op.EMBED_GRAD):
                    assert row[Field.WEIGHT_STASH] == weight[rank].dummy
            ran[rank] += [work] if work else []
        exchange(program, step, in_flight)
    assert all(value is None for pool in in_flight + stash + weight + cross for value in pool.held)
    return ran


def dummies(program: Program) -> set[int]:
    return {
        program.num_message_slots, program.num_stash_slots, program.num_weight_stash_slots, program.num_cross_slots,
    }  # fmt: skip


def exchange(program: Program, step: int, in_flight: list[Pool]) -> None:
    """Moves the messages of a step: every channel reads before any writes, and no message is lost on the way."""
    arriving: list[dict[int, object]] = [{} for _ in in_flight]
    for channel, permutation in enumerate(program.channels):
        assert len({s for s, _ in permutation}) == len({d for _, d in permutation}) == len(permutation)
        senders = {r for r in range(len(in_flight)) if program.send[step, r, channel] != in_flight[r].dummy}
        receivers = {r for r in range(len(in_flight)) if program.receive[step, r, channel] != in_flight[r].dummy}
        assert program.communicate[step, channel] == bool(senders)
        assert {d for s, d in permutation if s in senders} == receivers and senders <= {s for s, _ in permutation}
        for source, destination in permutation:
            if source in senders:
                slot = int(program.send[step, source, channel])
                value = in_flight[source].held[slot]
                assert value is not None
                in_flight[source].held[slot] = None
                arriving[destination][int(program.receive[step, destination, channel])] = value
    for pool, messages in zip(in_flight, arriving, strict=True):
        for slot, value in messages.items():
            pool.write(slot, value)


def assert_right(program: Program, embed_grad: bool) -> None:
    """What ran is the schedule, rank by rank, with the ends of the model beside their stages."""
    schedule = forwards(program.schedule) if program.forward_only else program.schedule
    ran = interpret(program)
    for rank, row in enumerate(schedule.ranks):
        expected = []
        for group in row:
            expected += [((Op.EMBED, 0, a.microbatch),) for a in group if a.kind is Kind.F and a.stage == 0]
            expected.append(tuple((Op(a.kind.value), a.stage, a.microbatch) for a in group))
            expected += [
                ((Op.HEAD, a.stage, a.microbatch),)
                for a in group
                if a.kind is Kind.F and a.stage == schedule.num_stages - 1
            ]
            expected += [
                ((Op.EMBED_GRAD, 0, a.microbatch),)
                for a in group
                if embed_grad and a.kind in (Kind.B, Kind.I) and a.stage == 0
            ]
        if program.shared_ends:  # they run between ticks, in an order that the slots have already proved right
            assert sorted(map(str, ran[rank])) == sorted(map(str, expected))
            expected = [work for work in expected if work[0][0] not in ENDS]
            ran[rank] = [work for work in ran[rank] if work[0][0] not in ENDS]
        assert ran[rank] == expected
    assert program.branch.dtype == program.operands.dtype == program.send.dtype == program.receive.dtype == np.int32
    assert program.ticks.dtype == np.int32 and program.communicate.dtype == np.bool_
    assert (np.diff(program.ticks) >= 0).all()
    talks = np.flatnonzero(program.communicate.any(axis=1))
    assert (program.ticks[talks] < program.ticks[talks + 1]).all()  # only after the last step of a tick
    assert not program.communicate[-1:].any()
    assert program.branches[0] == () and len(set(program.branches)) == len(program.branches)


@cases(("name", "ranks", "microbatches"), SIZES, quick=SMALL)
@pytest.mark.parametrize("embed_grad", [True, False])
def test_every_operation_finds_what_it_needs(name: str, ranks: int, microbatches: int, embed_grad: bool) -> None:
    schedule = build(name, ranks, microbatches)
    program = lower(schedule, embed_grad=embed_grad)
    assert_right(program, embed_grad)
    assert program.num_weight_stash_slots == max(simulate(schedule, Costs()).peak_live)
    assert program.makespan >= simulate(schedule, Costs()).makespan - 1e-6


@cases(("name", "ranks", "microbatches"), SIZES, quick=SMALL)
def test_forward_only_keeps_no_residuals(name: str, ranks: int, microbatches: int) -> None:
    program = lower(build(name, ranks, microbatches), forward_only=True)
    assert_right(program, embed_grad=False)
    assert (program.num_stash_slots, program.num_weight_stash_slots, program.num_cross_slots) == (0, 0, 0)


@cases(("name", "ranks", "microbatches"), SIZES, quick=SMALL)
def test_shared_ends_run_on_all_ranks_at_once(name: str, ranks: int, microbatches: int) -> None:
    """They need no more stash, next to no more time for the stages, and one branch each."""
    schedule = build(name, ranks, microbatches)
    program, lone = lower(schedule, shared_ends=True), lower(schedule)
    assert_right(program, embed_grad=True)
    assert_right(lower(schedule, shared_ends=True, embed_grad=False), embed_grad=False)
    assert_right(lower(schedule, shared_ends=True, forward_only=True), embed_grad=False)
    assert program.num_weight_stash_slots == lone.num_weight_stash_slots
    waits = 2 if name == "1f1b" else 0  # its last rank would run forward and backward in one tick, twice
    assert program.makespan <= 1.02 * lone.makespan + waits
    assert [[op for op, _ in branch] for branch in program.branches if branch and branch[0][0] in ENDS] == [
        [op] for op in ENDS
    ]
    naive = pack_naive(schedule, Costs(), shared_ends=True)
    assert_right(lower(schedule, packing=naive, shared_ends=True), embed_grad=True)


@settings(max_examples=30, deadline=None)
@given(size=st.sampled_from([s for s in SIZES if s[1] <= 4]), costs=st.tuples(*[st.floats(0.0, 4.0) for _ in range(5)]))
def test_any_costs_lower_rightly(size: tuple[str, int, int], costs: tuple[float, ...]) -> None:
    assert_right(lower(build(*size), Costs(*costs)), embed_grad=True)


def random_schedule(rng: random.Random) -> Schedule:
    """Stages on any ranks, and any order that can run: ready work is drawn until none is left."""
    ranks, directions = rng.randint(1, 4), rng.randint(1, 2)
    stages, microbatches = ranks * rng.randint(1, 3), directions * rng.randint(1, 4)
    routes = tuple(tuple(rng.sample([s % ranks for s in range(stages)], stages)) for _ in range(directions))
    empty = Schedule("random", stages, microbatches, ((),) * ranks, routes)
    ready = [Action(0, Kind.F, m) for m in range(microbatches)]
    rows: list[list[Group]] = [[] for _ in range(ranks)]
    while ready:
        action = rng.choice(ready)
        rank = empty.rank_of(action.stage, action.microbatch)
        backwards = [a for a in ready if a.kind is Kind.B and empty.rank_of(a.stage, a.microbatch) == rank]
        paired = action.kind is Kind.F and backwards and rng.random() < 0.7
        group = (action, rng.choice(backwards)) if paired else (action,)
        rows[rank].append(group)
        for stage, kind, m in group:
            ready.remove(Action(stage, kind, m))
            backward = rng.choice([Kind.B, Kind.I])
            if kind is Kind.F:
                ready.append(Action(stage + 1, Kind.F, m) if stage < stages - 1 else Action(stage, backward, m))
            elif kind is not Kind.W and stage > 0:
                ready.append(Action(stage - 1, backward, m))
            if kind is Kind.I:
                ready.append(Action(stage, Kind.W, m))
    return dataclasses.replace(empty, ranks=tuple(map(tuple, rows)))


@cases("seed", range(100), quick=range(30))
def test_any_schedule_that_can_run_lowers_rightly(seed: int) -> None:
    rng = random.Random(seed)
    schedule = random_schedule(rng)
    costs = Costs(rng.uniform(0.5, 2), rng.uniform(0.5, 2), rng.uniform(0.5, 2))
    program = lower(schedule, costs)
    assert_right(program, embed_grad=True)
    assert program.num_weight_stash_slots == max(simulate(schedule, costs).peak_live)
    assert_right(lower(schedule, costs, embed_grad=False), embed_grad=False)
    assert_right(lower(schedule, costs, forward_only=True), embed_grad=False)
    assert_right(lower(schedule, costs, shared_ends=True), embed_grad=True)
    assert_right(lower(schedule, costs, shared_ends=True, forward_only=True), embed_grad=False)


@pytest.mark.parametrize("name", ["1f1b", "dualpipe", "dualpipev"])
def test_one_group_a_tick_lowers_rightly(name: str) -> None:
    schedule = build(name, 4, 8)
    assert_right(lower(schedule, packing=pack_naive(schedule, Costs())), embed_grad=True)


@pytest.mark.parametrize(("name", "ranks", "microbatches"), [("dualpipe", 8, 20), ("dualpipev", 8, 20)])
def test_dualpipe_needs_few_buffers_and_messages(name: str, ranks: int, microbatches: int) -> None:
    program = lower(build(name, ranks, microbatches))
    assert program.num_stash_slots == (ranks + 1 if name == "dualpipe" else 2 * ranks + 1)
    assert program.num_message_slots <= 4
    assert len(program.channels) == 4  # two messages each way between neighbours
    assert program.communicate.any(axis=1).sum() < program.ticks[-1] + 1  # one exchange a tick at most
    assert program.communicate.sum() < 2 * (program.ticks[-1] + 1)  # of two permutes on average


def test_a_packing_of_another_schedule_is_an_error() -> None:
    schedule = build("1f1b", 4, 8)
    with pytest.raises(ValueError, match="pack the same schedule"):
        lower(schedule, packing=pack_naive(build("1f1b", 4, 6), Costs()))
    naive = pack_naive(schedule, Costs())
    too_early = type(naive)((naive.progress[-1],), naive.makespan)
    with pytest.raises(ValueError, match="only between ticks"):
        lower(schedule, packing=too_early)
    one_rank = build("1f1b", 1, 2)
    together = pack_naive(one_rank, Costs())
    together = type(together)((together.progress[-1],), together.makespan)
    assert_right(lower(one_rank, packing=together), embed_grad=True)
    with pytest.raises(ValueError, match="shared ends"):
        lower(one_rank, packing=together, shared_ends=True)
