"""Fully sharded data parallelism: the plain program's numbers; shards between uses, and messages where they belong."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe import layer_split
from jaxpipe.flax import layered_stages
from profiling import check_collectives
from tests.cases import cases
from tests.jaxprs import equations
from tests.plain import assert_trees_close, plain_value_and_grad

WIDTH, HIDDEN, VOCABULARY, MICROBATCHES = 8, 16, 12, 4
OPTIONS = {"data_axes": ("dp",), "fsdp_axis": "dp", "min_shard_size": 20}


def layer(params, x, ctx):
    """A residual MLP; biases are too small to divide."""
    hidden = jnp.tanh(x @ params["up"] + params["bias"])
    return jaxpipe.Output(x + hidden @ params["down"], aux_loss=(hidden**2).mean(), metrics={"calls": jnp.int32(1)})


def embed(outer, data, ctx):
    return outer["table"][data]


def head(outer, y, data, ctx):
    return jnp.mean(jax.nn.log_softmax(y @ outer["table"].T)[..., 0] * outer["scale"])


def make(schedule, layered, count=1):
    """(stage, params, batch); ``layered``: layers that do not divide over the stages, ``count`` a stage or fewer."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5)

    def one():
        leaves = {"up": normal(WIDTH, HIDDEN), "bias": normal(HIDDEN), "down": normal(HIDDEN, WIDTH)}
        return {**leaves, "index": jnp.arange(64)}

    outer = {"table": normal(VOCABULARY, WIDTH), "scale": jnp.asarray(2.0)}
    batch = jnp.asarray(rng.integers(0, VOCABULARY, (MICROBATCHES * 8, 3)))
    if layered:
        stage, stages = layered_stages(layer, [one() for _ in range(count * schedule.num_stages - 1)], schedule)
    else:
        stage, stages = layer, jaxpipe.stack_stages([one() for _ in range(schedule.num_stages)], schedule)
    return stage, jaxpipe.Params(stages, outer), batch


