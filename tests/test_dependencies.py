"""What is imported where: the packages work without Flax, Optax and SciPy, which only some of their modules use."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

WITHOUT = """
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flax", "optax", "scipy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Without())
import jax.numpy as jnp
import numpy as np
"""

PROGRAMS = {
    "jaxpipe": """
import jaxpipe
schedule = jaxpipe.schedule.build("dualpipev", 1, 2)
step = jaxpipe.value_and_grad(
    lambda weight, x, context: x * weight,
    schedule,
    jaxpipe.make_mesh(pp=1),
    embed=lambda outer, data, context: outer * data,
    head=lambda outer, y, data, context: y.sum(),
)
weights = jaxpipe.stack_stages([jnp.float32(3), jnp.float32(2)], schedule)
(loss, aux), grads = step(jaxpipe.Params(stages=weights, outer=jnp.ones(())), jnp.ones((4, 2)))
assert float(loss) == 24 and sorted(grads.stages.tolist()) == [8, 12], (loss, grads)
""",
    "eplb_jax": """
import eplb_jax
loads = np.array([[9, 1, 1, 1]])
for plan in (eplb_jax.rebalance_experts, eplb_jax.balanced, eplb_jax.no_duplicate):
    assert eplb_jax.gpu_loads(plan(loads, 6, 1, 1, 2), loads, 2).sum() == 12
routing = eplb_jax.route(jnp.eye(4), eplb_jax.RouterConfig(4, 2, 1, 1))
assert routing.loads.sum() == 8, routing
""",
    "profiling": """
import jaxpipe, profiling
timeline = jaxpipe.schedule.simulate(jaxpipe.schedule.build("dualpipev", 2, 4))
text = profiling.report(profiling.read_timeline(timeline)).text()
assert "bubble" in text, text
""",
}


@pytest.mark.parametrize("package", PROGRAMS)
def test_packages_work_without_flax_optax_and_scipy(package):
    command = [sys.executable, "-W", "error", "-c", WITHOUT + PROGRAMS[package]]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
