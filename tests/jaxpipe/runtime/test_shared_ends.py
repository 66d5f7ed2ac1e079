"""Embedding and head run by all pipeline ranks together: the plain program's numbers, whatever is sharded."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe import vocabulary
from tests.cases import cases
from tests.jaxpipe.runtime import models
from tests.plain import assert_trees_close, compiled_plain

SHARDED = jaxpipe.Params(P("pp"), {"embedding": P("pp"), "scale": P()})
GRID = [
    pytest.param("gpipe", 2, 4, marks=pytest.mark.slow),
    pytest.param("1f1b", 4, 8, marks=pytest.mark.slow),
    pytest.param("interleaved", 4, 8, marks=pytest.mark.slow),
    ("zb1p", 4, 8),
    pytest.param("zbv", 4, 8, marks=pytest.mark.slow),
    ("dualpipe", 4, 8),
    ("dualpipev", 1, 2),
    ("dualpipev", 3, 6),
    pytest.param("dualpipev", 4, 10, marks=pytest.mark.slow),
]


def sharded_embed(outer, data, ctx):
    h = vocabulary.embed_tokens(outer["embedding"], data["tokens"], "pp")
    return {"h": h, "position": jnp.arange(models.SEQUENCE)}


def mean_loss(losses, scale, data):
    """A masked mean, and a term of a replicated parameter that no collective touches."""
    loss = (losses * data["mask"]).sum() / data["mask"].sum() + 0.1 * (scale**2).sum()
    return jaxpipe.Output(loss, metrics={"summed": (losses * data["mask"]).sum(), "tokens": data["mask"].sum()})


def sharded_head(outer, y, data, ctx):
    """Cross-entropy against the tied embedding, its rows sharded over the pipeline."""
    h = y["h"] * outer["scale"]
    losses = vocabulary.cross_entropy(h, outer["embedding"], data["targets"], "pp", size=models.VOCAB)
    return mean_loss(losses, outer["scale"], data)


def autodiff_head(outer, y, data, ctx):
    """The same with plain collectives, differentiated by JAX."""
    logits = (y["h"] * outer["scale"]) @ outer["embedding"].T
    rows = len(outer["embedding"])
    index = jax.lax.axis_index("pp") * rows + jnp.arange(rows, dtype=jnp.int32)
    logits = jnp.where(index < models.VOCAB, logits, -1e30)
    largest = jax.lax.pmax(jax.lax.stop_gradient(logits).max(-1), "pp")
    total = jax.lax.psum(jnp.exp(logits - largest[..., None]).sum(-1), "pp")
    found = jax.lax.psum(jnp.where(data["targets"][..., None] == index, logits, 0.0).sum(-1), "pp")
    return mean_loss(largest + jnp.log(total) - found, outer["scale"], data)


def plain_head(outer, y, data, ctx):
    logits = (y["h"] * outer["scale"]) @ outer["embedding"][: models.VOCAB].T
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), data["targets"][..., None], -1)[..., 0]
    return mean_loss(losses, outer["scale"], data)


def padded_params(schedule):
    """Parameters of the token model, the vocabulary padded to divide over the ranks."""
    params = models.token_params(schedule)
    table = vocabulary.pad_vocabulary(params.outer["embedding"], schedule.num_ranks)
    return params._replace(outer={**params.outer, "embedding": table})


def compare(schedule, params, batch, mesh, *, specs, stage=models.token_stage, embed=sharded_embed,
            head=sharded_head, plain=(models.token_embed, plain_head), rng=None, **options):  # fmt: skip
    """Runs pipeline and plain program; asserts equality of everything; returns the pipeline's gradients."""
    step = jaxpipe.value_and_grad(
        stage, schedule, mesh, embed=embed, head=head, specs=specs, shared_ends=True, **options
    )
    (loss, aux), grads = jax.jit(step)(params, batch, rng)
    expected = compiled_plain(
        stage,
        schedule.num_stages,
        schedule.num_microbatches,
        embed=plain[0],
        head=plain[1],
        weight=options.get("weight"),
    )
    (expected_loss, expected_aux), expected_grads = expected(params, batch, rng)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-10)
    for name, value in aux.items():
        np.testing.assert_allclose(value, expected_aux[name], rtol=1e-10, err_msg=name)
    assert_trees_close(grads, expected_grads, rtol=1e-10)
    return grads


