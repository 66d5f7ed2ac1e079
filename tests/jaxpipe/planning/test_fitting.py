"""As much is kept as a device has room for, and a device that has none is told what a step needs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

import jaxpipe
from jaxpipe.planning import fitting
from jaxpipe.planning.chips import CHIPS

WIDTH, ROWS, RANKS = 512, 4096, 4


def stage(w, x, ctx):
    for layer in range(2):
        x = x + jnp.tanh(x @ w[layer]) @ w[layer]
    return x


def step(name="zb1p", **options):
    mesh = AbstractMesh((RANKS,), ("pp",), axis_types=(AxisType.Auto,))
    schedule = jaxpipe.schedule.build(name, RANKS, 8)
    return jaxpipe.value_and_grad(
        stage, schedule, mesh, head=lambda outer, y, data, ctx: (y.astype(jnp.float32) ** 2).mean(), **options
    )


SHAPES = (
    jaxpipe.Params(jax.ShapeDtypeStruct((RANKS, 2, WIDTH, WIDTH), jnp.bfloat16)),
    jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.bfloat16),
)


def test_a_smaller_memory_keeps_less_and_fits():
    whole = jaxpipe.plan(step(), *SHAPES, "H100").memory
    shares = (0.95, 0.8, 0.7)
    found = [jaxpipe.fit_stash(step(), *SHAPES, "H100", memory=share * whole.total) for share in shares]
    for share, each in zip(shares, found, strict=True):
        assert each.plan.memory.total <= share * whole.total
        assert each.pipeline.options.stash == each.stash
        assert jaxpipe.plan(each.pipeline, *SHAPES, "H100").memory == each.plan.memory
    stashes = [each.plan.memory.stash for each in found]
    assert stashes == sorted(stashes, reverse=True) and len(set(stashes)) == len(stashes)
    executed = [each.plan.executed for each in found]
    assert executed == sorted(executed) and executed[0] < executed[-1]


def test_where_all_fits_nothing_but_light_work_is_done_again():
    found = jaxpipe.fit_stash(step(), *SHAPES, "H100")
    assert found.plan.executed == jaxpipe.plan(step(), *SHAPES, "H100").executed
    assert found.plan.memory.total <= fitting.SHARE * CHIPS["H100"].memory


def test_what_some_stash_needs_is_enough():
    """Here a step takes more besides its stash where it keeps more."""

    def deep(w, x, ctx):
        for layer in range(8):
            x = x + jnp.tanh(x @ w[layer]) @ w[layer]
        return x

    mesh = AbstractMesh((2,), ("pp",), axis_types=(AxisType.Auto,))
    pipeline = jaxpipe.value_and_grad(
        deep, jaxpipe.schedule.build("dualpipev", 2, 4), mesh, head=lambda outer, y, data, ctx: y.sum()
    )
    shapes = (
        jaxpipe.Params(jax.ShapeDtypeStruct((4, 8, 256, 256), jnp.float32)),
        jax.ShapeDtypeStruct((4 * 2048, 256), jnp.float32),
    )

    def kept(stash):
        changed = dataclasses.replace(pipeline, options=dataclasses.replace(pipeline.options, stash=stash))
        return jaxpipe.plan(changed, *shapes, "H100").memory

    whole = kept(1 << 40)
    every = [kept(share * whole.stash // 50) for share in (1, 4)]  # of one of five microbatches: 0.1 and 0.4
    assert every[0].total < whole.total - whole.stash < whole.total - whole.stash + every[0].stash  # or little is shown
    for memory in every:
        found = jaxpipe.fit_stash(pipeline, *shapes, "H100", memory=memory.total).plan.memory
        assert memory.stash <= found.stash and found.total <= memory.total


def test_refusals():
    with pytest.raises(ValueError, match=r"takes .* bytes besides its stash, and may take 1,000,000 in all"):
        jaxpipe.fit_stash(step(), *SHAPES, "H100", memory=1e6)
    forward = jaxpipe.forward(stage, step().program.schedule, step().mesh)
    with pytest.raises(ValueError, match="forward alone and keeps nothing"):
        jaxpipe.fit_stash(forward, *SHAPES, "H100")
    with pytest.raises(ValueError, match=r"pass what jaxpipe\.value_and_grad returned"):
        jaxpipe.fit_stash(stage, *SHAPES, "H100")
    whole = jaxpipe.plan(step(stash=1 << 40), *SHAPES, "H100").memory
    besides = whole.total - whole.stash
    with pytest.raises(ValueError, match=r"bytes are too few for a step: stash=.* the least that works"):
        jaxpipe.fit_stash(step(), *SHAPES, "H100", memory=besides + 2**22)
