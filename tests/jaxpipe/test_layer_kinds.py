"""Layers with parameters of several structures equal the plain loop, and are stored once each."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.flax import layered_stages, split_layers, unstack_layers
from jaxpipe.stage import matmul_flops, split_stage
from tests.cases import cases
from tests.jaxprs import primitives
from tests.plain import assert_trees_close, fold

WIDTH, WIDE, EXPERTS, MICROBATCHES = 4, 6, 3, 8
ROWS = {
    "dense, then experts": "DDDMMMMMMMMMM",
    "in turn": "DMDMDMDMDMDMD",
    "three kinds": "DMMLMMLMMLMMD",
    "as many of each": "DMDMDMDM",
    "once more": "DMDMDMD",
    "one kind, by cost": "MMMMMMM",
}
COSTS = {"one kind, by cost": [1] * 6 + [4]}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape) / 2)


def make_layer(kind, seed):
    """All have ``mix`` and a norm; D and M a table of experts or of one; L nothing else."""
    shared = {"mix": normal(WIDTH, WIDTH, seed=seed), "norm": {"scale": 1 + normal(WIDTH, seed=seed)}}
    if kind == "L":
        return shared
    if kind == "D":
        return {**shared, "mlp": {"up": normal(WIDTH, WIDE, seed=seed), "down": normal(WIDE, WIDTH, seed=seed)}}
    experts = {"up": normal(EXPERTS, WIDTH, WIDE, seed=seed), "down": normal(EXPERTS, WIDE, WIDTH, seed=seed)}
    return {**shared, "mlp": {"router": normal(WIDTH, EXPERTS, seed=seed), **experts}}


def make_layers(row):
    return [make_layer(kind, seed) for seed, kind in enumerate(row)]


def dropout(key, x):
    return jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x, jnp.zeros_like(x)) / 0.8


def layer(params, x, ctx):
    """Layers without experts have no auxiliary loss and no count of tokens."""
    x = x + dropout(ctx.rng, jnp.tanh(x @ params["mix"])) * jnp.cos(ctx.layer.astype(x.dtype))
    x = x * params["norm"]["scale"]
    if "mlp" not in params:
        return jaxpipe.Output(x, metrics={"local": jnp.ones((), bool)})
    mlp = params["mlp"]
    if "router" not in mlp:
        return x + jnp.tanh(x @ mlp["up"]) @ mlp["down"]
    gates = jax.nn.softmax(x @ mlp["router"])
    y = jnp.einsum("be,ebw,ewd->bd", gates, jnp.tanh(jnp.einsum("bd,edw->ebw", x, mlp["up"])), mlp["down"])
    return jaxpipe.Output(x + y, (gates**2).mean(), {"tokens": (gates > 0.4).sum(0, dtype=jnp.int32)})


def head(outer, y, data, ctx):
    return jnp.mean((y @ outer - data) ** 2)


def plain(layers, outer, batch, key):
    """(loss, (auxiliary loss, tokens of each expert)) of a loop."""

    def loss(m, data):
        x, aux_loss, tokens = data, 0.0, jnp.zeros(EXPERTS, jnp.int32)
        for i, params in enumerate(layers):
            output = layer(params, x, jaxpipe.Context(None, m, fold(key, i, m), data, jnp.int32(i)))
            output = output if isinstance(output, jaxpipe.Output) else jaxpipe.Output(output)
            x, tokens = output.value, tokens + output.metrics.get("tokens", 0)
            aux_loss += 0.0 if output.aux_loss is None else output.aux_loss
        return head(outer, x, data, None) + aux_loss, tokens

    losses, tokens = jax.vmap(loss)(jnp.arange(MICROBATCHES), batch.reshape(MICROBATCHES, -1, WIDTH))
    return losses.mean(), tokens.sum(0)


@cases(("name", "ranks", "row"), [
    pytest.param("1f1b", 4, "in turn", marks=pytest.mark.slow),
    pytest.param("zb1p", 4, "three kinds", marks=pytest.mark.slow),
    ("zb1p", 4, "dense, then experts"),
    pytest.param("dualpipe", 4, "once more", marks=pytest.mark.slow),
    pytest.param("dualpipev", 4, "dense, then experts", marks=pytest.mark.slow),
    ("dualpipev", 2, "as many of each"),
    ("zb1p", 2, "one kind, by cost"),
], quick=[("dualpipev", 2, "as many of each")])  # fmt: skip
def test_kinds_equal_the_plain_loop(name, ranks, row, x64):
    """Loss, metrics and gradients, of layers with keys of their own."""
    layers = make_layers(ROWS[row])
    outer, batch, key = normal(WIDTH, WIDTH, seed=30), normal(16, WIDTH, seed=31), jax.random.key(5)
    (expected, tokens), expected_grads = jax.value_and_grad(plain, (0, 1), has_aux=True)(layers, outer, batch, key)
    schedule = jaxpipe.schedule.build(name, ranks, MICROBATCHES)
    stage, stacked = layered_stages(layer, layers, schedule, layer_costs=COSTS.get(row))
    step = jax.jit(jaxpipe.value_and_grad(stage, schedule, jaxpipe.make_mesh(pp=ranks), head=head))
    (loss, aux), grads = step(jaxpipe.Params(stacked, outer), batch, key)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_array_equal(aux["tokens"], tokens)
    if "L" in ROWS[row]:
        assert int(aux["local"]) == ROWS[row].count("L") * MICROBATCHES
    assert_trees_close((unstack_layers(grads.stages, stage, schedule), grads.outer), expected_grads, rtol=1e-10)
    used = sum(int((leaf != 0).any((-1, -2)).sum()) for leaf in jax.tree.leaves(grads.stages["mlp"]["router"]))
    assert used == ROWS[row].count("M")  # unused rows have gradients of zero


def schedule_of(stages):
    return jaxpipe.schedule.build("1f1b", stages, 4)


def context(stage, num_stages=4):
    return jaxpipe.Context.make(stage, 0, jax.random.key(0), None, num_stages=num_stages)


def shapes_of(tree):
    return jax.tree.map(lambda leaf: leaf.shape, tree)


def test_common_leaves_stand_once_and_others_in_as_many_slots_as_a_stage_needs():
    """4, 3, 3 and 3 layers: 3 dense ones in the first stage, up to 3 with experts in the others."""
    _, stacked = layered_stages(layer, make_layers(ROWS["dense, then experts"]), schedule_of(4))
    assert shapes_of(stacked) == {
        "mix": (4, 4, WIDTH, WIDTH),
        "norm": {"scale": (4, 4, WIDTH)},
        "mlp": {
            "up": {"kind_0": (4, 3, WIDTH, WIDE), "kind_1": (4, 3, EXPERTS, WIDTH, WIDE)},
            "down": {"kind_0": (4, 3, WIDE, WIDTH), "kind_1": (4, 3, EXPERTS, WIDE, WIDTH)},
            "router": (4, 3, WIDTH, EXPERTS),
        },
    }


@pytest.mark.parametrize(("row", "stages", "kind_of", "loops"), [
    ("DMDMDMDM", 4, (0, 0, 0, 0), (False,)),  # D and M in all stages
    ("DMMMDMMM", 2, (0, 0), (True,)),  # the layers with experts in a loop
    ("DMMMMMMM", 2, (0, 1), (True, True)),
    ("DDDMM", 2, (0, 1), (True, True)),  # three dense ones, or two with experts
    ("DMDMMMM", 3, (0, 1, 1), (False, True)),
])  # fmt: skip
def test_stages_with_the_same_row_of_kinds_are_one_kind_in_which_nothing_is_chosen(row, stages, kind_of, loops):
    stage, stacked = layered_stages(layer, make_layers(row), schedule_of(stages))
    assert stage.kind_of == kind_of
    params = jax.tree.map(lambda leaf: leaf[0], stacked)
    for function, loop in zip(stage.functions, loops, strict=True):
        found = primitives(jax.make_jaxpr(function)(params, normal(2, WIDTH), context(0, stages)))
        assert "cond" not in found and ("scan" in found) == loop


class Pair(NamedTuple):
    a: Any
    b: Any


CONTAINERS = {
    "arrays": [jnp.ones(2), jnp.ones((2, 2)), jnp.ones(2)],
    "an array, then a dict": [{"mlp": jnp.ones(2)}, {"mlp": {"up": jnp.ones(2)}}, {"mlp": {"up": jnp.ones(2)}}],
    "a list, then a dict": [{"mlp": [jnp.ones(2), jnp.ones(3)]}, {"mlp": {"up": jnp.ones(2)}}, jnp.ones(2)],
    "tuples with names": [Pair(jnp.ones(2), None), Pair(jnp.ones(2), (jnp.ones(3),)), {"a": jnp.ones(2), "b": {}}],
    "nothing": [{}, {"w": jnp.ones(2)}, ()],
    "types": [{"w": jnp.ones(2)}, {"w": jnp.ones(2, jnp.int32)}, {"w": jax.random.key(0)}],
}


@pytest.mark.parametrize("order", ["model", "storage"])
@pytest.mark.parametrize("name", CONTAINERS)
def test_layers_come_back_as_they_were(name, order):
    """Whatever containers they are in; every value is told from every other."""
    three = CONTAINERS[name]
    layers = [jax.tree.map(lambda leaf, i=i: numbered(leaf, i), three[i % 3]) for i in range(7)]
    schedule = jaxpipe.schedule.build("dualpipev", 2, 4)
    stage, stacked = layered_stages(lambda params, x, ctx: x, layers, schedule)
    if order == "storage":
        stacked = jaxpipe.stack_stages(stacked, schedule, "storage")
    for expected, found in zip(layers, unstack_layers(stacked, stage, schedule, order), strict=True):
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), found, expected))


def numbered(leaf, i):
    return jax.random.key(i) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf * i


def test_a_parameters_own_path_begins_its_path_in_the_stages():
    """So PartitionSpecs and optax masks for layers, prefixes of the tree of stages, hold for all kinds."""
    layers = make_layers(ROWS["three kinds"])
    _, stacked = layered_stages(layer, layers, schedule_of(4))
    found = {path for path, _ in jax.tree_util.tree_leaves_with_path(stacked)}
    own = {path for each in layers for path, _ in jax.tree_util.tree_leaves_with_path(each)}
    assert {next(path for path in own if other[: len(path)] == path) for other in found} == own


def test_a_function_for_each_layer_and_costs(x64):
    """Functions that are alike but for the parameters' structure; the dear layers stand alone."""
    dense, gated = {"w": normal(WIDTH, WIDTH)}, {"w": normal(WIDTH, WIDTH), "g": normal(WIDTH, seed=1)}
    layers = [dense, dense, dense, gated, gated]
    functions = [lambda w, x, ctx: x + jnp.tanh(x @ w["w"])] * 3 + [lambda w, x, ctx: x + x @ w["w"] * w["g"]] * 2
    stage, stacked = layered_stages(functions, layers, schedule_of(3), layer_costs=[1, 1, 1, 3, 3])
    assert shapes_of(stacked) == {"w": (3, 3, WIDTH, WIDTH), "g": (3, 1, WIDTH)}
    x = expected = normal(2, WIDTH, seed=2)
    for function, params in zip(functions, layers, strict=True):
        expected = function(params, expected, None)
    for s, params in enumerate(jaxpipe.unstack_stages(stacked, schedule_of(3))):
        x = stage(params, x, context(s, 3))
    np.testing.assert_allclose(x, expected, rtol=1e-12)


