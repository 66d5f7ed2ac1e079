"""Code of its own for each rank: the same steps on slots by name, the same results, and nothing copied into slots."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.runtime import buffers, execute
from jaxpipe.runtime.buffers import allocate_named
from jaxpipe.runtime.by_rank import MOST_CODE, begun_chunks, divide_by_rank, is_short_by_rank
from jaxpipe.runtime.lower import lower
from jaxpipe.runtime.program import Field, Op
from jaxpipe.runtime.rounds import make_bodies
from jaxpipe.runtime.stretches import Piece, host_reads, make_stretches, pieces, size_of_code
from jaxpipe.schedule import BUILDERS, build
from tests.cases import cases
from tests.jaxpipe.runtime import models
from tests.jaxpipe.runtime.test_execute import compare
from tests.plain import assert_trees_close, plain_value_and_grad

GRIDS = [
    *itertools.product(["gpipe", "1f1b", "zb1p"], [2, 3], [3, 8, 24]),
    *itertools.product(["zbv", "dualpipev"], [2, 4], [8, 17, 32]),
    *itertools.product(["interleaved", "dualpipe"], [2, 4], [8, 20]),
]
STASH, WEIGHT_STASH, CROSS = Field.STASH, Field.WEIGHT_STASH, Field.CROSS
WRITES = {Op.F: (STASH, WEIGHT_STASH), Op.I: (CROSS,)}
READS = {Op.B: (STASH, WEIGHT_STASH), Op.I: (STASH, WEIGHT_STASH), Op.W: (WEIGHT_STASH, CROSS)}
TOKENS = dict(stage=models.token_stage, embed=models.token_embed, head=models.token_head)


def boundary(op, stage, microbatch, *, writes):
    """What an operation reads or writes as a message: (stage whose input it is, cotangent or not, microbatch)."""
    table = {
        Op.F: ((stage, False), (stage + 1, False)),
        Op.B: ((stage + 1, True), (stage, True)),
        Op.I: ((stage + 1, True), (stage, True)),
        Op.EMBED: (None, (0, False)),
        Op.HEAD: ((stage + 1, False), (stage + 1, True)),
        Op.EMBED_GRAD: ((0, True), None),
    }
    found = table.get(op, (None, None))[writes]
    return found and (*found, microbatch)


def flat(nodes):
    for node in nodes:
        yield from [node] if isinstance(node, Piece) else flat(node.nodes)


@pytest.mark.parametrize(("name", "ranks", "microbatches"), GRIDS)
def test_every_slot_holds_what_is_read(name, ranks, microbatches):
    """Played rank by rank: the program's steps in their order, each reading what was written for it, by constants."""
    original = lower(build(name, ranks, microbatches))
    program, stretches, size = divide_by_rank(original)
    assert size == size_of_code(program, [piece.branch for piece in pieces(stretches)])
    for pool in ("num_stash_slots", "num_weight_stash_slots", "num_cross_slots"):
        assert getattr(original, pool) <= getattr(program, pool) <= getattr(original, pool) + 1
    held = [{} for _ in range(ranks)]
    done = [[] for _ in range(ranks)]
    for stretch, body in zip(stretches, make_bodies(program, stretches), strict=True):
        for number in range(stretch.times):
            for tick, (nodes, exchanges) in zip(stretch.ticks, body.ticks, strict=True):
                codes = [code for node in nodes for code in node.nodes]
                for piece, code in zip(flat(tick.nodes), codes, strict=True):
                    (rank,) = np.flatnonzero(piece.steps[number] >= 0)
                    step = piece.steps[number, rank]
                    assert program.branch[step, rank] == piece.branch
                    done[rank].append(int(step))
                    play(program, program.branches[piece.branch], original.operands[step, rank], code, held[rank])
                for code in exchanges:
                    step = tick.exchanges[0].steps[number]
                    sent = [[held[r].get(("message", leaves)) for _, leaves, _ in code.messages] for r in range(ranks)]
                    for at, (channel, leaves, written) in enumerate(code.messages):
                        assert isinstance(leaves, int) and isinstance(written, int)
                        for source, target in program.channels[channel]:
                            held[target]["message", written] = sent[source][at]
                        for rank in set(range(ranks)) - {target for _, target in program.channels[channel]}:
                            held[rank]["message", written] = None  # a permute gives it zeros
                    done = [[*each, ("moved", int(step))] for each in done]
    for rank, each in enumerate(done):
        expected = []
        for step in range(original.num_steps):
            expected += [step] * bool(original.branch[step, rank])
            expected += [("moved", step)] * bool(original.communicate[step].any())
        assert each == expected


