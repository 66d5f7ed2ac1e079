"""Parameters in the order of the model, whatever the schedule, and as the slots of stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpipe
from jaxpipe.deepseek.arrange import Arrangement
from jaxpipe.deepseek.config import DENSE, MOE, MTP

ROUTED = (MOE, MTP)
"""Kinds of layers that have experts."""

OF_SOME = ("mlp", "moe")
"""Parts that not all layers have."""


def to_layers(params: Any, arrangement: Arrangement) -> dict[str, Any]:
    """See `DeepSeekModel.to_layers`."""
    slots = {name: part for name, part in params.stages.items() if name != "mtp"}
    every = arrangement.to_layers({name: without(part, *OF_SOME) for name, part in slots.items()})
    moe = arrangement.to_layers(parts_of(slots, "moe"), ROUTED)
    kinds, outer = arrangement.layer_kinds, dict(params.outer)
    dense, routed = kinds.count(DENSE), kinds.count(MOE)
    if dense:
        mlp = arrangement.to_layers(parts_of(slots, "mlp"), (DENSE,))
        outer |= {f"layer_{i}": {**_at(every, i), "mlp": _at(mlp, i)} for i in range(dense)}
    if MTP in kinds:
        (slot,) = arrangement.slots_of((MTP,))
        own = _at(arrangement.to_layers({f"layer_{slot}": params.stages["mtp"]}, (MTP,)), 0)
        outer["norm"] = own.pop("main_norm")
        outer["mtp"] = {**own, "block": {**_at(every, -1), "moe": _at(moe, -1)}}
    layers = {**_at(every, slice(dense, dense + routed)), "moe": _at(moe, slice(routed))}
    return {"layers": layers, "outer": outer}


def from_layers(tree: Mapping[str, Any], arrangement: Arrangement) -> jaxpipe.Params:
    """The inverse of `to_layers`."""
    outer = dict(tree["outer"])
    dense = [_stacked(outer.pop(f"layer_{index}")) for index in range(arrangement.layer_kinds.count(DENSE))]
    mtp = [{**outer.pop("mtp"), "main_norm": outer.pop("norm")}] if MTP in arrangement.layer_kinds else []
    every = [*dense, tree["layers"], *(_stacked(layer["block"]) for layer in mtp)]
    stages = arrangement.from_layers(_joined([without(part, *OF_SOME) for part in every]))
    for name, kinds in (("moe", ROUTED), ("mlp", (DENSE,))):
        stacks = [part[name] for part in every if name in part]
        for slot, leaves in (arrangement.from_layers(_joined(stacks), kinds) if stacks else {}).items():
            stages[slot][name] = leaves
    for layer in mtp:
        (stages["mtp"],) = arrangement.from_layers(_stacked(without(layer, "block")), (MTP,)).values()
    return jaxpipe.Params(stages, outer)


def without(tree: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """A layer's parts but for some."""
    return {name: part for name, part in tree.items() if name not in names}


def parts_of(slots: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One part of the layers, of the slots that have it."""
    return {slot: parts[name] for slot, parts in slots.items() if name in parts}


def _at(stack: Any, index: int | slice) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], stack)


def _stacked(layer: Any) -> Any:
    """A layer as a stack of one."""
    return jax.tree.map(lambda leaf: leaf[None], layer)


def _joined(stacks: Sequence[Any]) -> Any:
    """Stacks of layers as one."""

    def join(*leaves: Any) -> Any:
        return (np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp).concatenate(leaves)

    return stacks[0] if len(stacks) == 1 else jax.tree.map(join, *stacks)
