"""Models of several kinds of layers: equal to a plain program, whatever the schedule, and no more work than theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.deepseek import (
    Arrangement,
    DenseBlock,
    EmbeddingAndHead,
    LayerCosts,
    MoEBlock,
    MTPLayer,
    build_model,
    feed_forward,
)
from jaxpipe.deepseek.layers import use_whole
from jaxpipe.flax import nnx_function
from jaxpipe.stage import split_stage
from tests.jaxpipe.deepseek.models import make_batch, small
from tests.plain import assert_trees_close

ROWS, MICROBATCHES = 16, 4


def attention(query, key, value):
    """Causal attention in float64: JAX's own computes weights in float32."""
    scores = jnp.einsum("bthc,bshc->bhts", query, key) * key.shape[-1] ** -0.5
    seen = jnp.tri(query.shape[1], dtype=bool)
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), value)


def plain(tree, batch, config, parts):
    """(loss, tokens of each expert in each layer) of parameters in the order of the model, module after module."""

    def function(module, *core):
        return nnx_function(nnx.eval_shape(lambda: module(config, nnx.Rngs(0), *core)))

    dense, moe, mtp = (function(module, attention) for module in (DenseBlock, MoEBlock, MTPLayer))
    ends = function(EmbeddingAndHead)
    outer = {name: tree["outer"][name] for name in ("embedding", "norm", "output")}
    if config.mtp:  # whose layer normalises
        last = {**tree["outer"]["mtp"], "main_norm": outer.pop("norm")}

    def of_part(data):
        ends_of = ends.merge(outer)
        x, every = ends_of.embed(data["tokens"], jnp.float64), []
        for index in range(config.dense_layers):
            x = dense(tree["outer"][f"layer_{index}"], x)
        for index in range(config.moe_layers):
            x, stats = moe(jax.tree.map(lambda leaf, i=index: leaf[i], tree["layers"]), x)
            every.append(stats)
        features = None
        if config.mtp:
            x, features, stats = mtp(last, x, ends_of.embed(data["targets"], jnp.float64))
            every.append(stats)
        loss, second = ends_of.loss(x, features, data["targets"], data["mask"])
        loss = loss + config.balance_factor * sum(stats.balance_loss for stats in every)
        loss = loss if second is None else loss + config.mtp_weight * second
        weight = data["mask"].sum()
        return weight * loss, weight, jnp.stack([stats.loads for stats in every])

    split = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)
    losses, weights, loads = jax.lax.map(of_part, split)
    return losses.sum() / weights.sum(), loads.sum(0)


def pipeline(model, schedule, pp, ep, **options):
    return jaxpipe.value_and_grad(
        model.stage,
        schedule,
        jaxpipe.make_mesh(pp=pp, ep=ep) if model.axis else jaxpipe.make_mesh(pp=pp),
        embed=model.embed,
        head=model.head,
        weight=model.weight,
        prepare=model.prepare,
        data_axes=("ep",) if model.axis else (),
        specs=model.specs,
        shared_ends=model.shared_ends,
        order="storage",
        **options,
    )


def wide(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, tree)


def floats(grads, params):
    """Gradients, zeros for what has none."""
    return jax.tree.map(lambda g, p: g if g.dtype == p.dtype else np.zeros(p.shape, p.dtype), grads, params)


BOTH = {"dense_layers": 2, "mtp": True}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "pp", "ep", "changes"),
    [
        pytest.param("1f1b", 2, 2, {"shared_ends": True, "dense_layers": 1, "layers": 3}, marks=SLOW),
        pytest.param("dualpipev", 2, 1, {}, marks=SLOW),
        pytest.param("dualpipev", 2, 2, {"shared_ends": True}, marks=SLOW),
        pytest.param("1f1b", 4, 2, {"shared_ends": True, "remat": "layer"}, marks=SLOW),
        pytest.param("zb1p", 4, 2, {"shared_ends": False, "shard_outer": True}, marks=SLOW),
        pytest.param("dualpipev", 2, 2, {"shared_ends": False, "shard_outer": True, "gather_head": "step"}, marks=SLOW),
        pytest.param("dualpipev", 2, 2, {"shared_ends": False, "remat": "attention"}, marks=SLOW),
        pytest.param("dualpipe", 4, 2, {"shared_ends": True, "mtp": False, "remat": "layer"}, marks=SLOW),
        pytest.param("dualpipev", 2, 2, {"dense_layers": 0, "redundant": 0}, marks=SLOW),
    ],
)
def test_equals_the_plain_program(x64, name, pp, ep, changes):
    config = small(**{**BOTH, "balance_factor": 0.1, **changes})
    schedule = jaxpipe.schedule.build(name, pp, max(MICROBATCHES, 2 * pp))
    options = {"axis": "ep" if ep > 1 else None, "dtype": jnp.float64, "core": attention}
    model = build_model(config, schedule, 0, abstract=True, **options)
    params = wide(jax.jit(model.init)(3))
    batch = wide(jax.tree.map(jnp.asarray, make_batch(0, ROWS, config)))
    step = jax.jit(pipeline(model, schedule, pp, ep)).lower(params, batch)
    (loss, aux), grads = step.compile()(params, batch)
    tree = model.to_layers(params)
    parts = schedule.num_microbatches * ep
    of_plain = jax.jit(jax.value_and_grad(plain, has_aux=True, allow_int=True), static_argnums=(2, 3))
    (expected, loads), expected_grads = of_plain(tree, batch, config, parts)
    np.testing.assert_allclose(loss, expected, rtol=1e-10)
    np.testing.assert_array_equal(model.loads_of(aux), loads)
    assert loads.shape == (config.routed_layers, config.experts) and int(model.dropped_of(aux)) == 0
    assert_trees_close(model.to_layers(floats(grads, params)), floats(expected_grads, tree), rtol=1e-10)


