"""Optimizers for parameters some of which are integers, bools or keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

from jaxpipe.trainable import choose, is_floating

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


def floating_only(transformation: optax.GradientTransformation, trainable: Any = None) -> optax.GradientTransformation:
    """The optimizer for the trained leaves alone, floating or complex; `optax.apply_updates` leaves others as they are.

    Integers, bools and keys among parameters (a placement of experts, a mask) have gradients of dtype float0, as
    `jax.grad` with ``allow_int=True`` gives them, and so have parameters that are frozen. No arithmetic takes these, so
    no optimizer takes them by mistake. It would take zeros: `optax.adamw` then decays the integers and the frozen
    parameters, and `optax.apply_updates` truncates the integers.

    Put it outermost, round clipping, accumulation and masks: what it returns has `Unchanged` in place of the updates of
    those leaves. To log the norm of gradients, take that of the trained leaves. Update keys inside of `jax.jit`, since
    `optax.apply_updates` cannot cast them eagerly.

    Args:
      transformation: an optax optimizer; it sees the trained leaves alone, and has no state for others.
      trainable: which leaves are trained, as `jaxpipe.value_and_grad` takes it; or what
        `jaxpipe.Pipeline.trainable_mask` returns. None: all that are floating or complex.

    Raises:
      ValueError: in ``update``, a leaf has no gradient that ``trainable`` says is trained.

    >>> import jax.numpy as jnp, optax
    >>> params = {"w": jnp.ones(2), "frozen": jnp.ones(2), "placement": jnp.array([0, 5, 7, 2])}
    >>> grads = jax.grad(lambda p: p["w"].sum(), allow_int=True)(params)
    >>> optimizer = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.5))
    >>> optimizer = floating_only(optimizer, trainable=lambda path, leaf: "frozen" not in path)
    >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> params["placement"].tolist(), params["frozen"].tolist(), params["w"].tolist()
    ([0, 5, 7, 2], [1.0, 1.0], [0.25, 0.25])
    """

    def trained(like: Any) -> Any:
        return jax.tree.map(lambda leaf, choice: choice and is_floating(leaf), like, choose(trainable, like))

    def init(params: Any) -> Any:
        return transformation.init(_chosen(trained(params), params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        chosen = trained(updates if params is None else params)
        jax.tree_util.tree_map_with_path(_check_gradient, chosen, updates)
        given = None if params is None else _chosen(chosen, params)
        found, state = transformation.update(_chosen(chosen, updates), state, given, **extra)
        return jax.tree.map(lambda choice, new: new if choice else Unchanged(), chosen, found), state

    return type(transformation)(init, update)


def _chosen(chosen: Any, tree: Any) -> Any:
    """The tree, with nothing in place of what is not chosen."""
    return jax.tree.map(lambda choice, value: value if choice else (), chosen, tree)


def _check_gradient(path: Any, choice: bool, gradient: Any) -> None:
    if choice and getattr(gradient, "dtype", None) == jax.dtypes.float0:
        raise ValueError(
            f"{jax.tree_util.keystr(path)} has no gradient, since it is frozen: pass floating_only(optimizer, "
            "trainable=...) what jaxpipe.value_and_grad was given as trainable"
        )
