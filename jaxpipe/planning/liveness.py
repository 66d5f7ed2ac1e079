"""How many bytes a traced program has alive at its peak, without compiling it.

A compiler allocates what it cannot fuse. So a value counts if something needs it whole in memory: a matrix product, a
collective, a sort, a gather or scatter, or more than one reader. All others are computed where they are read, and only
keep alive what they are made of. Reshapes, slots written in place and loops' carried buffers share memory.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxpipe._jax import (
    ADDS_ROWS,
    BODY_PARAMETERS,
    COMPUTED_ONCE,
    PRODUCTS,
    READS_WHOLE,
    REDUCTIONS,
    TRANSFER,
    VIEWS,
    WITH_BODIES,
    WRITES_IN_PLACE,
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    is_transfer,
)
from jaxpipe.stage.graph import scan_counts
from jaxpipe.stage.kernel_flops import is_attention_backward

Size = Callable[[Any], int]
"""Bytes of a variable of a jaxpr."""


@dataclasses.dataclass(frozen=True)
class _InlinedOp:
    """An equation whose calls are inlined; values are numbers."""

    name: str
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    inner: int = 0  # bytes that it needs besides operands and results
    aliases: tuple[int, ...] = ()  # what the first results are written into


class _Graph:
    """Equations in order, and the size of each value."""

    def __init__(self, cpu: bool, size: Size):
        self.cpu = cpu
        self.size = size
        self.ops: list[_InlinedOp] = []
        self.sizes: list[int] = []
        self.carried: set[int] = set()  # what a loop's body may write into
        self._computed: dict[Any, int] = {}  # what branches for a platform make, by what makes it of what

    def new(self, var: Any) -> int:
        self.sizes.append(self.size(var))
        return len(self.sizes) - 1

    def append(self, eqn: JaxprEqn, ins: Sequence[int | None], outs: Sequence[int]) -> None:
        """Takes the next equation."""
        name = "reshape" if eqn.primitive.name == "name" else name_of(eqn)  # a name is no copy
        known = tuple(value for value in ins if value is not None)
        inner, aliases = 0, ()
        if name in ("scan", "while"):
            inner, aliases = self._loop(eqn, ins)
        elif name == "cond":
            branches = eqn.params["branches"] if self.cpu else for_gpus(eqn)
            if not self.cpu and len(branches) == 1:
                outs = self._new_results(eqn, branches[0].jaxpr, ins, outs)
                if not outs:
                    return
            inner = max(peak(branch.jaxpr, cpu=self.cpu, size=self.size) for branch in branches)
        elif name.startswith("ragged_dot") and self.cpu:
            known = self._masked(eqn, ins)
        elif name in ADDS_ROWS | WRITES_IN_PLACE and ins[0] in self.carried:
            aliases = (ins[0],)  # what is written is in the buffer from then on, and need not live on its own
            self.carried.add(outs[0])
        elif not self.cpu:
            inner = workspace(eqn, self.size)
        if name == "optimization_barrier":
            self.carried.update(out for value, out in zip(ins, outs, strict=True) if value in self.carried)
        self.ops.append(_InlinedOp(name, known, tuple(outs), inner, aliases))

    def _new_results(
        self, eqn: JaxprEqn, branch: Jaxpr, ins: Sequence[int | None], outs: Sequence[int]
    ) -> Sequence[int]:
        """The results of a branch that is sure to run, without those that the same kernel has made of the same values.

        A backward pass that computes again what the forward pass has made reads more results of it, or other ones; XLA
        runs the kernel once.
        """
        given = tuple(
            repr(atom) if value is None else value for atom, value in zip(eqn.invars[1:], ins[1:], strict=True)
        )
        new = []
        for out, key in zip(outs, results_made_by(branch), strict=True):
            made = out if key is None else self._computed.setdefault((given, key), out)
            if made == out:
                new.append(out)
            else:
                self.ops.append(_InlinedOp("reshape", (made,), (out,)))
        return new

    def _loop(self, eqn: JaxprEqn, ins: Sequence[int | None]) -> tuple[int, tuple[int, ...]]:
        """(bytes that a turn needs, the buffers that the carried values are written into)."""
        if eqn.primitive.name == "scan":
            body = eqn.params["jaxpr"]
            begin, count = scan_counts(eqn)
            carried = ins[begin : begin + count]
        else:
            body, begin = eqn.params["body_jaxpr"], eqn.params["body_nconsts"]
            carried = ins[eqn.params["cond_nconsts"] + begin :]
        inner = peak(body.jaxpr, cpu=self.cpu, carried=range(begin, begin + len(carried)), size=self.size)
        # A literal start is a buffer like any other.
        pairs = zip(carried, eqn.outvars[: len(carried)], strict=True)
        return inner, tuple(self.new(var) if value is None else value for value, var in pairs)

    def _masked(self, eqn: JaxprEqn, ins: Sequence[int | None]) -> tuple[int, ...]:
        """What a grouped product reads on CPUs: operands with each row once for each group, masked."""
        numbers = eqn.params.get("ragged_dot_dimension_numbers")
        both = numbers is not None and not numbers.rhs_group_dimensions
        sizes: Any = eqn.invars[2].aval
        masked = [self.new(atom) for atom in eqn.invars[: 1 + both]]
        for value, source in zip(masked, ins, strict=False):
            self.sizes[value] *= math.prod(sizes.shape)
            self.ops.append(_InlinedOp("mask", () if source is None else (source,), (value,)))
        return (*masked, *(value for value in ins[1 + both :] if value is not None))


def nbytes(avals: Iterable[Any], *, local: bool = False) -> int:
    """Bytes of arrays, shapes or abstract values; ``local``: of the part that one device has of each."""
    shapes = ((aval.sharding.shard_shape(aval.shape) if local else aval.shape, aval.dtype) for aval in avals)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


def whole(var: Any) -> int:
    """Bytes of a variable or literal of a jaxpr."""
    return nbytes([var.aval])


def peak(jaxpr: Jaxpr, *, cpu: bool = False, carried: Sequence[int] = (), size: Size = whole) -> int:
    """Most bytes alive at once besides inputs and what is written into them.

    Args:
      jaxpr: to run in the order of its equations.
      cpu: as XLA compiles for CPUs: whatever is ready runs first, so that threads have work, and a grouped matrix
        product becomes a plain one whose left operand has each row once for each group, masked (and so has the right
        one if rows are what is summed over).
      carried: of a loop's body: inputs, over which the first outputs are written.
      size: gives the bytes that a device has of a variable.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((16, 16))
    >>> peak(jax.make_jaxpr(lambda x: ((x @ x + 1) @ x).sum())(x).jaxpr)  # two products alive
    2048
    """
    graph = _Graph(cpu, size)
    inputs = [graph.new(var) for var in jaxpr.invars]
    graph.carried.update(inputs[place] for place in carried)
    outputs = inline(jaxpr, inputs, graph.new, lambda eqn, ins, outs, path: graph.append(eqn, ins, outs))
    results = outputs[: len(carried)]
    # What is added to a carried sum, such as a gradient, XLA adds as soon as it is there, and frees.
    sums = set() if cpu else {value for value in results if value is not None} - set(inputs)
    sums = {value for op in graph.ops for value in op.outs if value in sums and _is_elementwise(op)}
    nodes, roots = _nodes(graph, inputs, sums)
    ends = frozenset[int]().union(*(roots[value] for value in outputs if value is not None))
    buffers = tuple(inputs[place] for place in carried)
    theirs = set(inputs) - set(buffers)
    own = {value: size for value, size in enumerate(graph.sizes) if value not in theirs}
    sizes = {value: graph.sizes[value] for value in (*buffers, *(made for node in nodes for made in node.made))}
    sizes.update((value, 0) for value in theirs)  # whoever calls counts them
    first, last = _Node(buffers, frozenset(), 0), _Node((), ends, 0)
    # On GPUs XLA tries several orders and takes the one of fewest bytes, as far as its estimate goes.
    orders = [_breadth_first(nodes)] if cpu else [_as_summed(nodes, sizes), _frees_first(nodes, ends, sizes)]
    orders = ([first, *order, last] for order in orders)
    most = min(_most_alive(order, _overwrite(order, own), sizes) for order in orders)
    return most - sum(sizes[value] for value in buffers)


def _nodes(graph: _Graph, inputs: Sequence[int], sums: set[int]) -> tuple[list[_Node], list[frozenset[int]]]:
    """(what runs, in the order of the equations; the allocated values that each value is made of)."""
    kept = _allocated(graph, set(inputs)) | sums
    floors = [0] * len(graph.sizes)
    roots: list[frozenset[int]] = [frozenset()] * len(graph.sizes)
    for value in inputs:
        roots[value] = frozenset({value})
    nodes: list[_Node] = []
    for op in graph.ops:
        sources = frozenset[int]().union(*(roots[value] for value in op.ins))
        made = tuple(value for value in op.outs if value in kept)
        floor = len(nodes) if op.name == "optimization_barrier" else max((floors[value] for value in op.ins), default=0)
        for place, value in enumerate(op.outs):
            floors[value] = floor
            written = op.aliases and place < len(op.aliases)
            roots[value] = frozenset({value}) if value in kept else roots[op.aliases[place]] if written else sources
        if made or op.inner or op.aliases or op.name in WRITES_IN_PLACE:
            elementwise = op.name not in READS_WHOLE and op.name not in REDUCTIONS
            begin = floor if sums.intersection(made) else None
            if op.aliases and op.name in WRITES_IN_PLACE and not graph.cpu:
                begin = len(nodes)
            nodes.append(_Node(made, sources, op.inner, elementwise, begin, op.name in PRODUCTS))
    return nodes, roots


def _most_alive(nodes: Sequence[_Node], owner: dict[int, int], sizes: dict[int, int]) -> int:
    """Bytes at the fullest moment, each value alive from the node that makes it to the last that reads it."""
    last = {owner[value]: index for index, node in enumerate(nodes) for value in (*node.sources, *node.made)}
    live = most = 0
    for index, node in enumerate(nodes):
        live += sum(sizes[value] for value in node.made if owner[value] == value)
        most = max(most, live + node.inner)
        both = {owner[value] for value in (*node.made, *node.sources)}
        live -= sum(sizes[value] for value in both if last[value] == index)
    return most


def _overwrite(nodes: Sequence[_Node], sizes: dict[int, int]) -> dict[int, int]:
    """In whose memory each value is: elementwise results take that of an operand that nobody reads any more.

    ``sizes``: of what may be overwritten.
    """
    last = {value: index for index, node in enumerate(nodes) for value in (*node.sources, *node.made)}
    owner = {value: value for value in last}
    for index, node in enumerate(nodes):
        if node.elementwise and len(node.made) == 1:
            (made,) = node.made
            free = (value for value in sorted(node.sources) if last[value] == index and sizes.get(value) == sizes[made])
            owner[made] = owner[next(free, made)]
    return owner


@dataclasses.dataclass(frozen=True)
class _Node:
    """What runs as one.

    Attributes:
      made, sources: values that it allocates, and those that it reads.
      inner: bytes that it needs besides.
      elementwise: whether it can write over what it reads.
      floor: the first place that it can have, of a sum, or of what is written into a slot, which XLA does when the
        rest is done; None: it stays where it is.
      product: whether it multiplies matrices.
    """

    made: tuple[int, ...]
    sources: frozenset[int]
    inner: int
    elementwise: bool = False
    floor: int | None = None
    product: bool = False


def _as_summed(nodes: Sequence[_Node], sizes: Mapping[int, int]) -> list[_Node]:
    """The nodes in their order, but a loop's sums as early as they can be, and what is added to others where it is."""
    producer = {value: index for index, node in enumerate(nodes) for value in node.made}
    readers: dict[int, list[int]] = collections.defaultdict(list)
    for index, node in enumerate(nodes):
        for value in node.sources:
            readers[value].append(index)

    def is_sum(index: int, addend: int) -> bool:
        node = nodes[index]
        others = [sizes.get(value, 0) for value in node.sources if value != addend]
        return node.elementwise and node.floor is None and sum(map(sizes.__getitem__, node.made)) in others

    def place(index: int) -> float:
        node = nodes[index]
        if node.product:
            found = [reader for value in node.made for reader in readers[value]]
            return found[0] - 0.5 if len(found) == 1 and is_sum(found[0], node.made[0]) else index
        if node.floor is None:
            return index
        return max(node.floor - 0.5, *(producer[value] + 0.5 for value in node.sources if value in producer), -1)

    return [nodes[index] for index in sorted(range(len(nodes)), key=place)]


