"""The workloads in FP8: near those in bfloat16's place, from matrices that inference keeps in 8 bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax import MoEConfig, RouterConfig
from profiling.workloads import SIZES
from profiling.workloads.run import make_mesh, prepare
from tests.cases import cases

SMALL = dataclasses.replace(
    SIZES["tiny"],
    layers=1,
    heads=4,
    query_rank=None,
    latent=96,
    content=32,
    rotary=32,
    value=32,
    moe=MoEConfig(128, 128, RouterConfig(4, 2, 1, 1, balanced=True), capacity_factor=1.25, backend="xla"),
    sequence=128,
    prompts=2,
    prompt=16,
    requests=4,
    context=16,
    expert_parallel={"train": 2, "prefill": 2, "decode": 4},
)


def cosine(found, wanted):
    found, wanted = (np.asarray(x, np.float64).ravel() for x in (found, wanted))
    return found @ wanted / np.sqrt((found @ found) * (wanted @ wanted))


@cases("workload", [pytest.param("train", marks=pytest.mark.slow), "prefill", "decode"], quick=["prefill"])
def test_results_are_near_those_of_bfloat16(workload):
    ran = {}
    for precision in ("bf16", "fp8"):
        function, arguments = prepare(workload, SMALL, make_mesh(1), jnp.float32, pairs=1, precision=precision)
        narrow = {leaf.dtype for leaf in jax.tree.leaves(arguments[0])} - {jnp.dtype(jnp.float32)}
        assert narrow == ({jnp.dtype("float8_e4m3fn")} if precision == "fp8" and workload != "train" else set())
        ran[precision] = function(*arguments)
    pairs = zip(*(jax.tree.leaves(ran[precision][0]) for precision in ("fp8", "bf16")), strict=True)
    cosines = [cosine(found, wanted) for found, wanted in pairs if np.asarray(wanted).any()]
    assert min(cosines) > 0.99 and max(cosines) < 1 - 1e-9
    assert int(ran["fp8"][-1]) == 0


def test_an_unknown_precision():
    with pytest.raises(ValueError, match="precision='fp4': it must be one of bf16, fp8"):
        prepare("train", SMALL, make_mesh(1), jnp.float32, precision="fp4")
