"""The shapes in the library's annotations are executed: a wrong one is an error under test, if only there."""

import importlib
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import eplb_jax
from eplb_jax.moe.experts import ExpertParams, swiglu

shapes = pytest.importorskip("tests.shapes", reason="needs the package beartype", exc_type=ImportError)

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_wrong_shapes_are_refused():
    with pytest.raises(jaxtyping.TypeCheckError, match=r"swiglu(.|\n)*parameter 'weight'"):
        swiglu(jnp.ones((4, 6)), jnp.ones(1))
    with pytest.raises(jaxtyping.TypeCheckError, match=r"ExpertParams(.|\n)*parameter 'w_out'"):
        ExpertParams(jnp.ones((2, 3, 8)), jnp.ones((2, 4, 5)))


def test_results_of_wrong_shapes_are_refused():
    @shapes.checked
    def halved(x: jaxtyping.Float[jax.Array, " rows"]) -> jaxtyping.Float[jax.Array, " rows"]:
        return x[::2]

    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        halved(jnp.ones(4))


def test_what_users_see_comes_first():
    """A function that refuses what its annotation refuses does so by its own error."""
    with pytest.raises(ValueError, match=r"it must be \[layers, experts\]"):
        eplb_jax.rebalance_experts(np.ones(8), 8, 1, 1, 8)


def test_lists_are_loads():
    assert eplb_jax.rebalance_experts([[3, 1]], 2, 1, 1, 2).logcnt.tolist() == [[1, 1]]


def test_jax_may_make_anything_of_a_pytree():
    params = ExpertParams(jnp.ones((2, 3, 8)), jnp.ones((2, 4, 3)))
    assert jax.tree.map(lambda leaf: leaf[None, 0, 0, 0], params).w_in.shape == (1,)
    assert jax.tree.map(lambda leaf: "a sharding", params).w_out == "a sharding"


def test_all_modules_with_shapes_are_executed():
    importlib.import_module("profiling.workloads.run")
    files = [path for package in shapes.PACKAGES for path in (ROOT / package).rglob("*.py")]
    named = {path for path in files if "from jaxtyping" in path.read_text(encoding="utf-8")}
    loaded = [module for name, module in sys.modules.items() if name.split(".")[0] in shapes.PACKAGES]
    executed = {pathlib.Path(module.__file__) for module in loaded if isinstance(module.__loader__, shapes.Loader)}
    assert len(executed) > 20
    assert not {pathlib.Path(module.__file__) for module in loaded} & named - executed


def test_without_the_hook_functions_raise_what_they_promise():
    code = """
import numpy as np
import eplb_jax
try:
    eplb_jax.rebalance_experts(np.ones(8), 8, 1, 1, 8)
except ValueError as error:
    assert "[layers, experts]" in str(error)
else:
    raise AssertionError("accepted")
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)