def _breadth_first(nodes: Sequence[_Node]) -> list[_Node]:
    """The nodes in the order in which they become ready."""
    producer = {value: index for index, node in enumerate(nodes) for value in node.made}
    needs = [{producer[value] for value in node.sources if value in producer} for node in nodes]
    readers: list[list[int]] = [[] for _ in nodes]
    for index, found in enumerate(needs):
        for other in found:
            readers[other].append(index)
    waiting = [len(found) for found in needs]
    queue = collections.deque(index for index, count in enumerate(waiting) if not count)
    order = []
    while queue:
        index = queue.popleft()
        order.append(nodes[index])
        for reader in readers[index]:
            waiting[reader] -= 1
            if not waiting[reader]:
                queue.append(reader)
    assert len(order) == len(nodes)
    return order


def _frees_first(nodes: Sequence[_Node], ends: frozenset[int], sizes: Mapping[int, int]) -> list[_Node]:
    """The nodes in an order in which that one of the ready ones runs next which leaves fewest bytes alive.

    Sums behind a barrier wait for all that stands before it.

    Args:
      nodes: in any order in which they can run.
      ends: values that stay alive.
      sizes: of values; without one: none.
    """
    producer = {value: index for index, node in enumerate(nodes) for value in node.made}
    readers = collections.Counter(value for node in nodes for value in node.sources)
    left = {value: count + (value in ends) for value, count in readers.items()}
    needs = [
        {*range(node.floor or 0), *(producer[value] for value in node.sources if value in producer)} for node in nodes
    ]
    followers: dict[int, list[int]] = collections.defaultdict(list)
    for index, found in enumerate(needs):
        for other in found:
            followers[other].append(index)
    waiting = [len(found) for found in needs]
    ready, order = {index for index, count in enumerate(waiting) if not count}, []

    def grows(index: int) -> tuple[int, int]:
        node = nodes[index]
        made = sum(sizes.get(value, 0) for value in node.made)
        return made - sum(sizes.get(value, 0) for value in node.sources if left[value] == 1), index

    while ready:
        index = min(ready, key=grows)
        ready.remove(index)
        order.append(nodes[index])
        for value in nodes[index].sources:
            left[value] -= 1
        for follower in followers[index]:
            waiting[follower] -= 1
            if not waiting[follower]:
                ready.add(follower)
    assert len(order) == len(nodes)
    return order


