"""Side effects of a stage run once, in its forward; refs are values; what cannot be had is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback

from jaxpipe._jax import Effect, Primitive
from jaxpipe.stage import split_stage
from jaxpipe.stage.graph import RECOMPUTE
from tests.cases import cases
from tests.jaxpipe.stage import zoo
from tests.plain import assert_trees_close

SEEN = []


def tap(value):
    jax.debug.callback(lambda v: SEEN.append(float(v)), value)


def layer(w, x):
    tap(x.sum())
    return jnp.tanh(x @ w)


def in_scan(w, x, unroll=1):
    return lax.scan(lambda c, _: (layer(w, c), None), x, length=3, unroll=unroll)[0]


def in_stacked_scan(w, x, unroll=1):
    """A parameter's own work in the loop is done once a step, its print in each turn."""

    def body(c, row):
        tap(row.sum())
        return jnp.tanh(c @ row.T), None

    return lax.scan(body, x, jnp.stack([w, -w, w / 2]), unroll=unroll)[0]


def in_cond(w, x):
    return lax.cond(x.sum() > -1e9, functools.partial(layer, w), lambda x: x, x)


def in_while(w, x):
    def body(i):
        tap(i.astype(x.dtype))
        return i + 1

    return jnp.tanh(x @ w) * lax.while_loop(lambda i: i < 3, body, jnp.int32(0)).astype(x.dtype)


@jax.custom_vjp
def probed(w, x):
    tap(x.sum())
    return x @ w


def probed_backward(kept, ct):
    """The cotangent is shown by the callback of the forward: the same but for what it is given."""
    tap(ct.sum())
    return kept[1].T @ ct, ct @ kept[0].T


probed.defvjp(lambda w, x: (probed(w, x), (w, x)), probed_backward)


@jax.custom_jvp
def bent(x):
    tap(x.sum())
    return jnp.maximum(x, 0)


bent.defjvp(lambda primals, tangents: (bent(*primals), jnp.where(primals[0] > 0, tangents[0], 0)))


def with_host(w, x):
    """A value that the host gives: asked for once, and kept."""
    scale = io_callback(
        lambda v: SEEN.append(float(v)) or np.asarray(v), jax.ShapeDtypeStruct((), x.dtype),
        lax.stop_gradient(x.sum()),
    )  # fmt: skip
    return jnp.tanh(x @ w) * scale


def named(w, x):
    return checkpoint_name(with_host(w, x) + layer(w, x), RECOMPUTE)


def of_params(w, x):
    tap(w.sum())
    return x @ w


def of_nothing(w, x):
    jax.debug.callback(lambda: SEEN.append(0.0))
    return x @ w


def ordered(w, x):
    for i in range(3):
        io_callback(lambda v, i=i: SEEN.append(float(i)), None, lax.stop_gradient(x.sum()), ordered=True)
    return x @ w


STAGES = {
    "once": (layer, 1),
    "jit": (jax.jit(layer), 1),
    "scan": (in_scan, 3),
    "scan over parameters": (in_stacked_scan, 3),
    "unrolled scan": (functools.partial(in_scan, unroll=3), 3),
    "unrolled scan over parameters": (functools.partial(in_stacked_scan, unroll=True), 3),
    "cond": (in_cond, 1),
    "while": (in_while, 3),
    "fori_loop": (lambda w, x: lax.fori_loop(0, 3, lambda _, c: layer(w, c), x), 3),
    "vmap": (lambda w, x: jax.vmap(functools.partial(layer, w))(x), 2),
    "remat": (jax.checkpoint(layer), 1),
    "remat that keeps all": (jax.checkpoint(layer, policy=jax.checkpoint_policies.everything_saveable), 1),
    "scan of remat": (lambda w, x: lax.scan(lambda c, _: (jax.checkpoint(layer)(w, c), None), x, length=3)[0], 3),
    "remat of a scan": (jax.checkpoint(in_scan), 3),
    "remat of a cond": (jax.checkpoint(in_cond), 1),
    "remat of a while": (jax.checkpoint(in_while), 3),
    "scan of remat of a cond": (
        lambda w, x: lax.scan(lambda c, _: (jax.checkpoint(in_cond)(w, c), None), x, length=3)[0], 3,
    ),
    "custom jvp": (lambda w, x: bent(x @ w), 1),
    "a value of the host": (with_host, 1),
    "a value of the host, by name light": (named, 2),
    "parameters alone": (of_params, 1),
    "nothing": (of_nothing, 1),
    "ordered": (ordered, 3),
}  # fmt: skip