@pytest.mark.parametrize(("costs", "stages", "expected"), [
    ([1] * 10, 4, (3, 3, 2, 2)),
    ([0.1] * 10, 4, (3, 3, 2, 2)),
    ([1, 1, 1, 3, 3, 3, 3, 3, 3, 3], 4, (4, 2, 2, 2)),
    ([9, 1, 1, 1], 3, (1, 2, 1)),
    ([1, 1, 1, 9], 2, (3, 1)),
    ([5], 1, (1,)),
])  # fmt: skip
def test_the_dearest_stage_is_as_cheap_as_can_be(costs, stages, expected):
    assert split_layers(len(costs), stages, costs) == expected


@pytest.mark.parametrize("seed", range(20))
def test_no_division_is_better(seed):
    rng = np.random.default_rng(seed)
    costs = rng.integers(1, 6, rng.integers(2, 9)).tolist()
    stages = int(rng.integers(1, len(costs) + 1))

    def rate(counts):
        ends = [0, *itertools.accumulate(counts)]
        found = [sum(costs[start:end]) for start, end in itertools.pairwise(ends)]
        return max(found), sum(cost**2 for cost in found), [-count for count in counts]

    cuts = itertools.combinations(range(1, len(costs)), stages - 1)
    every = [tuple(end - start for start, end in itertools.pairwise((0, *cut, len(costs)))) for cut in cuts]
    assert split_layers(len(costs), stages, costs) == min(every, key=rate)


