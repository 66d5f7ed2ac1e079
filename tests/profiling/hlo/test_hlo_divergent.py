"""Which compiled pipelines would wait for ever: those that XLA gave collectives across ranks within branches."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxpipe
from profiling.hlo.divergent import check_collectives, find_divergent
from tests.cases import cases

WIDTH = 8


def gated(w, x, ctx):
    """Gate and up in one matrix, whose columns the compiler shards: each half is on other devices than it is used."""
    gate, up = jnp.split(x @ w["up"], 2, -1)
    return x + (jax.nn.silu(gate) * up) @ w["down"][: 2 * WIDTH]


def rotated(w, x, ctx):
    """Rotary positions over a dimension that the compiler shards."""
    first, second = jnp.split(lax.with_sharding_constraint(x @ w["up"], P(None, "tp")), 2, -1)
    return x + lax.with_sharding_constraint(jnp.concatenate([-second, first], -1), P(None, "tp")) @ w["down"]


def rolled(w, x, ctx):
    """Rows of a batch that the compiler divides, each with its neighbour's."""
    return x + jnp.tanh(x @ w["up"]) @ w["down"] + jnp.roll(x, 1, 0)


def megatron(w, x, ctx):
    return x + jnp.tanh(x @ w["up"]) @ w["down"]


def whole(w, x, ctx):
    """As rotated, made whole before."""
    h = lax.with_sharding_constraint(x @ w["up"], P(None, "tp"))
    first, second = jnp.split(lax.with_sharding_constraint(h, P()), 2, -1)
    h = lax.with_sharding_constraint(jnp.concatenate([-second, first], -1), P())
    return x + h @ w["down"]


def halves(w, x, ctx):
    """As gated, with both halves of what one device has beside each other."""
    both = jnp.einsum("bd,dkh->bkh", x, w["up"].reshape(WIDTH, 2, 2 * WIDTH))
    return x + (jax.nn.silu(both[:, 0]) * both[:, 1]) @ w["down"][: 2 * WIDTH]


def resharded(w, x, ctx):
    """Rows to columns and back: exchanges within a rank."""
    x = lax.with_sharding_constraint(x, P("tp"))
    x = lax.with_sharding_constraint(jnp.tanh(x), P(None, "tp"))
    return megatron(w, x, ctx)


COLUMNS = {"up": P("pp", None, "tp"), "down": P("pp", "tp")}


def compiled(stage, dispatch, specs=None, make=jaxpipe.value_and_grad, name="1f1b", **options):
    """(HLO of a step, mesh)."""
    mesh, schedule = jaxpipe.make_mesh(pp=2, tp=2), jaxpipe.schedule.build(name, 2, 4)
    if make is jaxpipe.value_and_grad:
        options["head"] = lambda outer, y, data, ctx: jnp.mean(y**2)
    specs = None if specs is None else jaxpipe.Params(specs, P())
    step = make(stage, schedule, mesh, specs=specs, dispatch=dispatch, **options)
    count = schedule.num_stages
    shapes = {"up": (count, WIDTH, 4 * WIDTH), "down": (count, 4 * WIDTH, WIDTH)}
    params = jaxpipe.Params({key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in shapes.items()})
    batch = jax.ShapeDtypeStruct((16, WIDTH), jnp.float32)
    return jax.jit(step).lower(params, batch).compile().as_text(), mesh


@pytest.mark.parametrize("dispatch", ["sequential", "loops", "switch"])
def test_a_split_of_sharded_columns_is_found(dispatch):
    hlo, mesh = compiled(gated, dispatch, COLUMNS)
    with pytest.raises(
        ValueError, match=r"(?s)for ever.*collective-permute, ranks \[0, 1\].*/F/.*split.*two parameters"
    ):
        check_collectives(hlo, mesh)
    assert {one.kind for one in find_divergent(hlo, mesh)} == {"collective-permute"}


