"""What a device computes and moves in each action of a traced pipeline: products, traffic of memory, collectives.

The program's own scopes say which action an equation belongs to. A compiler fuses what is computed element by element,
so memory is read and written at values that something needs whole, as `jaxpipe.planning.liveness` has it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxpipe._jax import ELEMENTWISE, HEAVY, MOVING, Jaxpr, JaxprEqn, Literal
from jaxpipe.planning.chips import Achieved, Chip
from jaxpipe.planning.divided import Divided
from jaxpipe.planning.liveness import EXPENSIVE, IN_PLACE, REDUCTIONS, VIEWS, called_jaxpr
from jaxpipe.planning.mesh import Network
from jaxpipe.stage.flops import eqn_flops

FlopsRule = Callable[[Sequence[Any], Sequence[Any]], float]
"""FLOPs of a kernel, of the shapes of its operands and results."""

RECOMPUTED = "rematted_computation"
"""JAX's scope for what `jax.checkpoint` computes again."""

COLLECTIVES = {
    "psum": "all-reduce", "psum2": "all-reduce", "psum_invariant": "all-reduce", "pmax": "all-reduce",
    "pmin": "all-reduce", "all_gather": "all-gather", "all_gather_invariant": "all-gather",
    "all_gather_reduced": "all-gather", "reduce_scatter": "reduce-scatter", "psum_scatter": "reduce-scatter",
    "unreduced_psum": "all-reduce", "unreduced_reduce_scatter": "reduce-scatter", "all_to_all": "all-to-all",
    "ragged_all_to_all": "all-to-all", "ppermute": "permute",
}  # fmt: skip
"""What each primitive of JAX makes devices do together."""

PRODUCTS = ("dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated")
LOOPS = ("scan", "while", "cond", "shard_map")

_FUSED = (ELEMENTWISE | MOVING) - REDUCTIONS
_FREE = VIEWS | {"optimization_barrier", "axis_index", "platform_index", "pvary", "pcast", "iota", "name"}
_ENDS = frozenset({"prepare", "reduce"})
"""Scopes of what is done once a step."""

_SLICES = {"dynamic_slice", "slice"}
_SCALARS = 256
"""Bytes up to which something is no kernel of its own: places of slots and the like are computed beside others."""

_ACTION = re.compile(r"(?:^|/)(branch_\d+(?:/together)?(?:/steps_\w+)?/([FBIWEHG]))(?:/|$)")
_ATTENTION = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


class Task(NamedTuple):
    """One kernel.

    Attributes:
      name: of its primitive, or its own.
      unit: what multiplies, as `Chip.flops` names it; "" for nothing.
      flops: of its products.
      nbytes: that it reads from memory and writes.
      times: how often it runs.
      recomputed: whether a backward pass runs it again.
      parted: whether the pipeline's ranks have a part of its operands each.
    """

    name: str
    unit: str
    flops: float
    nbytes: float
    times: float
    recomputed: bool = False
    parted: bool = False


