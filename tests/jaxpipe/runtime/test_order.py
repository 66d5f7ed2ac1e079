"""Rows of stage parameters in model order and in storage order: the same model, and what moves for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.runtime.copies import plan_moves
from jaxpipe.schedule.action import Action, Kind
from jaxpipe.schedule.schedule import Schedule
from tests.cases import cases
from tests.jaxpipe.runtime import models
from tests.plain import assert_trees_close, plain_value_and_grad

NAMES = tuple(jaxpipe.schedule.BUILDERS)
IN_PLACE = ("gpipe", "1f1b", "zb1p", "dualpipe")  # rank r runs stage r


def placed(route, microbatches, *others):
    """All forwards, then all backwards, with stage s on rank ``route[s]``; further routes for further directions."""
    routes = (tuple(route), *map(tuple, others))
    stages, ranks = len(route), max(map(max, routes)) + 1
    forwards = [Action(s, Kind.F, m) for m in range(microbatches) for s in range(stages)]
    backwards = [Action(s, Kind.B, m) for m in range(microbatches) for s in reversed(range(stages))]
    per_rank = [
        tuple(
            (action,)
            for action in (*forwards, *backwards)
            if routes[action.microbatch * len(routes) // microbatches][action.stage] == rank
        )
        for rank in range(ranks)
    ]
    return Schedule("placed", stages, microbatches, tuple(per_rank), routes)


def stage(w, x, ctx):
    return x + jnp.tanh(x @ w)


def head(outer, y, data, ctx):
    return jnp.mean((y - 1) ** 2)


def weights(schedule, width=4):
    return jnp.asarray(np.random.default_rng(3).normal(size=(schedule.num_stages, width, width)))


def batch(schedule, width=4):
    return jnp.asarray(np.random.default_rng(4).normal(size=(2 * schedule.num_microbatches, width)))


def assert_plain(schedule, order, rows):
    """Stage s in row ``rows[s]`` gives the plain program's loss and gradients, and the forward pass its outputs."""
    mesh, params, x = jaxpipe.make_mesh(pp=schedule.num_ranks), jaxpipe.Params(weights(schedule)), batch(schedule)
    step = jaxpipe.value_and_grad(stage, schedule, mesh, head=head, **order)
    (loss, _), grads = jax.jit(step)(params, x)
    (expected_loss, _), expected = plain_value_and_grad(stage, schedule, head=head, rows=rows)(params, x)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    assert_trees_close(grads, expected, rtol=1e-10)
    outputs, _ = jax.jit(jaxpipe.forward(stage, schedule, mesh, **order))(params, x)
    for row in map(rows.__getitem__, range(schedule.num_stages)):
        x = stage(params.stages[row], x, None)
    np.testing.assert_allclose(outputs, x, rtol=1e-12)


@cases("name", NAMES, quick=["interleaved", "dualpipev"])
def test_row_i_is_stage_i(x64, name):
    """A user's [num_stages, ...] array, whatever the schedule."""
    schedule = jaxpipe.schedule.build(name, 4, 8)
    assert_plain(schedule, {}, range(schedule.num_stages))


@cases("name", ["interleaved", "dualpipe", "dualpipev"], quick=["dualpipe"])
def test_storage_order(x64, name):
    schedule = jaxpipe.schedule.build(name, 2, 4)
    assert_plain(schedule, {"order": "storage"}, np.argsort(schedule.storage_order).tolist())


@cases("order", ["model", "storage"], quick=["storage"])
@pytest.mark.parametrize("route, others", [((0, 1, 1, 1), ()), ((1, 0, 0, 1, 2, 0), ((2, 2, 1, 0, 0, 2),))])
def test_ranks_with_different_numbers_of_stages(x64, order, route, others):
    """Rows are divided evenly over ranks even where the schedule's stages are not."""
    schedule = placed(route, 4, *others)
    rows = range(len(route)) if order == "model" else np.argsort(schedule.storage_order).tolist()
    assert_plain(schedule, {"order": order}, rows)


