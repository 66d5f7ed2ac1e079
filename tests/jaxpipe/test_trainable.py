"""Frozen parameters: the others' gradients are the plain program's, and nothing is left of theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpipe
from jaxpipe.stage import split_stage
from jaxpipe.stage.graph import scan_counts
from jaxpipe.trainable import trainable_mask
from tests.cases import cases
from tests.jaxpipe.runtime.models import token_batch, token_embed, token_head, token_params, token_stage, token_weight
from tests.jaxprs import equations
from tests.plain import assert_trees_close, plain_value_and_grad

MODEL = {"embed": token_embed, "head": token_head, "weight": token_weight}
MASKS = {
    "one leaf of a stage": (lambda path, leaf: path == ".stages['w']", [".stages['w']"]),
    "outer": (jaxpipe.Params(stages=False), [".outer['embedding']", ".outer['scale']"]),
    "bias and scale": (
        jaxpipe.Params({"w": False, "b": True}, {"embedding": np.False_, "scale": True}),
        [".stages['b']", ".outer['scale']"],
    ),
}


def pipeline(name="dualpipev", ranks=2, **options):
    schedule = jaxpipe.schedule.build(name, ranks, 4)
    return jaxpipe.value_and_grad(token_stage, schedule, jaxpipe.make_mesh(pp=ranks), **MODEL, **options)


@cases(
    ("name", "ranks"),
    [("1f1b", 1), pytest.param("dualpipe", 2, marks=pytest.mark.slow), ("zb1p", 2)],
    quick=[("zb1p", 2)],
)
@cases("mask", MASKS, quick=["one leaf of a stage", "bias and scale"])
def test_gradients_are_the_plain_programs(x64, name, ranks, mask):
    """DualPipe's second copies have none to return either."""
    trainable, trained = MASKS[mask]
    step = pipeline(name, ranks, trainable=trainable)
    schedule, key = step.program.schedule, jax.random.key(0)
    params, batch = token_params(schedule), token_batch(8)
    (loss, _), grads = jax.jit(step)(params, batch, key)
    (expected, _), expected_grads = plain_value_and_grad(token_stage, schedule, **MODEL)(params, batch, key)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    expected_grads = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if jax.tree_util.keystr(path) in trained else np.zeros(leaf.shape, jax.dtypes.float0),
        expected_grads,
    )
    assert_trees_close(grads, expected_grads, rtol=1e-10)
    mask = jax.tree_util.tree_leaves_with_path(step.trainable_mask(params))
    assert {jax.tree_util.keystr(path) for path, leaf in mask if leaf} == set(trained)


def adapted(params, x, ctx):
    """A frozen matrix beside an adapter of rank 2."""
    return jnp.tanh(x @ params["w"] + (x @ params["a"]) @ params["b"])


def adapted_params(stages, width=12, rank=2):
    rng = np.random.default_rng(0)
    shapes = {"w": (width, width), "a": (width, rank), "b": (rank, width)}
    return {name: jnp.asarray(rng.normal(size=(stages, *shape)) / 4) for name, shape in shapes.items()}


def is_adapter(path, leaf):
    return "['w']" not in path


def test_no_weight_products_and_no_buffers_are_left(x64):
    """No product makes the frozen matrix's shape, none is carried by the loop, and none is reduced."""
    schedule, mesh = jaxpipe.schedule.build("zb1p", 2, 4), jaxpipe.make_mesh(pp=2, dp=2)
    params, batch = jaxpipe.Params(adapted_params(2)), jnp.ones((24, 12))

    def head(outer, y, data, ctx):
        return (y**2).mean()

    def found(trainable):
        step = jaxpipe.value_and_grad(adapted, schedule, mesh, head=head, data_axes=("dp",), trainable=trainable)
        traced = jax.make_jaxpr(step)(params, batch)
        kinds = {}
        for eqn, around in equations(traced):
            for var in (eqn.outvars, eqn.invars)[eqn.primitive.name == "scan"]:
                if var.aval.shape[-2:] == (12, 12):
                    kinds.setdefault(eqn.primitive.name, []).append(around)
        (loop,) = (eqn for eqn, _ in equations(traced) if eqn.primitive.name == "scan" and eqn.params["length"] > 4)
        carried = [v.aval.shape for v in loop.invars[scan_counts(loop)[0] :]]
        return kinds, carried

    every, carried = found(None)
    assert "dot_general" in every and "psum" in every and (12, 12) in carried
    some, carried = found(is_adapter)
    assert "dot_general" not in some and "psum" not in some and (12, 12) not in carried
    assert "add" not in some and "broadcast_in_dim" not in some


