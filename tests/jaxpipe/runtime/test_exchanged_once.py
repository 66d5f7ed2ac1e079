"""A step of a pipeline gathers working copies of experts once, and returns their gradients once."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from eplb_jax.moe.experts import working_copies
from tests.cases import cases

PP, EP, EXPERTS, SLOTS, WIDTH, MICROBATCHES = 2, 4, 16, 20, 4, 4
SPECS = jaxpipe.Params({"w": P("pp", "ep"), "s": P("pp"), "map": P("pp")}, P())


def experts(params, x, ctx):
    """All tokens through all slots of all devices."""
    del ctx
    copies = working_copies(params["w"], params["map"], "ep")
    return x + jax.lax.psum(jnp.tanh(jnp.einsum("bd,sde->sbe", x, copies)).sum(0), "ep") * params["s"] / SLOTS


def whole(params, x, ctx):
    """The same number of products with every master in turn: its parameters are reached directly."""
    del ctx
    here = jnp.tanh(jnp.einsum("bd,sde->sbe", x, params["w"])).sum(0)
    return x + jax.lax.psum(here, "ep") * params["s"] / EXPERTS


def plain(kinds, params, x):
    """The same by all devices' masters."""
    for row, kind in enumerate(kinds):
        w, s, slots = (params[name][row] for name in ("w", "s", "map"))
        used = w[slots] if kind == 0 else w
        x = x + jnp.tanh(jnp.einsum("bd,sde->sbe", x, used)).sum(0) * s / len(used)
    return (x**2).mean()


def arguments(stages, dtype=jnp.float64):
    rng = np.random.default_rng(stages)
    params = {
        "w": jnp.asarray(rng.normal(size=(stages, EXPERTS, WIDTH, WIDTH)), dtype),
        "s": jnp.asarray(rng.normal(size=(stages, WIDTH)), dtype),
        "map": jnp.asarray(np.stack([rng.permutation(SLOTS) % EXPERTS for _ in range(stages)]), jnp.int32),
    }
    return params, jnp.asarray(rng.normal(size=(8, WIDTH)), dtype)


def make(name, stage=experts, **options):
    schedule = jaxpipe.schedule.build(name, PP, MICROBATCHES)
    head = lambda outer, y, data, ctx: (y**2).mean()  # noqa: E731
    mesh = jaxpipe.make_mesh(pp=PP, ep=EP)
    return jaxpipe.value_and_grad(stage, schedule, mesh, head=head, replicated_axes=("ep",), specs=SPECS, **options)


def in_loop(pipeline, params, x):
    """The collectives that a step runs neither before nor after the microbatches."""
    found = []

    def walk(jaxpr, scopes):
        for eqn in jaxpr.eqns:
            inside = (*scopes, *str(eqn.source_info.name_stack).split("/"))
            if eqn.primitive.name in ("all_gather", "reduce_scatter") and {"prepare", "reduce"}.isdisjoint(inside):
                found.append(eqn.primitive.name)
            for value in eqn.params.values():
                for each in value if isinstance(value, (tuple, list)) else (value,):
                    inner = getattr(each, "jaxpr", each)
                    if hasattr(inner, "eqns"):
                        walk(inner, inside)

    walk(jax.make_jaxpr(pipeline)(jaxpipe.Params(params), x).jaxpr, ())
    return found


@cases(
    ("name", "options"),
    [
        ("dualpipe", {}),
        ("zb1p", {}),
        ("dualpipev", {"order": "storage"}),
        ("1f1b", {"stash": 1 << 20}),
        ("zbv", {"dispatch": "stretches"}),
        ("gpipe", {"dispatch": "switch"}),
    ],
    quick=[("dualpipe", {}), ("zb1p", {})],
)
def test_gradients_are_the_plain_ones(name, options, x64):
    pipeline = make(name, **options)
    schedule = pipeline.program.schedule
    params, x = arguments(schedule.num_stages)
    rows = schedule.storage_order if options.get("order") == "storage" else range(schedule.num_stages)
    given = jax.tree.map(lambda leaf: leaf[np.asarray(rows)], params)
    assert not in_loop(pipeline, given, x)
    (loss, _), grads = jax.jit(pipeline)(jaxpipe.Params(given), x)

    def objective(w, s):
        return plain((0,) * schedule.num_stages, {**params, "w": w, "s": s}, x)

    wanted, (w_ct, s_ct) = jax.value_and_grad(objective, (0, 1))(params["w"], params["s"])
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)
    for name, ct in (("w", w_ct), ("s", s_ct)):
        np.testing.assert_allclose(grads.stages[name], ct[np.asarray(rows)], rtol=1e-10, atol=1e-14)


def test_kinds_of_stages_of_which_only_some_have_copies(x64):
    kinds = [0, 1, 1, 0]
    pipeline = make("dualpipev", jaxpipe.StageKinds([experts, whole], kinds))
    params, x = arguments(4)
    (_, _), grads = jax.jit(pipeline)(jaxpipe.Params(params), x)
    w_ct, s_ct = jax.grad(lambda w, s: plain(kinds, {**params, "w": w, "s": s}, x), (0, 1))(params["w"], params["s"])
    for name, ct in (("w", w_ct), ("s", s_ct)):
        np.testing.assert_allclose(grads.stages[name], ct, rtol=1e-10, atol=1e-14)


def dense(params, x, ctx):
    """A kind that has no experts."""
    del ctx
    return x + jnp.tanh(x * params["s"])


def test_chunks_of_different_kinds_sum_in_bfloat16_what_each_has():
    """Rank 0's first stage has copies of experts and its second one reaches them directly."""
    pipeline = make("dualpipev", jaxpipe.StageKinds([experts, whole], [0, 0, 1, 1]), grad_dtype=jnp.bfloat16)
    params, x = arguments(4, jnp.float32)
    (_, _), grads = jax.jit(pipeline)(jaxpipe.Params(params), x)
    wanted = jax.grad(lambda w: plain([0, 0, 1, 1], {**params, "w": w}, x))(params["w"])
    np.testing.assert_allclose(grads.stages["w"], wanted, atol=2e-2 * float(jnp.abs(wanted).max()))


def test_a_kind_without_experts_sums_no_gradients_of_masters():
    """A chunk's sums are those of copies and of ``s``, whatever the other kind does."""
    pipeline = make("1f1b", jaxpipe.StageKinds([experts, dense], [0, 1]), dispatch="loops")
    params, x = arguments(PP, jnp.float32)
    memory = jaxpipe.plan(pipeline, jaxpipe.Params(params), x, "H100").memory
    assert memory.gradients == 4 * WIDTH * (SLOTS // EP * WIDTH + 1)


@pytest.mark.parametrize("max_growth", [1, math.inf])
def test_a_plan_counts_copies_and_their_sums(max_growth):
    pipeline = make("1f1b", max_growth=max_growth, dispatch="loops")
    params, x = arguments(PP, jnp.float32)
    memory = jaxpipe.plan(pipeline, jaxpipe.Params(params), x, "H100").memory
    copies, masters, small = (4 * WIDTH * rows for rows in (SLOTS // EP * WIDTH, EXPERTS // EP * WIDTH, 1))
    assert memory.gradients == small + (masters if max_growth == 1 else copies)
    assert (memory.working >= copies) == (max_growth > 1)
    assert bool(in_loop(pipeline, params, x)) == (max_growth == 1)
