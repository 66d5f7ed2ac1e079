"""Which parameters are trained, and which are frozen: from a mask or a function of paths to a bool for every leaf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.params import Params

Trainable = Params | Callable[[str, Any], bool] | None
"""A tree prefix of Params of bools, as optax's masks; ``(path, leaf) -> bool``; or None: all parameters."""


def check_trainable(trainable: Any) -> Any:
    """The same; raises ValueError unless it is a `Trainable`."""
    if trainable is None or (callable(trainable) and not isinstance(trainable, type)):
        return trainable
    if not isinstance(trainable, Params):
        raise ValueError(
            f"trainable is {trainable!r:.80}: pass jaxpipe.Params(stages=..., outer=...) of bools, or a function of a "
            "parameter's path and value, lambda path, leaf: 'lora' in path; from_nnx takes types of variables, too"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainable):
        _check_bool(leaf, f"trainable{jax.tree_util.keystr(path)}")
    return trainable


def trainable_mask(trainable: Trainable, params: Params) -> Params:
    """A bool for every leaf of params: whether it has a gradient.

    Integers, bools and keys have none, whatever ``trainable`` says of them.

    Args:
      trainable: a tree prefix of params with bools, in which None for ``stages`` or ``outer`` stands for all of them; a
        function of a leaf's path, such as ".stages['mlp']['kernel']" (`jax.tree_util.keystr`), and the leaf; or None.
      params: arrays, or anything with a shape and a dtype.

    Raises:
      ValueError: ``trainable`` does not match params, says something else than a bool, or leaves nothing to train.

    >>> params = Params({"kernel": jnp.ones((2, 3)), "lora": jnp.ones((2, 3))}, {"embedding": jnp.ones(3)})
    >>> trainable_mask(lambda path, leaf: "lora" in path, params)
    Params(stages={'kernel': False, 'lora': True}, outer={'embedding': False})
    >>> trainable_mask(Params(stages=False), params)
    Params(stages={'kernel': False, 'lora': False}, outer={'embedding': True})
    """
    chosen = choose(trainable, params)
    found = jax.tree.map(lambda leaf, choice: choice and is_floating(leaf), params, chosen)
    if trainable is not None and not any(jax.tree.leaves(found)):
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise ValueError(
            f"trainable={trainable!r:.80} leaves no floating parameter to train, of {', '.join(paths[:8])}"
            + ", ..." * (len(paths) > 8)
        )
    return found


def choose(trainable: Any, params: Any) -> Any:
    """What ``trainable`` says of every leaf of any tree: a bool.

    Raises:
      ValueError: it is no prefix of the tree, or says something else than a bool.
    """
    if trainable is None:
        return jax.tree.map(lambda _: True, params)
    if callable(trainable):
        function: Any = trainable
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: _ask(function, jax.tree_util.keystr(path), leaf), params
        )
    if isinstance(trainable, Params):
        trainable = Params(*(True if part is None else part for part in trainable))
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainable):
        _check_bool(leaf, f"trainable{jax.tree_util.keystr(path)}")
    try:
        return jax.tree.map(lambda choice, part: jax.tree.map(lambda _: bool(choice), part), trainable, params)
    except ValueError as error:
        raise ValueError(
            f"trainable has structure {jax.tree.structure(trainable)}, the parameters {jax.tree.structure(params)}: a "
            f"mask is a tree like the parameters, or a prefix of it, with bools ({error})"
        ) from error


def _ask(function: Callable[[str, Any], bool], path: str, leaf: Any) -> bool:
    answer = function(path, leaf)
    _check_bool(answer, f"trainable({path!r}, leaf)")
    return bool(answer)


def _check_bool(value: Any, name: str) -> None:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} is {value!r:.80}: say True of what is trained, and False of what is frozen")


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is floating or complex."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return bool(jnp.issubdtype(dtype, jnp.inexact))