@cases(("name", "row"), [
    ("zb1p", "dense, then experts"),
    ("zb1p", "in turn"),
    ("dualpipev", "dense, then experts"),
    ("dualpipev", "three kinds"),
    ("zb1p", "one kind, by cost"),
], quick=[("zb1p", "in turn"), ("dualpipev", "dense, then experts"), ("zb1p", "one kind, by cost")])  # fmt: skip
def test_the_backward_of_every_stage_divides_as_its_layers_do(name, row):
    """13 layers on 4 ranks: FLOPs(I) + FLOPs(W) = FLOPs(backward), and W holds the weight products of each layer.

    So no stage runs padding, where layers are of several kinds or costs divide them.
    """
    layers, schedule = make_layers(ROWS[row]), jaxpipe.schedule.build(name, 4, MICROBATCHES)
    stage, stacked = layered_stages(layer, layers, schedule, layer_costs=COSTS.get(row))
    params = jax.tree.map(lambda leaf: leaf[0], stacked)
    of_kind = {kind: halves(layer, make_layer(kind, 0))(None) for kind in set(ROWS[row])}
    expected, start = set(), 0
    for count in split_layers(len(layers), schedule.num_stages, COSTS.get(row)):
        own = [of_kind[kind] for kind in ROWS[row][start : start + count]]
        expected.add(tuple(map(sum, zip(*own, strict=True))))
        start += count
    assert set(map(halves(stage, params), range(schedule.num_stages))) == expected