def play(program, branch, rows, code, held):
    """One piece on one rank: both operations read, then both write."""
    slots = [dict(zip(Field, entries, strict=True)) for entries in code.operands]
    written = {}
    for (op, part), row, mine in zip(branch, rows, slots, strict=False):
        stage, microbatch = int(row[Field.STAGE]), int(row[Field.MICROBATCH])
        assert all(isinstance(mine[field], int) for field in list(Field)[Field.SOURCE :])
        for field in READS.get(op, ()):
            assert held[field, mine[field]] == (part, stage, microbatch)
        for field in WRITES.get(op, ()):
            written[field, mine[field]] = (part, stage, microbatch)
        if read := boundary(op, stage, microbatch, writes=False):
            assert held["message", mine[Field.SOURCE]] == read
        if made := boundary(op, stage, microbatch, writes=True):
            written["message", mine[Field.TARGET]] = made
    held |= written


@pytest.mark.parametrize("name", BUILDERS)
def test_code_of_two_ranks_does_not_grow_with_the_microbatches(name):
    if name == "gpipe":  # every microbatch has a slot of its own
        return
    sizes = [divide_by_rank(lower(build(name, 2, count))).size for count in (96, 192)]
    assert sizes[0] == sizes[1] <= MOST_CODE


@pytest.mark.parametrize("microbatches", [8, 64])
@pytest.mark.parametrize("name", ["1f1b", "zb1p", "zbv", "dualpipev"])
def test_fewer_reads_than_stretches(name, microbatches):
    program = lower(build(name, 2, microbatches))
    mine, others = (host_reads(s).max() for s in (divide_by_rank(program).stretches, make_stretches(program)))
    assert mine < 0.75 * others


@cases(
    "name, ranks, microbatches",
    [("1f1b", 2, 9), ("zb1p", 2, 8), ("zbv", 2, 16), ("interleaved", 2, 16), ("dualpipev", 2, 4), ("dualpipev", 2, 16),
     ("dualpipev", 3, 6), ("dualpipe", 2, 6), ("gpipe", 2, 3), ("1f1b", 4, 16), ("1f1b", 1, 4)],
    quick=[("1f1b", 2, 9), ("dualpipev", 2, 4)],
)  # fmt: skip
def test_equals_the_plain_program(x64, name, ranks, microbatches):
    """Tied embedding, dropout, auxiliary losses, metrics, masks and integer activations, with and without rounds."""
    check_plain(name, ranks, microbatches)


def check_plain(name, ranks, microbatches):
    schedule = build(name, ranks, microbatches)
    batch, params = models.token_batch(2 * microbatches), models.token_params(schedule)
    compare(schedule, params, batch, jax.random.key(3), weight=models.token_weight, dispatch="by_rank", **TOKENS)


def garbage(aval):
    """What may be in memory."""
    most = (
        True
        if aval.dtype == bool
        else jnp.iinfo(aval.dtype).max
        if jnp.issubdtype(aval.dtype, jnp.integer)
        else jnp.nan
    )
    return jnp.full(aval.shape, most, aval.dtype)


@cases(
    "name, ranks, microbatches",
    [("1f1b", 2, 9), ("zb1p", 2, 8), ("zbv", 2, 16), ("interleaved", 2, 16), ("dualpipev", 2, 4), ("dualpipev", 2, 16),
     ("dualpipev", 3, 6), ("dualpipe", 2, 6), ("dualpipe", 2, 12), ("gpipe", 2, 3), ("1f1b", 2, 1)],
    quick=[("dualpipe", 2, 12), ("dualpipev", 2, 4)],  # with rounds, and without
)  # fmt: skip
def test_what_was_in_memory_before_is_never_read(x64, monkeypatch, name, ranks, microbatches):
    """On GPUs slots and sums begin as what is there. The first gradient is the sum, also that of an example masked."""
    for module in (buffers, execute):
        monkeypatch.setattr(module, "uninitialised_array", garbage)
    monkeypatch.setattr(jaxpipe.api, "_on_cpu", lambda mesh: False)
    assert name in ("1f1b", "zb1p") or begun_chunks(lower(build(name, ranks, microbatches)))  # or less is shown
    check_plain(name, ranks, microbatches)


