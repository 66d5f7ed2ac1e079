"""What a device computes and moves in each action of a traced pipeline: products, traffic of memory, collectives.

The program's own scopes say which action an equation belongs to. A compiler fuses what is computed element by element,
so memory is read and written at values that something needs whole, as `jaxpipe.planning.liveness` has it.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpipe._jax import (
    COLLECTIVES,
    ELEMENTWISE,
    HEAVY,
    MOVING,
    PRODUCTS,
    READS_PART,
    REDUCTIONS,
    TRANSFER,
    VIEWS,
    WITH_BODIES,
    WITHOUT_KERNEL,
    WRITES_IN_PLACE,
    Jaxpr,
    JaxprEqn,
    is_on_host,
)
from jaxpipe.planning.chips import Achieved, Chip, KernelShare
from jaxpipe.planning.divided import Divided
from jaxpipe.planning.liveness import for_gpus, inline, name_of
from jaxpipe.planning.memory import prepared_bytes
from jaxpipe.planning.mesh import Network
from jaxpipe.runtime.program import Program
from jaxpipe.schedule.action import Kind
from jaxpipe.stage.again import RECOMPUTED
from jaxpipe.stage.flops import eqn_flops
from jaxpipe.stage.graph import has_side_effects
from jaxpipe.stage.kernel_flops import (
    FlopsRule,
    is_attention_backward,
    kernel_depth,
    kernel_flops,
    kernel_name,
    multiplying_unit,
)

_FUSED = ELEMENTWISE | MOVING
_ENDS = frozenset({"prepare", "reduce"})
"""Scopes of what is done once a step."""

_SCALARS = 256
"""Bytes up to which something is no kernel of its own: places of slots and the like are computed beside others."""

_NEVER_FIXED = WITH_BODIES | frozenset(COLLECTIVES) | {"axis_index", "optimization_barrier"}
"""What is not computed once though no value goes in."""

BESIDE_ATTENTION = "beside_attention_backward"
"""The name of what attention's backward pass does beside its products."""

PADDED = "pad"
"""The name of a kernel that writes numbers together which lie apart: for each it compares places."""

_ACTION = re.compile(r"(?:^|/)(branch_(\d+)(?:/together)?(?:/(?:steps|piece)_\w+)?/([FBIWEHG]))(?:/|$)")


_OF_STAGES = frozenset(kind.value for kind in Kind)
"""Letters of what stages run, beside those of the ends."""


class Kernel(NamedTuple):
    """One kernel.

    Attributes:
      name: of its primitive, or its own.
      unit: what multiplies, as `Chip.flops` names it; "" for nothing.
      flops: of its products.
      nbytes: that it reads from memory and writes.
      times: how often it runs.
      recomputed: whether a backward pass runs it again.
      parted: whether the pipeline's ranks have a part of its operands each.
      scope: that it stands in, within its action: "jvp(layer_0)/attention/core".
      narrow: those of ``nbytes`` that numbers of less than four bytes have.
      depth: numbers that each result of its products is a sum of; 0 where that is not known.
    """

    name: str
    unit: str
    flops: float
    nbytes: float
    times: float
    recomputed: bool = False
    parted: bool = False
    scope: str = ""
    narrow: float = 0.0
    depth: float = 0.0

    def seconds(self, chip: Chip, achieved: Achieved, clock: float = 1.0) -> float:
        """How long one run takes: its products or its bytes, whichever takes longer, and what any kernel takes.

        Args:
          chip, achieved: what it runs on.
          clock: as `Achieved.clock` has it.
        """
        own, us = achieved.kernels.get(self.name, KernelShare()), achieved.kernel_us
        if self.unit:
            us += achieved.product_us
        return max(self.multiplied(chip, achieved) / clock, self._moved(chip, achieved, own)) + us / 1e6

    def multiplied(self, chip: Chip, achieved: Achieved) -> float:
        """Seconds of its products, where nothing else runs."""
        if not self.unit:
            return 0.0
        own = achieved.kernels.get(self.name, KernelShare())
        filled = 1 + own.fill / self.depth if self.depth else 1.0
        return self.flops * filled / (chip.flops(self.unit) * (own.matmul or achieved.matmul))

    def _moved(self, chip: Chip, achieved: Achieved, own: KernelShare) -> float:
        """Seconds of its bytes."""
        wide = own.memory or achieved.memory
        narrow = own.memory or achieved.narrow or achieved.memory
        return ((self.nbytes - self.narrow) / wide + self.narrow / narrow) / chip.hbm


