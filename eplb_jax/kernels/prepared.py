"""A name for what is made of parameters alone and should be made once a step, not once for each microbatch."""

from __future__ import annotations

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

PREPARED = "prepared"
"""Name for `jax.ad_checkpoint.checkpoint_name`; `jaxpipe.stage.split_stage` knows it."""


def prepared(tree: Any) -> Any:
    """The same arrays, named `PREPARED`.

    A divided stage makes what depends on parameters alone once a step where this takes no more bytes than the
    parameters. It decides value by value, so it would not begin with one that becomes larger on the way: matrices in 8
    bits by way of float32. Of a named value only its own bytes count. Elsewhere the name does nothing.

    >>> prepared({"w": jax.numpy.ones(2)})["w"].tolist()
    [1.0, 1.0]
    """
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, PREPARED), tree)
