"""What collectives make of parameters alone is made once a step, and gradients pass them once, of their sums."""

import functools
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpipe
from eplb_jax.moe.experts import working_copies
from jaxpipe.runtime.buffers import accumulator, add
from jaxpipe.stage import split_stage
from tests.cases import cases

REPLICATED = P()
DEVICES, MASTERS, SLOTS, WIDTH = 4, 16, 20, 4
GATHERING = {"all_gather", "all_to_all", "reduce_scatter"}


def primitives(function, *args):
    """The collectives that a function calls, however deep."""
    found = set()

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            found.add(eqn.primitive.name)
            for value in eqn.params.values():
                for each in value if isinstance(value, (tuple, list)) else (value,):
                    inner = getattr(each, "jaxpr", each)
                    if hasattr(inner, "eqns"):
                        walk(inner)

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return found & {*GATHERING, "psum"}


def random_stage(seed):
    """A stage of layers with working copies, in a loop, unrolled or written out, with all that may stand between."""
    rng = random.Random(seed)
    form, fetched = rng.choice(["loop", "unrolled", "written"]), rng.choice([None, 1, 2])
    inner, outer = rng.random() < 0.4, rng.random() < 0.3
    cast, twice, directly = (rng.random() < 0.4 for _ in range(3))
    summed, chosen = rng.random() < 0.5, rng.random() < 0.4

    def layer(h, row, index):
        masters = row["w"].astype(jnp.bfloat16).astype(row["w"].dtype) if cast else row["w"]

        def feed(h):
            copies = working_copies(masters * 2, row["map"], "ep", fetched=fetched)
            out = jnp.tanh(jnp.einsum("sbd,sde->sbe", h, copies))
            return out + jnp.einsum("sbd,sed->sbe", out, copies) if twice else out

        h = jax.lax.cond(index > 0, feed, lambda h: h * 2, h) if chosen else feed(h)
        if directly:
            h = h + masters.sum()
        if summed:  # whole parameters, the same on all devices: their gradient is a sum over them
            h = h * jax.lax.psum(jax.lax.axis_index("ep").astype(h.dtype) * row["s"] / 8, "ep")
        return h * row["s"]

    run = jax.checkpoint(layer) if inner else layer

    def stage(params, x, index):
        if form == "written":
            for i in range(len(params["w"])):
                x = run(x, jax.tree.map(lambda leaf, i=i: leaf[i], params), index)
            return x
        length = len(params["w"])
        step = lambda h, row: (run(h, row, index), None)  # noqa: E731
        return jax.lax.scan(step, x, params, unroll=length if form == "unrolled" else 1)[0]

    # What a cast of the plain gradient rounds, a sum does not.
    return (jax.checkpoint(stage) if outer else stage), chosen, 1e-2 if cast else 1e-12


def on_devices(function, *, out=REPLICATED):
    """The function of (params, x), within `jax.shard_map` over the experts' axis."""
    mesh = jaxpipe.make_mesh(ep=DEVICES)
    specs = {"w": P(None, "ep"), "s": P(), "map": P()}, P("ep")
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)


