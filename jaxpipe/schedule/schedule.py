"""A pipeline schedule as data: what every rank does, in which order, and which rank holds which stage."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection

from jaxpipe.schedule.action import Action, Group


@dataclasses.dataclass(frozen=True, repr=False)
class Schedule:
    """What every rank does, in which order.

    Attributes:
      name: the builder's name, such as ``"dualpipev"``.
      num_stages: stages of the model, numbered in the order of the forward pass.
      num_microbatches: microbatches of one step. With two directions the first half travels in
        direction 0 and the second half in direction 1.
      ranks: ``[num_ranks][groups]``: the groups of each rank in order. A group is one action, or an
        overlapped (forward, backward) pair.
      routes: ``[num_directions][num_stages]``: the rank that runs each stage for the microbatches of a
        direction. One direction for all schedules but DualPipe, which has two.
    """

    name: str
    num_stages: int
    num_microbatches: int
    ranks: tuple[tuple[Group, ...], ...]
    routes: tuple[tuple[int, ...], ...]

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks, the size of the mesh's pipeline axis."""
        return len(self.ranks)

    def __repr__(self) -> str:
        sizes = f"{self.num_stages} stages on {self.num_ranks} ranks, {self.num_microbatches} microbatches"
        return f"<Schedule {self.name!r}: {sizes}>"

    def __str__(self) -> str:
        return self.grid()

    def grid(self, marked: Collection[tuple[int, int]] = ()) -> str:
        """The groups of each rank, one line a rank; those at the (rank, position) in ``marked`` stand between > and <.

        >>> from jaxpipe.schedule.builders.gpipe import gpipe
        >>> print(gpipe(2, 1).grid(marked=[(1, 0)]))
        rank 0   0F0   0B0
        rank 1  >1F0<  1B0
        """
        cells = [
            [
                f">{text}<" if (rank, position) in marked else f" {text} "
                for position, text in enumerate("&".join(map(str, group)) for group in groups)
            ]
            for rank, groups in enumerate(self.ranks)
        ]
        width = max((len(cell) for row in cells for cell in row), default=0)
        label = len(str(self.num_ranks - 1))
        return "\n".join(
            f"rank {rank:<{label}} " + "".join(f" {cell:<{width}}" for cell in row).rstrip()
            for rank, row in enumerate(cells)
        )

    def direction(self, microbatch: int) -> int:
        """The direction in which a microbatch travels."""
        return microbatch * len(self.routes) // self.num_microbatches

    def rank_of(self, stage: int, microbatch: int) -> int:
        """The rank that runs a stage for a microbatch."""
        return self.routes[self.direction(microbatch)][stage]

    @functools.cached_property
    def rank_stages(self) -> tuple[tuple[int, ...], ...]:
        """``[num_ranks][chunks]``: the stages that each rank works on, in the order of stages.

        The position in a rank's tuple is the stage's local chunk index. DualPipeV's rank r has
        ``(r, 2 * num_ranks - 1 - r)``. DualPipe's rank r and the rank that mirrors it have the same two stages in the
        same order, of which either owns one: so that what both do at a time is the same code.
        """
        return tuple(tuple(stage for stage, _ in held) for held in self._held)

    @functools.cached_property
    def _held(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """``[num_ranks][chunks]``: (stage, direction)."""
        held = ((stage, d, rank) for d, route in enumerate(self.routes) for stage, rank in enumerate(route))
        order = sorted(held)
        return tuple(tuple((stage, d) for stage, d, at in order if at == rank) for rank in range(self.num_ranks))

    def chunk_of(self, action: Action) -> int:
        """The local chunk index, on the rank that runs it, of an action's stage."""
        direction = self.direction(action.microbatch)
        rank = self.routes[direction][action.stage]
        return self._held[rank].index((action.stage, direction))

    @functools.cached_property
    def storage_order(self) -> tuple[int, ...]:
        """``[num_stages]``: the stage in each row of parameters stacked rank by rank.

        With ``order="storage"`` row i of a stacked parameter belongs to stage ``storage_order[i]``. Sharded evenly over
        the pipeline axis, each rank then has the stages that it runs in direction 0, where all ranks run as many.
        """
        return tuple(stage for rank in range(self.num_ranks) for stage, at in enumerate(self.routes[0]) if at == rank)