def test_work_of_a_stage_is_its_adapters(x64):
    """FLOPs: the input half is as before, and the weight half has the adapters' products alone."""
    params, x = jax.tree.map(lambda leaf: leaf[0], adapted_params(1)), jnp.ones((3, 12))
    mask = {"w": False, "a": True, "b": True}
    split = split_stage(lambda p, x: adapted(p, x, None), params, x, trainable=mask)

    def products(function, *args):
        return sum(
            2 * np.prod(eqn.outvars[0].aval.shape) * eqn.invars[0].aval.shape[eqn.params["dimension_numbers"][0][0][0]]
            for eqn, _ in equations(jax.make_jaxpr(function)(*args))
            if eqn.primitive.name == "dot_general"
        )

    prepared = split.prepare(params)
    y, residuals = split.forward(prepared, x)
    dx, crossing = split.backward_input(prepared, residuals, jnp.ones_like(y))
    grads = split.backward_weight(prepared, residuals.weight, crossing)
    _, pull = jax.vjp(lambda p, x: adapted(p, x, None), params, x)
    expected, expected_dx = pull(jnp.ones_like(y))
    assert grads["w"] is None
    assert_trees_close(grads, {**expected, "w": None}, rtol=1e-12)
    assert_trees_close(dx, expected_dx, rtol=1e-12)
    adapters = 3 * 12 * 2
    assert products(split.backward_input, prepared, residuals, y) == 2 * (3 * 12 * 12 + 2 * adapters)
    assert products(split.backward_weight, prepared, residuals.weight, crossing) == 2 * 3 * adapters - 2 * adapters
    assert split.backward(prepared, residuals, jnp.ones_like(y))[0]["w"] is None
    assert not split.opaque


def test_frozen_masters_in_the_compute_dtype():
    """Nothing is lost: the working copy is the same."""
    schedule, mesh = jaxpipe.schedule.build("1f1b", 2, 4), jaxpipe.make_mesh(pp=2)

    def head(outer, y, data, ctx):
        return (y.astype(jnp.float32) ** 2).mean()

    step = jax.jit(
        jaxpipe.value_and_grad(adapted, schedule, mesh, head=head, trainable=is_adapter, compute_dtype=jnp.bfloat16)
    )
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), adapted_params(2))
    narrow = params | {"w": params["w"].astype(jnp.bfloat16)}
    results = [step(jaxpipe.Params(each), jnp.ones((8, 12))) for each in (params, narrow)]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *(r[0] for r in results)))
    assert bool((results[0][1].stages["a"] == results[1][1].stages["a"]).all())


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(optax.adamw(0.1, weight_decay=0.5), marks=pytest.mark.slow),
        optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, 0.9)),
    ],
)
def test_optimizers_have_no_state_for_frozen_parameters(x64, optimizer):
    trainable = jaxpipe.Params({"w": False, "b": True}, {"embedding": False, "scale": True})
    step = pipeline(trainable=trainable)
    params, batch = token_params(step.program.schedule), token_batch(8)
    before = params
    guarded = jaxpipe.floating_only(optimizer, trainable=step.trainable_mask(params))
    state = guarded.init(params)
    assert {leaf.shape for leaf in jax.tree.leaves(state)} <= {
        (),
        params.stages["b"].shape,
        params.outer["scale"].shape,
    }

    @jax.jit
    def train(params, state):
        _, grads = step(params, batch, jax.random.key(0))
        with jax.numpy_dtype_promotion("standard"):  # optax promotes
            updates, state = guarded.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(2):
        params, state = train(params, state)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before, params)
    assert same == jaxpipe.Params({"w": True, "b": False}, {"embedding": True, "scale": False})
    wrong = jaxpipe.floating_only(optimizer)
    with pytest.raises(ValueError, match=r"\.stages\['w'\] has no gradient, since it is frozen"):
        wrong.update(jax.jit(step)(before, batch, jax.random.key(0))[1], wrong.init(before), before)


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        (True, r"trainable is True: pass jaxpipe\.Params"),
        (int, "from_nnx takes types of variables"),
        (jaxpipe.Params(stages=1), r"trainable\.stages is 1: say True"),
        (jaxpipe.Params({"v": True}), "a tree like the parameters, or a prefix"),
        (jaxpipe.Params(False, False), r"leaves no floating parameter to train, of \.stages\['b'\], "),
        (lambda path, leaf: leaf.ndim, r"trainable\(\"\.stages\['b'\]\", leaf\) is 2: say True"),
    ],
)
def test_what_is_no_mask_is_refused(trainable, message):
    with pytest.raises(ValueError, match=message):
        step = pipeline(trainable=trainable)
        params = token_params(step.program.schedule)
        jax.eval_shape(step, params, token_batch(8), jax.random.key(0))


def test_integers_are_never_trained():
    params = jaxpipe.Params({"w": jnp.ones(2), "rows": jnp.arange(2)})
    assert trainable_mask(None, params) == jaxpipe.Params({"w": True, "rows": False})
    assert trainable_mask(lambda path, leaf: True, params) == jaxpipe.Params({"w": True, "rows": False})
