"""Which replica of a logical expert a token goes to.

T tokens, k choices, E logical experts, X most replicas of one, P slots of all devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from eplb_jax.moe.split import choose_by_load
from eplb_jax.plan.placement import Placement

MULTIPLIER = 2654435769
"""2**32 over the golden ratio: multiples of it are spread evenly (Knuth, volume 3, 6.4)."""

CHOICES = ("hash", "nearest", "split")


def choose_replicas(
    experts: Int[Array, "tokens k"],
    placement: Placement,
    *,
    first_token: Int[Array, ""] | int = 0,
    choice: str = "hash",
    device: Int[Array, ""] | int = 0,
    num_devices: int = 1,
    devices_per_node: int | None = None,
    counts: Int[Array, "devices E"] | None = None,
) -> Int[Array, "tokens k"]:
    """The slot of each choice of each token, -1 for expert -1.

    "hash" takes replicas by the hash of the token's index, so that all are used alike: what a plan of even loads
    assumes. "nearest" takes one on the token's own device, else on its node, else any, by hash among equally near ones:
    fewer bytes travel, but loads are no longer those that were planned. "split" divides each expert's tokens by number,
    so that the heaviest device is as light as the placement allows, and keeps as many on their node as that allows; see
    `eplb_jax.moe.split`.

    Args:
      experts: logical experts.
      placement: of one layer, without the axis of layers; see `Placement.of_layer`.
      first_token: the index of the first of these tokens among all devices' tokens.
      choice: "hash", "nearest" or "split".
      device: where these tokens are.
      num_devices: devices that the slots divide over.
      devices_per_node: consecutive devices that share a node; None: all.
      counts: for "split", how many of each device's tokens chose each expert.

    Raises:
      ValueError: another choice; "split" without counts or with those of other devices or experts; slots that do not
        divide over the devices, or devices over nodes.

    >>> import numpy as np
    >>> placement = Placement.from_phy2log(np.array([[0, 1, 0, 2]]), 3).of_layer(0)
    >>> choose_replicas(jnp.array([[0, 2]]), placement, choice="nearest", device=1, num_devices=2).tolist()
    [[2, 3]]
    """
    slots = placement.phy2log.shape[-1]
    if choice not in CHOICES:
        raise ValueError(f"choice={choice!r}: it must be one of {CHOICES}")
    if placement.phy2log.ndim != 1:
        raise ValueError(f"phy2log has shape {placement.phy2log.shape}: take one layer of it, placement.of_layer(i)")
    if num_devices < 1 or slots % num_devices:
        raise ValueError(f"{slots} slots do not divide over {num_devices} devices")
    per_node = node_size(num_devices, devices_per_node)
    if choice == "split":
        wanted = num_devices, placement.num_experts
        if counts is None or counts.shape != wanted:
            found = None if counts is None else counts.shape
            raise ValueError(
                f"counts have shape {found}: choice='split' needs them for all devices and experts, {wanted}"
            )
        return choose_by_load(experts, placement, counts, device, per_node)
    table, replicas = jnp.asarray(placement.log2phy, jnp.int32), jnp.asarray(placement.logcnt, jnp.int32)
    if choice == "nearest":
        table, replicas = _nearest_first(table, device, slots // num_devices, per_node)
    token = jnp.arange(experts.shape[0], dtype=jnp.uint32) + jnp.asarray(first_token).astype(jnp.uint32)
    mixed = token * jnp.uint32(MULTIPLIER)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(MULTIPLIER)  # twice, or large even strides meet one replica only
    mixed = (mixed ^ (mixed >> 15)) & jnp.uint32(0x7FFFFFFF)
    known = jnp.maximum(experts, 0)
    replica = mixed.astype(jnp.int32)[:, None] % replicas[known]
    return jnp.where(experts >= 0, table[known, replica], -1)


def node_size(num_devices: int, devices_per_node: int | None) -> int:
    """Devices of a node, all where None is given.

    Raises:
      ValueError: devices that do not divide into nodes.
    """
    per_node = num_devices if devices_per_node is None else devices_per_node
    if per_node < 1 or num_devices % per_node:
        raise ValueError(
            f"{num_devices} devices do not divide into nodes of devices_per_node={per_node}: give a divisor of "
            f"{num_devices}, or None where all are one node"
        )
    return per_node


def _nearest_first(
    table: jax.Array, device: jax.Array | int, capacity: int, per_node: int
) -> tuple[jax.Array, jax.Array]:
    """Each expert's slots [E, X] with the nearest ones first, and how many those are [E]."""
    holder = table // capacity
    distance = jnp.where(holder == device, 0, jnp.where(holder // per_node == device // per_node, 1, 2))
    distance = jnp.where(table >= 0, distance, 3).astype(jnp.int32)
    order = jnp.argsort(distance, axis=1, stable=True)
    nearest = (distance == distance.min(1, keepdims=True)).sum(1, dtype=jnp.int32)
    return jnp.take_along_axis(table, order, axis=1), nearest
