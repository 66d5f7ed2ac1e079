"""A policy, a dispatcher, a recipe and a backend of kernels are each one line of a table, as CONTRIBUTING shows it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eplb_jax
from eplb_jax.__main__ import main
from eplb_jax.kernels.grouped_gemm import xla
from eplb_jax.kernels.recipe import RECIPES, Recipe
from eplb_jax.kernels.registry import BACKENDS
from eplb_jax.moe.dispatchers import DISPATCHERS
from eplb_jax.plan.cluster import make_cluster
from eplb_jax.plan.policies.registry import POLICIES
from tests.eplb_jax.moe.test_dispatchers import check_equals_dense
from tests.eplb_jax.moe.test_fp8 import CONFIG, make, relative, run


def in_turn(weight, num_replicas, num_groups, num_nodes, num_gpus):
    """Expert after expert, and again from the first: no look at the loads."""
    weight = eplb_jax.plan.arguments.check_loads(weight)
    make_cluster(weight.shape[1], num_replicas, num_groups, num_nodes, num_gpus)
    slots = np.tile(np.arange(num_replicas) % weight.shape[1], (len(weight), 1))
    return eplb_jax.Placement.from_phy2log(slots, weight.shape[1])


def test_a_policy(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(POLICIES, "in-turn", in_turn)
    eplb_jax.save_loads(tmp_path / "loads.npz", np.array([[4, 3, 2, 1]]))
    command = ["plan", str(tmp_path / "loads.npz"), "--replicas", "6", "--gpus", "2", "--policy", "in-turn"]
    assert main(command) == 0
    assert "| in-turn | 6 |" in capsys.readouterr().out
    assert eplb_jax.read_placement(tmp_path / "loads.plan.npz").phy2log.tolist() == [[0, 1, 2, 3, 0, 1]]


class Shifts:
    """Block after block by `jax.lax.ppermute`, each device to the next but d; not for pipelines, whose ranks differ."""

    gpu_only = False

    def why_not(self, recipe):
        """It sends rows as they are."""
        return None if recipe.encoding is None else f"exchange='shifts' does not know the recipe {recipe.name}"

    def dispatch(self, rows, counts, axis, recipe):
        """All rows."""
        size, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
        out = jnp.zeros_like(rows)
        for d in range(size):
            block = jax.lax.dynamic_index_in_dim(rows, (here + d) % size, keepdims=False)
            came = jax.lax.ppermute(block, axis, [(i, (i + d) % size) for i in range(size)])
            out = out.at[(here - d) % size].set(came)
        return out

    def combine(self, rows, counts, axis, recipe):
        """All rows."""
        return self.dispatch(rows, counts, axis, recipe)


def test_a_dispatcher(monkeypatch, x64):
    monkeypatch.setitem(DISPATCHERS, "shifts", Shifts())
    check_equals_dense("shifts", 2, None)


class Halves:
    """Rows in float16, divided by their largest value."""

    def encode(self, rows):
        """Rows of at most 1, and what they were divided by."""
        scales = jnp.abs(rows).max(-1, keepdims=True)
        return (rows / jnp.maximum(scales, 1e-30)).astype(jnp.float16), scales

    def decode(self, parts, dtype):
        """Their product."""
        return parts[0].astype(dtype) * parts[1]


def test_a_recipe(monkeypatch):
    monkeypatch.setitem(RECIPES, "halves", Recipe("halves", encoding=Halves(), product_dtype=jnp.float16))
    with pytest.raises(ValueError, match="halves travels by the dense exchange only: choose exchange='dense'"):
        dataclasses.replace(CONFIG, precision="halves", exchange="ragged")
    params, x, ct = make("float32", CONFIG)
    exact, rough = (run(dataclasses.replace(CONFIG, precision=name), 4, params, x, ct) for name in ("bf16", "halves"))
    assert [leaf.dtype for leaf in jax.tree.leaves(rough)] == [leaf.dtype for leaf in jax.tree.leaves(exact)]
    errors = [relative(rough[0], exact[0]), relative(rough[1][1], exact[1][1])]
    assert all(1e-5 < error < 5e-3 for error in errors), errors
    travels = {str(dtype) for dtype in travelling(dataclasses.replace(CONFIG, precision="halves"), params, x, ct)}
    assert travels == {"float16", "float32", "int32"}


def travelling(config, params, x, ct):
    """The dtypes of what the layer's program sends to other devices."""
    text = str(jax.make_jaxpr(lambda *arrays: run(config, 4, *arrays))(params, x, ct))
    names = {"f16": "float16", "f32": "float32", "i32": "int32"}
    return {names[dtype] for dtype in re.findall(r":(\w+)\[[\d,]*\](?:\{[^}]*\})? = all_to_all", text)}


class Counting:
    """XLA's products under another name, and how often each was asked for."""

    platform = "cpu"

    def __init__(self):
        self.asked = []

    def why_not(self, task, device, *operands):
        """It has the products alone."""
        return None if task == "grouped_matmul" else "there is no kernel for it"

    def kernel(self, name):
        """The product."""
        self.asked.append(name)
        return {"matmul": xla.matmul, "outer": xla.outer}[name]


def test_a_backend_of_kernels(monkeypatch):
    monkeypatch.setitem(BACKENDS, "counting", counting := Counting())
    rows, matrices, sizes = jnp.ones((16, 4)), jnp.ones((2, 4, 6)), jnp.array([8, 8])

    def gradients(backend):
        return jax.grad(lambda *pair: eplb_jax.grouped_matmul(*pair, sizes, backend=backend).sum(), (0, 1))

    expected = gradients("xla")(rows, matrices)
    assert not counting.asked
    for backend in ("counting", "auto"):
        for got, want in zip(gradients(backend)(rows, matrices), expected, strict=True):
            np.testing.assert_array_equal(got, want)
        assert sorted(counting.asked) == ["matmul", "matmul", "outer"]
        counting.asked.clear()