@cases("name, ranks, microbatches", GRID, quick=[("zb1p", 4, 8), ("dualpipev", 1, 2)])
def test_every_schedule_equals_the_plain_program(x64, name, ranks, microbatches):
    """Tied, padded and sharded embedding, dropout, auxiliary losses, metrics, masks and integer activations."""
    schedule = jaxpipe.schedule.build(name, ranks, microbatches)
    mesh = jaxpipe.make_mesh(pp=ranks)
    grads = compare(
        schedule,
        padded_params(schedule),
        models.token_batch(2 * microbatches),
        mesh,
        specs=SHARDED,
        weight=models.token_weight,
        rng=jax.random.key(3),
    )
    assert grads.outer["embedding"].sharding.is_equivalent_to(NamedSharding(mesh, P("pp")), 2)
    assert not grads.outer["embedding"][models.VOCAB :].any()


def token_stage(params, x, ctx):
    """The token model's stage without dropout, whose keys differ between data-parallel devices."""
    h = x["h"] + jnp.tanh(x["h"] @ params["w"] + params["b"])
    return jaxpipe.Output({"h": h, "position": x["position"]}, metrics={"mean": h.sum()})


@cases(
    "name, manual",
    [
        ("1f1b", True),
        ("zb1p", True),
        ("interleaved", True),
        ("dualpipe", True),
        ("dualpipev", True),
        ("dualpipev", False),
    ],
    quick=[("dualpipev", True), ("dualpipev", False)],
)
def test_beside_data_parallelism(x64, name, manual):
    """pp=4, dp=2; masks differ between data-parallel shards, dp is handled by hand or by the compiler."""
    schedule = jaxpipe.schedule.build(name, 4, 8)
    compare(
        schedule,
        padded_params(schedule),
        models.token_batch(32),
        jaxpipe.make_mesh(pp=4, dp=2),
        stage=token_stage,
        head=sharded_head_without_scale,
        plain=(models.token_embed, plain_head_without_scale),
        specs=SHARDED,
        weight=models.token_weight,
        **({"data_axes": ("dp",)} if manual else {"batch_spec": P("dp")}),
    )


def without_scale(head, outer, *args):
    """Without the term of the replicated parameter: the mean over halves of a microbatch weighs it by their masks."""
    output = head(outer, *args)
    return output._replace(value=output.value - 0.1 * (outer["scale"] ** 2).sum())


sharded_head_without_scale = functools.partial(without_scale, sharded_head)
plain_head_without_scale = functools.partial(without_scale, plain_head)


@pytest.mark.parametrize(
    "embed, head, outer",
    [
        (sharded_embed, autodiff_head, P("pp")),
        pytest.param(models.token_embed, plain_head, P(), marks=pytest.mark.slow),  # every rank does all of it
        (sharded_embed, lambda outer, y, data, ctx: plain_head(gather(outer), y, data, ctx), P("pp")),
    ],
    ids=["collectives", "replicated", "gathered"],
)
def test_any_way_of_sharing_counts_once(x64, embed, head, outer):
    """Gradients through psum, of parameters that every rank uses alike, and through all_gather."""
    schedule = jaxpipe.schedule.build("dualpipe", 2, 4)
    specs = jaxpipe.Params(P("pp"), {"embedding": outer, "scale": P()})
    mesh = jaxpipe.make_mesh(pp=2)
    compare(schedule, padded_params(schedule), models.token_batch(8), mesh, specs=specs, embed=embed, head=head,
            rng=jax.random.key(0))  # fmt: skip


def gather(outer):
    return {**outer, "embedding": jax.lax.all_gather(outer["embedding"], "pp", tiled=True)}


