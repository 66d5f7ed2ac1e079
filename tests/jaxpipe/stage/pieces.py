"""What random stages are made of: the smallest pieces, and those that hold others."""

import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxpipe.stage.graph import RECOMPUTE
from tests.jaxpipe.stage.leaves import COLUMNS, LEAVES, Context, Piece, act

TURNS = 3
POLICIES = jax.checkpoint_policies


class Maker:
    """Makes pieces with random choices; ``shapes`` are those of the parameters that they read, a tree of tuples."""

    def __init__(self, rng: random.Random, names: list[str] | None = None) -> None:
        self.rng = rng
        self.shapes: dict[str, Any] = {}
        self.names = [] if names is None else names

    def param(self, *shape: int) -> Callable[[Any, jax.Array], jax.Array]:
        """Reads a parameter of a shape in the activations' dtype: a new one, or one that another piece reads, too."""
        tied = [name for name, known in self.shapes.items() if known == shape]
        name = self.rng.choice(tied) if tied and self.rng.random() < 0.25 else f"p{len(self.shapes)}"
        self.shapes[name] = shape
        return lambda params, h: params[name].astype(h.dtype)

    def matrix(self) -> Callable[[Any, jax.Array], jax.Array]:
        """A square matrix of parameters: itself, transposed, a product, or a function of them."""
        a, b = self.param(COLUMNS, COLUMNS), self.param(COLUMNS, COLUMNS)
        column = self.param(COLUMNS, 1)
        return self.rng.choice(
            [
                a,
                a,
                a,
                lambda p, h: a(p, h).T,
                lambda p, h: jnp.tanh(a(p, h)),
                lambda p, h: a(p, h) @ b(p, h),
                lambda p, h: column(p, h) * column(p, h)[:, 0],
                lambda p, h: jnp.where(a(p, h) > 0, a(p, h), b(p, h)),
            ]
        )

    def chain(self, count: int, depth: int) -> Piece:
        """Pieces one after the other, kept in bounds."""
        parts = [self.piece(depth) for _ in range(count)]

        def run(params: Any, h: jax.Array, context: Context) -> jax.Array:
            for part in parts:
                h = bounded(part(params, h, context))
            return h

        return run

    def piece(self, depth: int) -> Piece:
        """A random piece; with depth it may hold others."""
        kinds = {**LEAVES, **NESTED} if depth else LEAVES
        weights = [3 if name in NESTED else 1 for name in kinds]
        name = self.rng.choices(list(kinds), weights)[0]
        self.names.append(name)
        made = kinds[name](self, depth) if name in NESTED else kinds[name](self)
        residual = self.rng.random() < 0.3
        return lambda p, h, c: h + made(p, h, c) if residual else made(p, h, c)


def bounded(h: jax.Array) -> jax.Array:
    """Keeps numbers near one, so that long chains neither vanish nor overflow."""
    return h / (1 + lax.stop_gradient(jnp.abs(h).max()) / 4)


NESTED: dict[str, Callable[[Maker, int], Piece]] = {}


def nested(function: Callable[[Maker, int], Piece]) -> Callable[[Maker, int], Piece]:
    NESTED[function.__name__] = function
    return function


@nested
def remat(m, depth):
    inner = m.chain(m.rng.randint(1, 3), depth - 1)
    policy = m.rng.choice([None, POLICIES.nothing_saveable, POLICIES.dots_saveable, POLICIES.everything_saveable])
    prevent_cse = m.rng.random() < 0.7
    return lambda p, h, c: jax.checkpoint(inner, policy=policy, prevent_cse=prevent_cse)(p, h, c)


@nested
def remat_names(m, depth):
    one, two = m.piece(depth - 1), m.piece(depth - 1)
    policy = m.rng.choice([POLICIES.save_only_these_names("kept"), POLICIES.save_anything_except_these_names("kept")])

    def inner(p, h, c):
        return two(p, checkpoint_name(one(p, h, c), "kept"), c)

    return jax.checkpoint(inner, policy=policy)


@nested
def jitted(m, depth):
    return jax.jit(m.chain(m.rng.randint(1, 2), depth - 1))


@nested
def light_by_name(m, depth):
    inner = m.piece(depth - 1)

    return lambda p, h, c: checkpoint_name(inner(p, h, c), RECOMPUTE)


