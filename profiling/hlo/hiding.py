"""Which communication of a compiled program is hidden behind compute, read from the schedule that XLA really made.

No device is needed: the program may be compiled ahead of time for GPUs that are not there
(`jax.experimental.topologies.get_topology_desc`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from profiling.event import Event, Trace
from profiling.hlo.chips import Achieved, Chip
from profiling.hlo.cost import Times
from profiling.hlo.links import Link, find_links, links_table, take_rates
from profiling.hlo.text import Computation, Module, parse
from profiling.hlo.timeline import LANES, Run, Settings, Transfer, play
from profiling.table import Column, Table, Value, as_text

HIDDEN, EXPOSED = 0.9, 0.1
"""Shares of a collective's time under compute: from the first on it is hidden, up to the second exposed."""

_WRAPPERS = re.compile(r"^(jit\(.*|shard_map|while|body|closed_call|pjit|checkpoint|rematted_computation)$")


@dataclasses.dataclass(frozen=True)
class CompiledCollective:
    """One collective of a schedule.

    Attributes:
      computation: that it stands in.
      name: of the instruction that starts it.
      kind: one of `hlo_collective.KINDS`, joined by "+" where several start together.
      label: the path of named scopes that it was traced under.
      is_asynchronous: whether the device goes on while it runs.
      count: how often it runs in one run of the program.
      devices: how many take part.
      bytes: that each device sends.
      remote_bytes: of them, to other nodes.
      group: devices that take part together, as an example; see `hlo_collective.Exchange`.
      us: estimated or measured microseconds of one run.
      hidden_us: of them, how many the device computes meanwhile.
      between_us, between_flops: compute that the schedule has between its start and the wait for it.
      products: labels of the matrix products among that.
      could_hide_us: compute of the same computation that neither needs its result nor is needed for it: what another
        order could put beside it. More than one collective may count the same compute.
      place: where it lies in the chain of dependencies: "first" if no matrix product is needed for it, "last" if none
        needs its result, "alone" if both, else "inner".
    """

    computation: str
    name: str
    kind: str
    label: str
    is_asynchronous: bool
    count: float
    devices: int
    bytes: float
    remote_bytes: float
    us: float
    hidden_us: float
    between_us: float
    between_flops: float
    products: tuple[str, ...]
    could_hide_us: float
    place: str
    group: tuple[int, ...] = ()

    @property
    def exposed_us(self) -> float:
        """Microseconds in which the device does not compute."""
        return self.us - self.hidden_us

    @property
    def verdict(self) -> str:
        """One of "hidden", "partial" and "exposed"."""
        if self.hidden_us >= HIDDEN * self.us:
            return "hidden"
        return "exposed" if self.hidden_us <= EXPOSED * self.us else "partial"