@cases(
    ("name", "dispatch"),
    [("1f1b", "stretches"), *(("dualpipev", name) for name in ("stretches", "switch", "loops", "sequential"))],
    quick=[("1f1b", "stretches")],
)
def test_dispatchers_agree(x64, name, dispatch):
    schedule = jaxpipe.schedule.build(name, 2, 4)
    compare(schedule, padded_params(schedule), models.token_batch(8), jaxpipe.make_mesh(pp=2), specs=SHARDED,
            rng=jax.random.key(0), dispatch=dispatch)  # fmt: skip


@pytest.mark.parametrize("name", ["gpipe", "interleaved", "dualpipe", "dualpipev"])
def test_forward_only(x64, name):
    """Logits gathered over the pipeline, beside data parallelism."""
    schedule = jaxpipe.schedule.build(name, 2, 4)
    params, batch = padded_params(schedule), models.token_batch(16)

    def head(outer, y, data, ctx):
        logits = jax.lax.all_gather(y["h"] @ outer["embedding"].T, "pp", axis=2, tiled=True)
        return {"logits": logits, "positive": logits[..., 0] > 0}

    run = jaxpipe.forward(
        token_stage, schedule, jaxpipe.make_mesh(pp=2, dp=2), embed=sharded_embed, head=head, specs=SHARDED,
        data_axes=("dp",), shared_ends=True,
    )  # fmt: skip
    outputs, metrics = jax.jit(run)(params, batch)
    x = models.token_embed(params.outer, batch, None)
    total = 0
    for stage in jaxpipe.unstack_stages(params.stages, schedule):
        x, _, stage_metrics = token_stage(stage, x, None)
        total += stage_metrics["mean"]
    logits = x["h"] @ params.outer["embedding"].T
    np.testing.assert_allclose(outputs["logits"], logits, rtol=1e-12)
    np.testing.assert_array_equal(outputs["positive"], logits[..., 0] > 0)
    np.testing.assert_allclose(metrics["mean"], total, rtol=1e-12)


def test_forward_only_without_ends(x64):
    schedule = jaxpipe.schedule.build("dualpipe", 2, 4)
    params, batch = models.deepseek_params(schedule, 8, 16), models.deepseek_batch(schedule, 8, sequence=4)["x"]
    run = jaxpipe.forward(models.deepseek_stage, schedule, jaxpipe.make_mesh(pp=2), shared_ends=True)
    outputs, _ = jax.jit(run)(params, batch)
    for stage in jaxpipe.unstack_stages(params.stages, schedule):
        batch = models.deepseek_stage(stage, batch, None)
    np.testing.assert_allclose(outputs, batch, rtol=1e-12)


def test_without_head_or_embed(x64):
    def stage(params, x, ctx):
        y = models.deepseek_stage(params, x, ctx)
        return jaxpipe.Output(y, aux_loss=jnp.mean(y**2))

    schedule = jaxpipe.schedule.build("dualpipe", 2, 4)
    params, batch = models.deepseek_params(schedule, 8, 16), models.deepseek_batch(schedule, 8, sequence=4)
    mesh = jaxpipe.make_mesh(pp=2)
    scaled = jaxpipe.Params(params.stages, {"scale": jnp.linspace(0.5, 1.5, 8)})

    def embed(outer, data, ctx):
        return data["x"] * outer["scale"]

    def head(outer, y, data, ctx):
        return jnp.mean(y * jnp.cos(data))

    run = functools.partial(compare, schedule, mesh=mesh, specs=None, stage=stage)
    run(scaled, batch, embed=embed, head=None, plain=(embed, None))
    run(params, batch["x"], embed=None, head=head, plain=(None, head))


def test_bfloat16_compute():
    """In bfloat16 the gradients differ from those of lone ends by its rounding alone."""
    schedule = jaxpipe.schedule.build("zb1p", 2, 4)
    params, batch = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf,
        (padded_params(schedule), models.token_batch(8)),
    )

    def head(outer, y, data, ctx):
        losses = vocabulary.cross_entropy(y["h"], outer["embedding"], data["targets"], "pp", size=models.VOCAB)
        return losses.mean()

    def plain(outer, y, data, ctx):
        logits = jnp.matmul(y["h"], outer["embedding"][: models.VOCAB].T, preferred_element_type=jnp.float32)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), data["targets"][..., None], -1).mean()

    def stage(params, x, ctx):
        return {"h": x["h"] + jnp.tanh(x["h"] @ params["w"] + params["b"]), "position": x["position"]}

    make = functools.partial(
        jaxpipe.value_and_grad, stage, schedule, jaxpipe.make_mesh(pp=2), compute_dtype=jnp.bfloat16
    )
    shared = make(embed=sharded_embed, head=head, specs=SHARDED, shared_ends=True)
    (loss, _), grads = jax.jit(shared)(params, batch)
    (expected_loss, _), expected = jax.jit(make(embed=models.token_embed, head=plain))(params, batch)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    for grad, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert grad.dtype == jnp.float32
        assert np.linalg.norm(grad - other) <= 1e-2 * np.linalg.norm(other)


