"""The code that several ranks share does what the program says, with few loops whose conditions a host reads."""

import numpy as np
import pytest

from jaxpipe.runtime import stretches as stretches_module
from jaxpipe.runtime.lower import lower
from jaxpipe.runtime.rounds import make_bodies
from jaxpipe.runtime.stretches import (
    MOST_CODE,
    Piece,
    host_reads,
    loops,
    make_stretches,
    pieces,
    size_of_code,
)
from jaxpipe.schedule import BUILDERS, build
from tests.cases import cases

GRIDS = [
    *((name, 2, 8) for name in BUILDERS),
    *((name, 4, 40) for name in BUILDERS),
    ("dualpipe", 8, 16),
    ("zbv", 8, 16),
    ("1f1b", 8, 9),
    ("dualpipev", 1, 4),
]


def programs(name, ranks, microbatches):
    schedule = build(name, ranks, microbatches)
    yield lower(schedule)
    yield lower(schedule, shared_ends=True)
    yield lower(schedule, forward_only=True)


def replay(program, stretches):
    """What each rank does, in order: steps of the program, and (step, channels) where messages move."""
    done = [[] for _ in range(program.num_ranks)]

    def run(nodes, number, reached):
        for node in nodes:
            if isinstance(node, Piece):
                steps = node.steps[number]
                assert ((steps >= 0) == reached).all()
                for rank in np.flatnonzero(reached):
                    assert program.branch[steps[rank], rank] == node.branch
                    done[rank].append(int(steps[rank]))
                if program.together(program.branches[node.branch]):
                    assert len(set(steps.tolist())) == 1
            else:
                assert (node.chosen[number] <= reached).all()
                run(node.nodes, number, node.chosen[number])

    for stretch in stretches:
        for number in range(stretch.times):
            for tick in stretch.ticks:
                run(tick.nodes, number, np.ones(program.num_ranks, bool))
                for exchange in tick.exchanges:
                    if exchange.steps[number] >= 0:
                        for each in done:
                            each.append((int(exchange.steps[number]), exchange.channels))
    return done


@cases(("name", "ranks", "microbatches"), GRIDS, quick=[g for g in GRIDS if g[1] < 8 or g[0] == "1f1b"])
def test_every_rank_does_what_the_program_says(name, ranks, microbatches):
    for program in programs(name, ranks, microbatches):
        stretches = make_stretches(program)
        for rank, done in enumerate(replay(program, stretches)):
            steps = iter(done)
            for step in range(program.num_steps):
                if program.branch[step, rank]:
                    assert next(steps) == step
                if program.communicate[step].any():
                    at, channels = next(steps)
                    assert at == step and set(np.flatnonzero(program.communicate[step])) <= set(channels)
            assert not list(steps)
        check_tables(program, stretches)
        once = size_of_code(program, range(len(program.branches)))
        assert size_of_code(program, [piece.branch for piece in pieces(stretches)]) <= MOST_CODE * once


def check_tables(program, stretches):
    """Constants and tables hold the program's operands and message slots."""
    found = iter(pieces(stretches))

    def held(entry, table, rounds, ranks):
        return entry if isinstance(entry, int) else table[rounds, ranks, entry.index]

    def check(nodes, table):
        for node in nodes:
            if hasattr(node, "nodes"):
                check(node.nodes, table)
                continue
            steps = next(found).steps
            at = np.nonzero(steps >= 0)
            for i, operation in enumerate(node.operands):
                for field, entry in enumerate(operation):
                    assert (held(entry, table, *at) == program.operands[steps[at], at[1], i, field]).all()

    for stretch, body in zip(stretches, make_bodies(program, stretches), strict=True):
        for tick, (nodes, exchanges) in zip(stretch.ticks, body.ticks, strict=True):
            check(nodes, body.table)
            for given, code in zip(tick.exchanges, exchanges, strict=True):
                rounds, ranks = np.nonzero(np.broadcast_to(given.steps[:, None] >= 0, body.table.shape[:2]))
                for channel, leaves, written in code.messages:
                    for entry, slots in ((leaves, program.send), (written, program.receive)):
                        expected = slots[given.steps[rounds], ranks, channel]
                        assert (held(entry, body.table, rounds, ranks) == expected).all()
    assert not list(found)


@pytest.mark.parametrize("name", BUILDERS)
def test_code_does_not_grow_with_the_microbatches(name):
    counts = [len(pieces(make_stretches(lower(build(name, 4, count))))) for count in (96, 480)]
    assert counts[0] == counts[1]


# Reads a step of the program on average, of a rank; before there were stretches it was 7 to 21.
FEW = {
    ("1f1b", 2, 8): 1.6,
    ("zb1p", 2, 16): 1.8,
    ("zbv", 2, 16): 2.7,
    ("dualpipe", 2, 8): 0.0,
    ("dualpipe", 2, 64): 0.0,
    ("dualpipev", 2, 8): 2.1,
    ("1f1b", 4, 16): 4.2,
    ("zb1p", 4, 16): 4.2,
    ("zbv", 4, 64): 4.0,
    ("dualpipe", 4, 16): 3.5,
    ("dualpipev", 4, 64): 4.4,
    ("1f1b", 8, 16): 3.0,
    ("1f1b", 16, 16): 3.2,
}


@pytest.mark.parametrize(("name", "ranks", "microbatches"), FEW)
def test_few_conditions_are_read(name, ranks, microbatches):
    program = lower(build(name, ranks, microbatches))
    stretches = make_stretches(program)
    reads = host_reads(stretches)
    assert reads.mean() <= FEW[name, ranks, microbatches] * program.num_steps
    assert (reads == sum((loop.reached.astype(int) + loop.chosen).sum(0) for loop in loops(stretches))).all()


def test_rounds_across_a_repeated_part_divide_what_was_left_out_of_it(monkeypatch):
    """The search sees a long program shortened; a stretch of the long one has whole rounds, too."""
    rests, candidates = [], stretches_module._candidates

    def spy(table, short, first, stop):
        for shape in candidates(table, short, first, stop):
            if short.cut and first < short.middle < stop:
                rests.append(short.cut % shape.period)
            yield shape

    monkeypatch.setattr(stretches_module, "_candidates", spy)
    make_stretches.__wrapped__(lower(build("gpipe", 2, 64)))
    assert rests and not any(rests)
