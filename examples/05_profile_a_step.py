"""Profiles one DualPipeV step on 8 devices and lays it beside its simulation: python examples/05_profile_a_step.py.

Prints the report, and leaves a page for a browser and a file for ui.perfetto.dev in ``profile/``. On fake CPU devices,
which share a few cores, the order of things is real and the times are not.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import argparse
import pathlib

import jax
import jax.numpy as jnp

import jaxpipe
from profiling.read.pipeline import attribute, group_actions, measured_costs, pipeline_ranks
from profiling.read.timeline import read_timeline
from profiling.read.xplane import read_xplane
from profiling.recording import annotate_step, capture
from profiling.reports.html import write_html
from profiling.reports.making import report
from profiling.write.perfetto import write_perfetto

WIDTH, LAYERS, MICROBATCHES = 128, 2, 12


def stage(params, x, ctx):
    """Two layers; their names are all that the profiler needs."""
    for i in range(LAYERS):
        with jax.named_scope(f"layer_{i}"):
            with jax.named_scope("attention"):
                x = x + jnp.tanh(x @ params["mix"][i])
            with jax.named_scope("mlp"):
                x = x + jax.nn.gelu(x @ params["up"][i]) @ params["down"][i]
    return x


def head(outer, y, data, ctx):
    """Distance to the input."""
    return jnp.mean((y - data) ** 2)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("profile"))
out = parser.parse_args().out

ranks = 4 if jax.device_count() >= 4 else 1
mesh, schedule = jaxpipe.make_mesh(pp=ranks), jaxpipe.schedule.build("dualpipev", ranks, MICROBATCHES)
keys = jax.random.split(jax.random.key(0), 3)
stages = {
    "mix": jax.random.normal(keys[0], (2 * ranks, LAYERS, WIDTH, WIDTH)) * 0.05,
    "up": jax.random.normal(keys[1], (2 * ranks, LAYERS, WIDTH, 4 * WIDTH)) * 0.05,
    "down": jax.random.normal(keys[2], (2 * ranks, LAYERS, 4 * WIDTH, WIDTH)) * 0.05,
}
pipeline = jaxpipe.value_and_grad(stage, schedule, mesh, head=head)
step, params, batch = jax.jit(pipeline), jaxpipe.Params(stages), jnp.ones((MICROBATCHES * 64, WIDTH))
jax.block_until_ready(step(params, batch))

with capture(out, ranks=pipeline_ranks(mesh)), annotate_step(0):
    jax.block_until_ready(step(params, batch))

trace = attribute(read_xplane(out), pipeline.program, pipeline_ranks(mesh))
actions = group_actions(trace, pipeline.program, pipeline_ranks(mesh))
predicted = read_timeline(jaxpipe.schedule.simulate(schedule, measured_costs(actions)))
found = report(actions, predicted)
print(found.text())
write_html(out / "report.html", found)
write_perfetto(out / "step.pftrace", trace)

assert {event.device for event in trace.events} == {device.id for device in mesh.devices.flat}
assert len([event for event in actions.events if event.phase in "FBIWFB"]) > 0