def halves(stage, params):
    """A function of the branch that counts in conditionals: (FLOPs(I), FLOPs(W)), together those of the backward."""
    x, ctx = normal(2, WIDTH), context(0)

    def run(params, x):
        output = stage(params, x, ctx)
        output = output if isinstance(output, jaxpipe.Output) else jaxpipe.Output(output)
        return output.value, output.aux_loss

    split = split_stage(run, params, x)
    assert split.opaque == ()
    prepared = jax.eval_shape(split.prepare, params)
    out, residuals = jax.eval_shape(split.forward, prepared, x)
    _, crossing = jax.eval_shape(split.backward_input, prepared, residuals, out)
    programs = [
        jax.make_jaxpr(split.backward_input)(prepared, residuals, out),
        jax.make_jaxpr(split.backward_weight)(prepared, residuals.weight, crossing),
        jax.make_jaxpr(lambda params, x, out: jax.vjp(run, params, x)[1](out))(params, x, out),
        jax.make_jaxpr(run)(params, x),
    ]

    def of_branch(branch):
        input_half, weight_half, whole, forward = (matmul_flops(program, branch=branch) for program in programs)
        assert input_half + weight_half == whole - forward
        return input_half, weight_half

    return of_branch


def test_what_kinds_cannot_do_is_refused():
    def run(function, layers, costs=None):
        stage, stacked = layered_stages(function, layers, schedule_of(2), layer_costs=costs)
        return stage(jax.tree.map(lambda leaf: leaf[0], stacked), jnp.ones(2), context(0, 2)), stage, stacked

    def counted(params, x, ctx):
        return jaxpipe.Output(x, metrics={"n": params["w"]})

    layers = [{"w": jnp.ones(2)}, {"w": jnp.ones(3)}]
    with pytest.raises(ValueError, match=r"layer 1 returns a metric 'n' float32\[3\], but layer 0 float32\[2\]"):
        run(counted, layers)
    with pytest.raises(ValueError, match=r"layer 1 returns an auxiliary loss .*but layer 0"):
        run(lambda params, x, ctx: jaxpipe.Output(x, params["w"]), layers)
    with pytest.raises(ValueError, match=r"the layer maps float32\[2\] to float32\[3\]"):
        run(lambda params, x, ctx: params["w"], layers)
    with pytest.raises(ValueError, match="name parameters kind_0"):
        run(counted, [{"w": jnp.ones(2)}, {"w": {"kind_0": jnp.ones(2)}}])
    with pytest.raises(ValueError, match="3 functions for 2 layers"):
        run([counted] * 3, layers)
    for costs, message in (([1], "1 costs for 2"), ([1, 0], r"layer 1 costs 0\.0"), ([1, np.nan], "layer 1 costs nan")):
        with pytest.raises(ValueError, match=message):
            run(counted, layers, costs)
    stage, stacked = layered_stages(counted, layers, schedule_of(2))
    with pytest.raises(ValueError, match=r"have structure .*and those of these layers"):
        unstack_layers(stacked["w"], stage, schedule_of(2))
    with pytest.raises(ValueError, match="give the number of layers, or the stage function"):
        unstack_layers(stacked, counted, schedule_of(2))