@cases(
    "stage, options",
    [
        (rotated, {}),
        (rolled, {"batch_spec": P("tp")}),
        (gated, {"specs": COLUMNS, "make": jaxpipe.forward}),
        (rotated, {"name": "dualpipev"}),
    ],
    quick=[(rolled, {"batch_spec": P("tp")}), (rotated, {"name": "dualpipev"})],
)
def test_other_ways_to_a_permute_are_found(stage, options):
    with pytest.raises(ValueError, match="would wait for ever"):
        check_collectives(*compiled(stage, None, **options))


@pytest.mark.parametrize(
    "stage, options",
    [
        (megatron, {"specs": COLUMNS, "dispatch": "switch"}),
        (megatron, {"specs": COLUMNS, "name": "dualpipev"}),  # rows of stages move between ranks, before the loop
        (megatron, {"batch_spec": P("tp")}),
        (whole, {}),
        (resharded, {}),
    ],
)
def test_collectives_within_a_rank_are_fine(stage, options):
    hlo, mesh = compiled(stage, **{"dispatch": None, **options})
    check_collectives(hlo, mesh)
    assert "all-" in hlo  # there are collectives in it


@pytest.mark.parametrize("shared", [True, False])
@cases("dispatch", ["loops", "switch"], quick=["switch"])
def test_shared_ends_may_communicate_over_the_ranks(dispatch, shared):
    """All ranks run them together; without sharing, one rank alone would wait for the other in its head."""
    mesh, schedule = jaxpipe.make_mesh(pp=2, tp=2), jaxpipe.schedule.build("1f1b", 2, 4)

    def head(outer, y, data, ctx):
        table = outer["table"] if shared else lax.with_sharding_constraint(jnp.roll(outer["table"], 1, 0), P("tp"))
        loss = jnp.mean((y @ table) ** 2)
        return lax.psum(loss, "pp") / 2 if shared else loss

    step = jaxpipe.value_and_grad(megatron, schedule, mesh, head=head, shared_ends=shared, dispatch=dispatch)
    stages = {"up": (2, WIDTH, 4 * WIDTH), "down": (2, 4 * WIDTH, WIDTH)}
    params = jaxpipe.Params(
        {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in stages.items()},
        {"table": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)},
    )
    lowered = jax.jit(step).lower(params, jax.ShapeDtypeStruct((16, WIDTH), jnp.float32))
    hlo = lowered.compile().as_text()
    if shared:
        check_collectives(hlo, mesh)
        assert "/together/" in hlo and "all-reduce" in hlo
    else:
        with pytest.raises(ValueError, match="would wait for ever"):
            check_collectives(hlo, mesh)


HANGS = """
import jax, jax.numpy as jnp, jaxpipe, sys
from tests.profiling.hlo.test_hlo_divergent import *
stage, batch_spec = globals()[sys.argv[1]], P("tp") if sys.argv[1] == "rolled" else None
mesh, schedule = jaxpipe.make_mesh(pp=2, tp=2), jaxpipe.schedule.build("1f1b", 2, 4)
step = jaxpipe.value_and_grad(stage, schedule, mesh, head=lambda o, y, d, c: jnp.mean(y**2), batch_spec=batch_spec,
                              specs=jaxpipe.Params(COLUMNS if sys.argv[1] in ("gated", "megatron") else P("pp"), P()))
params = jaxpipe.Params({"up": jnp.ones((2, WIDTH, 4 * WIDTH)), "down": jnp.ones((2, 4 * WIDTH, WIDTH))})
compiled = jax.jit(step).lower(params, jnp.ones((16, WIDTH))).compile()
print("compiled", flush=True)
jax.block_until_ready(compiled(params, jnp.ones((16, WIDTH))))
print("done", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name, ends", [("gated", False), ("rotated", False), ("rolled", False), ("megatron", True)])
def test_what_is_found_does_hang(name, ends):
    """Run for 20 seconds after it was compiled; XLA ends a program that waits longer than it is told to."""
    flags = "--xla_force_host_platform_device_count=4 --xla_cpu_collective_call_terminate_timeout_seconds=20"
    root = pathlib.Path(__file__).resolve().parents[3]
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, "-c", HANGS, name], env=env, cwd=root, capture_output=True, text=True)
    assert run.stdout.split() == ["compiled", "done"][: 1 + ends], run.stderr[-2000:]
