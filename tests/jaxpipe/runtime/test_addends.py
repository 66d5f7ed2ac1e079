"""Products that can be added to their sums in place: the executor has them do so, once for each microbatch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

import jaxpipe
from eplb_jax import grouped_matmul
from eplb_jax.kernels import registry
from eplb_jax.kernels.accumulable import OuterProduct
from eplb_jax.kernels.backend import HOPPER_SMS, Target
from tests.cases import cases
from tests.plain import assert_trees_close

WIDTH, HIDDEN, ROWS = 4, 6, 24
SIZES = np.array([8, 5, 0, 3], np.int32)
GROUP = np.array([0] * 8 + [1] * 5 + [-1] * 3 + [3] * 3 + [-1] * 5)


def experts(params, x, ctx):
    """Two grouped products, the second one's matrices transposed; rows of no group pass by."""
    used = jnp.asarray(GROUP >= 0)[:, None]
    sizes = jnp.asarray(SIZES)
    hidden = jnp.tanh(jnp.where(used, grouped_matmul(x[0], params["up"], sizes), 0))
    y = grouped_matmul(hidden, params["down"], sizes, transpose_rhs=True)
    return x + jnp.where(used, y, 0) * params["scale"]


def plain_experts(params, x):
    """The same, each row by itself."""
    rows = []
    for row, group in zip(x[0], GROUP, strict=True):
        y = params["down"][group] @ jnp.tanh(row @ params["up"][group]) if group >= 0 else jnp.zeros(WIDTH, x.dtype)
        rows.append(row + y * params["scale"])
    return jnp.stack(rows)[None]


def head(outer, y, data, ctx):
    """The mean of a microbatch's squares; NaN, with all derivatives, for one that has no weight."""
    return (y**2).mean() / data["weight"].sum()


def make(schedule, seed=0):
    rng = np.random.default_rng(seed)
    groups, stages = len(SIZES), []
    for _ in range(schedule.num_stages):
        up, down = (jnp.asarray(rng.normal(size=(groups, WIDTH, HIDDEN)) / 2) for _ in range(2))
        stages.append({"up": up, "down": down, "scale": jnp.asarray(rng.normal(size=WIDTH))})
    batch = {
        "x": jnp.asarray(rng.normal(size=(schedule.num_microbatches, ROWS, WIDTH))),
        "weight": jnp.asarray(rng.integers(1, 4, schedule.num_microbatches).astype(float)),
    }
    return stages, batch


def plain_loss(stages, batch):
    """The mean over all that have a weight, each by its weight."""
    total = 0.0
    for x, weight in zip(batch["x"], batch["weight"], strict=True):
        if weight:
            y = x[None]
            for params in stages:
                y = plain_experts(params, y)
            total += (y**2).mean()
    return total / batch["weight"].sum()


CASES = [
    ("1f1b", 1, None, False, {}),
    ("dualpipev", 1, None, True, {}),
    ("zb1p", 2, None, False, {"dispatch": "sequential"}),
    ("dualpipev", 2, None, False, {"dispatch": "switch"}),
    ("dualpipev", 2, None, False, {"dispatch": "stretches"}),
    ("dualpipev", 2, None, True, {"dispatch": "by_rank"}),
    ("dualpipe", 2, None, True, {"dispatch": "unrolled"}),
    ("dualpipev", 1, 0, True, {}),
    ("zb1p", 2, 2, False, {}),
]
"""Schedule, ranks, the microbatch without weight, and whether there is code for a first sum, before any loop."""


@cases("name, ranks, empty, first, options", CASES, quick=[CASES[1], CASES[5], CASES[7]])
def test_gradients_are_those_of_the_plain_program(x64, monkeypatch, name, ranks, empty, first, options):
    """A total that is missed or added twice shows, and so does a microbatch without weight, whose numbers are NaN."""
    schedule = jaxpipe.schedule.build(name, ranks, 4)
    stages, batch = make(schedule)
    if empty is not None:
        batch["weight"] = batch["weight"].at[empty].set(0)
        batch["x"] = batch["x"].at[empty].set(jnp.nan)
    accumulate, calls = OuterProduct.accumulate, []

    def seen(self, total, counts, *operands):
        calls.append((isinstance(total, jax.ShapeDtypeStruct), counts is None))
        return accumulate(self, total, counts, *operands)

    monkeypatch.setattr(OuterProduct, "accumulate", seen)
    weight = {} if empty is None else {"weight": lambda data: data["weight"].sum()}
    step = jaxpipe.value_and_grad(
        experts, schedule, jaxpipe.make_mesh(pp=ranks), embed=lambda outer, data, ctx: data["x"],
        head=head if empty is not None else lambda outer, y, data, ctx: (y**2).mean(), **weight, **options,
    )  # fmt: skip
    params = jaxpipe.Params(jaxpipe.stack_stages(stages, schedule))
    (loss, _), grads = jax.jit(step)(params, batch)
    assert calls and all(no_counts == (empty is None) for _, no_counts in calls)
    assert any(begins for begins, _ in calls) == first
    if empty is None:
        batch["weight"] = jnp.ones(4)
    expected, expected_grads = jax.value_and_grad(plain_loss)(stages, batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert_trees_close(grads.stages, jaxpipe.stack_stages(expected_grads, schedule), rtol=1e-10)


@pytest.mark.parametrize("grad_dtype, in_place", [(None, 2), (jnp.bfloat16, 0)])
def test_on_gpus_kernels_write_over_the_sums(monkeypatch, grad_dtype, in_place):
    """Of as many weight gradients as a microbatch has, where sums are float32; lowered, no GPU needed."""
    monkeypatch.setattr(registry, "current_target", lambda: Target("gpu", "NVIDIA H200", HOPPER_SMS, True))
    rows, width, hidden, sizes = 256, 128, 192, np.array([100, 50], np.int32)

    def stage(params, x, ctx):
        hidden = jnp.tanh(grouped_matmul(x, params["up"], sizes))
        return grouped_matmul(hidden, params["down"], sizes, transpose_rhs=True)

    step = jaxpipe.value_and_grad(
        stage, jaxpipe.schedule.build("1f1b", 1, 4), AbstractMesh((1,), ("pp",), axis_types=(AxisType.Auto,)),
        head=lambda outer, y, data, ctx: y.astype(jnp.float32).sum(), compute_dtype=jnp.bfloat16, grad_dtype=grad_dtype,
    )  # fmt: skip
    matrices = jax.ShapeDtypeStruct((1, 2, width, hidden), jnp.float32)
    batch = jax.ShapeDtypeStruct((4 * rows, width), jnp.float32)
    traced = jax.jit(step).trace(jaxpipe.Params({"up": matrices, "down": matrices}), batch)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Two products forward, one for what was hidden backward, and two weight gradients.
    assert text.count("output_operand_alias<") == in_place
    assert text.count("@mosaic_gpu_v2") == 5
