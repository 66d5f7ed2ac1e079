"""A schedule as columns: what packing and lowering compute on, for all actions at once."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np

from jaxpipe.schedule.action import Kind
from jaxpipe.schedule.schedule import Schedule

F, B, I, W = range(4)
"""The numbers of the kinds, in the order of `Kind`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """Groups of actions, numbered rank by rank in each rank's order.

    Attributes:
      lengths: ``int[ranks]``, the groups of each rank.
    """

    lengths: np.ndarray

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """``int[ranks]``: the number of each rank's first group."""
        return np.cumsum(self.lengths) - self.lengths

    @functools.cached_property
    def rank(self) -> np.ndarray:
        """``int[groups]``: the rank of each group."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


@dataclasses.dataclass(frozen=True, eq=False)
class Actions(Groups):
    """The actions of a schedule, numbered as its groups are.

    Attributes:
      lengths: see `Groups`.
      group: ``int[actions]``, the action's group.
      place: ``int[actions]``, 0 or 1: the action's place in its group.
      kind, stage, microbatch: ``int[actions]``.
      routes: ``int[directions, stages]``, the rank of each stage.
      num_microbatches: of both directions together.
    """

    group: np.ndarray
    place: np.ndarray
    kind: np.ndarray
    stage: np.ndarray
    microbatch: np.ndarray
    routes: np.ndarray
    num_microbatches: int

    @property
    def num_stages(self) -> int:
        """Stages of the model."""
        return self.routes.shape[1]

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """``int[groups]``: the actions of each group."""
        return np.bincount(self.group, minlength=len(self.rank))

    @functools.cached_property
    def direction(self) -> np.ndarray:
        """``int[actions]``: the direction in which the microbatch travels."""
        return self.microbatch * len(self.routes) // self.num_microbatches

    @functools.cached_property
    def where(self) -> np.ndarray:
        """``int[kinds, stages, microbatches]``: the number of that action; -1 where there is none."""
        found = np.full((4, self.num_stages, self.num_microbatches), -1)
        found[self.kind, self.stage, self.microbatch] = np.arange(len(self.kind))
        return found


def read_actions(schedule: Schedule) -> Actions:
    """The actions of a schedule that `jaxpipe.schedule.check` accepts.

    >>> from jaxpipe.schedule import build
    >>> actions = read_actions(build("dualpipev", 1, 2))
    >>> actions.kind.tolist(), actions.group.tolist()  # 0F0 1F0 0F1 1B0 1F1&0B0 1B1 0I1 0W1
    ([0, 0, 0, 1, 0, 1, 1, 2, 3], [0, 1, 2, 3, 4, 4, 5, 6, 7])
    """
    groups = list(itertools.chain.from_iterable(schedule.ranks))
    sizes = np.fromiter(map(len, groups), np.int64, len(groups))
    actions = list(itertools.chain.from_iterable(groups))
    numbers = {kind: number for number, kind in enumerate(Kind)}
    group = np.repeat(np.arange(len(groups)), sizes)
    return Actions(
        group=group,
        place=np.arange(len(group)) - (np.cumsum(sizes) - sizes)[group],
        kind=np.array([numbers[action[1]] for action in actions], np.int64),
        stage=np.array([action[0] for action in actions], np.int64),
        microbatch=np.array([action[2] for action in actions], np.int64),
        lengths=np.array([len(row) for row in schedule.ranks], np.int64),
        routes=np.array(schedule.routes, np.int64).reshape(len(schedule.routes), -1),
        num_microbatches=schedule.num_microbatches,
    )