def test_a_step_has_no_conditional():
    config = small(**BOTH, shared_ends=True)
    schedule = jaxpipe.schedule.build("1f1b", 2, 4)
    model = build_model(config, schedule, 0, axis="ep", abstract=True)
    assert len(model.arrangement.stage_kinds) == 2
    step = jax.jit(pipeline(model, schedule, 2, 2, dispatch="loops"))
    text = step.lower(model.params, jax.eval_shape(lambda: make_batch(0, ROWS, config))).as_text()
    assert "stablehlo.if" not in text and "stablehlo.case" not in text


@pytest.mark.parametrize("changes", [{}, {"redundant": 0}, {"mtp": False}, {"dense_layers": 0}])
def test_parameters_go_into_the_order_of_the_model_and_back(changes):
    """Between any two schedules, as a checkpoint that one run writes and another reads."""
    config, rng = small(**{**BOTH, "shared_ends": False, **changes}), np.random.default_rng(0)

    def model_of(name, pp):
        return build_model(config, jaxpipe.schedule.build(name, pp, 2 * pp), 0, axis="ep", abstract=True)

    models = [model_of(*case) for case in (("gpipe", 1), ("1f1b", 3), ("dualpipev", 2), ("dualpipe", 4))]
    shapes = jax.eval_shape(models[0].to_layers, models[0].params)
    tree = jax.tree.map(lambda leaf: rng.integers(1, 99, leaf.shape).astype(leaf.dtype), shapes)
    for model in models:
        params = model.from_layers(tree)
        assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, model.params)
        assert jax.tree.structure(model.specs) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, model.to_layers(params), tree)
        moe = [part["moe"]["router"] for part in params.stages.values() if "moe" in part]
        assert sum(bool(router.any()) for stack in moe for router in stack) == config.routed_layers


@SLOW
def test_initial_parameters_do_not_depend_on_the_schedule():
    config = small(**BOTH)
    trees = []
    for name, pp in (("gpipe", 1), ("dualpipev", 2)):
        model = build_model(config, jaxpipe.schedule.build(name, pp, 2 * pp), 0, axis="ep")
        trees.append(jax.device_get(model.to_layers(model.params)))
    jax.tree.map(np.testing.assert_array_equal, *trees)
    outer, layers = trees[0]["outer"], trees[0]["layers"]
    blocks = [outer["layer_0"], outer["layer_1"], outer["mtp"]["block"]]
    every = [*(block["attention"]["out"] for block in blocks), *layers["attention"]["out"]]
    assert len({leaf.tobytes() for leaf in every}) == len(every) == 6  # each layer has a key of its own


def test_only_slots_with_such_layers_have_their_parameters():
    """Two dense layers and four with experts on two stages, and one of multi-token prediction."""
    config = small(**BOTH, layers=6, layer_costs=LayerCosts(dense=2.0, moe=1.0, mtp=2.0))
    model = build_model(config, jaxpipe.schedule.build("1f1b", 2, 4), 0, axis="ep", abstract=True)
    assert model.arrangement.rows == (("dense", "dense", "moe"), ("moe", "moe", "moe", "mtp"))
    parts = {name: sorted(set(part) & {"mlp", "moe"}) for name, part in model.params.stages.items()}
    assert parts == {
        "layer_0": ["mlp", "moe"], "layer_1": ["mlp", "moe"], "layer_2": ["moe"], "layer_3": ["moe"], "mtp": [],
    }  # fmt: skip
    apart = Arrangement((3, 2, 1), (2, 1, 0), ("dense", *("moe",) * 4, "mtp"))
    assert apart.slots_of(["dense"]) == [0] and apart.slots_of(["moe"]) == [1, 2] and apart.slots_of(["mtp"]) == [2]
    assert apart.layer_of.tolist() == [[-1, -1, 5], [-1, 3, 4], [0, 1, 2]]
    specs = model.specs.stages
    assert specs["layer_1"]["mlp"]["w_out"] == specs["mtp"]["project"] == P("pp", "ep")
    assert specs["mtp"]["norm"]["scale"] == specs["layer_0"]["attention"]["out"] == P("pp")