class Message(NamedTuple):
    """One collective: kind, mesh axes, bytes of the whole array (see `Network.seconds`), how often."""

    kind: str
    axes: tuple[str, ...]
    nbytes: float
    times: float


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in a part of a program.

    Attributes:
      tasks: kernels.
      messages: collectives.
      unknown: (kernel that no rule knows, times): its bytes count, its FLOPs do not.
    """

    tasks: tuple[Task, ...] = ()
    messages: tuple[Message, ...] = ()
    unknown: tuple[tuple[str, float], ...] = ()

    @property
    def flops(self) -> float:
        """Of all products."""
        return sum(task.flops * task.times for task in self.tasks)

    def model_flops(self, ranks: int = 1) -> float:
        """Without what a backward pass computes again; of ``ranks`` together, what each of them does whole once."""
        return sum(
            task.flops * task.times * (ranks if task.parted else 1) for task in self.tasks if not task.recomputed
        )

    @property
    def nbytes(self) -> float:
        """That kernels read from memory and write."""
        return sum(task.nbytes * task.times for task in self.tasks)

    def compute(self, chip: Chip, achieved: Achieved) -> float:
        """Seconds of all kernels: of each its products or its bytes, whichever takes longer."""
        memory = chip.hbm * achieved.memory
        rates = {unit: chip.flops(unit) * achieved.matmul for unit in {task.unit for task in self.tasks if task.unit}}
        return sum(
            task.times
            * (
                max(task.flops / rates[task.unit] if task.unit else 0.0, task.nbytes / memory)
                + achieved.kernel_us / 1e6
            )
            for task in self.tasks
        )

    def communicate(self, network: Network) -> float:
        """Seconds of all collectives."""
        return sum(m.times * network.seconds(m.kind, m.axes, m.nbytes) for m in self.messages)


@dataclasses.dataclass(frozen=True)
class Works:
    """A traced step by action.

    Attributes:
      actions: of one run, by the letter of `jaxpipe.runtime.program.Op`: F, B, I, W, E (embed), H (head with its
        gradient), G (embed's gradient).
      once: what is done once a step beside them.
      boundary: bytes of each array between stages; empty where nothing is kept in slots.
    """

    actions: Mapping[str, Work]
    once: Work
    boundary: tuple[int, ...]


def works(body: Jaxpr, divided: Divided, kernels: Mapping[str, FlopsRule], axis: str) -> Works:
    """The work in the body of a pipeline's `jax.shard_map`.

    Args:
      body: as `jax.make_jaxpr` of a pipeline has it.
      divided: its values over the compiler's axes.
      kernels: rules by the names of kernels.
      axis: of the pipeline.
    """
    found = _Collector(divided, kernels, axis)
    found.piece(body, "", "", 1.0)
    once = found.work(())
    actions: dict[str, Work] = {}
    for label in found.labels:
        match = _ACTION.search(label)
        if match:  # branches of a kind do the same; where one is free of something, the fuller one counts
            work = found.work([label])
            kept = actions.setdefault(match[2], work)
            if (work.flops, work.nbytes) > (kept.flops, kept.nbytes):
                actions[match[2]] = work
    boundary = next((sizes for label, sizes in found.boundaries.items() if label.endswith("/F")), ())
    return Works(actions, once, tuple(boundary))


class _Op(NamedTuple):
    """An equation whose calls are inlined; values are numbers."""

    eqn: JaxprEqn
    name: str
    ins: tuple[int | None, ...]
    outs: tuple[int, ...]
    path: str
    label: str


class _Flat:
    """Equations in order, those of calls among them."""

    def __init__(self) -> None:
        self.ops: list[_Op] = []
        self.atoms: list[Any] = []

    def new(self, atom: Any) -> int:
        self.atoms.append(atom)
        return len(self.atoms) - 1

    def add(self, jaxpr: Jaxpr, inputs: Sequence[int | None], path: str, label: str) -> list[int | None]:
        env: dict[Any, int | None] = dict(zip(jaxpr.invars, inputs, strict=True))
        env.update((var, None) for var in jaxpr.constvars)
        for eqn in jaxpr.eqns:
            ins = [None if isinstance(atom, Literal) else env[atom] for atom in eqn.invars]
            inner = "/".join(part for part in (path, str(eqn.source_info.name_stack)) if part)
            match = None if label else _ACTION.search(inner)
            mine = label or (match[1] if match else "")
            called = called_jaxpr(eqn)
            if called is not None:
                results = self.add(called, ins[len(ins) - len(called.invars) :], inner, mine)
                env.update(zip(eqn.outvars, results, strict=True))
                continue
            name, outs = eqn.primitive.name, [self.new(var) for var in eqn.outvars]
            env.update(zip(eqn.outvars, outs, strict=True))
            if name == "optimization_barrier":
                pairs = zip(ins, outs, strict=True)
                self.ops += [_Op(eqn, name, (value,), (out,), inner, mine) for value, out in pairs]
            else:
                self.ops.append(_Op(eqn, name, tuple(ins), tuple(outs), inner, mine))
        return [None if isinstance(atom, Literal) else env[atom] for atom in jaxpr.outvars]


class _Collector:
    """Tasks, messages and unknown kernels by label; "" is what is done once a step."""

    def __init__(self, divided: Divided, kernels: Mapping[str, FlopsRule], axis: str) -> None:
        self.divided, self.kernels, self.axis = divided, kernels, axis
        self.tasks: dict[str, list[Task]] = collections.defaultdict(list)
        self.messages: dict[str, list[Message]] = collections.defaultdict(list)
        self.unknown: dict[str, dict[str, float]] = collections.defaultdict(dict)
        self.boundaries: dict[str, list[int]] = collections.defaultdict(list)
        self.labels: dict[str, None] = {}

    def work(self, labels: Iterable[str]) -> Work:
        """The work of some labels; of none, that of what has no label."""
        labels = list(labels) or [""]
        unknown: dict[str, float] = {}
        for label in labels:
            for name, times in self.unknown[label].items():
                unknown[name] = unknown.get(name, 0.0) + times
        return Work(
            tuple(task for label in labels for task in self.tasks[label]),
            tuple(message for label in labels for message in self.messages[label]),
            tuple(unknown.items()),
        )

    def piece(self, jaxpr: Jaxpr, path: str, label: str, times: float, *, in_loop: bool = False) -> None:
        """Collects a jaxpr and what is inside of it; ``in_loop``: of the loop over a program's steps."""
        flat = _Flat()
        inputs = [flat.new(var) for var in jaxpr.invars]
        outputs = {value for value in flat.add(jaxpr, inputs, path, label) if value is not None}
        ops = _needed(flat.ops, outputs)
        self.labels.update((op.label, None) for op in ops)
        kept = _materialized(ops, outputs)
        roots: list[frozenset[int]] = [frozenset()] * len(flat.atoms)
        for value in inputs:
            roots[value] = frozenset({value})
        for op in ops:
            sources = frozenset[int]().union(*(roots[value] for value in op.ins if value is not None))
            own = op.name in _SLICES or op.name in IN_PLACE or op.name in LOOPS
            for value in op.outs:
                roots[value] = frozenset({value}) if own or value in kept else sources
            if op.name in LOOPS:
                self._inside(op, times)
            elif not op.label and (in_loop or _ENDS.isdisjoint(op.path.split("/"))):
                continue  # of the loop over steps: its tables, slots, and the messages that the simulation counts
            elif op.name in COLLECTIVES:
                self._message(op, times)
            elif op.name not in _FREE:
                if op.name == "dynamic_slice" and op.path.endswith(f"{op.label}/read"):
                    self.boundaries[op.label].append(self.divided.nbytes(flat.atoms[op.outs[0]]))
                read = sum(self.divided.nbytes(flat.atoms[value]) for value in sources)
                self._task(op, read, any(value in kept for value in op.outs), roots, flat, times)

    def _inside(self, op: _Op, times: float) -> None:
        """The bodies of loops, conditionals and nested shard_maps."""
        params = op.eqn.params
        if op.name == "cond":
            options = []
            for branch in params["branches"]:
                other = _Collector(self.divided, self.kernels, self.axis)
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
            self.tasks[label] += other.tasks[label]
            self.messages[label] += other.messages[label]
            for name, times in other.unknown[label].items():
                self._tell_unknown(label, name, times)
            self.boundaries[label] += other.boundaries[label]
            self.labels[label] = None

    def _message(self, op: _Op, times: float) -> None:
        params, kind = op.eqn.params, COLLECTIVES[op.name]
        names = params.get("axes", params.get("axis_name", ()))
        axes = tuple(name for name in ((names,) if isinstance(names, str) else names) if isinstance(name, str))
        arrays = op.eqn.outvars if kind == "all-gather" else op.eqn.invars
        count = 1 if op.name.startswith("ragged") else len(arrays)
        nbytes = sum(self.divided.nbytes(atom) for atom in arrays[:count])
        self.messages[op.label].append(Message(kind, axes, nbytes, times))

    def _task(
        self, op: _Op, read: float, made: bool, roots: Sequence[frozenset[int]], flat: _Flat, times: float
    ) -> None:
        """The kernel that an operation is, if it is one."""
        written = sum(self.divided.nbytes(flat.atoms[value]) for value in op.outs)
        again = RECOMPUTED in op.path.split("/")
        name, unit, flops, nbytes = op.name, "", 0.0, read + written
        if op.name in PRODUCTS:
            flops, unit = self._product(op, times), _unit(op.eqn)
        elif op.name in HEAVY or "kernel" in op.name or op.name == "core_map":
            name = _kernel_name(op.eqn)
            known = self._kernel(op.eqn, name)
            if known is None:
                self._tell_unknown(op.label, name, times)
            else:
                flops, unit = known, _unit(op.eqn) if known else ""
        elif op.name in IN_PLACE or op.name.startswith("scatter"):
            place = 1 if op.name in IN_PLACE else 2
            value, atom = op.ins[place], op.eqn.invars[place]
            sources = () if value is None else roots[value]
            size = self.divided.nbytes(atom)
            nbytes = size * (1 if op.name in IN_PLACE else 2) + sum(self.divided.nbytes(flat.atoms[v]) for v in sources)
        elif op.name == "gather":
            nbytes = 2 * written
        elif op.name in _SLICES:
            if not made:
                return
            nbytes = 2 * written
        elif not made:
            return
        if flops or nbytes > _SCALARS:
            parted = any(self.axis in axes for atom in op.eqn.invars for axes in self.divided.dims(atom))
            self.tasks[op.label].append(Task(name, unit, flops, nbytes, times, again, parted))

    def _product(self, op: _Op, times: float) -> float:
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

    def _compilers(self, kind: str, axes: frozenset[str], nbytes: float, op: _Op, times: float) -> None:
        self.messages[op.label].append(Message(kind, tuple(sorted(axes)), nbytes, times))

    def _kernel(self, eqn: JaxprEqn, name: str) -> float | None:
        """FLOPs of a kernel, or None where nothing is known of it."""
        operands, results = [atom.aval for atom in eqn.invars], [var.aval for var in eqn.outvars]
        share = self.divided.share(
            frozenset[str]().union(*(axes for var in eqn.outvars for axes in self.divided.dims(var)))
        )
        if name in self.kernels:
            return float(self.kernels[name](operands, results)) / share
        estimate = eqn.params.get("cost_estimate")
        if estimate is not None:
            return float(estimate.flops) / share
        if name in _ATTENTION:
            return attention_flops(*operands[:3], products=_ATTENTION[name], causal=_is_causal(eqn)) / share
        found = grouped_flops(operands, results)
        return None if found is None else found / share


def attention_flops(query: Any, key: Any, value: Any, *, products: int, causal: bool) -> float:
    """FLOPs of attention of queries ``[B, T, H, C]`` to keys ``[B, S, H, C]`` and values ``[B, S, H, V]``.

    ``products``: 2 forward, 5 backward, of scores or the like; a causal mask halves them.

    >>> import jax
    >>> q = jax.ShapeDtypeStruct((1, 4, 2, 8), "bfloat16")
    >>> attention_flops(q, q, q, products=2, causal=True)
    512.0
    """
    batch, queries, heads, width = query.shape
    scores = batch * heads * queries * key.shape[1]
    return scores * products * (width + value.shape[-1]) * (0.5 if causal else 1.0)


def grouped_flops(operands: Sequence[Any], results: Sequence[Any]) -> float | None:
    """FLOPs of a product of rows ``[m, k]`` with one matrix ``[k, n]`` a group, told by its shapes; else None.

    Rows, results ``[m, n]`` and matrices ``[g, k, n]`` stand in whichever places, for gradients too.

    >>> import jax
    >>> rows, matrices, out = (jax.ShapeDtypeStruct(s, "bfloat16") for s in ((8, 2), (4, 2, 3), (8, 3)))
    >>> grouped_flops([rows, matrices], [out])
    96.0
    """
    floats = [a for a in (*operands, *results) if jnp.issubdtype(a.dtype, jnp.floating) and len(a.shape) > 1]
    rows, matrices = ([a for a in floats if len(a.shape) == rank] for rank in (2, 3))
    if len(floats) != 3 or len(rows) != 2 or len(matrices) != 1 or rows[0].shape[0] != rows[1].shape[0]:
        return None
    if sorted(matrices[0].shape[1:]) != sorted(a.shape[1] for a in rows):
        return None
    return 2.0 * rows[0].shape[0] * math.prod(matrices[0].shape[1:])


def _needed(ops: Sequence[_Op], outputs: set[int]) -> list[_Op]:
    """Without operations whose results nobody reads; a compiler removes them."""
    needed, found = set(outputs), []
    for op in reversed(ops):
        if needed.intersection(op.outs) or (not op.outs) or (op.eqn.effects and op.name not in LOOPS):
            found.append(op)
            needed.update(value for value in op.ins if value is not None)
    return found[::-1]


def _materialized(ops: Sequence[_Op], outputs: set[int]) -> set[int]:
    """The values that are written to memory."""
    readers: dict[int, list[str]] = collections.defaultdict(list)
    needed, kept = set(outputs), set()
    for op in reversed(ops):
        fused = op.name in _FUSED or op.name in _FREE or op.name in REDUCTIONS or op.name in _SLICES
        for value in op.outs:
            several = len(readers[value]) > 1 and op.name in EXPENSIVE
            outside = any(label != op.label for label in readers[value])
            if op.name in _FREE or op.name in IN_PLACE or op.name in LOOPS:
                continue
            if value in needed or several or outside or not fused or op.name in REDUCTIONS:
                kept.add(value)
        for value in op.ins:
            if value is None:
                continue
            readers[value].append(op.label)
            passed = op.name in _FREE and any(out in needed for out in op.outs)
            # A gather computes what it takes, and a slot what is written into it.
            if passed or not (fused or op.name == "gather" or op.name in IN_PLACE):
                needed.add(value)
    return kept


def _unit(eqn: JaxprEqn) -> str:
    """What multiplies the operands of a product or kernel, as `Chip.flops` names it: by default float32 as TF32."""
    avals: list[Any] = [atom.aval for atom in eqn.invars]
    floats = [aval.dtype.itemsize for aval in avals if jnp.issubdtype(aval.dtype, jnp.floating)]
    if eqn.primitive.name in PRODUCTS:
        widest = max(floats[:2], default=1)  # integers multiply as 8-bit numbers do
    else:
        widest = max(sorted(set(floats)), key=floats.count, default=4)
    if widest == 4:
        return "f32" if "HIGHEST" in str(eqn.params.get("precision")) else "tf32"
    return {1: "fp8", 2: "bf16"}.get(widest, "f64")


def _kernel_name(eqn: JaxprEqn) -> str:
    params = eqn.params
    return str(params.get("name") or params.get("target_name") or params.get("call_target_name") or eqn.primitive.name)


def _is_causal(eqn: JaxprEqn) -> bool:
    return "CAUSAL" in str(eqn.params.get("mask_type", "")).upper()