def _allocated(graph: _Graph, inputs: set[int]) -> set[int]:
    """The values that get memory of their own."""
    readers: dict[int, int] = {}
    whole: set[int] = set()
    kept: set[int] = set()
    for op in reversed(graph.ops):
        shared = op.name in VIEWS or op.name in WRITES_IN_PLACE or op.name == "optimization_barrier"
        for place, value in enumerate(op.outs):
            shared_by_readers = readers.get(value, 0) > 1 and (graph.cpu or op.name in COMPUTED_ONCE)
            own = value in whole or shared_by_readers or op.name in READS_WHOLE or op.name in REDUCTIONS
            if own and not shared and place >= len(op.aliases):
                kept.add(value)
        needed = op.name in READS_WHOLE or op.name == "optimization_barrier"
        if op.name in VIEWS and any(value in whole or readers.get(value, 0) > 1 for value in op.outs):
            needed = True
        for value in dict.fromkeys(op.ins):
            readers[value] = readers.get(value, 0) + 1
            if needed:
                whole.add(value)
    return {value for value in kept if value not in inputs}


def _is_elementwise(op: _InlinedOp) -> bool:
    """Whether an operation is computed element by element, and is one: no view, nothing written into a part."""
    return op.name not in READS_WHOLE | REDUCTIONS | VIEWS | WRITES_IN_PLACE | {"optimization_barrier"}


