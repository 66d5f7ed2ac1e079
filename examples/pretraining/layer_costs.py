"""``--layer-costs auto``: stages get layers by what one of each kind takes on the chip, as it is planned."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jaxpipe
from jaxpipe.deepseek import LayerCosts, ModelConfig
from jaxpipe.deepseek.config import MOE
from jaxpipe.planning.chips import Achieved, Chip
from jaxpipe.planning.mesh import Network
from jaxpipe.planning.rates import PROGRAMS
from pretraining.probes import Probe, probe

ENDS = {"head": "H", "embedding": "EG"}
"""The actions of each end."""


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedCosts:
    """What layers cost in planned milliseconds, from one trace of a layer of each kind.

    What a budget of bytes (``--stash``) has the backward pass compute again is not counted.

    Attributes:
      config: the model.
      sizes: of the mesh's axes, in the order of the devices.
      microbatch_size: sequences of a microbatch on a device.
      chip: of the devices.
      achieved, devices_per_node: as `jaxpipe.plan` takes them.
    """

    config: ModelConfig
    sizes: Mapping[str, int]
    microbatch_size: int
    chip: Chip
    achieved: Achieved = PROGRAMS
    devices_per_node: int = 8

    def of(self, schedule: jaxpipe.schedule.Schedule) -> LayerCosts:
        """Of a schedule, by whether it overlaps forwards with backwards, which hides what they exchange; rounded.

        Raises:
          ValueError: layers that are all alike; sizes that do not fit each other.
        """
        pairs = any(len(group) > 1 for groups in schedule.ranks for group in groups)
        one = {kind: self._seconds([kind], pairs=pairs) for kind in dict.fromkeys(self.config.layer_kinds)}
        alone = 2 * one[MOE] - self._seconds([MOE, MOE], pairs=pairs)  # once a stage, however many layers it has
        costs = {kind: 1e3 * (seconds - alone) for kind, seconds in one.items()}
        if not self.config.shared_ends:
            costs |= {end: 1e3 * sum(map(self._seconds_of_end, letters)) for end, letters in ENDS.items()}
        return LayerCosts(**costs).rounded()

    def applied(self, schedule: jaxpipe.schedule.Schedule) -> ModelConfig:
        """The model with its costs for a schedule.

        Raises:
          ValueError: see `of`.
        """
        return dataclasses.replace(self.config, layer_costs=self.of(schedule))

    def _seconds(self, row: list[str], *, pairs: bool) -> float:
        """Of a forward and a backward of a stage with layers of these kinds."""
        costs = self._probe.costs(row, self.achieved, 0.0)
        apart = costs.forward + (costs.backward or 0.0)
        return costs.overlapped or apart if pairs else apart

    def _seconds_of_end(self, letter: str) -> float:
        work = self._probe.ends[letter]
        network = Network.make(dict(self.sizes), self.chip, self.achieved, self.devices_per_node)
        return work.compute(self.chip, self.achieved) + work.communicate(network)

    @functools.cached_property
    def _probe(self) -> Probe:
        kinds = dict.fromkeys(self.config.layer_kinds)
        if len(kinds) < 2:
            raise ValueError(
                f"--layer-costs auto: all {len(self.config.layer_kinds)} layers are alike, and stages get them evenly; "
                "leave it out"
            )
        config = dataclasses.replace(self.config, shared_ends=bool(self.config.shared_ends))
        given = self.sizes.get("ep", 1), self.microbatch_size, self.chip, self.achieved, self.devices_per_node
        return probe(config, *given)
