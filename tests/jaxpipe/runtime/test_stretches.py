"""The code that several ranks share does exactly what the program says, with few loops whose conditions a host reads."""

import jax
import numpy as np
import pytest

import jaxpipe
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

from . import models

MANY = {"dualpipe", "dualpipev", "zbv"}
GRIDS = [
    (name, ranks, microbatches)
    for name in BUILDERS
    for ranks in (2, 4, 8)
    for microbatches in (8, 16, 200)
    if microbatches >= (2 * ranks if name in MANY else ranks)
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


@pytest.mark.parametrize(("name", "ranks", "microbatches"), GRIDS)
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


@pytest.mark.parametrize(("name", "ranks", "microbatches"), GRIDS)
def test_the_tables_hold_the_programs_operands(name, ranks, microbatches):
    program = lower(build(name, ranks, microbatches))
    stretches = make_stretches(program)
    found = iter(pieces(stretches))

    def check(nodes, table):
        for node in nodes:
            if hasattr(node, "nodes"):
                check(node.nodes, table)
                continue
            steps = next(found).steps
            rounds, ranks = np.nonzero(steps >= 0)
            for i, operation in enumerate(node.operands):
                for field, entry in enumerate(operation):
                    held = entry if isinstance(entry, int) else table[rounds, ranks, entry.index]
                    assert (held == program.operands[steps[rounds, ranks], ranks, i, field]).all()

    for body in make_bodies(program, stretches):
        for nodes, _ in body.ticks:
            check(nodes, body.table)
    assert not list(found)


@pytest.mark.parametrize(("name", "ranks", "microbatches"), GRIDS)
def test_code_is_bounded(name, ranks, microbatches):
    for program in programs(name, ranks, microbatches):
        once = size_of_code(program, range(len(program.branches)))
        assert size_of_code(program, [piece.branch for piece in pieces(make_stretches(program))]) <= MOST_CODE * once


@pytest.mark.parametrize("name", BUILDERS)
def test_code_does_not_grow_with_the_microbatches(name):
    counts = [len(pieces(make_stretches(lower(build(name, 4, count))))) for count in (96, 480)]
    assert counts[0] == counts[1]
