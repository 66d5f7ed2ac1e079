"""What users of `jax.value_and_grad` get wrong: a sentence of ours each time, and what means the same is accepted."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe import Params

W, X = jnp.ones((2, 4, 4)) / 4, jnp.ones((8, 4))
SCHEDULE = jaxpipe.schedule.build("1f1b", 2, 4)


def stage(w, x, ctx):
    return x @ w


def mse(outer, y, data, ctx):
    return jnp.mean(y**2)


def make(stage=stage, schedule=SCHEDULE, mesh=None, head=mse, **options):
    return jaxpipe.value_and_grad(stage, schedule, mesh or jaxpipe.make_mesh(pp=2), head=head, **options)


def trace(params=None, batch=X, rng=None, **options):
    """Traces a step without compiling it; what is no array stays as it is."""
    step = make(**options)
    return jax.eval_shape(lambda: step(Params(W) if params is None else params, batch, rng))


def explicit(**sizes):
    count = int(np.prod(list(sizes.values())))
    kinds = (AxisType.Explicit,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=jax.devices()[:count])


def device(index):
    if jax.device_count() <= index:
        pytest.skip(f"needs {index + 1} devices, there are {jax.device_count()}")
    return jax.devices()[index]


def on(mesh, spec, array):
    return jax.device_put(array, NamedSharding(mesh, spec))


def under_an_explicit_mesh():
    with jax.set_mesh(explicit(pp=2)):
        return trace()


def inside_a_shard_map():
    mesh = jaxpipe.make_mesh(pp=2)
    function = jax.shard_map(lambda w: make()(Params(w), X)[0][0], mesh=mesh, in_specs=P(), out_specs=P())
    return jax.eval_shape(function, W)


def with_specs(stages, outer=None, **options):
    return functools.partial(trace, specs=Params(stages, outer), **options)


@pytest.mark.parametrize("outer", [None, (), {}, {"nothing": []}], ids=repr)
@pytest.mark.parametrize("specs", [None, Params(P("pp"), P()), Params(P("pp"))], ids=repr)
def test_what_has_no_leaves_needs_no_spec(outer, specs):
    (loss, _), grads = trace(params=Params(W, outer), specs=specs)
    assert loss.shape == () and grads.outer == outer and grads.stages.shape == W.shape


MISTAKES = {
    "schedule by name": (lambda: make(schedule="zbv"), r"schedule is 'zbv'.*build\('zbv', num_ranks"),
    "no schedule": (lambda: make(schedule=None), r"schedule is None.*schedule\.build"),
    "builder": (lambda: make(schedule=jaxpipe.schedule.dualpipe), r"schedule is <function dualpipe.*schedule\.build"),
    "program": (lambda: make(schedule=make().program), r"a Program.*its \.schedule"),
    "no mesh": (lambda: jaxpipe.value_and_grad(stage, SCHEDULE, None), r"mesh is None.*make_mesh\(pp=2\)"),
    "mesh of devices": (lambda: make(mesh=jax.devices()), r"mesh is \[.*make_mesh"),
    "axis": (lambda: make(axis=["pp"]), r"axis=\['pp'\].*one of \['pp'\]"),
    "data axes": (lambda: make(data_axes=None), r"data_axes=None.*\('dp',\)"),
    "dtype": (lambda: make(compute_dtype="bf16"), r"compute_dtype='bf16'.*bfloat16"),
    "integer dtype": (lambda: make(compute_dtype=jnp.int8), r"compute_dtype=.*floating"),
    "costs": (lambda: make(costs=(1, 2, 1)), r"costs=\(1, 2, 1\).*Costs\(forward"),
    "order": (lambda: make(order="rows"), r"order='rows'; choose one of \('model', 'storage'\)"),
    "no stage": (lambda: make(stage=None), r"stage is None.*stage\(params, x, ctx\)"),
    "stage without ctx": (lambda: make(stage=lambda w, x: x @ w), r"stage takes \(w, x\).*stage\(params, x, ctx\)"),
    "module": (lambda: make(stage=nnx.Linear(4, 4, rngs=nnx.Rngs(0))), r"stage takes \(inputs.*is called as"),
    "head of two": (lambda: make(head=lambda y, target: 0.0), r"head takes \(y, target\).*head\(outer, y, data, ctx\)"),
    "weight of two": (lambda: make(weight=lambda data, ctx: 1.0), r"weight takes .*weight\(data\)"),
    "embed is an array": (lambda: make(embed=W), r"embed is Array.*embed\(outer, data, ctx\)"),
    "specs are a dict": (lambda: make(specs={"stages": P("pp")}), r"specs is \{'stages'.*Params\(stages=\.\.\., outer"),
    "specs with another leaf": (with_specs({"w": P("pp"), "b": P("pp")}, params=Params({"w": W})),
                                r"specs\.stages\['b'\] is for no parameter: there are \.stages\['w'\]"),
    "specs without a leaf": (with_specs({"w": P("pp")}, params=Params({"w": W, "b": W})),
                             r"params\.stages\['b'\] has no PartitionSpec.*\.stages\['w'\]"),
    "a spec as text": (with_specs("pp"), r"specs\.stages is 'pp', not a PartitionSpec"),
    "a spec of another mesh": (lambda: with_specs(NamedSharding(jaxpipe.make_mesh(pp=4), P("pp")))(),
                               r"mesh of \{'pp': 4\}, the pipeline over one of \{'pp': 2\}"),
    "a spec of no axis": (with_specs(P("pp", "tp")), r"specs\.stages is P.*'tp'.*axes of the mesh, \{'pp': 2\}"),
    "a spec with an axis twice": (with_specs(P("pp", "pp")), "each at most once"),
    "a long spec": (with_specs(P("pp", None, None, None)), r"params\.stages has shape \(2, 4, 4\).*4 dimensions"),
    "a spec that does not divide": (
        lambda: with_specs(P("pp", "tp"), mesh=jaxpipe.make_mesh(pp=2, tp=3), replicated_axes="tp")(),
        r"shape \(2, 4, 4\).*divides 4 over \{'tp': 3\}.*multiple of 3"),
    "batch over ranks": (lambda: make(batch_spec=P("pp")), r"batch_spec is P.*same on all devices of \['pp'\]"),
    "batch spec as text": (lambda: make(batch_spec="dp"), "batch_spec is 'dp', not a PartitionSpec"),
    "batch spec of no axis": (lambda: make(batch_spec=P("dp")), r"batch_spec is P.*\{'pp': 2\}"),
    "a long batch spec": (lambda: trace(batch_spec=P(None, None, None)), r"microbatch of batch has shape \(2, 4\)"),
    "a batch that does not divide": (
        lambda: trace(
            mesh=jaxpipe.make_mesh(pp=2, sp=4), data_axes="sp", batch_spec=P(None, "sp"), batch=jnp.ones((16, 6))
        ),
        r"microbatch of batch has shape \(4, 6\).*6 over \{'sp': 4\}"),
    "text in the batch": (lambda: trace(batch={"x": X, "name": "train"}), r"batch\['name'\] is 'train', a str"),
    "objects": (lambda: trace(batch=np.array([None] * 8)), r"batch is array\(\[None.*ndarray of object"),
    "lists of numbers": (lambda: trace(batch=[[1.0, 2.0]] * 8), r"batch\[0\]\[0\] is 1\.0.*np\.asarray"),
    "an integer as key": (lambda: trace(rng=0), r"rng is 0: pass one key, such as jax\.random\.key"),
    "keys": (lambda: trace(rng=jax.random.split(jax.random.key(0))), r"rng is .*pass one key"),
    "nnx.Rngs": (lambda: trace(rng=nnx.Rngs(0)), "pass one key"),
    "params as a dict": (lambda: trace(params={"stages": W}), r"params is a dict; pass jaxpipe\.Params"),
    "a list of stages": (lambda: trace(params=Params([W[0], W[1]])), r"params\.stages\[0\] has shape .*stack_stages"),
    "text in params": (lambda: trace(params=Params({"w": W, "kind": "mlp"})), r"stages\['kind'\] is 'mlp', a str"),
    "arguments swapped": (lambda: trace(params=X, batch=Params(W)), r"params is a \w+; pass jaxpipe\.Params"),
    "an Explicit mesh around": (under_an_explicit_mesh, r"mesh is \{'pp': '.*Explicit'\}.*outside of jax\.set_mesh"),
    "a shard_map around": (inside_a_shard_map, r"mesh is \{'pp': '.*Manual'\}.*outside of"),
    "an array of an Explicit mesh": (lambda: trace(batch=on(explicit(dp=2), P("dp"), X)),
                                     r"\['batch'\] is on a mesh of \{'dp': 2\} with Explicit axes.*device_put"),
    "an array on one device": (
        lambda: make()(Params(jax.device_put(W, device(7))), X),
        r"\['params'\]\.stages is on devices \[7\], and the pipeline runs on \[0, 1\].*device_put",
    ),
    "a mesh of fractions": (lambda: jaxpipe.make_mesh(pp=2.0), r"pp=2\.0: it must be an integer of at least 1"),
    "a mesh of nothing": (jaxpipe.make_mesh, "needs an axis"),
    "a fraction of microbatches": (lambda: jaxpipe.schedule.build("1f1b", 2, 4.0), r"num_microbatches=4\.0.*integer"),
    "stages that differ": (lambda: jaxpipe.stack_stages([{"w": W[0]}, {"w": W[1, :2]}], SCHEDULE),
                           r"parameters 1 have .*float32\[2, 4\].*parameters 0 .*float32\[4, 4\].*alike"),
    "a stack of too many": (lambda: jaxpipe.stack_stages(jnp.ones((3, 4)), SCHEDULE), r"shape \(3, 4\).*2 stages"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(mistake):
    run, words = MISTAKES[mistake]
    with pytest.raises(ValueError, match=f"(?s){words}"):
        run()


def differentiate(kind):
    mesh = jaxpipe.make_mesh(pp=2)
    step, run = make(), jaxpipe.forward(stage, SCHEDULE, mesh)
    return {
        "loss": lambda w: step(Params(w), X)[0][0],
        "loss under jit": lambda w: jax.jit(step)(Params(w), X)[0][0],
        "gradients": lambda w: step(Params(w), X)[1].stages.sum(),
        "outputs": lambda w: run(Params(w), X)[0].sum(),
        "one rank": lambda w: make(schedule=jaxpipe.schedule.build("zbv", 1, 4), mesh=jaxpipe.make_mesh(pp=1))(
            Params(w), X
        )[0][0],
    }[kind]


@pytest.mark.parametrize("kind", ["loss", "loss under jit", "gradients", "outputs", "one rank"])
def test_reverse_differentiation_names_the_gradients(kind):
    words = "jaxpipe.value_and_grad, whose head" if kind == "outputs" else "(loss, aux), grads = step(params, batch)"
    with pytest.raises(ValueError, match=re.escape(words)):
        jax.eval_shape(jax.grad(differentiate(kind)), W)


def test_forward_differentiation_and_vmap_work():
    """The loss is of degree 4 in two equal layers together; its derivative along the parameters is 4 times itself."""
    loss = differentiate("loss")
    values, tangents = jax.jit(jax.vmap(lambda w: jax.jvp(loss, (w,), (w,))))(jnp.stack([W, 2 * W]))
    np.testing.assert_allclose(values, [1, 16], rtol=1e-6)
    np.testing.assert_allclose(tangents, 4 * values, rtol=1e-6)


SAME = {
    "NamedShardings": lambda mesh: Params(NamedSharding(mesh, P("pp")), NamedSharding(mesh, P())),
    "no outer": lambda mesh: Params(P("pp")),
    "no stages": lambda mesh: Params(None, P()),
    "none for a leaf": lambda mesh: Params(None, {"scale": None}),
    "none": lambda mesh: None,
}


@pytest.mark.parametrize("specs", SAME)
def test_specs_that_mean_the_default(specs):
    mesh, params = jaxpipe.make_mesh(pp=2), Params(W, {"scale": jnp.float32(3)})

    def head(outer, y, data, ctx):
        return outer["scale"] * jnp.mean(y**2)

    step = jax.jit(make(mesh=mesh, head=head, specs=SAME[specs](mesh)))
    (loss, _), grads = step(params, X)
    assert float(loss) == 3 and float(grads.outer["scale"]) == 1
    assert grads.stages.sharding.spec == P("pp")


def test_one_axis_may_stand_alone():
    mesh = jaxpipe.make_mesh(pp=2, dp=2)
    assert make(mesh=mesh, data_axes="dp").axes.data == ("dp",)
    assert make(mesh=mesh, data_axes=["dp"]).axes.data == ("dp",)


def test_meshes_that_are_the_pipelines_own():
    mesh = jaxpipe.make_mesh(pp=2)
    with jax.set_mesh(mesh):
        jax.eval_shape(make(mesh=mesh), Params(W), X)
    trace(params=Params(on(explicit(pp=2), P("pp"), W)))  # the same axes, Explicit


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, jnp.int32])
def test_integers_of_any_kind(kind):
    for name in jaxpipe.schedule.BUILDERS:
        assert jaxpipe.schedule.build(name, kind(2), kind(4)) == jaxpipe.schedule.build(name, 2, 4)
    assert jaxpipe.schedule.interleaved(2, 4, kind(3)) == jaxpipe.schedule.interleaved(2, 4, 3)
    assert type(jaxpipe.schedule.build("zbv", kind(2), kind(4)).num_microbatches) is int
    assert jaxpipe.make_mesh(pp=kind(2)).shape == {"pp": 2}


def test_reprs_are_one_line_and_modules_have_names():
    step = make(schedule=jaxpipe.schedule.build("dualpipev", 2, 64), dispatch="loops")
    run = jaxpipe.forward(stage, jaxpipe.schedule.build("gpipe", 2, 4), jaxpipe.make_mesh(pp=2))
    assert repr(step) == "<jaxpipe.Pipeline dualpipev_2x64 on {'pp': 2}, dispatch='loops'>"
    assert repr(step.program.schedule) == "<Schedule 'dualpipev': 4 stages on 2 ranks, 64 microbatches>"
    assert repr(step.program).startswith("<Program of <Schedule 'dualpipev'") and len(repr(step.program)) < 120
    assert repr(run).startswith("<jaxpipe.Pipeline gpipe_2x4_forward on")
    assert "module @jit_gpipe_2x4_forward " in jax.jit(run).lower(Params(W), X).as_text()
