"""Pipelines beside other mesh axes: data, tensor and expert parallelism."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpipe
from profiling import check_collectives
from tests.cases import cases
from tests.jaxpipe.runtime import models
from tests.jaxprs import equations
from tests.plain import assert_trees_close, plain_value_and_grad


def expert_stage(axis):
    """A stage with one expert a device: rows of tokens go round by all_to_all. ``axis`` None: all experts here."""

    def stage(params, x, ctx):
        if axis is None:
            tokens = x.reshape(len(params["expert"]), -1, len(params["expert"]), *x.shape[1:])
            y = jnp.einsum("dresh,ehk->dresk", jnp.moveaxis(tokens, 2, 2), params["expert"])
            y = jnp.tanh(y).reshape(x.shape)
        else:
            count = jax.lax.axis_size(axis)
            sent = jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)
            here = jax.lax.all_to_all(sent, axis, 0, 0)
            here = jnp.tanh(jnp.einsum("drsh,hk->drsk", here, params["expert"][0]))
            back = jax.lax.all_to_all(here, axis, 0, 0)
            y = jnp.moveaxis(back, 0, 1).reshape(x.shape)
        return x + y * params["scale"]

    return stage


def moe_params(schedule, experts, seed=0):
    rng = np.random.default_rng(seed)
    width = models.WIDTH
    stages = [
        {
            "expert": jnp.asarray(rng.normal(size=(experts, width, width)) / width**0.5),
            "scale": jnp.asarray(rng.normal(size=width)),
        }
        for _ in range(schedule.num_stages)
    ]
    return jaxpipe.Params(jaxpipe.stack_stages(stages, schedule), {"out": jnp.asarray(rng.normal(size=width))})


def moe_head(outer, y, data, ctx):
    return jnp.mean((y @ outer["out"]) ** 2)


@cases("name", ["1f1b", "zb1p", "zbv", "dualpipe", "dualpipev"], quick=["dualpipev"])
def test_all_to_all_inside_the_stage_beside_data_parallelism(x64, name):
    """pp=2, dp=2, ep=2: experts sharded over ep, tokens over dp and ep."""
    schedule = jaxpipe.schedule.build(name, 2, 4)
    mesh = jaxpipe.make_mesh(pp=2, dp=2, ep=2)
    params = moe_params(schedule, experts=2)
    batch = jnp.asarray(np.random.default_rng(5).normal(size=(4 * 2 * 2 * 2, 3, models.WIDTH)))
    step = jaxpipe.value_and_grad(
        expert_stage("ep"),
        schedule,
        mesh,
        head=moe_head,
        data_axes=("dp", "ep"),
        specs=jaxpipe.Params({"expert": P("pp", "ep"), "scale": P("pp")}, P()),
    )
    (loss, _), grads = jax.jit(step)(params, batch)
    # Of every two rows, row e goes to expert e: the same in any grouping of the batch into pairs of rows.
    (expected_loss, _), expected = plain_value_and_grad(expert_stage(None), schedule, head=moe_head)(params, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    assert_trees_close(grads, expected, rtol=1e-10)


@cases(
    "name",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("zb1p", "dualpipe")), "1f1b", "dualpipev"],
    quick=["dualpipev"],
)
def test_compiler_sharded_matmuls_inside_the_stage(x64, name):
    """pp=4, tp=2: the compiler shards the hidden dimension and adds the all-reduces."""
    schedule = jaxpipe.schedule.build(name, 4, 8)
    mesh = jaxpipe.make_mesh(pp=4, tp=2)
    specs = jaxpipe.Params({"up": P("pp", None, "tp"), "down": P("pp", "tp", None)}, P())

    def stage(params, x, ctx):
        hidden = jax.nn.gelu(x @ params["up"])
        hidden = jax.lax.with_sharding_constraint(hidden, P(None, None, "tp"))
        return hidden @ params["down"]

    params = models.deepseek_params(schedule, 16, 32)
    batch = models.deepseek_batch(schedule, 16, sequence=4)
    functions = {"embed": models.deepseek_embed, "head": models.deepseek_head}
    placed = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params.stages, specs.stages
    )
    step = jax.jit(jaxpipe.value_and_grad(stage, schedule, mesh, specs=specs, **functions))
    step = step.lower(jaxpipe.Params(placed), batch).compile()
    (loss, _), grads = step(jaxpipe.Params(placed), batch)
    (expected_loss, _), expected = plain_value_and_grad(models.deepseek_stage, schedule, **functions)(params, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    assert_trees_close(grads, expected, rtol=1e-10)
    for grad, param in zip(jax.tree.leaves(grads), jax.tree.leaves(placed), strict=True):
        assert grad.sharding.is_equivalent_to(param.sharding, grad.ndim)
    assert "all-reduce" in step.as_text()


def test_tensor_parallelism_by_hand(x64):
    """pp=2, tp=2, both manual: psum inside the stage, the batch replicated over tp."""
    schedule = jaxpipe.schedule.build("zb1p", 2, 4)

    def stage(params, x, ctx):
        return jax.lax.psum(jax.nn.gelu(x @ params["up"]) @ params["down"], "tp")

    params = models.deepseek_params(schedule, 16, 32)
    batch = models.deepseek_batch(schedule, 16, sequence=4)
    functions = {"embed": models.deepseek_embed, "head": models.deepseek_head}
    step = jaxpipe.value_and_grad(
        stage,
        schedule,
        jaxpipe.make_mesh(pp=2, tp=2),
        replicated_axes=("tp",),
        specs=jaxpipe.Params({"up": P("pp", None, "tp"), "down": P("pp", "tp", None)}, P()),
        **functions,
    )
    (loss, _), grads = jax.jit(step)(params, batch)
    (expected_loss, _), expected = plain_value_and_grad(models.deepseek_stage, schedule, **functions)(params, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    assert_trees_close(grads, expected, rtol=1e-10)


@pytest.mark.parametrize("manual", [True, False])
def test_data_parallel_mean_is_over_all_real_tokens(x64, manual):
    """Masks differ between data-parallel shards; dp handled by hand or by the compiler."""
    schedule = jaxpipe.schedule.build("dualpipev", 2, 4)
    params, batch = models.token_params(schedule), models.token_batch(32)

    def stage(params, x, ctx):
        return {"h": x["h"] + jnp.tanh(x["h"] @ params["w"] + params["b"]), "position": x["position"]}

    functions = {"embed": models.token_embed, "head": models.token_head, "weight": models.token_weight}
    mesh = jaxpipe.make_mesh(pp=2, dp=2)
    axes = {"data_axes": ("dp",)} if manual else {"batch_spec": P("dp")}
    (loss, aux), grads = jax.jit(jaxpipe.value_and_grad(stage, schedule, mesh, **axes, **functions))(params, batch)
    (expected_loss, expected_aux), expected = plain_value_and_grad(stage, schedule, **functions)(params, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    assert int(aux["correct"]) == int(expected_aux["correct"])
    assert_trees_close(grads, expected, rtol=1e-10)


def test_data_parallel_gradients_are_reduced_once_after_the_loop(x64):
    """No all-reduce inside the scan over steps."""
    schedule = jaxpipe.schedule.build("1f1b", 2, 4)
    step = jaxpipe.value_and_grad(
        models.deepseek_stage,
        schedule,
        jaxpipe.make_mesh(pp=2, dp=2),
        embed=models.deepseek_embed,
        head=models.deepseek_head,
        data_axes=("dp",),
    )
    params = models.deepseek_params(schedule, 8, 16)
    batch = models.deepseek_batch(schedule, 8, sequence=4, microbatch=2)
    jaxpr = jax.make_jaxpr(step)(params, batch)
    in_scan = ["scan" in around for eqn, around in equations(jaxpr) if eqn.primitive.name.startswith("psum")]
    assert in_scan and not any(in_scan)


def test_parameters_sharded_over_the_batch_axis_by_the_compiler_are_refused():
    """FSDP by specs alone: the message has the recipe of the next test, for the parameter at hand."""
    schedule = jaxpipe.schedule.build("zb1p", 2, 4)
    params, batch = (
        models.deepseek_params(schedule, 16, 32),
        models.deepseek_batch(schedule, 16, microbatch=4, sequence=4),
    )
    functions = {"embed": lambda outer, data, ctx: data["x"] * outer["scale"], "head": models.deepseek_head}
    params = params._replace(outer={"scale": jnp.ones(16)})
    stages, mesh = {"up": P("pp"), "down": P("pp", None, ("tp", "dp"))}, jaxpipe.make_mesh(pp=2, dp=2, tp=2)

    def trace(specs, mesh=mesh, **options):
        step = jaxpipe.value_and_grad(models.deepseek_stage, schedule, mesh, specs=specs, **functions, **options)
        return jax.eval_shape(step, params, batch)

    recipe = r"data_axes=\('dp',\) and fsdp_axis='dp'.*all_gather\(parameter, 'dp', axis=1, tiled=True\)"
    with pytest.raises(ValueError, match=r"specs\.stages\['down'\] is P.*for ever.*" + recipe):
        trace(jaxpipe.Params(stages, P()), batch_spec=P("dp"))
    outer = jaxpipe.Params(P("pp"), {"scale": P("dp")})
    with pytest.raises(ValueError, match=r"specs\.outer\['scale'\] is P.*axis=0, tiled"):
        trace(outer, batch_spec=P("dp"))
    trace(outer, batch_spec=P("dp"), shared_ends=True)  # all ranks run embed together
    trace(jaxpipe.Params(stages, P()))  # the axes do not divide the batch
    trace(jaxpipe.Params(stages, P()), mesh=jaxpipe.make_mesh(pp=2, dp=1, tp=2), batch_spec=P("dp"))
    trace(jaxpipe.Params(P("pp", None, "tp"), P()), batch_spec=P("dp"))


@cases(
    "name, order",
    [("1f1b", "model"), ("dualpipev", "model"), ("dualpipe", "storage")],
    quick=[("dualpipe", "storage")],
)
def test_parameters_sharded_over_the_batch_axis_by_hand(x64, name, order):
    """pp=2, dp=2, tp=2: FSDP, gathered in the stage, beside the compiler's tensor parallelism; gradients divided."""
    schedule = jaxpipe.schedule.build(name, 2, 4)
    mesh = jaxpipe.make_mesh(pp=2, dp=2, tp=2)

    def stage(params, x, ctx):
        up = jax.lax.all_gather(params["up"], "dp", axis=0, tiled=True)
        down = jax.lax.all_gather(params["down"], "dp", axis=1, tiled=True)
        return jax.nn.gelu(x @ up) @ down

    stacked = models.deepseek_params(schedule, 16, 32).stages
    batch = models.deepseek_batch(schedule, 16, microbatch=4, sequence=4)
    functions = {"embed": models.deepseek_embed, "head": models.deepseek_head}
    specs = jaxpipe.Params({"up": P("pp", "dp", "tp"), "down": P("pp", "tp", "dp")}, P())
    step = jaxpipe.value_and_grad(stage, schedule, mesh, data_axes=("dp",), specs=specs, order=order, **functions)
    params = jaxpipe.Params(jaxpipe.stack_stages(stacked, schedule, order))
    compiled = jax.jit(step).lower(params, batch).compile()
    check_collectives(compiled.as_text(), mesh)
    (loss, _), grads = compiled(params, batch)
    plain = plain_value_and_grad(models.deepseek_stage, schedule, **functions)
    (expected_loss, _), expected = plain(jaxpipe.Params(stacked), batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    for stage, wanted in zip(
        jaxpipe.unstack_stages(grads.stages, schedule, order),
        jaxpipe.unstack_stages(expected.stages, schedule),
        strict=True,
    ):
        assert_trees_close(stage, wanted, rtol=1e-10)
    assert grads.stages["up"].sharding.spec == P("pp", "dp", "tp")