def counted(function, *args):
    """(result, what was seen while it ran)."""
    SEEN.clear()
    result = jax.block_until_ready(jax.jit(function)(*args))
    jax.effects_barrier()
    return result, list(SEEN)


def parts(stage, w, x):
    """(what each part shows, W and I's cotangents, whole B's)."""
    split = split_stage(stage, w, x)
    prepared, nothing = counted(split.prepare, w)
    (out, residuals), forward = counted(split.forward, prepared, x)
    (x_ct, crossing), one = counted(split.backward_input, prepared, residuals, out)
    params_ct, two = counted(split.backward_weight, prepared, residuals.weight, crossing)
    whole, both = counted(split.backward, prepared, residuals, out)
    assert nothing == []
    return {"F": forward, "I": one, "W": two, "B": both}, (params_ct, x_ct), whole


SIMILAR = (
    "unrolled scan over parameters",
    "scan of remat",
    "remat of a scan",
    "remat of a cond",
    "unrolled scan",
    "remat of a while",
    "remat",
    "custom jvp",
)
"""As others that run by default, and slow."""


@cases("name", STAGES, quick=[name for name in STAGES if name not in SIMILAR])
def test_effects_run_once_in_the_forward(x64, name):
    stage, count = STAGES[name]
    w, x = zoo.normal(4, 4), zoo.normal(2, 4)
    out, plain = counted(stage, w, x)
    assert len(plain) == count
    seen, halves, whole = parts(stage, w, x)
    assert sorted(seen["F"]) == pytest.approx(sorted(plain)) and (name != "ordered" or seen["F"] == plain)
    assert seen["I"] == seen["W"] == seen["B"] == []
    expected = jax.vjp(stage, w, x)[1](out)
    assert_trees_close(halves, expected, rtol=1e-12)
    assert_trees_close(whole, expected, rtol=1e-12)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_effects_of_a_custom_derivative_run_once_in_the_backward(x64, wrap):
    """Where the cotangent is at hand, and not where the weights' products would have to be done for it."""
    w, x = zoo.normal(4, 4), zoo.normal(2, 4)
    stage = wrap(lambda w, x: jnp.sin(probed(w, x)))
    seen, halves, _ = parts(stage, w, x)
    out, vjp = jax.vjp(stage, w, x)
    assert seen["F"] == pytest.approx([float(x.sum())])
    assert len(seen["I"]) == 1 and seen["W"] == [] and seen["B"] == pytest.approx(seen["I"])
    assert seen["I"] == pytest.approx([float((out * jnp.cos(x @ w)).sum())])
    assert_trees_close(halves, vjp(out), rtol=1e-12)


def test_effects_that_read_weight_gradients_are_in_the_weight_half(x64):
    try:
        jax.jit(lambda x, ct: (tap((x.T @ ct).max()), x.T @ ct)[1])(zoo.normal(2, 4), zoo.normal(2, 4))
    except jax.errors.JaxRuntimeError as error:  # XLA of jax 0.11.2 on GPUs
        pytest.skip(f"plain JAX cannot compile a callback that reads a product: {str(error)[:80]}")

    @jax.custom_vjp
    def shown(w):
        return w

    shown.defvjp(lambda w: (w, None), lambda _, ct: (tap(ct.max()), ct)[1:])
    seen, (params_ct, _), _ = parts(lambda w, x: jnp.tanh(x @ shown(w)), zoo.normal(4, 4), zoo.normal(2, 4))
    expected = [float(params_ct.max())]
    assert (seen["F"], seen["I"]) == ([], [])
    assert seen["W"] == pytest.approx(expected) and seen["B"] == pytest.approx(expected)


def test_an_unknown_effect_is_kept():
    """An equation with an effect that nobody has heard of stays where plain tracing puts it."""

    class Unheard(Effect):
        pass

    bell = Primitive("bell")
    bell.multiple_results = True
    bell.def_effectful_abstract_eval(lambda x: ([], {Unheard()}))

    def stage(w, x):
        bell.bind(lax.stop_gradient(x))
        return jnp.tanh(x @ w)

    def rings(function, *args):
        return str(jax.make_jaxpr(function)(*args)).count("bell")

    w, x = jnp.ones((4, 4)), jnp.ones((2, 4))
    split = split_stage(stage, w, x)
    prepared = split.prepare(w)
    assert rings(split.forward, prepared, x) == 1
    residuals = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), split.residuals)
    assert rings(split.backward, prepared, residuals, x) == 0