def test_on_one_device_layers_are_where_they_are_in_the_pipeline():
    """Where ends are shared the head costs the last stage nothing; on one device that must not change its layers."""
    config = small(dense_layers=1, layers=6, vocab=640, shared_ends=True)
    schedule = jaxpipe.schedule.build("1f1b", 2, 4)
    model = build_model(config, schedule, 0, axis="ep", abstract=True)
    alone = model.on_one_device()
    assert alone.axis is None and not alone.shared_ends and alone.arrangement == model.arrangement
    assert alone.params == model.params
    assert build_model(config, schedule, 0, abstract=True).arrangement != model.arrangement


def test_costs_decide_and_are_checked():
    schedule = jaxpipe.schedule.build("1f1b", 2, 4)

    def counts(axis=None, costs=None, **changes):
        config = small(**changes, layer_costs=None if costs is None else LayerCosts(**costs))
        return build_model(config, schedule, 0, axis=axis, abstract=True).arrangement.counts

    alike, head = {"dense_layers": 0, "shared_ends": False}, {"moe": 1.0, "head": 3.0}
    assert counts(**alike) == (3, 2) and counts(**alike, costs=head) == (4, 1)
    assert counts(**alike, costs=head, axis="ep") == (4, 1)
    assert counts(**alike, costs={**head, "embedding": 3.0}) in {(3, 2), (2, 3)}
    assert counts(**alike, costs={"moe": 1.0, "embedding": 3.0}) == (1, 4)
    shared = {**alike, "shared_ends": True}
    assert counts(**shared, costs={**head, "embedding": 9.0}, axis="ep") in {(3, 2), (2, 3)}
    assert counts(dense_layers=1, costs={"dense": 4.0, "moe": 1.0}) == (1, 4)
    for costs in ({"moe": 1.0}, {"moe": 1.0, "dense": 1.0, "mtp": 2.5}):
        with pytest.raises(ValueError, match=rf"{LayerCosts(**costs)} .* for each of \['dense', 'moe'\] and no other"):
            counts(dense_layers=1, costs=costs)
    for costs in ({"moe": 1.0, "dense": 0.0}, {"moe": float("inf")}, {"head": 1.0}, {"moe": 1.0, "head": -1.5}):
        with pytest.raises(ValueError, match=rf"{list(costs.values())[-1]}.*give a positive number for each kind"):
            LayerCosts(**costs)
    for text in ("moe", "moe=1,moe=2", "moe=1,expert=2", "moe=1,dense=x", "moe=1;dense=2"):
        with pytest.raises(ValueError, match=f"{text!r}: .*as in dense=1.5,moe=2"):
            LayerCosts.parse(text)


def test_what_passes_through_a_stage_is_not_kept():
    """The next tokens' embeddings, on their way to the last layer."""
    sizes = []
    for mtp in (False, True):
        costs = LayerCosts(dense=1.0, moe=1.0, **({"mtp": 1.0} if mtp else {"head": 1.0}))
        config = small(dense_layers=1, layers=3, mtp=mtp, layer_costs=costs)
        model = build_model(config, jaxpipe.schedule.build("1f1b", 2, 4), 0, abstract=True)
        row = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), model.params.stages)
        x = jax.ShapeDtypeStruct((2, 8, 16), jnp.float32)
        ctx = jaxpipe.Context(jnp.int32(0), jnp.int32(0), None, None)

        def stage(params, x, model=model, ctx=ctx):
            return model.stage_of(0)(params, x, ctx).value

        split = split_stage(stage, row, (x, x) if mtp else x)
        assert model.arrangement.rows[0] == ("dense", "moe")
        sizes.append(sorted(str(leaf) for leaf in (*split.residuals.input, *split.residuals.weight, *split.crossing)))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("remat", [False, True])
def test_matrices_in_parts_are_gathered_again_and_not_kept(x64, remat):
    """Loss, and gradients as parts, equal to those of whole matrices; residuals are smaller than one of them."""
    rng = np.random.default_rng(0)
    w_in, w_out, x = (jnp.asarray(rng.normal(size=size)) for size in ((64, 96), (48, 64), (4, 2, 64)))
    kept = []

    def layer(params, x):
        y = use_whole(feed_forward, x, params, "ep")
        return x + y

    def parts(w_in, w_out, x):
        run = jax.checkpoint(layer) if remat else layer
        split = split_stage(run, (w_in, w_out), x[0])
        kept.append(sum(leaf.size for leaf in (*split.residuals.input, *split.residuals.weight, *split.crossing)))
        prepared = split.prepare((w_in, w_out))
        y, residuals = split.forward(prepared, x[0])
        grads, dx = split.backward(prepared, residuals, y)
        return grads, dx[None]

    mesh = jax.make_mesh((4,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = P("ep"), P("ep"), P("ep")
    run = jax.shard_map(parts, mesh=mesh, in_specs=specs, out_specs=((P("ep"), P("ep")), P("ep")), check_vma=False)
    found = jax.jit(run)(w_in, w_out, x)
    assert kept[0] < w_out.size

    def whole(params, x):
        return 0.5 * ((x + feed_forward(x, *params)) ** 2).sum()

    expected = jax.grad(whole, argnums=(0, 1))((w_in, w_out), x)
    assert_trees_close(found, expected, rtol=1e-10)