@pytest.mark.slow
def test_what_was_in_memory_is_not_read_of_another_kind(x64, monkeypatch):
    """Sums of a chunk that only the other rank's kind of stage adds to; shards of parameters, sums of shards."""
    for module in (buffers, execute):
        monkeypatch.setattr(module, "uninitialised_array", garbage)
    monkeypatch.setattr(jaxpipe.api, "_on_cpu", lambda mesh: False)

    def first(params, x, ctx):
        return jaxpipe.Output(x + jnp.tanh(x @ params["a"]) @ params["b"], (x**2).mean())

    def second(params, x, ctx):
        return jaxpipe.Output(x + jnp.sin(x @ params["c"]), (x**4).mean())

    schedule, rng = build("zbv", 2, 4), np.random.default_rng(0)
    shapes = {"a": (4, 6), "b": (6, 4), "c": (4, 4)}
    stages = {name: jnp.asarray(rng.normal(size=(4, *shape)) / 2) for name, shape in shapes.items()}
    params, batch = jaxpipe.Params(stages), jnp.asarray(rng.normal(size=(16, 4)))
    functions = dict(stage=jaxpipe.StageKinds([first, second], [0, 1, 0, 1]), head=lambda o, y, d, c: (y**2).mean())
    mesh, options = jaxpipe.make_mesh(pp=2, dp=2), dict(data_axes=("dp",), fsdp_axis="dp", min_shard_size=8)
    step = jaxpipe.value_and_grad(schedule=schedule, mesh=mesh, dispatch="by_rank", **functions, **options)
    assert begun_chunks(step.program)  # or this shows nothing
    (loss, _), grads = jax.jit(step)(jax.device_put(params, step.shardings(params)), batch)
    stage, head = functions.values()
    (expected, _), expected_grads = plain_value_and_grad(stage, schedule, head=head)(params, batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert_trees_close(grads, expected_grads, rtol=1e-10)


def test_forward_only(x64):
    schedule, mesh = build("dualpipev", 2, 4), jaxpipe.make_mesh(pp=2)
    params, batch = models.deepseek_params(schedule, 8, 16), models.deepseek_batch(schedule, 8, sequence=4)
    functions = dict(stage=models.deepseek_stage, embed=models.deepseek_embed)
    given, expected = (
        jax.jit(jaxpipe.forward(schedule=schedule, mesh=mesh, dispatch=dispatch, **functions))(params, batch)
        for dispatch in ("by_rank", "loops")
    )
    np.testing.assert_allclose(given[0], expected[0], rtol=1e-12)


def lowered(name, dispatch, microbatches, width=8):
    """A step on two ranks: stages of one product, microbatches of one example."""
    schedule = build(name, 2, microbatches)
    step = jaxpipe.value_and_grad(
        lambda params, x, ctx: jnp.tanh(x @ params), schedule, jaxpipe.make_mesh(pp=2), head=lambda o, y, d, c: y.sum(),
        dispatch=dispatch,
    )  # fmt: skip
    params = jaxpipe.Params(jnp.ones((schedule.num_stages, width, width)))
    return jax.jit(step).lower(params, jnp.ones((microbatches, width)))


def test_empty_slots_are_numbers():
    """Or a search for NaNs (`jax.debug_nans`) would end where nothing is wrong; MXFP8's scales have no zero."""
    dtypes = ("bool", "int4", "float4_e2m1fn", "float8_e4m3fn", "float8_e8m0fnu", "bfloat16", "complex64")
    pool = allocate_named([jax.ShapeDtypeStruct((2,), dtype) for dtype in dtypes], 8, itertools.count())
    assert [len(arrays) for arrays in pool.slots] == 8 * [len(dtypes)]
    for leaf, dtype in zip(itertools.chain(*pool.slots), itertools.cycle(dtypes)):
        assert leaf.shape == (2,) and leaf.dtype == dtype
        assert np.isfinite(np.asarray(leaf).astype(np.complex64)).all()

    def uninitialised():
        made = jax.jit(lambda: allocate_named([jax.ShapeDtypeStruct((2,), "float32")], 3, None).slots)
        return made.trace().lower(lowering_platforms=("cuda",)).as_text().count("AllocateBuffer")

    assert uninitialised() == 3
    for search in (jax.debug_nans, jax.debug_infs):
        with search(True):
            assert uninitialised() == 0
            (found,) = allocate_named([jax.ShapeDtypeStruct((2,), "float32")], 1, None).slots[0]
        assert (np.asarray(found) == 0).all()


@pytest.mark.parametrize("name", ["1f1b", "zbv", "dualpipev"])
def test_nothing_is_copied_into_slots(name):
    text = lowered(name, "by_rank", 16).as_text()
    assert "while" in text and "collective_permute" in text and "dynamic_update_slice" not in text


def test_no_more_memory_than_stretches():
    """But for slots of messages, of which code by rank has more; here and in residuals a slot is a row."""
    width, plain = 256, lower(build("zb1p", 2, 8))
    named = divide_by_rank(plain).program
    residuals = named.num_stash_slots, named.num_weight_stash_slots, named.num_cross_slots
    assert residuals == (plain.num_stash_slots, plain.num_weight_stash_slots, plain.num_cross_slots)
    messages = named.num_message_slots - (plain.num_message_slots + 1)  # one nobody reads
    sizes = [
        lowered("zb1p", dispatch, 8, width).compile().memory_analysis().temp_size_in_bytes
        for dispatch in ("by_rank", "stretches")
    ]
    assert sizes[0] <= sizes[1] + messages * width * 4


def test_a_plan_and_a_budget_count_the_slots_of_the_code():
    """One more than stretches have."""
    schedule, mesh = build("dualpipev", 2, 16), jax.sharding.AbstractMesh(
        (2,), ("pp",), axis_types=(jax.sharding.AxisType.Auto,)
    )  # fmt: skip
    shapes = jaxpipe.Params(jax.ShapeDtypeStruct((4, 64, 64), "float32")), jax.ShapeDtypeStruct((512, 64), "float32")

    def step(dispatch, stash=None):
        return jaxpipe.value_and_grad(
            lambda w, x, ctx: jnp.tanh(jnp.tanh(x @ w) @ w), schedule, mesh, head=lambda o, y, d, c: (y**2).mean(),
            dispatch=dispatch, stash=stash,
        )  # fmt: skip

    memories = [jaxpipe.plan(step(dispatch), *shapes, "H100").memory for dispatch in ("by_rank", "stretches")]
    program = step("by_rank").program
    slots = [each.num_weight_stash_slots for each in (divide_by_rank(program).program, program)]
    assert slots == [6, 5]  # or this shows nothing
    of_microbatch = 32 * 64 * 4
    assert memories[0].stash - memories[1].stash >= of_microbatch
    assert (memories[0].in_flight - memories[1].in_flight) % of_microbatch == 0
    limit = memories[0].total - 1
    fitted = jaxpipe.fit_stash(step("by_rank"), *shapes, "H100", memory=limit)
    assert fitted.plan.memory.total <= limit and fitted.plan.memory.stash <= 6 * fitted.stash


def test_default_where_there_is_little_code():
    mesh = jax.sharding.AbstractMesh((2,), ("pp",), axis_types=(jax.sharding.AxisType.Auto,))

    def made(name, **given):
        head = lambda outer, y, data, ctx: y.sum()  # noqa: E731
        return jaxpipe.value_and_grad(lambda w, x, ctx: x @ w, build(name, 2, 16), mesh, head=head, **given)

    assert made("dualpipev").dispatch == made("zbv").dispatch == made("1f1b").dispatch == "by_rank"
    assert made("dualpipe").dispatch == "unrolled" and made("gpipe").dispatch == "stretches"
    assert made("dualpipev", shared_ends=True).dispatch == "stretches"
    assert not is_short_by_rank(lower(build("dualpipev", 4, 16)))
    with pytest.raises(ValueError, match="by_rank' gives each rank code of its own, and with shared_ends all run"):
        made("dualpipev", shared_ends=True, dispatch="by_rank")
    with pytest.raises(ValueError, match=r"with shared_ends do not: choose of \('switch', "):
        made("dualpipev", shared_ends=True, dispatch="unrolled")