class Message(NamedTuple):
    """One collective.

    Attributes:
      kind, axes, nbytes, groups: as `Network.seconds` takes them.
      times: how often.
      recomputed: whether a backward pass runs it again.
      scope: as that of a `Kernel`.
    """

    kind: str
    axes: tuple[str, ...]
    nbytes: float
    times: float
    recomputed: bool = False
    scope: str = ""
    groups: tuple[tuple[int, ...], ...] | None = None

    def seconds(self, network: Network) -> float:
        """How long one run takes."""
        return network.seconds(self.kind, self.axes, self.nbytes, self.groups)


class HostTransfer(NamedTuple):
    """An array on its way between the memories of a device and its host.

    Attributes:
      to_host: which way.
      nbytes: of the array.
      times: how often.
      place: number of kernels of the action before that one which waits for it, or before and with that one which makes
        what leaves.
    """

    to_host: bool
    nbytes: float
    times: float
    place: int


class SlotArray(NamedTuple):
    """One of the arrays that a slot holds: shape and dtype, and bytes that a device has of it."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclasses.dataclass(frozen=True)
class DeviceWork:
    """What one device does in a part of a program.

    Attributes:
      kernels: in the order of the program.
      messages: collectives.
      unknown: (kernel that no rule knows, times): its bytes count, its FLOPs do not.
      loaded, stored: what is read of slots, and written into them.
      transfers: between device and host.
    """

    kernels: tuple[Kernel, ...] = ()
    messages: tuple[Message, ...] = ()
    unknown: tuple[tuple[str, float], ...] = ()
    loaded: tuple[SlotArray, ...] = ()
    stored: tuple[SlotArray, ...] = ()
    transfers: tuple[HostTransfer, ...] = ()

    @property
    def flops(self) -> float:
        """Of all products."""
        return sum(kernel.flops * kernel.times for kernel in self.kernels)

    def model_flops(self, ranks: int = 1) -> float:
        """Without what a backward pass computes again; of ``ranks`` together, what each of them does whole once."""
        return sum(
            kernel.flops * kernel.times * (ranks if kernel.parted else 1)
            for kernel in self.kernels
            if not kernel.recomputed
        )

    @property
    def nbytes(self) -> float:
        """That kernels read from memory and write."""
        return sum(kernel.nbytes * kernel.times for kernel in self.kernels)

    def compute(self, chip: Chip, achieved: Achieved) -> float:
        """Seconds of all kernels: of each its products or its bytes, whichever takes longer."""
        clock = self.clock(chip, achieved)
        return sum(kernel.times * kernel.seconds(chip, achieved, clock) for kernel in self.kernels)

    def clock(self, chip: Chip, achieved: Achieved) -> float:
        """The clock of its products, as `Achieved.clock` has it."""
        multiplying = sum(kernel.times * kernel.multiplied(chip, achieved) for kernel in self.kernels)
        others = sum(kernel.times * kernel.seconds(chip, achieved) for kernel in self.kernels if not kernel.unit)
        return achieved.clock(multiplying, others)

    def communicate(self, network: Network) -> float:
        """Seconds of all collectives."""
        return sum(message.times * message.seconds(network) for message in self.messages)

    def transfer(self, chip: Chip, achieved: Achieved) -> tuple[float, float]:
        """Seconds that the link to the host is busy: (to it, from it), which do not disturb each other."""
        rate = chip.host * achieved.host
        there, back = (
            sum(each.nbytes * each.times for each in self.transfers if each.to_host is way) / rate
            for way in (True, False)
        )
        return there, back

    def exposed(self, chip: Chip, achieved: Achieved, network: Network) -> float:
        """Seconds by which transfers make one run longer.

        What comes from the host is asked for when the action begins, in the order in which it is needed, and a kernel
        that needs it waits. What goes there leaves behind the kernel that makes it, and the action ends when all has
        left. Collectives count as time of the kernels about them, in which transfers go on.
        """
        if not self.transfers:
            return 0.0
        rate, clock = chip.host * achieved.host, self.clock(chip, achieved)
        seconds = [kernel.times * kernel.seconds(chip, achieved, clock) for kernel in self.kernels]
        total = sum(seconds) + self.communicate(network)
        longer = total / sum(seconds) if sum(seconds) else 1.0
        moves: dict[int, list[HostTransfer]] = collections.defaultdict(list)
        for each in sorted(self.transfers, key=lambda each: not each.to_host):
            moves[each.place].append(each)
        now = arrived = left = 0.0
        for place in range(len(seconds) + 1):
            for each in moves[place]:
                if each.to_host:
                    left = max(left, now) + each.nbytes * each.times / rate
                else:
                    arrived += each.nbytes * each.times / rate
                    now = max(now, arrived)
            now += seconds[place] * longer if place < len(seconds) else 0.0
        return max(now, left) - total


@dataclasses.dataclass(frozen=True)
class Works:
    """A traced step by action.

    Attributes:
      kinds: of one run by each kind of stage, by the letter of `jaxpipe.runtime.program.Op`: F, B, I, W.
      kind_of: of each stage, its kind.
      ends: of one run: E (embed), H (head with its gradient), G (embed's gradient).
      once: what is done once a step beside them.
      boundary: bytes of each array between stages; empty where nothing is kept in slots.
      prepared: of each kind of stage, bytes that are made of its parameters once a step.
    """

    kinds: tuple[Mapping[str, DeviceWork], ...]
    kind_of: tuple[int, ...]
    ends: Mapping[str, DeviceWork]
    once: DeviceWork
    boundary: tuple[int, ...]
    prepared: tuple[int, ...] = ()

    @property
    def actions(self) -> Mapping[str, DeviceWork]:
        """One run of each action by letter; of a stage's, that of the kind with most work."""
        found: dict[str, DeviceWork] = {}
        for actions in (*self.kinds, self.ends):
            for letter, work in actions.items():
                found[letter] = _fuller(found.get(letter), work)
        return found

    def of(self, letter: str, kind: int) -> DeviceWork:
        """One run of an action of a kind of stage, or of an end."""
        return self.kinds[kind].get(letter) or self.ends.get(letter) or DeviceWork()


def works(
    body: Jaxpr,
    divided: Divided,
    kernels: Mapping[str, FlopsRule],
    axis: str,
    program: Program,
    kind_of: Sequence[int] | None,
) -> Works:
    """The work in the body of a pipeline's `jax.shard_map`.

    Of a conditional within an action the branch with most work counts; of a divided one, in each half by itself.

    Args:
      body: as `jax.make_jaxpr` of a pipeline has it.
      divided: its values over the compiler's axes.
      kernels: rules by the names of kernels.
      axis: of the pipeline.
      program: that the body runs.
      kind_of: of each stage its kind; None: all are of one.
    """
    found = _Collector(divided, kernels, axis)
    found.piece(body, "", "", 1.0)
    once = found.work(())
    kind_of = tuple(kind_of or (0,) * program.schedule.num_stages)
    kinds: list[dict[str, DeviceWork]] = [{} for _ in range(max(kind_of) + 1)]
    ends: dict[str, DeviceWork] = {}
    for label in found.labels:
        match = _ACTION.search(label)
        if match:  # branches of a kind do the same; where one is free of something, the fuller one counts
            branch, letter = program.branches[int(match[2])], match[3]
            part = next(part for op, part in branch if op.value == letter)
            into = kinds[program.parts[part][1]] if letter in _OF_STAGES else ends
            into[letter] = _fuller(into.get(letter), found.work([label]))
    boundary = next((sizes for label, sizes in found.boundaries.items() if label.endswith("/F")), ())
    made = prepared_bytes(body, divided.nbytes)
    prepared = [0] * len(kinds)
    for part, (_, kind) in enumerate(program.parts):
        prepared[kind] = max(prepared[kind], made.get(part, 0))
    return Works(tuple(kinds), kind_of, ends, once, tuple(boundary), tuple(prepared))


def _fuller(kept: DeviceWork | None, work: DeviceWork) -> DeviceWork:
    """That of two with more work, the first of equals."""
    return work if kept is None or (work.flops, work.nbytes) > (kept.flops, kept.nbytes) else kept


class _ScopedOp(NamedTuple):
    """An equation whose calls are inlined; values are numbers."""

    eqn: JaxprEqn
    name: str
    ins: tuple[int | None, ...]
    outs: tuple[int, ...]
    path: str
    label: str


class _Flat:
    """The equations of a jaxpr in order, those of calls among them.

    Args:
      jaxpr: whose inputs are the values 0, 1, ....
      path: the scopes that it is in.
      label: of all of it; "": each equation's own scopes say.
    """

    def __init__(self, jaxpr: Jaxpr, path: str, label: str) -> None:
        self.ops: list[_ScopedOp] = []
        self.atoms: list[Any] = []
        self._label = label
        self.inputs = [self._new(var) for var in jaxpr.invars]
        results = inline(jaxpr, self.inputs, self._new, self._append, path)
        self.outputs = {value for value in results if value is not None}

    def _new(self, atom: Any) -> int:
        self.atoms.append(atom)
        return len(self.atoms) - 1

    def _append(self, eqn: JaxprEqn, ins: Sequence[int | None], outs: Sequence[int], path: str) -> None:
        match = None if self._label else _ACTION.search(path)
        label = match[1] if match else self._label
        self.ops.append(_ScopedOp(eqn, name_of(eqn), tuple(ins), tuple(outs), path, label))


class _Collector:
    """Kernels, messages and unknown kernels by label; "" is what is done once a step."""

    def __init__(self, divided: Divided, rules: Mapping[str, FlopsRule], axis: str) -> None:
        self.divided, self.rules, self.axis = divided, rules, axis
        self.kernels: dict[str, list[Kernel]] = collections.defaultdict(list)
        self.messages: dict[str, list[Message]] = collections.defaultdict(list)
        self.unknown: dict[str, dict[str, float]] = collections.defaultdict(dict)
        self.boundaries: dict[str, list[int]] = collections.defaultdict(list)
        self.loaded: dict[str, list[SlotArray]] = collections.defaultdict(list)
        self.stored: dict[str, list[SlotArray]] = collections.defaultdict(list)
        self.transfers: dict[str, list[HostTransfer]] = collections.defaultdict(list)
        self.labels: dict[str, None] = {}

    def work(self, labels: Iterable[str]) -> DeviceWork:
        """The work of some labels; of none, that of what has no label."""
        labels = list(labels) or [""]
        unknown: dict[str, float] = {}
        for label in labels:
            for name, times in self.unknown[label].items():
                unknown[name] = unknown.get(name, 0.0) + times
        return DeviceWork(
            tuple(kernel for label in labels for kernel in self.kernels[label]),
            tuple(message for label in labels for message in self.messages[label]),
            tuple(unknown.items()),
            tuple(array for label in labels for array in self.loaded[label]),
            tuple(array for label in labels for array in self.stored[label]),
            tuple(each for label in labels for each in self.transfers[label]),
        )

    def piece(self, jaxpr: Jaxpr, path: str, label: str, times: float, *, in_loop: bool = False) -> None:
        """Collects a jaxpr and what is inside of it; ``in_loop``: of the loop over a program's steps."""
        flat = _Flat(jaxpr, path, label)
        ops = _needed(flat.ops, flat.outputs)
        self.labels.update((op.label, None) for op in ops)
        added = _added_by_products(ops)
        kept = _materialized(ops, flat.outputs) | added
        roots: list[frozenset[int]] = [frozenset()] * len(flat.atoms)
        padded, fixed = set[int](), set[int]()
        found: list[_Pass] = []
        coming: dict[int, _ScopedOp] = {}
        for value in flat.inputs:
            roots[value] = frozenset({value})
        for op in ops:
            sources = frozenset[int]().union(*(roots[value] for value in op.ins if value is not None))
            if op.name == "pad" or (op.name in _FUSED and not padded.isdisjoint(op.ins)):
                padded.update(op.outs)
            if op.name not in _NEVER_FIXED and all(value is None or value in fixed for value in op.ins):
                fixed.update(op.outs)  # made when the program is compiled, or once
                continue
            own = op.name in READS_PART or op.name in WRITES_IN_PLACE or op.name in WITH_BODIES or op.name == TRANSFER
            for value in op.outs:
                roots[value] = frozenset({value}) if own or value in kept else sources
            if op.name in WITH_BODIES:
                self._inside(op, times)
            elif not op.label and (in_loop or _ENDS.isdisjoint(op.path.split("/"))):
                continue  # of the loop over steps: its tables, slots, and the messages that the simulation counts
            elif op.name in COLLECTIVES:
                self._message(op, times)
            elif op.name == TRANSFER:
                if is_on_host(op.eqn.outvars[0]):
                    found.append(_Pass(op, None, sources))
                else:
                    coming[op.outs[0]] = op
            elif op.name not in WITHOUT_KERNEL:
                if op.name == "dynamic_slice" and op.path.endswith(f"{op.label}/read"):
                    held = self._held(op.eqn.outvars[0])
                    self.boundaries[op.label].append(held.nbytes)
                    self.loaded[op.label].append(held)
                elif op.name == "dynamic_update_slice" and op.path.endswith(f"{op.label}/write"):
                    self.stored[op.label].append(self._held(op.eqn.invars[1]))
                made = not added.issuperset(op.outs) and any(value in kept for value in op.outs)
                kernel = self._kernel(op, sources, made, roots, flat, times)
                if kernel is not None and not padded.isdisjoint(op.outs):
                    kernel = kernel._replace(name=PADDED)
                if kernel is not None:
                    needed = [value for value in coming if value in sources]
                    found += [_Pass(coming.pop(value), None, frozenset()) for value in needed]
                    found.append(_Pass(op, kernel, sources))
                if kernel is not None and is_attention_backward(op.eqn):
                    found.append(_Pass(op, self._beside_attention(op, kernel, flat), frozenset()))
            for value in padded.intersection(op.outs) & kept:
                padded.discard(value)
        found += [_Pass(op, None, frozenset()) for op in coming.values()]
        for one in _together(_sent_when_made(found)):
            label = one.op.label
            if one.kernel is not None:
                self.kernels[label].append(one.kernel)
            else:
                to_host = is_on_host(one.op.eqn.outvars[0])
                size = self.divided.nbytes(one.op.eqn.invars[0] if to_host else one.op.eqn.outvars[0])
                self.transfers[label].append(HostTransfer(to_host, size, times, len(self.kernels[label])))

    def _inside(self, op: _ScopedOp, times: float) -> None:
        """The bodies of loops, conditionals and nested shard_maps."""
        params = op.eqn.params
        if op.name == "cond":
            options = []
            for branch in for_gpus(op.eqn):
                other = _Collector(self.divided, self.rules, self.axis)
                other.piece(branch.jaxpr, op.path, op.label, times, in_loop=True)
                options.append(other)
            if not op.label:  # branches of a pipeline's own switch, all of which count
                for other in options:
                    self._merge(other, other.labels)
            else:
                sizes = [(work.flops, work.nbytes) for work in (other.work([op.label]) for other in options)]
                self._merge(options[sizes.index(max(sizes))], [op.label])
        elif op.name == "scan":
            once = not op.label and _ENDS.isdisjoint(op.path.split("/"))  # the loop over steps
            length = 1 if once else params["length"]
            self.piece(params["jaxpr"].jaxpr, op.path, op.label, times * length, in_loop=once)
        elif op.name == "while":
            if op.label:
                self._tell_unknown(op.label, "while, of which one turn counts", times)
            self.piece(params["body_jaxpr"].jaxpr, op.path, op.label, times, in_loop=not op.label)
        else:
            self.piece(getattr(params["jaxpr"], "jaxpr", params["jaxpr"]), op.path, op.label, times)

    def _tell_unknown(self, label: str, name: str, times: float) -> None:
        self.unknown[label][name] = self.unknown[label].get(name, 0.0) + times

    def _merge(self, other: _Collector, labels: Iterable[str]) -> None:
        for label in labels:
            self.kernels[label] += other.kernels[label]
            self.messages[label] += other.messages[label]
            for name, times in other.unknown[label].items():
                self._tell_unknown(label, name, times)
            self.boundaries[label] += other.boundaries[label]
            self.loaded[label] += other.loaded[label]
            self.stored[label] += other.stored[label]
            self.transfers[label] += other.transfers[label]
            self.labels[label] = None

    def _held(self, atom: Any) -> SlotArray:
        return SlotArray(atom.aval.shape, str(atom.aval.dtype), self.divided.nbytes(atom))

    def _message(self, op: _ScopedOp, times: float) -> None:
        params, kind = op.eqn.params, COLLECTIVES[op.name]
        names = params.get("axes", params.get("axis_name", ()))
        axes = tuple(name for name in ((names,) if isinstance(names, str) else names) if isinstance(name, str))
        arrays = op.eqn.outvars if kind == "all-gather" else op.eqn.invars
        count = 1 if op.name.startswith("ragged") else len(arrays)
        nbytes = sum(self.divided.nbytes(atom) for atom in arrays[:count])
        groups = params.get("axis_index_groups")
        groups = groups if groups is None else tuple(map(tuple, groups))
        again, scope = RECOMPUTED in op.path.split("/"), _within(op)
        self.messages[op.label].append(Message(kind, axes, nbytes, times, again, scope, groups))

    def _moved(self, flat: _Flat, values: Iterable[int], times: float = 1.0) -> np.ndarray:
        """(bytes that a device has of some values, those of them in numbers of less than four bytes), so many times."""
        found = np.zeros(2)
        for value in values:
            nbytes = self.divided.nbytes(flat.atoms[value])
            found += nbytes, nbytes * is_narrow(flat.atoms[value])
        return times * found

    def _kernel(
        self,
        op: _ScopedOp,
        sources: Iterable[int],
        made: bool,
        roots: Sequence[frozenset[int]],
        flat: _Flat,
        times: float,
    ) -> Kernel | None:
        """The kernel that an operation is, if it is one."""
        again = RECOMPUTED in op.path.split("/")
        written = self._moved(flat, op.outs)
        name, unit, flops, depth, moved = op.name, "", 0.0, 0.0, self._moved(flat, sources) + written
        if op.name in PRODUCTS:
            flops, unit = self._product(op, times), multiplying_unit(op.eqn)
        elif op.name in HEAVY or "kernel" in op.name or op.name == "core_map":
            name, known = kernel_name(op.eqn), kernel_flops(op.eqn, self.rules)
            if known is None:
                self._tell_unknown(op.label, name, times)
            elif known:
                axes = frozenset[str]().union(*(axes for var in op.eqn.outvars for axes in self.divided.dims(var)))
                flops, unit = known / self.divided.share(axes), multiplying_unit(op.eqn)
                depth = kernel_depth(op.eqn)
        elif op.name in WRITES_IN_PLACE or op.name.startswith("scatter"):
            place = 1 if op.name in WRITES_IN_PLACE else 2
            value = op.ins[place]
            size = self.divided.nbytes(op.eqn.invars[place])
            moved = place * np.array([size, size * is_narrow(op.eqn.invars[place])])
            moved = moved + self._moved(flat, () if value is None else roots[value])
        elif op.name == "gather":
            moved = 2 * written
        elif op.name in READS_PART:
            if not made:
                return None
            moved = 2 * written
        elif not made:
            return None
        nbytes, narrow = map(float, moved)
        if not flops and nbytes <= _SCALARS:
            return None
        parted = any(self.axis in axes for atom in op.eqn.invars for axes in self.divided.dims(atom))
        return Kernel(name, unit, flops, nbytes, times, again, parted, _within(op), narrow, depth)

    def _beside_attention(self, op: _ScopedOp, kernel: Kernel, flat: _Flat) -> Kernel:
        """The passes that attention's backward makes beside its products.

        Gradients of queries are summed in float32, in an array that is cleared before and cast after; each query's
        gradient times its result is summed along the row.
        """
        query, value = (self.divided.nbytes(flat.atoms[number]) for number in op.outs[0:3:2])
        aval: Any = op.eqn.outvars[0].aval
        width = aval.dtype.itemsize
        nbytes = query / width * (4 + 4 + width) + 2 * value
        return kernel._replace(name=BESIDE_ATTENTION, unit="", flops=0.0, nbytes=nbytes, narrow=0.0, depth=0.0)

    def _product(self, op: _ScopedOp, times: float) -> float:
        """A device's FLOPs of a product; what the compiler has to gather or sum for it becomes messages."""
        eqn, divided = op.eqn, self.divided
        marks = frozenset(name for name, size in divided.sizes.items() if size == 1)
        out = frozenset[str]().union(*divided.dims(eqn.outvars[0])) - marks
        summed = frozenset[str]()
        if op.name == "dot_general":
            (contract, _) = eqn.params["dimension_numbers"]
            for atom, used in zip(eqn.invars, contract, strict=True):
                dims = divided.dims(atom)
                inner = frozenset[str]().union(*(dims[place] for place in used)) - marks
                summed |= inner - out
                lost = inner & out
                if lost:
                    self._compilers("all-gather", lost, divided.nbytes(atom) * divided.share(lost), op, times)
            if summed:
                self._compilers("all-reduce", summed, divided.nbytes(eqn.outvars[0]), op, times)
        return eqn_flops(eqn) / divided.share(out | summed)

    def _compilers(self, kind: str, axes: frozenset[str], nbytes: float, op: _ScopedOp, times: float) -> None:
        again = RECOMPUTED in op.path.split("/")
        self.messages[op.label].append(Message(kind, tuple(sorted(axes)), nbytes, times, again, _within(op)))


class _Pass(NamedTuple):
    """A kernel on the way: its operation, and the values that it reads; without a kernel, a transfer."""

    op: _ScopedOp
    kernel: Kernel | None
    sources: frozenset[int]

    @property
    def sums(self) -> bool:
        """Whether it makes nothing but sums, or the like, of what it reads."""
        return self.op.name in REDUCTIONS

    def sums_rows(self) -> bool:
        """Whether it sums along the last dimension, so that who computes a row has its sum at hand."""
        aval: Any = self.op.eqn.invars[0].aval
        return self.sums and len(aval.shape) - 1 in self.op.eqn.params.get("axes", ())


def _added_by_products(ops: Sequence[_ScopedOp]) -> set[int]:
    """Sums of a product and something else, where nothing else reads the product: cuBLAS adds what it multiplies."""
    readers = collections.Counter(value for op in ops for value in op.ins if value is not None)
    products = {value for op in ops if op.name == "dot_general" for value in op.outs if readers[value] == 1}
    views: set[int] = set()
    found: set[int] = set()
    for op in ops:
        if op.name in VIEWS and len(op.ins) == 1 and op.ins[0] in products | views and readers[op.outs[0]] == 1:
            views.update(op.outs)
        elif op.name in ("add", "add_any") and not op.path.endswith("/write"):
            shapes: list[Any] = [atom.aval for atom in (*op.eqn.outvars, *op.eqn.invars)]
            if len({aval.shape for aval in shapes}) == 1 and not (products | views).isdisjoint(op.ins):
                found.update(op.outs)
    return found


def _sent_when_made(found: Sequence[_Pass]) -> list[_Pass]:
    """The passes with transfers of what they make right behind them."""
    order: list[_Pass] = []
    for one in found:
        if one.kernel is None and one.sources:
            makes = (place for place in reversed(range(len(order))) if one.sources.intersection(order[place].op.outs))
            place = next(makes, -1) + 1
            while place < len(order) and order[place].kernel is None and order[place].sources:
                place += 1
            order.insert(place, one)
        else:
            order.append(one)
    return order


def _together(found: Sequence[_Pass]) -> Iterator[_Pass]:
    """Passes over memory as a compiler fuses them.

    Several sums of the same numbers are made in one pass. Sums along rows are made where they are read, if that is one
    pass of elementwise work which reads the same rows.
    """
    seen: set[tuple[str, frozenset[int]]] = set()
    readers: dict[int, list[_Pass]] = collections.defaultdict(list)
    for one in found:
        for value in one.sources if one.kernel is not None else ():
            readers[value].append(one)
    for one in found:
        if one.sums:
            (result, *_) = one.op.outs
            reading = readers[result]
            alone = len(reading) == 1 and reading[0].op.name in _FUSED and one.sources < reading[0].sources
            if (one.op.label, one.sources) in seen or (alone and one.sums_rows()):
                continue
            seen.add((one.op.label, one.sources))
        yield one


def is_narrow(atom: Any) -> bool:
    """Whether a value's numbers have less than four bytes."""
    return getattr(getattr(atom.aval, "dtype", None), "itemsize", 4) < 4


def _within(op: _ScopedOp) -> str:
    """The scopes of an operation within its action."""
    return op.path.partition(f"{op.label}/")[2] if op.label else op.path


def _needed(ops: Sequence[_ScopedOp], outputs: set[int]) -> list[_ScopedOp]:
    """Without operations whose results nobody reads; a compiler removes them."""
    needed, found = set(outputs), []
    for op in reversed(ops):
        lasting = op.name not in WITH_BODIES and has_side_effects(op.eqn.effects)
        if needed.intersection(op.outs) or (not op.outs) or lasting:
            found.append(op)
            needed.update(value for value in op.ins if value is not None)
    return found[::-1]


def _materialized(ops: Sequence[_ScopedOp], outputs: set[int]) -> set[int]:
    """The values that are written to memory."""
    readers: dict[int, list[str]] = collections.defaultdict(list)
    needed, kept = set(outputs), set()
    for op in reversed(ops):
        fused = op.name in _FUSED or op.name in WITHOUT_KERNEL or op.name in REDUCTIONS or op.name in READS_PART
        for value in op.outs:
            outside = any(label != op.label for label in readers[value])
            if op.name in WITHOUT_KERNEL or op.name in WRITES_IN_PLACE or op.name in WITH_BODIES:
                continue
            if value in needed or outside or not fused or op.name in REDUCTIONS:
                kept.add(value)
        for value in op.ins:
            if value is None:
                continue
            readers[value].append(op.label)
            passed = op.name in WITHOUT_KERNEL and any(out in needed for out in op.outs)
            # A gather computes what it takes, and a slot what is written into it.
            if passed or not (fused or op.name == "gather" or op.name in WRITES_IN_PLACE):
                needed.add(value)
    return kept