def name_of(eqn: JaxprEqn) -> str:
    """The name of an equation's primitive; of a broadcast that makes no more numbers, and of a transfer, what it is.

    >>> import jax
    >>> (eqn,) = jax.make_jaxpr(lambda x: x[None])(jax.numpy.ones(3)).eqns
    >>> eqn.primitive.name, name_of(eqn)
    ('broadcast_in_dim', 'reshape')
    """
    name = eqn.primitive.name
    if is_transfer(eqn):
        return TRANSFER
    if name != "broadcast_in_dim" or isinstance(eqn.invars[0], Literal):
        return name
    given, made = (math.prod(getattr(atom.aval, "shape", ())) for atom in (eqn.invars[0], eqn.outvars[0]))
    return "reshape" if given == made else name


def inline(
    jaxpr: Jaxpr,
    inputs: Sequence[int | None],
    new: Callable[[Any], int],
    emit: Callable[[JaxprEqn, Sequence[int | None], Sequence[int], str], None],
    path: str = "",
) -> list[int | None]:
    """Emits a jaxpr's equations in order, those of calls among them; returns its outputs.

    A barrier is emitted once for each of its values, or all would live as long as any.

    Args:
      jaxpr: whose values become numbers; constants and literals None.
      inputs: numbers of its inputs.
      new: numbers a variable.
      emit: is called with an equation, its operands, its results, and the scopes that it is in, "outer/inner".
      path: the scopes that all of it is in.
    """
    env: dict[Any, int | None] = dict(zip(jaxpr.invars, inputs, strict=True))
    env.update((var, None) for var in jaxpr.constvars)

    def read(atom: Any) -> int | None:
        return None if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        ins = [read(atom) for atom in eqn.invars]
        inner = "/".join(part for part in (path, str(eqn.source_info.name_stack)) if part)
        called = called_jaxpr(eqn)
        if called is not None:
            results = inline(called, ins[len(ins) - len(called.invars) :], new, emit, inner)
            env.update(zip(eqn.outvars, results, strict=True))
            continue
        outs = [new(var) for var in eqn.outvars]
        env.update(zip(eqn.outvars, outs, strict=True))
        if eqn.primitive.name == "optimization_barrier":
            for value, out in zip(ins, outs, strict=True):
                emit(eqn, [value], [out], inner)
        else:
            emit(eqn, ins, outs, inner)
    return [read(atom) for atom in jaxpr.outvars]