@dataclasses.dataclass(frozen=True)
class CompiledOverlap:
    """The communication of a program, and how much of it is hidden.

    Attributes:
      module: its name.
      chip: that the times are meant for.
      collectives: the asynchronous ones, in the order of the schedule, computation by computation.
      synchronous: the others, during which the device waits.
      us: estimated microseconds from the program's start to its end.
      compute_us: of them, how many the device computes.
      events: the timeline that the estimate is read from.
      notes: what had to be assumed.
      links: what collectives of each kind travel over, and where the rate comes from.
    """

    module: str
    chip: str
    collectives: tuple[CompiledCollective, ...]
    synchronous: tuple[CompiledCollective, ...]
    us: float
    compute_us: float
    events: tuple[Event, ...] = ()
    notes: tuple[str, ...] = ()
    links: tuple[Link, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of collectives that occur."""
        return tuple(sorted({one.kind for one in (*self.collectives, *self.synchronous)}))

    def select(self, kind: str = "", label: str = "", computation: str = "") -> CompiledOverlap:
        """The same with only those collectives whose kind is this and whose label and computation contain these.

        Args:
          kind: "" for all.
          label, computation: regular expressions, searched for anywhere.
        """

        def kept(found: Sequence[CompiledCollective]) -> tuple[CompiledCollective, ...]:
            return tuple(
                one
                for one in found
                if kind in ("", one.kind) and re.search(label, one.label) and re.search(computation, one.computation)
            )

        return dataclasses.replace(self, collectives=kept(self.collectives), synchronous=kept(self.synchronous))

    def communication_us(self, kind: str = "") -> float:
        """Microseconds of all collectives of a kind, of all kinds if "", as often as they run."""
        return sum(one.count * one.us for one in self._of(kind))

    def exposed_us(self, kind: str = "") -> float:
        """Of them, those in which the device does not compute."""
        return sum(one.count * one.exposed_us for one in self._of(kind))

    def hidden_share(self, kind: str = "") -> float | None:
        """Share of the communication time of a kind ("": of all) that is hidden; None where there is none."""
        total = self.communication_us(kind)
        return 1 - self.exposed_us(kind) / total if total else None

    def _of(self, kind: str) -> list[CompiledCollective]:
        return [one for one in (*self.collectives, *self.synchronous) if kind in ("", one.kind)]

    def tables(self) -> tuple[Table, ...]:
        """Every collective in a row, the totals of each kind, and the links that they travel over, for any report."""
        every = (*self.collectives, *self.synchronous)
        collectives = Table(
            name="collectives",
            title=f"Collectives of {self.module} on {self.chip}",
            caption=f"{self.us:.0f} us from start to end, {self.compute_us:.0f} us of them compute, by estimate.",
            columns=_COLUMNS,
            rows=tuple(map(_row, every)),
        )
        kinds = Table(
            name="kinds",
            title="Communication by kind",
            caption="",
            columns=(Column("kind"), Column("places", "n"), Column("time", "us"), Column("exposed", "us"),
                     Column("hidden", "%", is_share=True)),
            rows=tuple(
                (kind or "all", len(self._of(kind)), self.communication_us(kind), self.exposed_us(kind),
                 self.hidden_share(kind))
                for kind in (*self.kinds, "")
            ),
        )  # fmt: skip
        return (collectives, kinds, links_table(self.links)) if self.links else (collectives, kinds)

    def table(self) -> str:
        """The tables as text, and what had to be assumed."""
        return "\n".join([*map(as_text, self.tables()), *self.notes])

    def trace(self) -> Trace:
        """The timeline as any other trace, for metrics and reports: one device, its compute and its transfers."""
        notes = ("estimated from the schedule of a compiled program, not measured", *self.notes)
        return Trace(self.module, "simulated", self.events, metadata={"chip": self.chip}, notes=notes)


def overlap(
    hlo: str | Module,
    chip: Chip,
    *,
    achieved: Achieved | None = None,
    times: Times = (),
    trips: Sequence[tuple[str, float]] = (),
    lanes: Sequence[tuple[str, str]] = LANES,
    node_size: int = 8,
    internode: float | None = None,
    intranode: float | None = None,
) -> CompiledOverlap:
    """What a scheduled program hides of its communication on a chip.

    Args:
      hlo: `compiled.as_text()`, or a module that `hlo_text.read` or `hlo_text.parse` made.
      chip: for instance ``chips.chip("H200")``.
      achieved: the share of the chip's best that is reached; the defaults of `Achieved` if None.
      times: measured times that replace estimates: ``[(pattern, microseconds), ...]``, the pattern searched for in the
        names and op_names of instructions, compute and collectives alike; instead of microseconds, a function of the
        instruction. Give them for kernels whose work does not show in the program, such as Pallas kernels; those that
        look like a grouped matrix product by their shapes are estimated as such.
      trips: ``[(pattern, count), ...]`` for loops of which the compiler does not know how often they run, the pattern
        searched for in the loop's name and the op_names within; a fraction if it runs that often on average. Other
        such loops count as running once.
      lanes: ``[(pattern, lane), ...]`` on kinds of collectives. Those of one lane queue; by default all but sends and
        receives share one, as on a GPU.
      node_size: devices of a node. Device ``i`` of the program is on node ``i // node_size``.
      internode, intranode: bytes/s that a device really gets to devices of other nodes, and of its own, in each
        direction; None: the chip's, times the share of them that `achieved` says.

    Raises:
      ValueError: the text is no HLO module, its module is not scheduled, or a rate is not positive.

    Sources: the classes are those of xprof's analysis of asynchronous operations.

    >>> from profiling.hlo.chips import Achieved, Chip
    >>> chip = Chip("toy", 1e12, 1e12, 1e12, 1e12, 1e12, 1e9, 1e9, 0.0, 1, 1e9)
    >>> found = overlap('''HloModule toy, is_scheduled=true, num_partitions=2
    ... ENTRY %main (p: f32[1000], w: f32[100,100]) -> (f32[1000], f32[100,100]) {
    ...   %p = f32[1000]{0} parameter(0)
    ...   %w = f32[100,100]{1,0} parameter(1)
    ...   %send = ((f32[1000]), f32[1000]) all-to-all-start(%p), replica_groups={{0,1}}, dimensions={0}
    ...   %square = f32[100,100]{1,0} dot(%w, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    ...   %got = f32[1000]{0} all-to-all-done(%send)
    ...   ROOT %both = (f32[1000], f32[100,100]) tuple(%got, %square)
    ... }''', chip, achieved=Achieved(1.0, 1.0, 1.0, 1.0, 0.0))
    >>> [(one.kind, one.us, one.hidden_us, one.verdict) for one in found.collectives]
    [('all-to-all', 2.0, 2.0, 'hidden')]
    """
    module = parse(hlo) if isinstance(hlo, str) else hlo
    chip, achieved, sources = take_rates(chip, achieved or Achieved(), internode, intranode)
    timeline = play(module, Settings(chip, achieved, times, trips, lanes, node_size))
    found = [one for run in timeline.runs for one in _collectives(run)]
    sent = [transfer.exchange for run in timeline.runs for transfer in run.transfers]
    return CompiledOverlap(
        module=module.name,
        chip=chip.name,
        collectives=tuple(one for one in found if one.is_asynchronous),
        synchronous=tuple(one for one in found if not one.is_asynchronous),
        us=timeline.us,
        compute_us=timeline.compute_us,
        events=timeline.events,
        notes=timeline.notes,
        links=find_links(sent, chip, achieved, node_size, sources),
    )


def _collectives(run: Run) -> list[CompiledCollective]:
    needs = _needs(run.computation) if run.transfers else []
    return [_collective(run, transfer, needs) for transfer in run.transfers]


def _needs(computation: Computation) -> list[int]:
    """For each instruction, a bit for every one whose result it needs, itself included.

    An element that is taken out of a tuple just made needs that element alone: where XLA dropped an optimization
    barrier, only such a tuple is left, and it orders nothing.
    """
    needs: list[int] = []
    for i, instruction in enumerate(computation.instructions):
        sources = instruction.operands
        if instruction.opcode == "get-tuple-element" and sources and computation[sources[0]].opcode == "tuple":
            elements = computation[sources[0]].operands
            element = instruction.attributes.get("index", "")
            if not element.isdecimal() or int(element) >= len(elements):
                raise ValueError(
                    f"{instruction.name!r} in computation {computation.name!r} takes element index={element!r} of "
                    f"{len(elements)}: the text is damaged"
                )
            sources = (elements[int(element)],)
        bits = 1 << i
        for name in sources:
            bits |= needs[computation.index[name]]
        needs.append(bits)
    return needs


def _collective(run: Run, transfer: Transfer, needs: Sequence[int]) -> CompiledCollective:
    instructions = run.computation.instructions
    start, end = transfer.start, transfer.start if transfer.done is None else transfer.done
    between = range(start + 1, end)
    before = [bool(needs[start] >> i & 1) for i in range(len(instructions))]
    after = [bool(needs[i] >> end & 1) for i in range(len(instructions))]
    needs_product = any(p and b for p, b in zip(run.is_product, before, strict=True))
    feeds_product = any(p and a for p, a in zip(run.is_product, after, strict=True))
    independent = (us for us, b, a in zip(run.us, before, after, strict=True) if not (a or b))
    place = {(True, True): "inner", (False, True): "first", (True, False): "last", (False, False): "alone"}
    return CompiledCollective(
        computation=run.computation.name,
        name=instructions[start].name,
        kind=transfer.exchange.kind,
        label=instructions[start].op_name,
        is_asynchronous=transfer.is_asynchronous,
        count=run.count,
        devices=transfer.exchange.devices,
        bytes=transfer.exchange.bytes,
        remote_bytes=transfer.exchange.remote,
        us=transfer.us,
        hidden_us=min(transfer.hidden_us, transfer.us),
        between_us=sum(run.us[i] for i in between),
        between_flops=sum(run.flops[i] for i in between),
        products=tuple(instructions[i].op_name or instructions[i].name for i in between if run.is_product[i]),
        could_hide_us=sum(independent),
        place=place[needs_product, feeds_product],
        group=transfer.exchange.example,
    )


def short_label(label: str) -> str:
    """A path of scopes without what every path has.

    >>> short_label("jit(step)/transpose(jvp())/shard_map/while/body/closed_call/dispatch/all_to_all")
    'transpose(jvp())/dispatch/all_to_all'
    """
    return "/".join(part for part in label.split("/") if not _WRAPPERS.match(part))


_COLUMNS = (
    Column("verdict"), Column(""), Column("kind"), Column("times", "n"), Column("MB", "n"), Column("us", "us"),
    Column("between", "us"), Column("GFLOP", "n"), Column("products", "n"), Column("hidden", "%", is_share=True),
    Column("could hide", "us"), Column("place"), Column("in"), Column("label"),
)  # fmt: skip


def _row(one: CompiledCollective) -> tuple[Value, ...]:
    return (
        one.verdict,
        "async" if one.is_asynchronous else "sync",
        one.kind,
        one.count,
        round(one.bytes / 1e6, 2),
        one.us,
        one.between_us,
        round(one.between_flops / 1e9),
        len(one.products),
        one.hidden_us / one.us if one.us else None,
        one.could_hide_us,
        one.place,
        one.computation if len(one.computation) <= 24 else one.computation[:23] + "…",
        short_label(one.label) or one.name,
    )