@nested
def choice(m, depth):
    count, kind = m.rng.choice([2, 3]), m.rng.choice(["index", "data", "value"])
    branches = [m.piece(depth - 1) for _ in range(count)]

    def run(p, h, c):
        if kind == "index":
            return lax.switch(c.index % count, branches, p, h, c)
        which = c.mask[0] if kind == "data" else h.sum() > 0
        return lax.cond(which, branches[0], branches[1], p, h, c)

    return run


def unroll_of(m):
    """Whether a scan is a loop or written out: in turn, which leaves the choice of all else as it was."""
    return (1, TURNS)[len(m.shapes) % 2]


@nested
def switched_layers(m, depth):
    """A scan over layers of one structure of parameters and of several kinds, in an order of their own."""
    own = Maker(m.rng, m.names)
    kinds = [own.piece(depth - 1) for _ in range(m.rng.choice([2, 3]))]
    order, moving = [m.rng.randrange(len(kinds)) for _ in range(TURNS)], m.rng.random() < 0.5
    again = m.rng.random() < 0.2
    unroll = unroll_of(m)
    name = f"switched{len(m.shapes)}"
    own.shapes.setdefault("bias", (COLUMNS,))
    m.shapes[name] = jax.tree.map(lambda s: (TURNS, *s), own.shapes, is_leaf=lambda node: isinstance(node, tuple))

    def run(p, h, c):
        def layer(h, inputs):
            turn, row = inputs
            kind = jnp.asarray(order, jnp.int32)[turn]
            kind = (kind + c.index) % len(kinds) if moving else kind
            return bounded(lax.switch(kind, kinds, row, h, c)) + row["bias"].astype(h.dtype), None

        body = jax.checkpoint(layer) if again else layer
        return lax.scan(body, h, (jnp.arange(TURNS, dtype=jnp.int32), p[name]), unroll=unroll)[0]

    return run


@nested
def layers(m, depth):
    """A scan over stacked parameters, whose body may read unstacked ones, too."""
    own = Maker(m.rng, m.names)
    inner = own.chain(m.rng.randint(1, 2), depth - 1)
    shared = m.piece(0) if m.rng.random() < 0.4 else None
    again = m.rng.choice([None, None, POLICIES.nothing_saveable, POLICIES.dots_saveable])
    reverse, sums, unroll = m.rng.random() < 0.3, m.rng.random() < 0.4, unroll_of(m)
    own.shapes.setdefault("bias", (COLUMNS,))
    name = f"layers{len(m.shapes)}"
    m.shapes[name] = jax.tree.map(lambda s: (TURNS, *s), own.shapes, is_leaf=lambda node: isinstance(node, tuple))

    def run(p, h, c):
        def layer(carry, inputs):
            turn, row = inputs
            here = c._replace(key=jax.random.fold_in(c.key, turn), index=(c.index + turn) % 3)
            y = inner(row, carry, here) + row["bias"].astype(h.dtype)
            if shared is not None:
                y = bounded(shared(p, y, here))
            return y, y.mean(0) if sums else None

        body = layer if again is None else jax.checkpoint(layer, policy=again)
        h, rows = lax.scan(body, h, (jnp.arange(TURNS, dtype=jnp.int32), p[name]), reverse=reverse, unroll=unroll)
        return h + rows if sums else h

    return run


@nested
def loop(m, depth):
    inner = m.piece(depth - 1)
    return lambda p, h, c: lax.fori_loop(
        0, TURNS, lambda i, h: bounded(inner(p, h, c._replace(index=jnp.asarray(i % 3, jnp.int32)))), h
    )


@nested
def branches(m, depth):
    one, two, mask = m.piece(depth - 1), m.piece(depth - 1), m.param(COLUMNS)
    kind = m.rng.choice(["add", "mul", "data", "value", "params", "max", "gate", "stop"])

    def run(p, h, c):
        a, b = one(p, h, c), two(p, h, c)
        match kind:
            case "add":
                return a + b
            case "mul":
                return a * b
            case "data":
                return jnp.where(c.mask[:, None], a, b)
            case "value":
                return jnp.where(a > b, a * b, h)
            case "params":
                return jnp.where(mask(p, h) > 0, a, b)
            case "max":
                return jnp.maximum(a, b)
            case "gate":
                return a * jax.nn.sigmoid(b)
        return a + lax.stop_gradient(b)

    return run


@nested
def mapped(m, depth):
    w = m.matrix()
    f = act(m)

    def run(p, h, c):
        return jax.vmap(lambda row, seen: jnp.where(seen, f(row @ w(p, h)), row))(h, c.mask)

    return run