def for_gpus(eqn: JaxprEqn) -> Sequence[ClosedJaxpr]:
    """The branches of a conditional that may run on a GPU of NVIDIA's: all, unless they are for platforms."""
    branches, platforms = eqn.params["branches"], eqn.params.get("branches_platforms") or ()
    found = [branch for branch, names in zip(branches, platforms, strict=False) if names and "cuda" in names]
    return found or branches


def results_made_by(branch: Jaxpr) -> list[Any]:
    """Of each result of a branch what makes it of the branch's inputs, as a key; None where it is no equation's.

    >>> import jax, jax.numpy as jnp
    >>> first, second = (jax.make_jaxpr(f)(jnp.ones(3)).jaxpr for f in (jnp.sin, lambda x: (jnp.cos(x), jnp.sin(x))))
    >>> results_made_by(first)[0] == results_made_by(second)[1]
    True
    """
    made: dict[Any, Any] = {}
    names: dict[Any, Any] = {var: place for place, var in enumerate(branch.invars)}
    for eqn in branch.eqns:
        operands = tuple(repr(atom) if isinstance(atom, Literal) else names.get(atom, atom) for atom in eqn.invars)
        params = tuple((name, _identity(value)) for name, value in sorted(eqn.params.items()))
        for place, var in enumerate(eqn.outvars):
            names[var] = made[var] = (eqn.primitive.name, params, operands, place)
    return [None if isinstance(var, Literal) else made.get(var) for var in branch.outvars]


def _identity(value: Any) -> Any:
    """A parameter of an equation as part of a key."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value


def workspace(eqn: JaxprEqn, size: Size) -> int:
    """Bytes that a kernel needs besides operands and results.

    Attention's backward pass sums gradients of queries in float32, and has a number for each row of scores.
    """
    if not is_attention_backward(eqn):
        return 0
    query: Any = eqn.outvars[0].aval
    numbers = size(eqn.outvars[0]) // query.dtype.itemsize
    return 4 * (numbers + numbers // query.shape[-1])


def called_jaxpr(eqn: JaxprEqn) -> Jaxpr | None:
    """The body of an equation that is a call."""
    if eqn.primitive.name in WITH_BODIES or eqn.primitive.name == "pallas_call":
        return None
    for name in BODY_PARAMETERS:
        body = eqn.params.get(name)
        if isinstance(body, ClosedJaxpr):
            return body.jaxpr
        if isinstance(body, Jaxpr):
            return body
    return None
