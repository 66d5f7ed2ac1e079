"""Finds the links that a compiled program's communication uses, and the sources of their rates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from jaxpipe.planning.chips import CHIPS, Achieved, Chip
from profiling.hlo.collective import Exchange
from profiling.table import Column, Table, Value

_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Link:
    """The links that the collectives of one kind use.

    Attributes:
      kind: kind of the collectives.
      places: number of them in the program.
      group: devices of one group, as an example.
      nodes: nodes of these devices; several if bytes cross between nodes.
      local, remote: bytes that a device sends within its node and to other nodes, in one run of each.
      local_rate, remote_rate: rates of the estimate, in bytes/s.
      source: source of the rate that decides.

    >>> Link("all-gather", 1, tuple(range(16)), (0, 1), 7e6, 8e6, 360e9, 40e9, "the chip table").decides
    'between nodes'
    """

    kind: str
    places: int
    group: tuple[int, ...]
    nodes: tuple[int, ...]
    local: float
    remote: float
    local_rate: float
    remote_rate: float
    source: str

    @property
    def decides(self) -> str:
        """The slower way: "within nodes" or "between nodes"."""
        return "between nodes" if self.remote / self.remote_rate > self.local / self.local_rate else "within nodes"


def take_rates(
    chip: Chip, achieved: Achieved, internode: float | None, intranode: float | None
) -> tuple[Chip, Achieved, dict[str, str]]:
    """The chip with the given rates, and the source of the rates "within" and "between" nodes.

    Args:
      chip: chip whose rates count if none are given.
      achieved: share of the chip's rates that is reached; a given rate is reached in full.
      internode, intranode: rates of a device between and within nodes, in bytes/s; None if not given.

    Raises:
      ValueError: a rate is not positive.
    """
    given_chip, sources = chip, {}
    for way, given, field in (("within", intranode, "interconnect"), ("between", internode, "internode")):
        if given is None:
            known = "its data sheet" if CHIPS.get(given_chip.name) == given_chip else "the chip given"
            share = getattr(achieved, field)
            sources[way] = (
                f"{getattr(chip, field) / 1e9:,.4g} GB/s of {chip.name} by {known}, {share:.0%} of it reached"
            )
            continue
        if not 0 < given < math.inf:
            raise ValueError(f"{given!r} bytes/s {way} nodes: give a positive rate")
        chip = dataclasses.replace(chip, **{field: given})
        achieved = dataclasses.replace(achieved, **{field: 1.0})
        sources[way] = f"{given / 1e9:,.4g} GB/s as given"
    return chip, achieved, sources


def find_links(
    sent: Sequence[Exchange], chip: Chip, achieved: Achieved, node_size: int, sources: Mapping[str, str]
) -> tuple[Link, ...]:
    """The links of each kind of collective; collectives that cross between nodes are separate from the others.

    Args:
      sent: what each collective sends.
      chip, achieved, sources: what `take_rates` returned.
      node_size: number of devices in a node.
    """
    kinds: dict[tuple[str, bool], list[Exchange]] = {}
    for one in sent:
        kinds.setdefault((one.kind, one.remote > 0), []).append(one)
    links = []
    for (kind, _), ones in kinds.items():
        example = max(ones, key=lambda one: one.bytes).example
        link = Link(
            kind=kind,
            places=len(ones),
            group=example,
            nodes=tuple(sorted({device // node_size for device in example})),
            local=sum(one.local for one in ones),
            remote=sum(one.remote for one in ones),
            local_rate=chip.interconnect * achieved.interconnect,
            remote_rate=chip.internode * achieved.internode,
            source="",
        )
        links.append(dataclasses.replace(link, source=sources[link.decides.partition(" ")[0]]))
    return tuple(links)


def links_table(links: Sequence[Link]) -> Table:
    """A table with one link in each row."""
    return Table(
        name="links",
        title="Links that the estimates take",
        caption="The devices that take part decide what is sent between nodes. The slower way decides the time.",
        columns=_COLUMNS,
        rows=tuple(map(_row, links)),
    )


_COLUMNS = (
    Column("kind"), Column("places", "n"), Column("devices together"), Column("nodes"), Column("MB in node", "n"),
    Column("MB between", "n"), Column("decides"), Column("GB/s", "n"), Column("from"),
)  # fmt: skip


def _row(link: Link) -> tuple[Value, ...]:
    is_pair = link.kind in ("collective-permute", "send", "recv")
    rate = link.remote_rate if link.decides == "between nodes" else link.local_rate
    return (
        link.kind,
        link.places,
        _few(link.group, " to " if is_pair else ", "),
        _few(link.nodes, ", "),
        round(link.local / 1e6, 2),
        round(link.remote / 1e6, 2),
        link.decides,
        round(rate / 1e9, 2),
        link.source,
    )


def _few(numbers: Sequence[int], between: str) -> str:
    return between.join(map(str, numbers[:_SHOWN])) + (", ..." if len(numbers) > _SHOWN else "")
