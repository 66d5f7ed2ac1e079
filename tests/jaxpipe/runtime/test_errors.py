"""Bad input is refused before anything is compiled, with the values and the remedy."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxpipe
from tests.jaxpipe.runtime import models


def build(name="dualpipev", ranks=2, microbatches=4):
    return jaxpipe.schedule.build(name, ranks, microbatches)


def make_step(schedule=None, mesh=None, stage=models.deepseek_stage, **options):
    functions = {"embed": models.deepseek_embed, "head": models.deepseek_head}
    return jaxpipe.value_and_grad(
        stage, schedule or build(), mesh or jaxpipe.make_mesh(pp=2), **{**functions, **options}
    )


def trace(step, params=None, batch=None):
    """Traces the step without compiling it."""
    schedule = build()
    params = models.deepseek_params(schedule, 8, 16) if params is None else params
    batch = models.deepseek_batch(schedule, 8, sequence=4) if batch is None else batch
    return jax.eval_shape(step, params, batch)


@pytest.mark.parametrize(
    "name, ranks, microbatches, words",
    [("dualpipe", 3, 12, "3.*even"), ("dualpipe", 4, 6, "6.*8"), ("dualpipev", 4, 7, "7.*8"), ("nope", 4, 8, "nope")],
)
def test_impossible_schedules(name, ranks, microbatches, words):
    with pytest.raises(ValueError, match=words):
        jaxpipe.schedule.build(name, ranks, microbatches)


def test_ranks_not_matching_the_mesh():
    with pytest.raises(ValueError, match=r"2 ranks, but mesh axis 'pp' has size 4.*pp=2"):
        make_step(mesh=jaxpipe.make_mesh(pp=4))


def test_unknown_axis():
    with pytest.raises(ValueError, match=r"the mesh has axes \{'pp': 2\} and not \['dp'\]"):
        make_step(data_axes=("dp",))


def test_explicit_axes():
    mesh = jax.make_mesh((2,), ("pp",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    with pytest.raises(ValueError, match=r"\['pp'\] are not Auto.*make_mesh"):
        make_step(mesh=mesh)


def test_mesh_larger_than_the_machine():
    with pytest.raises(ValueError, match=r"needs 4096 devices.*xla_force_host_platform_device_count=4096"):
        jaxpipe.make_mesh(pp=4096)


def test_batch_that_does_not_divide():
    batch = {"x": jnp.ones((10, 4, 8)), "target": jnp.ones((10, 4, 8))}
    with pytest.raises(ValueError, match=r"batch of 10 does not divide into 4 microbatches.*multiple of 4"):
        trace(make_step(), batch=batch)
    mesh = jaxpipe.make_mesh(pp=2, dp=2)
    batch = {"x": jnp.ones((12, 4, 8)), "target": jnp.ones((12, 4, 8))}
    with pytest.raises(ValueError, match=r"batch of 12 .* 2 data-parallel shards {'dp': 2}.*multiple of 8"):
        trace(make_step(mesh=mesh, data_axes=("dp",)), batch=batch)


def test_batch_leaves_of_different_lengths():
    with pytest.raises(ValueError, match=r"\(4, 4, 8\).*\(8, 4, 8\).*same leading"):
        trace(make_step(), batch={"x": jnp.ones((8, 4, 8)), "target": jnp.ones((4, 4, 8))})
    with pytest.raises(ValueError, match="no arrays"):
        trace(make_step(), batch={})


def test_stages_not_matching_the_schedule():
    params = models.deepseek_params(build("dualpipev", 3, 6), 8, 16)
    with pytest.raises(ValueError, match=r"stages\['down'\] has shape \(6, 16, 8\).*4 stages.*stack_stages"):
        trace(make_step(), params=params)
    with pytest.raises(ValueError, match=r"pass jaxpipe\.Params"):
        trace(make_step(), params={"stages": params.stages})
    with pytest.raises(ValueError, match="3 stages for schedule 'dualpipev', which has 4"):
        jaxpipe.stack_stages([1.0, 2.0, 3.0], build())


def test_stage_whose_output_is_not_like_its_input():
    def wider(params, x, ctx):
        return jnp.concatenate([x, x], -1)

    with pytest.raises(ValueError, match=r"maps float32\[3, 4, 8\] to float32\[3, 4, 16\].*embed.*head"):
        trace(make_step(stage=wider))

    def narrower(params, x, ctx):
        return x.astype(jnp.bfloat16)

    with pytest.raises(ValueError, match=r"maps float32\[3, 4, 8\] to bfloat16\[3, 4, 8\]"):
        trace(make_step(stage=narrower))


def test_losses_that_are_not_scalars():
    with pytest.raises(ValueError, match=r"loss of shape \(3, 4, 8\).*scalar"):
        trace(make_step(head=lambda outer, y, data, ctx: y))
    with pytest.raises(ValueError, match=r"aux_loss has shape \(8,\).*scalar"):
        trace(make_step(stage=lambda params, x, ctx: jaxpipe.Output(x, aux_loss=x[0, 0])))
    with pytest.raises(ValueError, match=r"neither.*head.*aux_loss"):
        trace(make_step(head=None))


def test_metrics_with_one_name_for_two_things():
    def stage(params, x, ctx):
        return jaxpipe.Output(models.deepseek_stage(params, x, ctx), metrics={"norm": x.mean()})

    def head(outer, y, data, ctx):
        return jaxpipe.Output(y.mean(), metrics={"norm": y.mean()})

    with pytest.raises(ValueError, match=r"\['norm'\].*rename"):
        trace(make_step(stage=stage, head=head))


def test_forward_outputs_without_the_batch_dimension():
    run = jaxpipe.forward(
        models.deepseek_stage,
        build(),
        jaxpipe.make_mesh(pp=2),
        embed=models.deepseek_embed,
        head=lambda outer, y, data, ctx: y.mean(),
    )
    with pytest.raises(ValueError, match=r"output of shape \(\) for a microbatch of 3"):
        trace(run)


def test_unknown_dispatch():
    with pytest.raises(ValueError, match=r"'branch'; choose one of .*'switch', 'loops', 'stretches', 'sequential'"):
        make_step(dispatch="branch")


def test_stage_specs_must_shard_rows_over_the_pipeline_axis():
    with pytest.raises(ValueError, match=r"\['up'\].*PartitionSpec.*start with 'pp'"):
        trace(make_step(specs=jaxpipe.Params({"up": P(), "down": P("pp")}, P())))