@cases(
    ("name", "ranks", "dispatch", "layered"),
    [
        ("dualpipev", 2, "stretches", False),
        ("zb1p", 2, "switch", True),
        ("zb1p", 2, "by_rank", True),
        ("1f1b", 1, "unrolled", True),
        *(
            pytest.param(*case, layered, marks=pytest.mark.slow)
            for case in (("1f1b", 2, "sequential"), ("dualpipe", 2, "sequential"), ("zbv", 2, "loops"))
            for layered in (False, True)
        ),
    ],
    quick=[("dualpipev", 2, "stretches", False), ("1f1b", 1, "unrolled", True)],
)
def test_fsdp_equals_the_plain_program(x64, name, ranks, dispatch, layered):
    """Loss, auxiliary loss, metrics and gradients; these come back divided as the parameters are."""
    schedule = jaxpipe.schedule.build(name, ranks, MICROBATCHES)
    mesh = jaxpipe.make_mesh(pp=ranks, dp=8 // ranks)
    stage, params, batch = make(schedule, layered, 2)
    ends = {"embed": embed, "head": head}
    step = jaxpipe.value_and_grad(stage, schedule, mesh, dispatch=dispatch, **ends, **OPTIONS)
    shardings = step.shardings(params)
    compiled = jax.jit(step).lower(jax.device_put(params, shardings), batch).compile()
    check_collectives(compiled.as_text(), mesh)
    (loss, aux), grads = compiled(jax.device_put(params, shardings), batch)
    (expected_loss, expected_aux), expected = plain_value_and_grad(stage, schedule, **ends)(params, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    np.testing.assert_allclose(aux["aux_loss"], expected_aux["aux_loss"], rtol=1e-12)
    assert_trees_close(grads, expected, rtol=1e-10)
    for grad, sharding in zip(jax.tree.leaves(grads), jax.tree.leaves(shardings), strict=True):
        assert grad.dtype == jax.dtypes.float0 or grad.sharding.is_equivalent_to(sharding, grad.ndim)


def trace(fsdp=True, compute_dtype=None):
    """(equation, primitives around it) of a step of layers in float32."""
    schedule = jaxpipe.schedule.build("zb1p", 2, MICROBATCHES)
    stage, params, batch = make(schedule, True, 2)
    options = OPTIONS if fsdp else {"data_axes": ("dp",)}
    ends = {"embed": embed, "head": head}
    mesh = jaxpipe.make_mesh(pp=2, dp=4)
    step = jaxpipe.value_and_grad(stage, schedule, mesh, compute_dtype=compute_dtype, **ends, **options)
    return list(equations(jax.make_jaxpr(step)(params, batch)))


def of_loops(found):
    """Shapes of what loops return."""
    return {var.aval.shape for eqn, _ in found if eqn.primitive.name in ("scan", "while") for var in eqn.outvars}


@pytest.mark.parametrize("layers", ["in a loop", "written out"])
def test_whole_parameters_live_in_the_layer_that_uses_them(layers, monkeypatch):
    """No loop carries one or stacks one for another; W gathers none, and reduces its sums where they are made."""
    if layers == "in a loop":
        monkeypatch.setattr(layer_split, "MOST_UNROLLED", 1)
    found = trace()
    whole = {(WIDTH, HIDDEN), (HIDDEN, WIDTH)}
    assert not {shape[-2:] for shape in of_loops(found)} & whole
    assert {shape[-2:] for shape in of_loops(trace(fsdp=False))} >= whole  # sums of gradients
    for name, of_layers, of_ends in (("all_gather", 2 * ["F", "I"], 3), ("reduce_scatter", 2 * ["W"], 2)):
        places = [around for eqn, around in found if eqn.primitive.name == name]
        inner = [around for around in places if around[:4] == ("shard_map", "scan", "while", "scan")]
        if layers == "in a loop":
            assert len(inner) == len(of_layers) and len(places) - len(inner) == of_ends
        else:
            assert not inner and len(places) == 2 * len(of_layers) + of_ends
        assert all(around[:3] == ("shard_map", "scan", "while") for around in places)
    once = [eqn for eqn, around in found if eqn.primitive.name.startswith("psum") and around == ("shard_map",)]
    assert (1, 2, HIDDEN) in {var.aval.shape for eqn in once for var in eqn.outvars}  # biases are whole
    assert not [eqn for eqn in once for var in eqn.outvars if var.aval.shape[-2:] == (WIDTH, HIDDEN // 4)]


def test_messages_have_the_compute_dtype_and_sums_32_bits():
    found = trace(compute_dtype=jnp.bfloat16)
    for name, dtype in (("all_gather", jnp.bfloat16), ("reduce_scatter", jnp.float32)):
        eqns = [eqn for eqn, _ in found if eqn.primitive.name == name]
        assert eqns and all(eqn.invars[0].aval.dtype == dtype for eqn in eqns)
    (scan,) = [eqn for eqn, around in found if eqn.primitive.name == "scan" and around == ("shard_map",)][-1:]
    sums = [var.aval for var in scan.outvars if var.aval.shape == (2, WIDTH, HIDDEN // 4)]
    assert [aval.dtype for aval in sums] == [jnp.float32]


def test_gathers_stay_in_their_branches_when_compiled():
    """Shards are the same in all steps, and XLA would gather them before the loop, if nothing held it back."""
    schedule = jaxpipe.schedule.build("1f1b", 2, MICROBATCHES)
    mesh = jaxpipe.make_mesh(pp=2, dp=4)

    def stage(params, x, ctx):
        return x + jnp.tanh(x @ params["up"]) @ params["down"]

    params = jaxpipe.Params({"up": jnp.ones((2, WIDTH, HIDDEN)), "down": jnp.ones((2, HIDDEN, WIDTH))})
    head = lambda outer, y, data, ctx: (y**2).mean()  # noqa: E731
    step = jaxpipe.value_and_grad(stage, schedule, mesh, head=head, dispatch="loops", **OPTIONS)
    forward = jaxpipe.forward(stage, schedule, mesh, dispatch="loops", **OPTIONS)
    for function, gathers in ((step, 4), (forward, 2)):
        text = jax.jit(function).lower(params, jnp.ones((32, WIDTH))).compile().as_text()
        entry = text[text.index("\nENTRY ") :]
        assert len(re.findall(r"all-gather(?:-start)?\(", text)) >= gathers
        assert not re.findall(r"all-gather(?:-start)?\(", entry)
    np.testing.assert_allclose(
        forward(params, jnp.ones((32, WIDTH)))[0][0],
        stage(
            jax.tree.map(lambda w: w[0], params.stages),
            stage(jax.tree.map(lambda w: w[0], params.stages), jnp.ones(WIDTH), None),
            None,
        ),
        rtol=1e-5,
    )


def test_axes_specs_and_ends_together(x64):
    """Fsdp over two axes beside a compiler's and an expert's; outer parameters sharded over the pipeline, too."""
    schedule = jaxpipe.schedule.build("dualpipev", 2, MICROBATCHES)
    mesh = jaxpipe.make_mesh(pp=2, dp=2, ep=2)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / shape[-2] ** 0.5)

    def stage(params, x, ctx, of_expert=None):
        """Each device's expert takes its own half of the width of all tokens; written for one device or for ep."""
        expert = params["expert"]
        if of_expert is None:
            y = jnp.concatenate([x[..., 0:4] @ expert[0], x[..., 4:8] @ expert[1]], axis=-1)
        else:
            tokens = jax.lax.all_to_all(x, "ep", 2, 0, tiled=True)
            y = jax.lax.all_to_all(tokens @ expert[0], "ep", 0, 2, tiled=True)
        return x + jnp.tanh(y @ params["mix"])

    def split(outer, data, ctx):
        first = jax.lax.axis_index("pp") * 8
        return jax.lax.psum(jax.lax.dynamic_slice_in_dim(data, first, 8, -1) @ outer["in"], "pp")

    def whole(outer, data, ctx):
        return data @ outer["in"]

    def head(outer, y, data, ctx):
        return (y**2).mean()

    params = jaxpipe.Params({"expert": normal(4, 2, 4, 4), "mix": normal(4, 8, 8)}, {"in": normal(16, 8)})
    batch = jnp.asarray(rng.normal(size=(MICROBATCHES * 8, 3, 16)))
    specs = jaxpipe.Params({"expert": P("pp", "ep"), "mix": None}, P("pp"))
    step = jaxpipe.value_and_grad(
        lambda *args: stage(*args, of_expert=True), schedule, mesh, embed=split, head=head, specs=specs,
        data_axes=("dp", "ep"), fsdp_axis=("dp", "ep"), min_shard_size=0, shared_ends=True,
    )  # fmt: skip
    found = jax.tree.map(lambda sharding: sharding.spec, step.shardings(params))
    assert found.stages == {"expert": P("pp", "ep", "dp"), "mix": P("pp", ("dp", "ep"))}
    assert found.outer == {"in": P("pp", ("dp", "ep"))}
    (loss, _), grads = jax.jit(step)(params, batch)
    (expected_loss, _), expected = plain_value_and_grad(stage, schedule, embed=whole, head=head)(params, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    assert_trees_close(grads, expected, rtol=1e-10)


def test_beside_the_compilers_tensor_parallelism(x64):
    """The largest dimension that the spec leaves whole is divided, never the one of layers."""
    schedule = jaxpipe.schedule.build("1f1b", 2, MICROBATCHES)
    mesh = jaxpipe.make_mesh(pp=2, dp=2, tp=2)
    stage, params, batch = make(schedule, True, 2)
    tensor = {"up": P("pp", None, None, "tp"), "down": P("pp", None, "tp"), "bias": None, "index": None}
    specs = jaxpipe.Params(tensor, None)
    step = jaxpipe.value_and_grad(stage, schedule, mesh, embed=embed, head=head, specs=specs, **OPTIONS)
    found = jax.tree.map(lambda sharding: sharding.spec, step.shardings(params)).stages
    assert found["up"] == P("pp", None, "dp", "tp") and found["down"] == P("pp", None, "tp", "dp")
    compiled = jax.jit(step).lower(params, batch).compile()
    check_collectives(compiled.as_text(), mesh)
    (loss, _), grads = compiled(params, batch)
    (expected_loss, _), expected = plain_value_and_grad(stage, schedule, embed=embed, head=head)(params, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    assert_trees_close(grads, expected, rtol=1e-10)


def test_microbatches_of_unequal_weight(x64):
    """Some of weight 0 on some devices and not on others: gradients for all are summed in each microbatch."""
    schedule = jaxpipe.schedule.build("1f1b", 2, MICROBATCHES)
    stage, params, batch = make(schedule, False)
    batch = batch.at[4:12].set(0)
    functions = {"embed": embed, "head": head, "weight": lambda data: (data > 0).sum()}
    step = jaxpipe.value_and_grad(stage, schedule, jaxpipe.make_mesh(pp=2, dp=2), **functions, **OPTIONS)
    (loss, _), grads = jax.jit(step)(params, batch)
    eighths = jaxpipe.schedule.build("1f1b", 2, 2 * MICROBATCHES)  # whose microbatches are those of one device
    (expected_loss, _), expected = plain_value_and_grad(stage, eighths, **functions)(params, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    assert_trees_close(grads, expected, rtol=1e-10)


def test_what_is_not_sharded_is_told():
    schedule = jaxpipe.schedule.build("1f1b", 2, MICROBATCHES)
    mesh = jaxpipe.make_mesh(pp=2, dp=4)
    stages = {"w": jnp.ones((2, 16, 16)), "odd": jnp.ones((2, 15, 15)), "own": jnp.ones((2, 16, 16))}
    stages |= {"small": jnp.ones((2, 16)), "index": jnp.ones((2, 99), jnp.int32)}
    specs = jaxpipe.Params({"w": None, "odd": None, "own": P("pp", "dp"), "small": None, "index": None})
    options = {"data_axes": ("dp",), "fsdp_axis": "dp", "min_shard_size": 100, "specs": specs}
    step = jaxpipe.value_and_grad(layer, schedule, mesh, **options)
    told = step.not_sharded(jaxpipe.Params(stages, jnp.ones(3)))
    assert told == {
        ".stages['index']": "it is int32, not floating",
        ".stages['odd']": f"of its shape (2, 15, 15), {P('pp')} leaves no dimension from 1 on whole that 4 divides",
        ".stages['own']": f"its PartitionSpec {P('pp', 'dp')} names ['dp'] already",
        ".stages['small']": "its 16 elements are fewer than min_shard_size=100",
        ".outer": "its 3 elements are fewer than min_shard_size=100",
    }
    assert jaxpipe.value_and_grad(layer, schedule, mesh).not_sharded(jaxpipe.Params(jnp.ones((2, 1)))) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp_axis": "dp"}, r"fsdp_axis='dp': name axes of data_axes, \[\] here.*such as data_axes=\('dp',\)"),
        ({"fsdp_axis": ("dp", "dp"), "data_axes": "dp"}, "each once"),
        ({"fsdp_axis": 3, "data_axes": "dp"}, "fsdp_axis=3: give names"),
        ({"min_shard_size": -1}, "min_shard_size=-1: it must be an integer of at least 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    schedule, mesh = jaxpipe.schedule.build("1f1b", 2, MICROBATCHES), jaxpipe.make_mesh(pp=2, dp=2)
    with pytest.raises(ValueError, match=message):
        jaxpipe.value_and_grad(layer, schedule, mesh, head=head, **options)
