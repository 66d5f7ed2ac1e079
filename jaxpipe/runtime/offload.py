"""Residuals in pinned host memory: which of them, and the slots that they have there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from jaxpipe.runtime.buffers import Apart, numbered_array
from jaxpipe.runtime.stage_kinds import SharedPool
from jaxpipe.stage import Residuals, SplitStage
from jaxpipe.stage.stash import Slots

HOST_MEMORY = "pinned_host"
"""The kind of memory, as JAX names it, that `jax.memory.Space.Host` stands for."""

_LEAST = 0.01
"""Of what a stage keeps of a microbatch, the share that an array has at least which is worth a transfer of its own."""

Chosen = Residuals
"""Bools in place of arrays: whether each of a stage's residuals goes to the host."""


def choose_offloaded(split: SplitStage, offload: int, slots: Slots) -> Chosen:
    """Which residuals of a stage go to the host: at most ``offload`` bytes of a microbatch.

    Those come first that free most device memory for what they make the link to the host carry: a residual that input
    and weight gradient read apart comes back twice. Among equals those do that are made first: they have the rest of
    the forward to leave in, and are read last in the backward pass.

    >>> import jax, jax.numpy as jnp, jaxpipe.stage
    >>> w, x = jnp.ones((4, 4)), jnp.ones((64, 4))
    >>> split = jaxpipe.stage.split_stage(lambda w, x: jnp.tanh(x @ w), w, x)
    >>> choose_offloaded(split, 1024, Slots())  # x is for the weight's gradient alone, the product for the input's
    Residuals(input=(True,), weight=(False,))
    """
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(split.residuals))
    worth = {"input": slots.stash / 2, "weight": slots.weight / (2 + slots.apart)}
    candidates = [
        (name, place, leaf.size * leaf.dtype.itemsize)
        for name, leaves in split.residuals._asdict().items()
        for place, leaf in enumerate(leaves)
    ]
    chosen: set[tuple[str, int]] = set()
    for name, place, nbytes in sorted(candidates, key=lambda each: (-worth[each[0]], each[1])):
        if _LEAST * total <= nbytes <= offload:
            chosen.add((name, place))
            offload -= nbytes
    return Residuals(
        *(
            tuple((name, place) in chosen for place in range(len(leaves)))
            for name, leaves in split.residuals._asdict().items()
        )
    )


class PlacedPool(NamedTuple):
    """A pool of which some places are in host memory.

    Attributes:
      device: for what stays on the device.
      host: for what does not.
      chosen: of each kind of stage, which of its arrays are in host memory.
    """

    device: SharedPool
    host: SharedPool
    chosen: tuple[tuple[bool, ...], ...]

    @classmethod
    def of(cls, kinds: Sequence[Sequence[Any]], chosen: Sequence[Sequence[bool]], *, flat: bool = False) -> PlacedPool:
        """The pool for what each kind keeps, given as shapes and dtypes, and ``flat`` as of `SharedPool.of`."""
        both = [_divided(avals, mine) for avals, mine in zip(kinds, chosen, strict=True)]
        device = SharedPool.of([here for here, _ in both], flat=flat)
        return cls(device, SharedPool.of([there for _, there in both]), tuple(map(tuple, chosen)))

    def take(self, pool: Any, host: Any, slot: Any, kind: int) -> tuple[Any, ...]:
        """What is kept in a slot, of a kind, all of it on the device."""
        if isinstance(pool, Apart):
            return tuple(map(_to_device, self.device.take(pool, slot, kind), self.chosen[kind]))
        here = iter(self.device.take(pool, slot, kind))
        there = iter(self.host.take(host, slot, kind))
        return tuple(_to_device(next(there), True) if away else next(here) for away in self.chosen[kind])

    def after_take(self, values: tuple[Any, ...], host: Any, kind: int) -> tuple[tuple[Any, ...], Any]:
        """(what `take` returned, the pool in host memory) such that the pool is not written before that is read.

        Without an order XLA would copy the whole pool.
        """
        if not host:
            return values, host
        leaves, found = list(host), list(values)
        away = (place for place, goes in enumerate(self.chosen[kind]) if goes)
        for value, place in zip(away, self.host.places[kind], strict=True):
            found[value], leaves[place] = lax.optimization_barrier((found[value], leaves[place]))
        return tuple(found), tuple(leaves)

    def put(self, pool: Any, host: Any, slot: Any, kind: int, values: tuple[Any, ...]) -> tuple[Any, Any]:
        """(the pool, the pool in host memory) with a slot's places for a kind replaced."""
        placed = tuple(map(_to_host, values, self.chosen[kind]))
        if isinstance(pool, Apart):
            return self.device.put(pool, slot, kind, placed), host
        here, there = _divided(placed, self.chosen[kind])
        return self.device.put(pool, slot, kind, here), self.host.put(host, slot, kind, there)


def _divided(values: Sequence[Any], chosen: Sequence[bool]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(what stays, what goes)."""
    here, there = (
        tuple(value for value, away in zip(values, chosen, strict=True) if away is goes) for goes in (False, True)
    )
    return here, there


def _to_host(array: Any, away: bool) -> Any:
    return jax.device_put(array, jax.memory.Space.Host) if away else array


def _to_device(array: Any, away: bool) -> Any:
    return jax.device_put(array, jax.memory.Space.Device) if away else array


def allocate_on_host(avals: Sequence[Any], slots: int, first: int) -> tuple[jax.Array, ...]:
    """``[slots, ...]`` arrays in host memory, whose first contents are never read; ``first`` as of `numbered_array`.

    What a constant fills, and code then writes in part, XLA allocates there and does not write before.
    """
    pools = [jax.ShapeDtypeStruct((slots, *aval.shape), aval.dtype) for aval in avals]
    return tuple(_to_host(numbered_array(pool, first + i), True) for i, pool in enumerate(pools))
