"""Optimizers for parameters some of which are integers, bools or keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    import optax


@jax.tree_util.register_static
class Unchanged:
    """The update of a leaf that stays as it is: ``leaf + Unchanged()`` is the leaf, of any dtype.

    As a pytree it has no leaves, so what is mapped over updates (a norm, a factor) passes it by.
    """

    __array_ufunc__ = None  # numpy's arrays leave the sum to us

    def __radd__(self, leaf: Any) -> Any:
        """The leaf."""
        return leaf

    def __repr__(self) -> str:
        """The call that makes one."""
        return "Unchanged()"

    def __eq__(self, other: object) -> bool:
        """All `Unchanged` are equal."""
        return isinstance(other, Unchanged)

    def __hash__(self) -> int:
        """All `Unchanged` are equal."""
        return hash(Unchanged)


def floating_only(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer for the floating and complex leaves alone; `optax.apply_updates` leaves all others as they are.

    Integers, bools and keys among parameters (a placement of experts, a mask) have gradients of dtype float0, as
    `jax.grad` with ``allow_int=True`` gives them. No arithmetic takes these, so no optimizer takes them by mistake. It
    would take zeros: `optax.adamw` then decays the integers, and `optax.apply_updates` truncates the result.

    Put it outermost, round clipping, accumulation and masks: what it returns has `Unchanged` in place of the updates of
    those leaves. To log the norm of gradients, take that of the floating leaves. Update keys inside of `jax.jit`, since
    `optax.apply_updates` cannot cast them eagerly.

    Args:
      transformation: an optax optimizer; it sees the floating leaves alone, and has no state for others.

    >>> import optax
    >>> params = {"w": jnp.ones(2), "placement": jnp.array([0, 5, 7, 2])}
    >>> grads = jax.grad(lambda p: p["w"].sum(), allow_int=True)(params)
    >>> optimizer = floating_only(optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.5)))
    >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> params["placement"].tolist(), params["w"].tolist()
    ([0, 5, 7, 2], [0.25, 0.25])
    """

    def init(params: Any) -> Any:
        return transformation.init(_floating(params, params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        like = updates if params is None else params
        floating = None if params is None else _floating(like, params)
        found, state = transformation.update(_floating(like, updates), state, floating, **extra)
        return jax.tree.map(lambda leaf, new: new if is_floating(leaf) else Unchanged(), like, found), state

    return type(transformation)(init, update)


def _floating(like: Any, tree: Any) -> Any:
    """The tree, with nothing in place of what is not floating in ``like``."""
    return jax.tree.map(lambda leaf, value: value if is_floating(leaf) else (), like, tree)


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is of a floating or complex dtype."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return jnp.issubdtype(dtype, jnp.inexact)
