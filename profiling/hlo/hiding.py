"""Finds which communication of a compiled program is hidden behind compute, from the schedule that XLA made.

No device is needed: the program may be compiled ahead of time for GPUs that are not there (`profiling.topology`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from jaxpipe.planning.chips import Achieved, Chip
from profiling.event import Event, Trace
from profiling.hlo.cost import Times
from profiling.hlo.links import Link, find_links, links_table, take_rates
from profiling.hlo.text import Computation, Module, parse
from profiling.hlo.timeline import LANES, Run, Settings, Transfer, play
from profiling.table import Column, Table, Value, as_text

HIDDEN, EXPOSED = 0.9, 0.1
"""Shares of a collective's time beside compute: from the first on it is hidden, up to the second it is exposed."""

_WRAPPERS = re.compile(r"^(jit\(.*|shard_map|while|body|closed_call|pjit|checkpoint|rematted_computation)$")


@dataclasses.dataclass(frozen=True)
class CompiledCollective:
    """One collective of a compiled schedule.

    Attributes:
      computation: name of the computation that it stands in.
      name: name of the instruction that starts it.
      kind: one of `profiling.hlo.collective.KINDS`; several that start together are joined by "+".
      label: path of named scopes that it was traced under.
      is_asynchronous: whether the device goes on while it runs.
      count: how often it runs in one run of the program.
      devices: number of devices that take part.
      bytes: bytes that each device sends.
      remote_bytes: bytes of them that go to other nodes.
      group: devices of one group, as an example; see `profiling.hlo.collective.Exchange`.
      us: estimated or measured microseconds of one run.
      hidden_us: microseconds of them in which the device computes.
      between_us, between_flops: compute between its start and the wait for it in the schedule.
      products: labels of the matrix products in that compute.
      could_hide_us: compute of the same computation that another order could put beside it, as it neither needs the
        result nor is needed for it. Several collectives may count the same compute.
      place: position in the chain of dependencies: "first" if it needs no matrix product, "last" if no matrix product
        needs its result, "alone" if both, otherwise "inner".
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
        """Microseconds of the collective in which the device does not compute."""
        return self.us - self.hidden_us

    @property
    def verdict(self) -> str:
        """One of "hidden", "partial" and "exposed"."""
        if self.hidden_us >= HIDDEN * self.us:
            return "hidden"
        return "exposed" if self.hidden_us <= EXPOSED * self.us else "partial"


@dataclasses.dataclass(frozen=True)
class CompiledOverlap:
    """The communication of a compiled program, and how much of it is hidden; `overlap` makes it.

    Attributes:
      module: name of the module.
      chip: name of the chip that times are estimated for.
      collectives: asynchronous collectives, in the order of the schedule, computation by computation.
      synchronous: collectives during which the device waits.
      us: estimated microseconds from the start of the program to its end.
      compute_us: microseconds of them in which the device computes.
      events: the simulated timeline.
      notes: what was assumed.
      links: links that the collectives of each kind use, and the sources of their rates.
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
        """The same program with only the collectives of a kind whose label and computation match.

        Args:
          kind: kind of collective; "" for all.
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
        """Microseconds of all runs of the collectives of a kind; "" for all kinds."""
        return sum(one.count * one.us for one in self._of(kind))

    def exposed_us(self, kind: str = "") -> float:
        """Microseconds of `communication_us` in which the device does not compute."""
        return sum(one.count * one.exposed_us for one in self._of(kind))

    def hidden_share(self, kind: str = "") -> float | None:
        """Share of the communication time of a kind that is hidden, "" for all kinds; None without communication."""
        total = self.communication_us(kind)
        return 1 - self.exposed_us(kind) / total if total else None

    def _of(self, kind: str) -> list[CompiledCollective]:
        return [one for one in (*self.collectives, *self.synchronous) if kind in ("", one.kind)]

    def tables(self) -> tuple[Table, ...]:
        """Tables for a report: every collective, the totals of each kind, and the links that they use."""
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
        """The tables and the notes as text."""
        return "\n".join([*map(as_text, self.tables()), *self.notes])

    def trace(self) -> Trace:
        """The timeline as a trace for metrics and reports: compute and transfers of one device."""
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
    """Finds which communication of a scheduled program is hidden on a chip.

    Args:
      hlo: `compiled.as_text()`, or a module that `profiling.hlo.text` read or parsed.
      chip: chip to estimate for, such as ``chip("H200")``.
      achieved: share of the chip's best that is reached; None for the defaults of `Achieved`.
      times: measured times that replace estimates, ``[(pattern, microseconds), ...]``. The pattern is searched for in
        names and op_names of compute and collectives; a function of the instruction may replace the microseconds. Give
        times for kernels whose work the program does not show, such as Pallas kernels. Kernels with the shapes of a
        grouped matrix product are estimated as such.
      trips: ``[(pattern, count), ...]`` for loops whose number of trips the compiler does not know. The pattern is
        searched for in the loop's name and the op_names within; the count may be an average. Other such loops count as
        running once.
      lanes: ``[(pattern, lane), ...]`` on kinds of collectives. Collectives of one lane queue; by default all but sends
        and receives share a lane, as on a GPU.
      node_size: number of devices in a node. Device ``i`` of the program is on node ``i // node_size``.
      internode, intranode: bytes/s that a device gets in each direction between nodes, and within its node; None takes
        the chip's rate times the share in `achieved`.

    Raises:
      ValueError: the text is no HLO module, the module is not scheduled, or a rate is not positive.

    The verdicts are those of xprof's analysis of asynchronous operations.

    >>> from jaxpipe.planning.chips import Achieved, Chip
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
    """For each instruction, a bit for every instruction whose result it needs, itself included.

    An element that is taken out of a tuple needs only that element: a dropped optimization barrier leaves such a tuple,
    which orders nothing.
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
    """A path of scopes without the parts that every path has.

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
