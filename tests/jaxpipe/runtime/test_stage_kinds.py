"""Stages of several kinds: the plain program's numbers, a branch for each operation and kind, slots that are shared."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.runtime.buffers import allocate, allocate_named
from jaxpipe.runtime.program import Op
from jaxpipe.runtime.stage_kinds import SharedPool
from tests.plain import assert_trees_close

WIDTH, HIDDEN, BATCH, MICROBATCHES = 8, 24, 16, 8


def dense(params, x, ctx):
    """Wide: keeps more of a microbatch than the others."""
    y = jnp.tanh(x @ params["w"]) @ params["wide"]
    y = x + jax.nn.silu(y) @ params["narrow"]
    return jaxpipe.Output(y, (y**2).mean(), {"dense": jnp.int32(1), "noise": jnp.zeros(2, x.dtype)})


def gated(params, x, ctx):
    """Uses another matrix of the same row, and the context."""
    noise = jax.random.normal(ctx.rng, x.shape, x.dtype)
    y = x + jax.nn.sigmoid(x @ params["w"]) * (x @ params["v"]) * (ctx.stage + 1).astype(x.dtype) + 0.1 * noise
    return jaxpipe.Output(y, (y**4).mean(), {"dense": jnp.int32(0), "noise": jnp.stack([noise.sum(), noise[0, 0]])})


def plain(params, batch, rng, schedule, stage):
    def of_microbatch(m, data):
        contexts = [
            jaxpipe.Context.make(s, m, rng, data, num_stages=schedule.num_stages)
            for s in range(-1, schedule.num_stages)
        ]
        x, extra = data @ params.outer["in"], 0.0
        for s in range(schedule.num_stages):
            output = stage(jax.tree.map(lambda leaf, s=s: leaf[s], params.stages), x, contexts[s + 1])
            x, extra = output.value, extra + output.aux_loss
        return jnp.mean((x @ params.outer["in"].T) ** 2) + extra

    data = batch.reshape(MICROBATCHES, -1, WIDTH)
    return sum(of_microbatch(m, data[m]) for m in range(MICROBATCHES)) / MICROBATCHES


def make(schedule):
    rng = np.random.default_rng(0)
    sizes = {"w": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "wide": (WIDTH, HIDDEN), "narrow": (HIDDEN, WIDTH)}
    stages = {name: jnp.asarray(rng.normal(size=(schedule.num_stages, *size)) / 4) for name, size in sizes.items()}
    outer = {"in": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / 3)}
    return jaxpipe.Params(stages, outer), jnp.asarray(rng.normal(size=(BATCH, WIDTH)))


ENDS = {
    "embed": lambda outer, data, ctx: data @ outer["in"],
    "head": lambda outer, y, data, ctx: jnp.mean((y @ outer["in"].T) ** 2),
}
CASES = [
    ("zb1p", 2, [0, 1], None),
    ("dualpipev", 1, [1, 0], None),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            ("zb1p", 4, [0, 1, 1, 1], None),
            ("1f1b", 4, [0, 1, 1, 0], None),
            ("dualpipev", 2, [0, 1, 1, 1], "stretches"),
            ("dualpipe", 4, [0, 1, 1, 1], None),
            ("dualpipev", 4, [0, 0, 0, 1, 1, 1, 0, 1], None),
            ("dualpipev", 2, [0, 1, 1, 1], "switch"),
            ("zbv", 2, [0, 1, 1, 1], "by_rank"),
        ]
    ),
]


@pytest.mark.parametrize(("name", "ranks", "kind_of", "dispatch"), CASES)
def test_equals_the_plain_program(x64, name, ranks, kind_of, dispatch):
    schedule = jaxpipe.schedule.build(name, ranks, MICROBATCHES)
    params, batch = make(schedule)
    stage, key = jaxpipe.StageKinds([dense, gated], kind_of), jax.random.key(1)
    pipeline = jaxpipe.value_and_grad(stage, schedule, jaxpipe.make_mesh(pp=ranks), dispatch=dispatch, **ENDS)
    (loss, aux), grads = jax.jit(pipeline)(params, batch, key)
    expected, expected_grads = jax.jit(jax.value_and_grad(plain), static_argnums=(3, 4))(
        params, batch, key, schedule, stage
    )
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert int(aux["dense"]) == kind_of.count(0) * MICROBATCHES
    assert_trees_close(grads, expected_grads, rtol=1e-10)
    unused = [stage for stage, kind in enumerate(kind_of) if kind]
    assert not np.any(grads.stages["wide"][np.asarray(unused)])


def test_every_stage_runs_the_branch_of_its_kind():
    schedule = jaxpipe.schedule.build("zb1p", 4, MICROBATCHES)
    kind_of = [0, 1, 1, 1]
    stage = jaxpipe.StageKinds([dense, gated], kind_of)
    program = jaxpipe.value_and_grad(stage, schedule, jaxpipe.make_mesh(pp=4), **ENDS).program
    assert program.parts == ((0, 0), (0, 1))
    for rank in range(4):
        ran = [program.branches[i] for i in program.branch[:, rank]]
        kinds = {program.parts[part][1] for branch in ran for op, part in branch if op in (Op.F, Op.B, Op.I, Op.W)}
        assert kinds == {kind_of[rank]}


def test_a_stage_holds_no_conditional_and_slots_are_as_large_as_the_largest_kind():
    """The dense kind keeps more than the gated one; both together keep no more than it."""
    schedule = jaxpipe.schedule.build("zb1p", 4, MICROBATCHES)
    mesh = jaxpipe.make_mesh(pp=4)
    params, batch = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), make(schedule))
    batch = jax.tree.map(lambda leaf: jnp.repeat(leaf, 16, 0), batch)  # so that slots outweigh the loops' own

    def program(functions, kind_of):
        stage = jaxpipe.StageKinds(functions, kind_of)
        pipeline = jaxpipe.value_and_grad(stage, schedule, mesh, **ENDS, dispatch="loops")
        return jax.jit(pipeline).lower(params, batch, jax.random.key(0))

    both = program([dense, gated], [0, 1, 1, 1])
    text = both.as_text()
    assert "stablehlo.case" not in text and "stablehlo.if" not in text
    sizes = [
        compiled.compile().memory_analysis().temp_size_in_bytes
        for compiled in (both, program([dense], [0] * 4), program([gated], [0] * 4))
    ]
    assert sizes[0] < 1.2 * max(sizes[1:])


def test_forward_runs_each_kind(x64):
    schedule = jaxpipe.schedule.build("dualpipev", 2, MICROBATCHES)
    params, batch = make(schedule)
    stage, key = jaxpipe.StageKinds([dense, gated], [0, 1, 1, 0]), jax.random.key(1)
    run = jaxpipe.forward(stage, schedule, jaxpipe.make_mesh(pp=2), embed=ENDS["embed"])
    outputs, metrics = jax.jit(run)(params, batch, key)
    assert int(metrics["dense"]) == 2 * MICROBATCHES
    x = []
    for m, data in enumerate(batch.reshape(MICROBATCHES, -1, WIDTH)):
        y = data @ params.outer["in"]
        for s in range(4):
            ctx = jaxpipe.Context.make(s, m, key, data, num_stages=4)
            y = stage(jax.tree.map(lambda leaf, s=s: leaf[s], params.stages), y, ctx).value
        x.append(y)
    np.testing.assert_allclose(outputs, jnp.concatenate(x), rtol=1e-12)


def test_an_evaluation_runs_each_kind(x64):
    schedule = jaxpipe.schedule.build("zb1p", 2, MICROBATCHES)
    params, batch = make(schedule)
    stage, key = jaxpipe.StageKinds([dense, gated], [0, 1]), jax.random.key(1)
    pipeline = jaxpipe.value_and_grad(stage, schedule, jaxpipe.make_mesh(pp=2), **ENDS)
    loss, aux = jax.jit(pipeline.evaluation)(params, batch, key)
    assert float(loss) == pytest.approx(float(plain(params, batch, key, schedule, stage)), rel=1e-12)
    assert int(aux["dense"]) == MICROBATCHES


def other_metrics(params, x, ctx):
    return jaxpipe.Output(x @ params["w"], jnp.mean(x), {"dense": jnp.zeros(3)})


@pytest.mark.parametrize(
    ("make_stage", "message"),
    [
        (lambda: jaxpipe.StageKinds([], []), "functions has none"),
        (lambda: jaxpipe.StageKinds([dense, 3], [0, 1, 0, 1]), r"functions has \[3\]"),
        (lambda: jaxpipe.StageKinds([dense, gated], [0, 2, 0, 1]), "give each stage an index of functions, 0 to 1"),
        (lambda: jaxpipe.StageKinds([dense, gated], [0, 0, 0, 0]), "leave out functions that no stage runs"),
        (lambda: jaxpipe.StageKinds([dense, gated], [0, 1, 0]), r"has 3 stages, schedule 'zb1p' 4"),
        (lambda: jaxpipe.StageKinds([dense, lambda x: x], [0, 1, 0, 1]), r"stage takes \(x\)"),
        (lambda: jaxpipe.StageKinds([dense, other_metrics], [0, 1, 0, 1]), "zeros for what a kind does not have"),
    ],
)
def test_what_does_not_fit_is_refused(make_stage, message):
    schedule = jaxpipe.schedule.build("zb1p", 4, MICROBATCHES)
    params, batch = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), make(schedule))
    with pytest.raises(ValueError, match=message):
        pipeline = jaxpipe.value_and_grad(make_stage(), schedule, jaxpipe.make_mesh(pp=4), **ENDS)
        jax.eval_shape(pipeline, params, batch, jax.random.key(0))


@pytest.mark.parametrize("dispatch", ["sequential", "by_rank"])
def test_kinds_whose_arrays_differ_in_shape_share_memory(x64, dispatch):
    """What each keeps has a width of its own; a slot takes what the larger one does."""
    sizes = {"narrow": 24, "wide": 36}

    def hidden(name):
        def stage(params, x, ctx):
            rows = jnp.full(x.shape[:1], 1 / len(x), x.dtype)  # a mean: sums would make exp amplify what is rounded
            return x + jnp.sin(jnp.exp(x @ params[name])).T @ rows @ params[name].T

        return stage

    schedule = jaxpipe.schedule.build("zb1p", 2, MICROBATCHES)
    rng = np.random.default_rng(0)
    stages = {name: jnp.asarray(rng.normal(size=(2, WIDTH, size)) / 4) for name, size in sizes.items()}
    params, batch = jaxpipe.Params(stages), jnp.asarray(rng.normal(size=(64 * MICROBATCHES, WIDTH)))
    head = lambda outer, y, data, ctx: jnp.mean(y**2)  # noqa: E731

    def pipeline(functions, kind_of):
        stage, mesh = jaxpipe.StageKinds(functions, kind_of), jaxpipe.make_mesh(pp=2)
        return jaxpipe.value_and_grad(stage, schedule, mesh, head=head, stash=10**6, dispatch=dispatch)

    both = pipeline([hidden("narrow"), hidden("wide")], [0, 1])
    (loss, _), grads = jax.jit(both)(params, batch)

    def plain(params):
        def of(data):
            for stage, name in enumerate(sizes):
                data = hidden(name)(jax.tree.map(lambda leaf, s=stage: leaf[s], params.stages), data, None)
            return jnp.mean(data**2)

        return sum(map(of, jnp.split(batch, MICROBATCHES))) / MICROBATCHES

    expected, expected_grads = jax.jit(jax.value_and_grad(plain))(params)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert_trees_close(grads, expected_grads, rtol=1e-10)
    alone = pipeline([hidden("wide")], [0, 0])
    stash = [jaxpipe.plan(step, params, batch, "H100").memory.stash for step in (both, alone)]
    assert stash[0] == stash[1]


@pytest.mark.parametrize("named", [True, False])
def test_slots_of_arrays_of_several_shapes_hold_what_was_put_there(named):
    """Slots whose last value was of another kind: places of all dtypes, some larger than what is in them."""

    def numbers(dtype, *shape):
        return jnp.asarray(np.random.default_rng(len(shape)).integers(0, 2, shape)).astype(dtype)

    def keys(*shape):
        return jax.random.split(jax.random.key(sum(shape)), shape)

    dtypes = (jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.int32, jnp.bool_)
    kinds = (
        (*(numbers(dtype, 3, 5) for dtype in dtypes), keys(7)),
        (*(numbers(dtype, 2, 3, 2) for dtype in dtypes), keys(2, 3)),
        (*(numbers(dtype) for dtype in dtypes), numbers(jnp.float32, 0, 4), jax.random.key(5)),
    )
    shared = SharedPool.of(jax.tree.map(jax.typeof, kinds), flat=True)
    assert [aval.shape for aval in shared.avals] == [(15,)] * len(dtypes) + [(7,), (0, 4)]

    def value(kind, slot):  # each slot's numbers are its own
        return tuple(leaf[::-1] if slot and leaf.ndim else leaf for leaf in kinds[kind])

    slots = 2
    pool = allocate_named(shared.avals, slots, itertools.count()) if named else allocate(shared.avals, slots)
    held = {}
    for kind, slot in [(0, 0), (1, 1), (1, 0), (2, 1), (0, 1), (2, 0), (0, 0)]:
        place = slot if named else jnp.int32(slot)
        pool = shared.put(pool, place, kind, value(kind, slot))
        held[slot] = kind
        for slot, kind in held.items():
            found = shared.take(pool, slot if named else jnp.int32(slot), kind)
            for leaf, expected in zip(found, value(kind, slot), strict=True):
                assert leaf.shape == expected.shape and leaf.dtype == expected.dtype
                assert (leaf == expected).all()


def test_what_two_kinds_make_of_the_same_parameters_is_there_once():
    """Both cast a matrix of a row, and one of them another one."""

    def first(params, x, ctx):
        return x + jnp.tanh(x @ params["w"].astype(jnp.bfloat16))

    def second(params, x, ctx):
        return first(params, x, ctx) + x @ params["v"].astype(jnp.bfloat16)

    rng = np.random.default_rng(0)
    params = jaxpipe.Params({name: jnp.asarray(rng.normal(size=(2, 32, 32)), jnp.float32) for name in ("w", "v")})
    batch = jnp.asarray(rng.normal(size=(16, 32)), jnp.bfloat16)
    pipeline = jaxpipe.value_and_grad(
        jaxpipe.StageKinds([first, second], [0, 1]), jaxpipe.schedule.build("zb1p", 2, MICROBATCHES),
        jaxpipe.make_mesh(pp=2), head=lambda outer, y, data, ctx: jnp.mean(y**2),
    )  # fmt: skip
    assert jaxpipe.plan(pipeline, params, batch, "H100").memory.working == 2 * 32 * 32 * 2
