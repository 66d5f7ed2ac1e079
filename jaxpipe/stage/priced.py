"""What to keep of a stage, what to hand to its weights' half, and what to compute again, at a price of a byte."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax

from jaxpipe._jax import LIGHT
from jaxpipe.stage.again import COPY, MEMORY, RECOMPUTED, seconds_again
from jaxpipe.stage.divide import closure, is_light, light_results
from jaxpipe.stage.graph import Node, Value
from jaxpipe.stage.in_memory import held_in_memory, read_by_kernels
from jaxpipe.stage.residuals import cheapest_cut
from jaxpipe.stage.stage import packed_shape
from jaxpipe.stage.stash import Slots

_UNIT = 1e-15
"""Seconds of which prices are whole numbers."""

_TILT = 0.05
"""By how much of its price a byte of what is made first is cheaper: alike layers then change one by one."""


class Chosen(NamedTuple):
    """What is decided at a price.

    Attributes:
      kept: of the forward's values, in the order in which they are made.
      crossing: what the input's half hands over, likewise.
      again_first, again_second, again: nodes of the forward that the halves, and both at once, run again. The weights'
        half may run nodes of the input's half again, too.
      seconds: that a microbatch takes by it, copies included.
    """

    kept: tuple[Value, ...]
    crossing: tuple[Value, ...]
    again_first: tuple[Node, ...]
    again_second: tuple[Node, ...]
    again: tuple[Node, ...]
    seconds: float


class Chooser:
    """A stage's forward and backward as a choice of what to keep.

    Two minimum cuts follow each other. The first is through the forward: what is kept makes all that both halves read.
    The second is through the forward and the input's half: what is kept or handed over makes what the weights' half
    reads. The first one counts what the weights' half reads and nobody keeps twice, since the second then has to hand
    it over or compute it again.

    Args:
      forward: nodes that run for each microbatch.
      arguments: that the forward is given.
      first, second: nodes of the halves.
      cotangents: that the input's half is given.
      reads_first: values of the forward that the input's half reads.
      reads_second: values that the weights' half reads, whoever makes them.
      known: values that cost nothing.
    """

    def __init__(
        self,
        forward: Sequence[Node],
        arguments: Sequence[Value],
        first: Sequence[Node],
        second: Sequence[Node],
        cotangents: Sequence[Value],
        reads_first: Sequence[Value],
        reads_second: Sequence[Value],
        known: Collection[Value],
    ) -> None:
        self._forward, self._first = tuple(forward), tuple(first)
        self._known, self._cotangents = frozenset(known), tuple(cotangents)
        self._reads_first, self._reads_second = tuple(reads_first), tuple(reads_second)
        made = dict.fromkeys((*arguments, *(value for node in forward for value in node.outs)))
        self._place = {value: place / len(made) for place, value in enumerate(made)}
        self._of_forward = tuple(value for value in reads_second if value in made)
        # Light work on parameters costs nothing, wherever it stands.
        self._free = light_results(self._forward, self._known)
        self._free_second = light_results((*self._forward, *self._first), self._known)
        self._seconds, self._nbytes = functools.cache(seconds_again), functools.cache(_nbytes)
        self._held = held_in_memory((*self._forward, *self._first), (*arguments, *cotangents))
        self._read_whole = read_by_kernels((*first, *second))

    def at(self, price: float, slots: Slots) -> Chosen:
        """The choice where a byte of a slot is worth ``price`` seconds."""
        kept = self._keep(price, slots)
        place = self._place
        ordered = tuple(sorted(kept, key=lambda value: place[value]))
        given = self._known | kept
        again_first = self._closure((v for v in self._reads_first if v not in kept), self._forward, given)
        missing = (v for v in (*self._reads_first, *self._of_forward) if v not in kept)
        again = self._closure(missing, self._forward, given)
        handed = self._hand_over(price, slots, kept, again_first)
        nodes = (*self._forward, *self._first)
        again_second = self._closure((v for v in self._reads_second if v not in handed), nodes, self._known | handed)
        order = dict.fromkeys((*self._cotangents, *_results(self._first), *_results(again_first)))
        crossing = tuple(value for value in order if value in handed and value not in kept)
        apart = slots.apart
        seconds = (
            (1 - apart) * self._time(again)
            + apart * (self._time(again_first) + self._time(again_second))
            + sum(self._copying(value, slots) for value in kept)
            + apart * sum(self._copying(value, slots) for value in crossing)
        )
        one, two, both = (tuple(map(_named, nodes)) for nodes in (again_first, again_second, again))
        return Chosen(ordered, crossing, one, two, both, seconds)

    def _keep(self, price: float, slots: Slots) -> set[Value]:
        """The cut through the forward."""
        for_second, apart = frozenset(self._of_forward), slots.apart

        def keep(value: Value) -> int:
            tilted = price * slots.weight * (1 + _TILT * self._place[value])
            return round((self._copying(value, slots) + self._nbytes(value) * tilted) / _UNIT)

        def twice(value: Value) -> int:
            node = made[value]
            written = self._writing(node, slots) if value in self._read_whole else 0.0
            if value not in for_second or not slots.cross:
                return round(written / _UNIT)
            again = self._seconds(node)
            handed = self._copying(value, slots) * apart + self._nbytes(value) * price * slots.cross
            return round((written + (handed if again is None else min(handed, again * apart))) / _UNIT)

        made = {value: node for node in self._forward for value in node.outs}
        needed = dict.fromkeys((*self._reads_first, *self._of_forward))
        return cheapest_cut(needed, self._forward, self._free, keep, self._price, twice)

    def _hand_over(
        self, price: float, slots: Slots, kept: Collection[Value], again_first: Sequence[Node]
    ) -> set[Value]:
        """The cut through what the weights' half may read or run again: kept values, and what it is handed."""
        apart = slots.apart if slots.cross else 1.0  # without a half apart any cut will do
        longer = max(0, slots.weight - slots.stash)
        at_hand = {*self._cotangents, *_results(self._first), *_results(again_first)}

        def keep(value: Value) -> int | None:
            if value in kept:
                read = COPY / 2 if slots.copied else 0.0
                return round(self._nbytes(value) * (read * apart + price * longer) / _UNIT)
            if value in at_hand and not value.effect:
                handed = self._copying(value, slots) * apart + self._nbytes(value) * price * slots.cross
                return round(handed / _UNIT)
            return None

        def again(node: Node) -> int | None:
            cost = self._price(node)
            return None if cost is None else round(cost * apart)

        nodes = (*self._forward, *self._first)
        return cheapest_cut(self._reads_second, nodes, self._free_second, keep, again, lambda value: 0)

    def _copying(self, value: Value, slots: Slots) -> float:
        """Seconds to keep a value: to copy it, or to write what would not be in memory."""
        if slots.copied:
            return self._nbytes(value) * COPY
        return 0.0 if value in self._held else self._nbytes(value) / MEMORY

    def _writing(self, node: Node, slots: Slots) -> float:
        """Seconds to make again, in memory, what would else be fused into what reads it; copies take as long."""
        if slots.copied or node.name not in LIGHT:
            return 0.0
        return sum(self._nbytes(value) for value in (*node.ins, *node.outs)) / MEMORY

    def _price(self, node: Node) -> int | None:
        seconds = self._seconds(node)
        return None if seconds is None else round(seconds / _UNIT)

    def _time(self, nodes: Iterable[Node]) -> float:
        return sum(self._seconds(node) or 0.0 for node in nodes)

    def _closure(self, values: Iterable[Value], nodes: Sequence[Node], given: Collection[Value]) -> tuple[Node, ...]:
        """The nodes that make values of given ones; a cut has seen to it that they may run again."""
        found = closure(list(values), nodes, given, lambda node: is_light(node) or self._seconds(node) is not None)
        assert found is not None
        return found


def _named(node: Node) -> Node:
    """The node in the scope that `jax.checkpoint` gives to what it computes again."""

    def run(*arrays: Any, run: Callable[..., Sequence[Any]] = node.run) -> Sequence[Any]:
        with jax.named_scope(RECOMPUTED):
            return run(*arrays)

    return dataclasses.replace(node, run=run)


def _nbytes(value: Value) -> int:
    """Bytes of a value as it is kept."""
    shape = packed_shape(value.aval)
    return shape.size * shape.dtype.itemsize


def _results(nodes: Iterable[Node]) -> list[Value]:
    return [value for node in nodes for value in node.outs]