def test_steps_compile_once_and_do_not_grow_with_the_microbatches():
    def step(microbatches):
        schedule = jaxpipe.schedule.build("dualpipev", 2, microbatches)
        run = jaxpipe.value_and_grad(
            models.token_stage, schedule, jaxpipe.make_mesh(pp=2), embed=sharded_embed, head=sharded_head,
            specs=SHARDED, shared_ends=True,
        )  # fmt: skip
        return jax.jit(run), padded_params(schedule), models.token_batch(2 * microbatches)

    run, params, batch = step(4)
    specs = jaxpipe.Params(jax.tree.map(lambda _: P("pp"), params.stages), SHARDED.outer)
    mesh = jaxpipe.make_mesh(pp=2)
    params = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params, specs)
    for seed in range(3):
        _, grads = run(params, batch, jax.random.key(seed))
        params = jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, params, grads)
    assert run._cache_size() == 1
    sizes = []
    for microbatches in (8, 32):
        run, params, batch = step(microbatches)
        sizes.append(len(run.lower(params, batch, jax.random.key(0)).as_text().splitlines()))
    assert abs(sizes[1] - sizes[0]) <= 0.02 * sizes[0]


def test_scopes_name_the_ends():
    """What a profile knows them by, one branch each."""
    schedule = jaxpipe.schedule.build("dualpipe", 2, 4)
    run = jaxpipe.value_and_grad(
        token_stage, schedule, jaxpipe.make_mesh(pp=2), embed=sharded_embed, head=sharded_head, specs=SHARDED,
        shared_ends=True,
    )  # fmt: skip
    text = jax.jit(run).lower(padded_params(schedule), models.token_batch(8)).as_text(debug_info=True)
    ends = {i: branch[0][0].value for i, branch in enumerate(run.program.branches) if branch and len(branch) == 1}
    ends = {i: name for i, name in ends.items() if name in "EHG"}
    assert sorted(ends.values()) == ["E", "G", "H"]
    assert set(re.findall(r"branch_(\d+)/together/([EHG])/", text)) == {(str(i), name) for i, name in ends.items()}


def test_ends_that_need_all_ranks_are_refused_where_one_runs_them():
    schedule = jaxpipe.schedule.build("1f1b", 2, 4)
    params, batch = padded_params(schedule), models.token_batch(8)
    make = functools.partial(jaxpipe.value_and_grad, token_stage, schedule, jaxpipe.make_mesh(pp=2))
    with pytest.raises(ValueError, match=r"specs.outer\['embedding'\] is .*'pp'.*shared_ends=True"):
        jax.eval_shape(make(embed=models.token_embed, head=plain_head, specs=SHARDED), params, batch)
    with pytest.raises(ValueError, match=r"embed uses mesh axis 'pp'.*shared_ends=True"):
        jax.eval_shape(make(embed=sharded_embed, head=plain_head), params, batch)
    with pytest.raises(ValueError, match=r"head uses mesh axis 'pp'.*shared_ends=True"):
        jax.eval_shape(make(embed=models.token_embed, head=sharded_head), params, batch)
    run = jaxpipe.forward(
        token_stage, schedule, jaxpipe.make_mesh(pp=2), embed=models.token_embed,
        head=lambda outer, y, data, ctx: jax.lax.psum(y["h"], "pp"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"head uses mesh axis 'pp'.*shared_ends=True"):
        jax.eval_shape(run, params, batch)
