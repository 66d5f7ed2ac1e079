"""The smallest pieces of random stages: ``(params, h[ROWS, COLUMNS], context) -> h`` of what a layer may hold.

Each is made by a function of a `tests.jaxpipe.stage.pieces.Maker`, which has random choices and parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

ROWS, COLUMNS = 3, 4


class Context(NamedTuple):
    """What a stage gets besides parameters and activations."""

    mask: jax.Array  # bool[ROWS]
    position: jax.Array  # int32[ROWS], 0 to ROWS + 1
    index: jax.Array  # int32, 0 to 2
    key: jax.Array


Piece = Callable[[Any, jax.Array, Context], jax.Array]
LEAVES: dict[str, Callable[[Any], Piece]] = {}


def leaf(function: Callable[[Any], Piece]) -> Callable[[Any], Piece]:
    LEAVES[function.__name__] = function
    return function


def act(m: Any) -> Callable[[jax.Array], jax.Array]:
    return m.rng.choice([jnp.tanh, jnp.sin, jax.nn.gelu, jax.nn.silu, jax.nn.relu, jnp.square, jnp.abs, jax.nn.sigmoid])


@leaf
def dense(m):
    w, b, f = m.matrix(), m.param(COLUMNS), act(m)
    return lambda p, h, c: f(h @ w(p, h) + b(p, h))


@leaf
def linear(m):
    w = m.matrix()
    return lambda p, h, c: h @ w(p, h)


@leaf
def mlp(m):
    up, down, f = m.param(COLUMNS, 6), m.param(6, COLUMNS), act(m)
    return lambda p, h, c: f(h @ up(p, h)) @ down(p, h)


@leaf
def swiglu(m):
    up, down, f = m.param(COLUMNS, 12), m.param(6, COLUMNS), act(m)

    def run(p, h, c):
        gate, value = jnp.split(h @ up(p, h), 2, -1)
        return (f(gate) * value) @ down(p, h)

    return run


@leaf
def batched(m):
    w, spec = m.param(2, 2, 2), m.rng.choice(["bij,ijk->bik", "bij,jki->bik", "bij,kij->bik"])
    return lambda p, h, c: jnp.einsum(spec, h.reshape(ROWS, 2, 2), w(p, h)).reshape(h.shape)


@leaf
def gram(m):
    w = m.matrix()
    return lambda p, h, c: h @ (h.T @ (h @ w(p, h)))


@leaf
def bilinear(m):
    a, b = m.matrix(), m.matrix()
    return lambda p, h, c: (h @ a(p, h)) * (h @ b(p, h))


@leaf
def lowrank(m):
    w, a, b = m.matrix(), m.param(COLUMNS, 2), m.param(2, COLUMNS)
    masked = m.rng.random() < 0.5

    def run(p, h, c):
        extra = h @ a(p, h) @ b(p, h)
        return h @ w(p, h) + (jnp.where(c.mask[:, None], extra, 0) if masked else extra)

    return run


@leaf
def scale(m):
    s, e = m.param(COLUMNS), m.param(1)
    return lambda p, h, c: h * jnp.exp(s(p, h)) + e(p, h)


@leaf
def convolution(m):
    w = m.param(3, COLUMNS, COLUMNS)
    numbers = ("NWC", "WIO", "NWC")
    return lambda p, h, c: lax.conv_general_dilated(h[None], w(p, h), (1,), "SAME", dimension_numbers=numbers)[0]


@leaf
def choose_by_data(m):
    a, b = m.matrix(), m.matrix()
    return lambda p, h, c: jnp.where(c.mask[:, None], h @ a(p, h), h @ b(p, h))


@leaf
def choose_by_value(m):
    a, b = m.matrix(), m.matrix()

    def run(p, h, c):
        left, right = h @ a(p, h), h @ b(p, h)
        return jnp.where(left + right > 0, left, right * 0.5)

    return run


@leaf
def uneven_branches(m):
    """Branches that keep arrays of other shapes, return integers beside, or read neither input nor parameters."""
    up, down, w, f = m.param(COLUMNS, 6), m.param(6, COLUMNS), m.matrix(), act(m)
    sign, kind = m.param(1), m.rng.choice(["index", "value", "params"])

    def deep(p, h, c):
        return f(jnp.sin(h @ up(p, h)) @ down(p, h)), jnp.argsort(lax.stop_gradient(h[:, 0])).astype(jnp.int32)

    def shallow(p, h, c):
        return h @ w(p, h), (c.position + 1) % ROWS

    def constant(p, h, c):
        return jnp.ones_like(h), jnp.zeros(ROWS, jnp.int32)

    def run(p, h, c):
        choices = {"index": c.index, "value": jnp.asarray(h.sum() > 0, jnp.int32)}
        which = choices.get(kind, jnp.asarray(sign(p, h)[0] > 0, jnp.int32))
        y, rows = lax.switch(which, [deep, shallow, constant], p, h, c)
        return y[rows] + h

    return run


@leaf
def choose_by_params(m):
    a, mask = m.matrix(), m.param(COLUMNS)
    return lambda p, h, c: jnp.where(mask(p, h) > 0, h @ a(p, h), h)


@leaf
def dropout(m):
    w, fold, f = m.matrix(), m.rng.randint(0, 9), act(m)

    def run(p, h, c):
        keep = jax.random.bernoulli(jax.random.fold_in(c.key, fold), 0.7, h.shape)
        return jnp.where(keep, f(h @ w(p, h)) / 0.7, 0)

    return run


@leaf
def stochastic_depth(m):
    w, fold = m.matrix(), m.rng.randint(0, 9)

    def run(p, h, c):
        keep = jax.random.uniform(jax.random.fold_in(c.key, fold), (ROWS, 1)) < 0.6
        return h + jnp.where(keep, jnp.tanh(h @ w(p, h)), 0)

    return run


@leaf
def noise(m):
    w, fold = m.matrix(), m.rng.randint(0, 9)
    return lambda p, h, c: (h @ w(p, h)) * jax.random.normal(jax.random.fold_in(c.key, fold), h.shape, h.dtype)


@leaf
def top_k(m):
    w, outside = m.matrix(), m.rng.random() < 0.3

    def run(p, h, c):
        scores = w(p, h)[:1] if outside else h @ w(p, h)
        least = lax.top_k(scores, 2)[0][:, -1:]
        return jnp.where(scores >= least, h * jax.nn.softmax(scores), 0)

    return run


@leaf
def maxout(m):
    a, b, f = m.matrix(), m.matrix(), m.rng.choice([jnp.maximum, jnp.minimum])
    return lambda p, h, c: f(h @ a(p, h), h @ b(p, h))


@leaf
def extreme(m):
    w, f, axis = m.matrix(), m.rng.choice([jnp.max, jnp.min]), m.rng.choice([0, 1])
    return lambda p, h, c: h - f(h @ w(p, h), axis=axis, keepdims=True)


@leaf
def bend(m):
    a, b = m.matrix(), m.param(COLUMNS)
    f = m.rng.choice(
        [
            jnp.abs,
            lambda x: jnp.clip(x, -0.3, 0.4),
            jax.nn.relu,
            lambda x: jax.nn.leaky_relu(x, 0.1),
            lambda x: x * lax.stop_gradient(jnp.sign(x)),
            lambda x: x + lax.stop_gradient(jnp.round(x) - x),
            lambda x: jnp.where(x > 0, x, jnp.expm1(x)),
        ]
    )
    return lambda p, h, c: f(h @ a(p, h)) + b(p, h)


@leaf
def norm(m):
    s, w, kind = m.param(COLUMNS), m.matrix(), m.rng.choice(["layer", "rms", "l2"])

    def run(p, h, c):
        if kind == "layer":
            h = h - h.mean(-1, keepdims=True)
        square = (h * h).sum(-1, keepdims=True) if kind == "l2" else (h * h).mean(-1, keepdims=True)
        return (h * lax.rsqrt(square + 1e-2) * s(p, h)) @ w(p, h)

    return run


@leaf
def attention(m):
    qkv, out, kind = m.param(COLUMNS, 3, 2, 2), m.param(2, 2, COLUMNS), m.rng.choice(["causal", "data", "both", "none"])

    def run(p, h, c):
        q, k, v = (jnp.einsum("td,dnh->tnh", h, qkv(p, h)[:, i]) for i in range(3))
        scores = jnp.einsum("tnh,snh->nts", q, k)
        seen = jnp.ones((ROWS, ROWS), bool)
        if kind in ("causal", "both"):
            seen = jnp.arange(ROWS)[:, None] >= jnp.arange(ROWS)
        if kind in ("data", "both"):
            seen = seen & (c.mask | (jnp.arange(ROWS) == 0))
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e4))
        return jnp.einsum("nts,snh,nhd->td", weights, v, out(p, h))

    return run


@leaf
def rotary(m):
    w = m.matrix()

    def run(p, h, c):
        angles = c.position[:, None].astype(h.dtype) * jnp.ones(2, h.dtype)
        left, right = jnp.split(h @ w(p, h), 2, -1)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], -1)

    return run


@leaf
def order(m):
    w, kind = m.matrix(), m.rng.choice(["sort", "argsort", "take", "along", "roll", "flip", "slice"])

    def run(p, h, c):
        y = h @ w(p, h)
        match kind:
            case "sort":
                return jnp.sort(y, axis=0) * h
            case "argsort":
                return h[jnp.argsort(lax.stop_gradient(y[:, 0]))] + y
            case "take":
                return jnp.take(y, c.position % ROWS, axis=0)
            case "along":
                return jnp.take_along_axis(y, jnp.argsort(lax.stop_gradient(h), 0), 0)
            case "roll":
                return jnp.roll(y, 1, 0) * h
            case "flip":
                return y[::-1] + y[:, ::-1]
        row = lax.dynamic_slice(y, (c.index, jnp.int32(0)), (1, COLUMNS))
        return lax.dynamic_update_slice(h, row, (jnp.int32(0), jnp.int32(0)))

    return run


@leaf
def scatter(m):
    w, kind = m.matrix(), m.rng.choice(["add", "set", "mul", "max", "segments", "experts"])
    many = m.param(2, COLUMNS, COLUMNS)

    def run(p, h, c):
        y, rows = h @ w(p, h), c.position % ROWS
        match kind:
            case "add":
                return h.at[rows].add(y)
            case "set":
                return h.at[jnp.array([2, 0])].set(y[:2])
            case "mul":
                return h.at[jnp.array([0, 2])].multiply(y[:2], unique_indices=True)
            case "max":
                return h.at[jnp.array([1, 2])].max(y[:2])
            case "segments":
                return jax.ops.segment_sum(y, rows, num_segments=ROWS)
        return jnp.einsum("td,tde->te", y, many(p, h)[rows % 2])

    return run


@leaf
def lookup(m):
    table = m.param(5, COLUMNS)
    return lambda p, h, c: h * table(p, h)[c.position] + jax.nn.one_hot(c.position, 5, dtype=h.dtype) @ table(p, h)


@leaf
def cumulate(m):
    w = m.matrix()
    f = m.rng.choice(
        [
            lambda x: jnp.cumsum(x, 0),
            lambda x: lax.cumlogsumexp(x, 0),
            lambda x: lax.cummax(x, 0),
            lambda x: lax.associative_scan(jnp.add, x),
            lambda x: lax.associative_scan(jnp.maximum, x),
            lambda x: lax.associative_scan(lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1]), (jax.nn.sigmoid(x), x))[1],
        ]
    )
    return lambda p, h, c: f(h @ w(p, h))


@leaf
def own_vjp(m):
    w, kind = m.matrix(), m.rng.choice(["product", "clip", "mask", "straight", "integer"])

    @jax.custom_vjp
    def f(x, w, rows):
        return jnp.abs(x @ w) if kind == "mask" else x @ w

    def forward(x, w, rows):
        return f(x, w, rows), ((x @ w > 0) if kind == "mask" else None, x, w, rows)

    def backward(kept, ct):
        mask, x, w, rows = kept
        ct = {"clip": jnp.clip(ct, -0.2, 0.2), "integer": ct[rows], "product": 2 * ct}.get(kind, ct)
        if mask is not None:
            ct = jnp.where(mask, ct, -ct)
        return (ct if kind == "straight" else ct @ w.T), x.T @ ct, None

    f.defvjp(forward, backward)
    return lambda p, h, c: f(h, w(p, h), c.position % ROWS)


@leaf
def own_jvp(m):
    w = m.matrix()

    @jax.custom_jvp
    def f(x):
        return jnp.maximum(x, 0)

    f.defjvp(lambda primals, tangents: (f(*primals), jnp.where(primals[0] > 0, tangents[0], tangents[0] * 0.1)))
    return lambda p, h, c: f(h @ w(p, h))


@leaf
def recurrence(m):
    w, start, reverse = m.matrix(), m.param(COLUMNS), m.rng.random() < 0.5

    def run(p, h, c):
        matrix = w(p, h)

        def step(carry, x):
            hidden, count = carry
            hidden = jnp.tanh(hidden @ matrix + x)
            return (hidden, count + 1), jnp.where(count % 2 == 0, hidden, x)

        (last, _), rows = lax.scan(step, (start(p, h), jnp.int32(0)), h, reverse=reverse)
        return rows + last

    return run