@pytest.mark.parametrize("order", ["model", "storage"])
@pytest.mark.parametrize("row", ["three kinds", "DDDDDDD"])
def test_masks_names_and_norms_by_layer(order, row):
    """Of layers of several kinds, and of one kind divided by costs: as of the plain layers, unused rows left out."""
    layers = make_layers(ROWS.get(row, row))
    schedule = jaxpipe.schedule.build("dualpipev", 2, 4)
    costs = [1 + i % 3 for i in range(len(layers))]
    stage, stacked = layered_stages(layer, layers, schedule, layer_costs=costs)
    stacked = jaxpipe.stack_stages(stacked, schedule, order)
    params = jaxpipe.Params(stacked, {"head": normal(WIDTH, WIDTH)})
    stacking = jaxpipe.Stacking(schedule, order=order, storage=stage.storage)
    named = {f"layers[{i}]": each for i, each in enumerate(layers)}
    assert_trees_close(stacking.by_layer(params), {**named, "outer": params.outer}, rtol=0)
    squares = {name: sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(each)) for name, each in named.items()}
    norms = stacking.norms(params)
    assert {name: float(norms[name]) for name in squares} == pytest.approx(
        {name: square**0.5 for name, square in squares.items()}
    )
    total = sum(squares.values()) + float((params.outer["head"] ** 2).sum())
    assert float(stacking.global_norm(params)) == pytest.approx(total**0.5)
    used = stacking.without_padding(params)
    assert sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(used)) == pytest.approx(total)
    leaves = {f".stages{jax.tree_util.keystr(p)}": v for p, v in jax.tree_util.tree_leaves_with_path(stacked)}
    paths = stacking.paths(params)
    for index, each in enumerate(layers):
        for path, leaf in jax.tree_util.tree_leaves_with_path(each):
            name, place = paths[f"layers[{index}].{jax.tree_util.keystr(path, simple=True, separator='.')}"]
            np.testing.assert_array_equal(leaves[name][place], leaf)
    decays = jax.tree.leaves(jax.tree.map(lambda leaf: leaf.ndim > 3, stacked))
    assert jax.tree.leaves(stacking.weight_decay_mask(params).stages) == decays


def test_what_is_not_stacked_so_is_refused():
    schedule = schedule_of(2)
    stage, stacked = layered_stages(layer, make_layers("DM"), schedule)
    stacking = jaxpipe.Stacking(schedule, storage=stage.storage)
    with pytest.raises(ValueError, match="storage of 2 layers in 2 stages for 3 layers"):
        jaxpipe.Stacking(schedule, 3, storage=stage.storage)
    with pytest.raises(ValueError, match="and storage where these are of several kinds"):
        jaxpipe.Stacking(schedule, 4).norms(jaxpipe.Params(stacked))
    with pytest.raises(ValueError, match=r"have structure .*and those of these layers"):
        stacking.norms(jaxpipe.Params(stacked["mlp"]))
