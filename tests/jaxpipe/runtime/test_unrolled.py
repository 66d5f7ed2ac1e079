"""Programs whose ranks keep step as unrolled code: the same steps, the same results, and no copies into slots."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.runtime.lower import lower
from jaxpipe.runtime.program import Field
from jaxpipe.runtime.unrolled import find_repeat, is_short, keeps_step
from tests.cases import cases
from tests.jaxpipe.runtime import models
from tests.jaxpipe.runtime.test_execute import compare
from tests.plain import assert_trees_close

NAMES = ("gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipev")
TOKENS = dict(stage=models.token_stage, embed=models.token_embed, head=models.token_head)


@pytest.mark.parametrize("microbatches", [2, 3, 9, 24])
@pytest.mark.parametrize("name", NAMES)
def test_repeated_steps_are_the_programs_steps(name, microbatches):
    """Round for round, the repeated steps run the same branch on the same slots."""
    program = lower(jaxpipe.schedule.build(name, 1, microbatches))
    repeat = find_repeat(program)
    stop = repeat.start + repeat.period * repeat.times
    assert stop <= program.num_steps
    fixed = np.delete(program.operands[:, 0], Field.MICROBATCH, axis=-1)
    for table in (program.branch[:, 0], fixed):
        rounds = table[repeat.start : stop].reshape(repeat.times, repeat.period, *table.shape[1:])
        assert (rounds == rounds[0]).all()
    assert repeat.code(program.num_steps) == [
        step for step in range(program.num_steps) if step < repeat.start + repeat.period or step >= stop
    ]


@pytest.mark.parametrize("microbatches", [4, 8, 32])
def test_both_ranks_of_dualpipe_keep_step(microbatches):
    """All that unrolled code makes constants is the same on both, round for round of what repeats."""
    program = lower(jaxpipe.schedule.build("dualpipe", 2, microbatches))
    slots = program.operands[..., Field.SOURCE :]
    assert keeps_step(program)
    for table in (program.branch, slots, program.send, program.receive):
        np.testing.assert_array_equal(table[:, 0], table[:, 1])
    repeat = find_repeat(program)
    stop = repeat.start + repeat.period * repeat.times
    for table in (program.branch, slots, program.send, program.receive, program.communicate):
        rounds = table[repeat.start : stop].reshape(repeat.times, repeat.period, *table.shape[1:])
        assert (rounds == rounds[0]).all()
    assert (repeat.times > 1) == (microbatches == 32)


@pytest.mark.parametrize("name, ranks", [("1f1b", 2), ("dualpipev", 2), ("dualpipe", 4)])
def test_other_ranks_do_not_keep_step(name, ranks):
    program = lower(jaxpipe.schedule.build(name, ranks, 8))
    assert (program.branch != program.branch[:, :1]).any() and not keeps_step(program)


@pytest.mark.parametrize("name, microbatches, times", [("1f1b", 64, 64), ("zb1p", 8, 8), ("dualpipev", 64, 31)])
def test_code_does_not_grow_with_the_microbatches(name, microbatches, times):
    """1F1B repeats every microbatch, DualPipeV every two: its first stage's two slots take turns."""
    repeat, longer = (find_repeat(lower(jaxpipe.schedule.build(name, 1, count))) for count in (microbatches, 128))
    assert repeat.times == times
    assert (repeat.start, repeat.period) == (longer.start, longer.period)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_repetition_leaves_less_code(seed):
    """Against every start and period, on tables of random steps that partly repeat."""
    rng = np.random.default_rng(seed)
    program = lower(jaxpipe.schedule.build("1f1b", 1, 8))
    steps = [*rng.integers(1, 9, 6), *np.tile(rng.integers(1, 5, rng.integers(1, 6)), 4), *rng.integers(1, 9, 9)]
    operands = np.zeros((len(steps), 1, 2, len(Field)), np.int32)
    operands[:, 0, 0, Field.STASH] = steps
    operands[:, 0, 0, Field.MICROBATCH] = rng.integers(0, 9, len(steps))
    program = dataclasses.replace(program, branch=np.zeros((len(steps), 1), np.int32), operands=operands)
    saved = 0
    for period in range(1, len(steps) // 2 + 1):
        for start in range(len(steps) - period):
            pairs = zip(steps[start:], steps[start + period :], strict=False)
            same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
            saved = max(saved, same // period * period)
    repeat = find_repeat(program)
    assert (repeat.times - 1) * repeat.period == saved
    stop = repeat.start + repeat.period * repeat.times
    rounds = np.reshape(steps[repeat.start : stop], (repeat.times, repeat.period))
    assert (rounds == rounds[0]).all()
    assert find_repeat(program, longest=2).period in (1, 2, len(steps))


def test_only_short_code_of_ranks_that_keep_step_is_unrolled():
    def made(name, ranks, microbatches, **options):
        schedule = jaxpipe.schedule.build(name, ranks, microbatches)
        return jaxpipe.value_and_grad(mesh=jaxpipe.make_mesh(pp=ranks), schedule=schedule, **TOKENS, **options)

    assert made("dualpipev", 1, 64).dispatch == "unrolled"
    assert made("gpipe", 1, 4).dispatch == "unrolled"
    assert made("gpipe", 1, 64).dispatch != "unrolled"  # every microbatch has a slot of its own
    assert made("dualpipev", 2, 8).dispatch != "unrolled"
    assert not is_short(lower(jaxpipe.schedule.build("dualpipev", 2, 8)))
    assert is_short(lower(jaxpipe.schedule.build("dualpipe", 2, 64)))
    with pytest.raises(ValueError, match="dispatch='unrolled' is for one rank, or ranks that all run the same at once"):
        made("dualpipev", 2, 8, dispatch="unrolled")
    with pytest.raises(ValueError, match="with shared_ends do not: choose of"):
        made("dualpipe", 2, 8, dispatch="unrolled", shared_ends=True)


@cases(
    "name, microbatches",
    [("gpipe", 9), ("interleaved", 9), ("zb1p", 4), ("zbv", 7), ("dualpipev", 5), ("dualpipev", 11)],
    quick=[("zb1p", 4), ("dualpipev", 5)],
)
def test_equals_the_plain_program(x64, name, microbatches):
    """Tied embedding, dropout, auxiliary losses, metrics, masks and integer activations, with and without rounds."""
    schedule = jaxpipe.schedule.build(name, 1, microbatches)
    batch = models.token_batch(2 * microbatches)
    params = models.token_params(schedule)
    compare(schedule, params, batch, jax.random.key(3), weight=models.token_weight, dispatch="unrolled", **TOKENS)


@cases("microbatches, order", [(4, "model"), (6, "storage"), (20, "storage")], quick=[(20, "storage")])
def test_two_mirrored_ranks_equal_the_plain_program(x64, microbatches, order):
    schedule = jaxpipe.schedule.build("dualpipe", 2, microbatches)
    batch, params = models.token_batch(2 * microbatches), models.token_params(schedule)
    compare(schedule, params, batch, jax.random.key(3), weight=models.token_weight,
            order=order, dispatch="unrolled", **TOKENS)  # fmt: skip


def jaxpr_of_mirrored_ranks(microbatches):
    """A step of DualPipe on two ranks: stages of one product, microbatches of one example."""
    schedule = jaxpipe.schedule.build("dualpipe", 2, microbatches)
    step = jaxpipe.value_and_grad(
        lambda params, x, ctx: jnp.tanh(x @ params), schedule, jaxpipe.make_mesh(pp=2), head=lambda o, y, d, c: y.sum(),
        dispatch="unrolled",
    )  # fmt: skip
    return jax.make_jaxpr(step)(jaxpipe.Params(jnp.ones((2, 8, 8))), jnp.ones((microbatches, 8)))


def test_a_mirrored_stage_sends_its_gradients_while_others_are_computed():
    """The permutes of the chunk that is done first, pairs of one, are before the last products; the other's after."""
    (mapped,) = (eqn for eqn in jaxpr_of_mirrored_ranks(4).eqns if eqn.primitive.name == "shard_map")
    order = [
        eqn.primitive.name if eqn.primitive.name == "dot_general" else eqn.params["perm"]
        for eqn in mapped.params["jaxpr"].eqns
        if eqn.primitive.name == "dot_general"
        or (eqn.primitive.name == "ppermute" and eqn.outvars[0].aval.shape == (8, 8))
    ]
    fetch, early, late = ([place for place, what in enumerate(order) if what == perm]
                          for perm in (((0, 1), (1, 0)), ((0, 1),), ((1, 0),)))  # fmt: skip
    assert order.index("dot_general") > fetch[0] and len(fetch) == len(early) == len(late) == 1
    assert "dot_general" in order[early[0] : late[0]] and "dot_general" not in order[late[0] :]


@pytest.mark.parametrize("name, microbatches", [("interleaved", 7), ("dualpipev", 4)])
def test_forward_only(x64, name, microbatches):
    schedule, mesh = jaxpipe.schedule.build(name, 1, microbatches), jaxpipe.make_mesh(pp=1)
    params, batch = models.deepseek_params(schedule, 8, 16), models.deepseek_batch(schedule, 8, sequence=4)
    functions = dict(stage=models.deepseek_stage, embed=models.deepseek_embed)
    results = [
        jax.jit(jaxpipe.forward(schedule=schedule, mesh=mesh, dispatch=dispatch, **functions))(params, batch)
        for dispatch in ("unrolled", "loops")
    ]
    assert_trees_close(*results, rtol=1e-12)


def test_ends_that_all_ranks_share(x64):
    schedule = jaxpipe.schedule.build("dualpipev", 1, 6)
    compare(schedule, models.token_params(schedule), models.token_batch(12), jax.random.key(3), shared_ends=True,
            dispatch="unrolled", **TOKENS)  # fmt: skip


def test_without_embed_and_head(x64):
    """The input cotangent of the first stage is written and never read; the objective is the stages' own."""
    schedule = jaxpipe.schedule.build("dualpipev", 1, 9)
    weights = jax.random.normal(jax.random.key(0), (2, 8, 8)) / 3

    def stage(params, x, ctx):
        y = jnp.tanh(x @ params)
        return jaxpipe.Output(y, aux_loss=jnp.mean(y**2))

    batch = jax.random.normal(jax.random.key(1), (18, 8))
    compare(schedule, jaxpipe.Params(weights), batch, stage=stage, dispatch="unrolled")


def test_messages_and_residuals_of_two_ranks_are_not_copied_into_slots():
    text = str(jaxpr_of_mirrored_ranks(20))
    assert "scan[" in text and "ppermute" in text and "dynamic_update_slice" not in text


def test_slots_are_neither_copied_nor_held_when_free():
    """In the loop nothing is written into a pool, and it carries what is alive between its rounds alone."""
    schedule = jaxpipe.schedule.build("dualpipev", 1, 8)
    step = jaxpipe.value_and_grad(
        lambda params, x, ctx: jnp.tanh(x @ params), schedule, jaxpipe.make_mesh(pp=1), head=lambda o, y, d, c: y.sum()
    )
    jaxpr = jax.make_jaxpr(step)(jaxpipe.Params(jnp.ones((2, 8, 8))), jnp.ones((16, 8)))
    (mapped,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "shard_map")
    (loop,) = (eqn for eqn in mapped.params["jaxpr"].eqns if eqn.primitive.name == "scan")
    assert "dynamic_update_slice" not in str(loop.params["jaxpr"])
    microbatch = (2, 8)
    carried = [var.aval.shape for var in loop.outvars]
    # Between rounds one microbatch is past both forwards and another is about to begin.
    stashed = sum(shape == microbatch for shape in carried)
    assert stashed <= 5 < step.program.num_stash_slots * 2 + step.program.num_message_slots


def test_less_memory_than_pools():
    schedule = jaxpipe.schedule.build("dualpipev", 1, 8)
    params = models.deepseek_params(schedule, 64, 256)
    batch = models.deepseek_batch(schedule, 64, sequence=64)
    sizes = [
        jax.jit(jaxpipe.value_and_grad(models.deepseek_stage, schedule, jaxpipe.make_mesh(pp=1),
                                       embed=models.deepseek_embed, head=models.deepseek_head, dispatch=dispatch))
        .lower(params, batch).compile().memory_analysis().temp_size_in_bytes
        for dispatch in ("unrolled", "loops")
    ]  # fmt: skip
    assert sizes[0] < sizes[1]