def arguments(seed, layers, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    maps = [rng.permutation(SLOTS) % MASTERS for _ in range(layers)]
    params = {
        "w": jnp.asarray(rng.normal(size=(layers, MASTERS, WIDTH, WIDTH)), dtype),
        "s": jnp.asarray(rng.normal(size=(layers, WIDTH)), dtype),
        "map": jnp.asarray(np.stack(maps), jnp.int32),
    }
    return params, jnp.asarray(rng.normal(size=(SLOTS, 3, WIDTH)), dtype)


@cases("seed", range(40), quick=[3])
def test_random_stages_have_the_plain_gradients_and_exchange_nothing_of_experts(seed, x64):
    stage, chosen, tolerance = random_stage(seed)
    index = jnp.int32(seed % 2)

    def both(params, x):
        split = split_stage(stage, params, x, index)
        prepared = split.prepare(params)
        y, kept = split.forward(prepared, x, index)
        x_ct, crossing = split.backward_input(prepared, kept, y)
        summands = split.backward_weight(prepared, kept.weight, crossing, summands=True)
        whole, _ = split.backward(prepared, kept, y, summands=True)
        if not chosen:  # the gradients of a branch stay in it
            backward = functools.partial(split.backward, summands=True)
            assert not primitives(backward, prepared, kept, y) & GATHERING
            assert not primitives(split.forward, prepared, x, index) & GATHERING
        sums = [2 * one + other for one, other in zip(summands, whole, strict=True)]
        found = split.gradients(prepared, sums)
        wanted, pull = jax.vjp(lambda w, s, x: stage({**params, "w": w, "s": s}, x, index), params["w"], params["s"], x)
        w_ct, s_ct, wanted_x = pull(y)
        pairs = (y, wanted), (x_ct, wanted_x), (found["w"], 3 * w_ct), (found["s"], 3 * s_ct)
        errors = [jnp.abs(one - other).max() / jnp.abs(other).max() for one, other in pairs]
        return jax.lax.pmax(jnp.stack(errors), "ep")

    assert jax.jit(on_devices(both))(*arguments(seed, 1 + seed % 3)).max() < tolerance


def test_sums_are_of_copies_in_place_of_masters():
    def stage(params, x):
        return jnp.einsum("sbd,sde->sbe", x, working_copies(params["w"][0], params["map"][0], "ep"))

    def check(params, x):
        split = split_stage(stage, params, x, trainable={"w": True, "s": False, "map": False})
        assert [leaf.shape for leaf in split.summands] == [(SLOTS // DEVICES, WIDTH, WIDTH)]
        prepared = split.prepare(params)
        copies = [leaf for leaf in prepared if leaf.dtype == jnp.float32]
        assert [leaf.shape for leaf in copies] == [(SLOTS // DEVICES, WIDTH, WIDTH)]
        return x

    jax.eval_shape(on_devices(check, out=P("ep")), *arguments(0, 1, jnp.float32))


def test_gradients_of_narrow_copies_return_as_wide_as_they_were_summed():
    """What each microbatch adds is far below the last bit that a sum in bfloat16 would keep."""

    def stage(params, x):
        copies = working_copies(params["w"][0], params["map"][0], "ep")
        return jnp.einsum("sbd,sde->sbe", x, copies)

    def gradients(params, x):
        split = split_stage(stage, params, x)
        assert {leaf.dtype.name for leaf in split.summands} == {"bfloat16"}
        sums = [jnp.full(leaf.shape, 1 + 2**-12, jnp.float32) for leaf in split.summands]
        return split.gradients(split.prepare(params), sums)["w"]

    params, x = arguments(0, 1, jnp.bfloat16)
    found = jax.jit(on_devices(gradients, out=P(None, "ep")))(params, x)
    copies = np.bincount(np.asarray(params["map"][0]), minlength=MASTERS)
    np.testing.assert_array_equal(found[0], np.ones((1, WIDTH, WIDTH)) * (copies * (1 + 2**-12))[:, None, None])


def gathered_stage(params, x):
    """Parameters in shards, as a user may write it."""
    whole = jax.lax.all_gather(params["w"], "ep", axis=1, tiled=True)
    for w in whole:
        x = jnp.tanh(jnp.einsum("sbd,kde->skbe", x, w)).sum(1)
    return x * params["s"][0]


@pytest.mark.parametrize(("max_growth", "loops"), [(2, True), (DEVICES, True), (math.inf, False)])
def test_shards_are_gathered_for_each_microbatch_unless_they_may_grow(max_growth, loops):
    def check(params, x):
        split = split_stage(gathered_stage, params, x, max_growth=max_growth)
        prepared = split.prepare(params)
        _, kept = split.forward(prepared, x)
        assert ("all_gather" in primitives(split.forward, prepared, x)) == loops
        backward = functools.partial(split.backward, summands=True)
        assert ("reduce_scatter" in primitives(backward, prepared, kept, x)) == loops
        size = sum(leaf.size for leaf in prepared)
        assert (size > params["w"].size * DEVICES) == (not loops)
        return x

    jax.eval_shape(on_devices(check, out=P("ep")), *arguments(0, 2, jnp.float32))


def test_layers_of_shards_are_compared_with_their_own_shards():
    """A layer's gathered parameters are fewer bytes than all layers' shards, and all of them together are not."""

    def stage(params, x):
        for w in params["w"]:
            x = jnp.tanh(jnp.einsum("sbd,kde->skbe", x, jax.lax.all_gather(w, "ep", tiled=True))).sum(1)
        return x

    def check(params, x):
        split = split_stage(stage, params, x)
        prepared = split.prepare(params)
        assert sum(leaf.size for leaf in prepared) <= params["w"].size
        assert "all_gather" in primitives(split.forward, prepared, x)
        return x

    large = arguments(0, 8, jnp.float32)
    jax.eval_shape(on_devices(check, out=P("ep")), *large)


@pytest.mark.parametrize("wrong", [0.5, "2", True, math.nan])
def test_a_wrong_growth_is_named(wrong):
    with pytest.raises(ValueError, match=f"max_growth={wrong!r}: it must be a number of at least 1"):
        split_stage(lambda w, x: w * x, jnp.ones(2), jnp.ones(2), max_growth=wrong)


def check_three_microbatches(stage, params, x, tolerance):
    """Gradients made of sums over three microbatches, with cotangents of their own, are the sums of the plain ones.

    Parameters and x, ``[3, ...]``, are the same on all devices. Returns the shapes of what was summed.
    """
    shapes = []

    def error(params, x):
        split = split_stage(stage, params, x[0], max_growth=math.inf)
        shapes.extend(leaf.shape for leaf in split.summands)
        prepared = split.prepare(params)
        sums = [accumulator(leaf) for leaf in split.summands]
        wanted = jax.tree.map(accumulator, params)
        for m, weight in enumerate((1, -2, 4)):
            y, kept = split.forward(prepared, x[m])
            ct = y * jnp.asarray(weight, y.dtype)
            sums = add(sums, list(split.backward(prepared, kept, ct, summands=True)[0]))
            plain = jax.vjp(stage, params, x[m])[1](ct)[0]
            wanted = jax.tree.map(lambda total, leaf: total + leaf.astype(total.dtype), wanted, plain)
        found = split.gradients(prepared, sums)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
        pairs = [(one.astype(other.dtype), other) for one, other in pairs]
        errors = [jnp.abs(one - other).max() / jnp.maximum(jnp.abs(other).max(), 1e-30) for one, other in pairs]
        return jax.lax.pmax(functools.reduce(jnp.maximum, (each.astype(jnp.float32) for each in errors)), "ep")

    mesh = jaxpipe.make_mesh(ep=DEVICES)
    mapped = jax.shard_map(error, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    assert jax.jit(mapped)(params, x) < tolerance
    return shapes


def normal(*shape, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(math.prod(shape)).normal(size=shape), dtype)


def test_a_parameter_may_be_a_gradient_beside_one_that_is_made_of_it(x64):
    """A rule of the user's says that c's gradient is a: its sum is not what b's gradient is multiplied by."""

    @jax.custom_vjp
    def scale(c, a, x):
        return x * c.sum() * a.sum()

    scale.defvjp(
        lambda c, a, x: (scale(c, a, x), (c, a)),
        lambda kept, ct: (kept[1], jnp.zeros_like(kept[1]), ct * kept[0].sum()),
    )

    def stage(params, x):
        x = scale(params["c"], params["a"], x)
        return jnp.tanh(x @ jax.lax.psum(params["b"] * params["a"], "ep"))

    params = {name: normal(4, 4) + i for i, name in enumerate("abc")}
    check_three_microbatches(stage, params, normal(3, 5, 4), 1e-12)


def test_numbers_that_a_gather_fills_in_are_added_for_each_microbatch(x64):
    """A rule of the user's fills the cotangent up with ones after it was summed over devices."""

    @jax.custom_vjp
    def summed(w):
        return jax.lax.psum(w, "ep")

    places = jnp.asarray([0, 9, 2, 1])
    summed.defvjp(
        lambda w: (summed(w), ()),
        lambda _, ct: (jax.lax.psum(ct, "ep").at[places].get(mode="fill", fill_value=1.0),),
    )
    check_three_microbatches(lambda w, x: jnp.tanh(x @ summed(w)), normal(4, 4), normal(3, 5, 4), 1e-12)


@pytest.mark.parametrize(
    ("narrow", "wide", "tolerance"),
    [("float64", "complex128", 1e-12), ("float32", "complex128", 1e-6), ("float16", "complex64", 1e-2)],
)
def test_real_parameters_exchanged_as_complex_numbers_have_real_gradients(narrow, wide, tolerance, x64):

    def stage(w, x):
        return x @ jnp.abs(jax.lax.psum(w.astype(wide), "ep") * (1 + 2j)).astype(x.dtype)

    x = normal(3, 5, 4, dtype=jnp.finfo(wide).dtype)
    assert check_three_microbatches(stage, normal(4, 4, dtype=narrow), x, tolerance)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_of_16_bits_are_scattered_in_the_dtype_of_their_sums(dtype):
    """Copies by plain indexing: their rows are added to the gathered masters', and those return."""
    slots = jnp.asarray([3, 1, 2, 2])

    def stage(w, x):
        return jnp.tanh(x @ jax.lax.all_gather(w * 2, "ep", tiled=True)[slots] * jnp.asarray(0.1, dtype))

    shapes = check_three_microbatches(stage, normal(2, 4, dtype=dtype), normal(3, 5, 4, dtype=dtype), 5e-2)
    assert shapes == [(4, 4)]


def test_gradients_that_are_zeros_are_not_summed(x64):
    params = {"w": normal(4, 4), "unused": normal(3), "number": normal()}
    for stage in (lambda p, x: x @ p["w"], lambda p, x: x @ jax.lax.psum(p["w"], "ep")):
        assert check_three_microbatches(stage, params, normal(3, 5, 4), 1e-12) == [(4, 4)]