@pytest.mark.parametrize("seed", range(40))
def test_moves_deliver_every_row_where_it_is_needed(seed):
    """Any placement of stages on ranks, one direction or two: each holder gets its stage by permutations of ranks."""
    rng = np.random.default_rng(seed)
    ranks, rows, directions = (int(rng.integers(1, high)) for high in (6, 4, 3))
    stages = ranks * rows
    routes = [np.concatenate([rng.permutation(ranks), rng.integers(0, ranks, stages - ranks)]) for _ in "ab"]
    schedule = placed(*([routes[0].tolist(), 4, routes[1].tolist()][: 1 + directions]))
    for order, stage_of in {"model": range(stages), "storage": schedule.storage_order}.items():
        masters = np.asarray(stage_of).reshape(ranks, rows)
        chunks = plan_moves(schedule, order)
        for chunk, moves in enumerate(chunks):
            held = {}
            for move in moves:
                owners, holders = zip(*move.pairs, strict=True)
                assert len(set(owners)) == len(owners) and len(set(holders)) == len(holders)
                assert {owner == holder for owner, holder in move.pairs} == {move.stays}
                assert not held.keys() & set(holders)
                held |= {holder: masters[owner, move.row] for owner, holder in move.pairs}
            assert held == {rank: held[chunk] for rank, held in enumerate(schedule.rank_stages) if chunk < len(held)}
        assert len(chunks) == max(map(len, schedule.rank_stages))


def permutes(function, *args):
    """Count of ppermutes outside of loops."""
    found = [eqn for eqn in jax.make_jaxpr(function)(*args).eqns if eqn.primitive.name == "shard_map"]
    return sum(eqn.primitive.name == "ppermute" for eqn in found[0].params["jaxpr"].eqns)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_in_place_does_not_move(name):
    schedule = jaxpipe.schedule.build(name, 4, 8)
    arguments = jaxpipe.Params(weights(schedule)), batch(schedule)

    def count(order):
        step = jaxpipe.value_and_grad(stage, schedule, jaxpipe.make_mesh(pp=4), head=head, order=order)
        return permutes(step, *arguments)

    mirrored = 2 if name == "dualpipe" else 0  # the second copy of each stage, and its gradient
    assert count("storage") == mirrored
    # Of eight rows on four ranks, row i goes to chunk j from two ranks or one, there and back. Both chunks' go at once
    # in a V, where no rank is to receive two.
    assert count("model") == (mirrored if name in IN_PLACE else 8 if name == "interleaved" else 4)


@cases(
    "name", ["interleaved", "zbv", pytest.param("dualpipe", marks=pytest.mark.slow), "dualpipev"], quick=["dualpipev"]
)
def test_both_orders_give_the_same_bits(name):
    """bfloat16 copies, tensor parallelism by the compiler, and leaves that are no floating numbers."""
    schedule = jaxpipe.schedule.build(name, 2, 4)
    mesh = jaxpipe.make_mesh(pp=2, tp=2)
    rng = np.random.default_rng(5)
    count = schedule.num_stages
    stages = {
        "up": jnp.asarray(rng.normal(size=(count, 8, 16)) / 3, jnp.float32),
        "down": jnp.asarray(rng.normal(size=(count, 16, 8)) / 4, jnp.float32),
    }
    constant = {"order": jnp.asarray([rng.permutation(8) for _ in range(count)], jnp.int32)}
    specs = jaxpipe.Params({"up": P("pp", None, "tp"), "down": P("pp", "tp"), "order": P("pp")}, P())

    def permuting(params, x, ctx):
        x = x[..., params["order"]]
        return jax.nn.gelu(x @ params["up"]) @ params["down"]

    x = models.deepseek_batch(schedule, 8, sequence=4)
    results = []
    for order in ("model", "storage"):
        step = jaxpipe.value_and_grad(
            permuting, schedule, mesh, embed=models.deepseek_embed, head=models.deepseek_head, specs=specs,
            compute_dtype=jnp.bfloat16, order=order,
        )  # fmt: skip
        params = jaxpipe.Params(jaxpipe.stack_stages({**stages, **constant}, schedule, order))
        (loss, _), grads = jax.jit(step)(params, {name: leaf.astype(jnp.bfloat16) for name, leaf in x.items()})
        floats = {name: grads.stages[name] for name in stages}
        results.append((loss, jaxpipe.unstack_stages(floats, schedule, order)))
    jax.tree.map(np.testing.assert_array_equal, *results)
