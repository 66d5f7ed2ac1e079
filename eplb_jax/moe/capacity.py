"""Room for tokens from recent loads: what a device needs when tokens pick their replicas by load."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from eplb_jax.moe.split import split_tokens
from eplb_jax.plan.placement import Array, Placement


def capacity_from(
    loads: Integer[Array, "steps layers experts"], placement: Placement, num_devices: int, *, margin: float = 0.1
) -> float:
    """A ``capacity_factor`` that recent microbatches would have needed with ``replicas="split"``, and a margin.

    It is the most tokens that a device got over the mean, of all these microbatches and layers. What later goes beyond
    it is dropped, and counted in `eplb_jax.MoEStats`; with a factor of None a layer has room for the worst case and
    drops nothing. It bounds the rows of a device's experts. Rows between two devices are bounded by the same factor of
    what evenly spread choices need: there tokens that all want the same few devices may be too many before.

    Args:
      loads: tokens of each expert in recent microbatches, of all devices.
      placement: with layers, on the host.
      num_devices: that its slots divide over.
      margin: added, as a share.

    Raises:
      ValueError: loads of no step, or of other layers or experts; a negative margin.

    >>> placement = Placement.from_phy2log(np.array([[0, 1, 0, 2]]), 3)
    >>> capacity_from(np.array([[[6, 4, 2]], [[2, 5, 1]]]), placement, 2, margin=0.0)
    1.25
    """
    if not 0 <= margin < np.inf:
        raise ValueError(f"margin={margin}: it must be a share of at least 0")
    heaviest = heaviest_by_split(loads, placement, num_devices)
    return float(max(heaviest.max(), 1.0) * (1 + margin))


def heaviest_by_split(
    loads: Integer[Array, "steps layers experts"], placement: Placement, num_devices: int
) -> Float[np.ndarray, "steps layers"]:
    """Tokens of the heaviest device over the mean, in each microbatch and layer, when tokens go where load is least.

    Args:
      loads, placement, num_devices: as in `capacity_from`.

    Raises:
      ValueError: as there.

    >>> heaviest_by_split(np.array([[[6, 4, 2]]]), Placement.from_phy2log(np.array([[0, 1, 0, 2]]), 3), 2).tolist()
    [[1.0]]
    """
    array = np.asarray(loads)
    if array.ndim != 3 or 0 in array.shape or array.shape[1:] != placement.logcnt.shape or array.dtype.kind not in "iu":
        raise ValueError(
            f"loads are {array.dtype} of shape {array.shape}: they must be integers of [steps, "
            f"{placement.num_layers} layers, {placement.num_experts} experts] and not empty"
        )
    if array.min() < 0 or array.max() >= 2**24:
        raise ValueError(f"loads are {array.min()} to {array.max()}: they must be tokens of a microbatch, below 2**24")
    found = _heaviest(jnp.asarray(array, jnp.int32), jax.tree.map(jnp.asarray, placement.padded()), num_devices)
    mean = array.sum(2) / num_devices
    return np.where(mean > 0, np.asarray(found) / np.where(mean > 0, mean, 1), 1.0)


@functools.partial(jax.jit, static_argnums=2)
def _heaviest(loads: jax.Array, placement: Placement, num_devices: int) -> jax.Array:
    def of_layer(counts: jax.Array, layer: Placement) -> jax.Array:
        tokens = split_tokens(counts, layer, num_devices)
        used = layer.log2phy >= 0
        slots = jnp.where(used, layer.log2phy, layer.phy2log.size)
        out = jnp.zeros(layer.phy2log.size, jnp.int32).at[slots].set(tokens, mode="drop", unique_indices=True)
        return out.reshape(num_devices, -1).sum(1, dtype=jnp.int32).max()

    return jax.lax.map(lambda counts: jax.vmap(of_layer)(counts, placement), loads)