def counter(w, x):
    used = jax.new_ref(jnp.zeros((), jnp.int32))
    used[...] += 3
    return jnp.tanh(x @ w) * used[...].astype(x.dtype)


def scratch(w, x):
    y = jax.new_ref(jnp.zeros_like(x))
    y[...] = x @ w
    y[0] *= 2
    return jnp.sin(jax.freeze(y))


def scaled_in_place(w, x):
    y = jax.new_ref(x)
    y[...] *= w[0]
    return jnp.sin(jax.freeze(y))


def scratch_of_a_loop(w, x):
    y = jax.new_ref(x)

    def body(c, _):
        y[...] = jnp.sin(y[...] @ w) * c
        y[1] += c[0]
        return c * 0.9, None

    c, _ = lax.scan(body, x, length=3)
    return y[...] + c


def filled(w, x):
    y = jax.new_ref(jnp.zeros_like(x))

    def fill(i, _):
        y[i] = jnp.tanh(x[i] @ w)

    lax.fori_loop(0, len(x), fill, None)
    return y[...]


def conditional(w, x):
    y = jax.new_ref(x)

    def double():
        y[...] = y[...] @ w * 2

    def add():
        y[...] += 1

    lax.cond(x.sum() > 0, double, add)
    return y[...]


def of_own_rule(w, x):
    """A custom derivative around a ref is used, not the derivative of what the ref does."""

    @jax.custom_vjp
    def tripled(x):
        y = jax.new_ref(x)
        y[...] *= 2
        return y[...]

    tripled.defvjp(lambda x: (tripled(x), None), lambda _, ct: (3 * ct,))
    return tripled(x) @ w


REFS = {
    "counter": counter,
    "scratch": scratch,
    "jit": jax.jit(scratch),
    "remat": jax.checkpoint(scaled_in_place),
    "vmap": lambda w, x: jax.vmap(lambda row: scratch(w, row[None])[0])(x),
    "in a loop": lambda w, x: lax.scan(lambda c, _: (scaled_in_place(w, c), None), x, length=3)[0],
    "of a loop": scratch_of_a_loop,
    "filled": filled,
    "conditional": conditional,
    "custom vjp": of_own_rule,
}


@cases("name", REFS, quick=["counter", "filled", "conditional", "in a loop", "custom vjp", "remat"])
def test_refs_are_values(x64, name):
    stage, w, x = REFS[name], zoo.normal(4, 4), zoo.normal(2, 4)
    expected = jax.jit(stage)(w, x)
    seen, halves, whole = parts(stage, w, x)
    assert seen == {"F": [], "I": [], "W": [], "B": []}
    split = split_stage(stage, w, x)
    out, _ = split.forward(split.prepare(w), x)
    assert_trees_close(out, expected, rtol=1e-12)
    cotangents = jax.vjp(stage, w, x)[1](expected)
    assert_trees_close(halves, cotangents, rtol=1e-12)
    assert_trees_close(whole, cotangents, rtol=1e-12)


def test_refs_of_others_are_refused():
    ref, x = jax.new_ref(jnp.ones(3)), jnp.ones(3)

    def write(w, x):
        ref[...] = jnp.ones(3)
        return w * x

    for stage in (write, lambda w, x: w * x * ref[...]):
        with pytest.raises(ValueError, match=r"made outside of it \((Read|Write)Effect\).*jax\.new_ref"):
            split_stage(stage, x, x)
    with pytest.raises(ValueError, match=r"is a ref.*pass the array that it holds"):
        split_stage(lambda w, x: w["ref"][...] * x, {"ref": ref}, x)


def test_refs_that_cannot_be_values_are_refused():
    @jax.custom_jvp
    def f(x):
        y = jax.new_ref(x)
        y[...] *= 2
        return y[...]

    f.defjvp(lambda primals, tangents: (f(*primals), 2 * tangents[0]))
    with pytest.raises(ValueError, match=r"custom_jvp_call; there, pass the array"):
        split_stage(lambda w, x: f(x) * w, jnp.ones(3), jnp.ones(3))
