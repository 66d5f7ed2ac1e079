"""One trace of each kind of stage, from which times and memory of pipelines of any size follow by arithmetic.

What a layer does on a device depends on the experts' axis, on precision, recomputation and exchange; not on how many
layers there are, on ranks, microbatches or schedule. So one small pipeline is planned, on two ranks: a stage of a
dense layer, one of a layer with experts, one of two of these, and one of multi-token prediction. A layer among others
of its stage costs what the second one adds.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxpipe
from jaxpipe.deepseek import DeepSeekModel, LayerCosts, build_model, stand_in
from jaxpipe.deepseek.config import DENSE, MOE, MTP, ModelConfig
from jaxpipe.planning.chips import Achieved, Chip
from jaxpipe.planning.work import DeviceWork, Kernel, SlotArray
from jaxpipe.schedule.simulator import Costs
from pretraining import trainer

RANKS, MICROBATCHES = 2, 4

Arrays = Mapping[tuple[tuple[int, ...], str], tuple[int, int]]
"""How many arrays of a shape and dtype, and bytes of one."""


class Held(NamedTuple):
    """What a stage keeps of a microbatch in slots.

    Attributes:
      both: from its forward to its backward: to I or B, what W reads later left out.
      weight: from F to W.
      cross: from I to W.
    """

    both: Arrays
    weight: Arrays
    cross: Arrays


class Seconds(NamedTuple):
    """Of one run of an action: of its kernels, of its collectives, and for reading gradients that are added to sums.

    The sums themselves are read and written whole, those of layers that a stage does not have too; see `Probe.costs`.
    """

    compute: float = 0.0
    communicate: float = 0.0
    gradients: float = 0.0


@dataclasses.dataclass(frozen=True)
class Probe:
    """What one trace has found.

    Attributes:
      times: of stages by their layers' kinds, and by action.
      held: what those keep.
      prepared: bytes made of their parameters once a step.
      boundary: bytes of what goes between stages.
      transient: bytes that the busiest moment needs besides.
      ends: kernels and collectives of the ends' actions where `RANKS` ranks share them.
      unknown: kernels that no rule knows.
    """

    times: Mapping[tuple[str, ...], Mapping[str, Seconds]]
    held: Mapping[tuple[str, ...], Held]
    prepared: Mapping[tuple[str, ...], int]
    boundary: int
    transient: int
    ends: Mapping[str, DeviceWork]
    unknown: tuple[str, ...]

    def seconds(self, row: Sequence[str], letter: str) -> Seconds:
        """Of an action of a stage with layers of these kinds; one without layers hands on what it gets."""
        if not row:
            return Seconds(0.0, 0.0, 0.0)
        each = [self._alone(kind)[letter] for kind in row]
        one, two = (self.times[(MOE,) * count][letter] for count in (1, 2))
        fixed = [max(0.0, 2 * a - b) for a, b in zip(one[:2], two[:2], strict=True)] + [0.0]
        sums = (sum(times) for times in zip(*each, strict=True))
        return Seconds(*(time - (len(row) - 1) * less for time, less in zip(sums, fixed, strict=True)))

    def costs(self, row: Sequence[str], achieved: Achieved, sums: float) -> Costs:
        """Times of a stage, as `jaxpipe.plan` makes them of its work.

        Args:
          row: kinds of its layers.
          achieved: for the pair of a forward and a backward.
          sums: seconds for reading and writing the sums of a stage's gradients.
        """
        computes, communicates = {}, {}
        for letter in "FBIW":
            compute, communicates[letter], gradients = self.seconds(row, letter)
            computes[letter] = compute + (gradients + sums) * (letter in "BW") * bool(row)
        both = [sum(times[letter] for letter in "FB") for times in (computes, communicates)]
        whole = [computes[letter] + communicates[letter] for letter in "FIWB"]
        return Costs(*whole, overlapped=max(both[0] + achieved.occupied * both[1], both[1]))

    def kept(self, row: Sequence[str]) -> Held:
        """What a stage with layers of these kinds keeps of a microbatch."""
        if not row:
            return Held({}, {}, {})
        first, *others = row
        found = self.held[(first,)]
        for kind in others:
            found = Held(*(_plus(a, self._more(kind, name)) for name, a in zip(Held._fields, found, strict=True)))
        return found

    def copies(self, row: Sequence[str]) -> int:
        """Bytes made of a stage's parameters once a step."""
        return sum(self.prepared[(kind,)] for kind in row)

    def _alone(self, kind: str) -> Mapping[str, Seconds]:
        return self.times[(kind,)]

    def _more(self, kind: str, name: str) -> Arrays:
        """What one more layer of a kind adds to what a stage keeps."""
        one, two = (getattr(self.held[(MOE,) * count], name) for count in (1, 2))
        shared = _minus(one, _minus(two, one))  # once a stage, however many layers it has
        return _minus(getattr(self.held[(kind,)], name), shared)


def probe(
    config: ModelConfig, devices: int, microbatch_size: int, chip: Chip, achieved: Achieved, devices_per_node: int
) -> Probe:
    """Plans the small pipeline.

    Args:
      config: of the model, with precision, recomputation and exchange.
      devices: of the experts' axis.
      microbatch_size: sequences of a microbatch on a device.
      chip, achieved, devices_per_node: as `jaxpipe.plan` takes them.

    Raises:
      ValueError: sizes that do not fit.
    """
    from pretraining.plan import KERNELS, abstract_mesh  # noqa: PLC0415

    if len(set(config.layer_kinds)) == 1:
        raise ValueError(
            f"all {config.layers} layers of the model are of one kind, and its stages run padding: a search cannot "
            "tell what one layer costs; plan schedules by name"
        )
    kinds = [*[DENSE] * bool(config.dense_layers), *[MOE] * 3, *[MTP] * config.mtp]
    if len(kinds) < 5:  # at least four stages, as many as the schedule has
        kinds = [*kinds, *[MOE] * (5 - len(kinds))]
    dense = kinds.count(DENSE)
    # Two of the layers with experts in one stage, each of the others alone; a head that cost something would empty one.
    costs = {kind: cost for kind, cost in ((DENSE, 1.0), (MOE, 0.5), (MTP, 1.0)) if kind in kinds}
    small = dataclasses.replace(
        config, layers=dense + kinds.count(MOE), dense_layers=dense, redundant=0, layer_costs=LayerCosts(**costs)
    ).over_devices(devices)
    schedule = jaxpipe.schedule.build("dualpipev", RANKS, MICROBATCHES)
    model = build_model(small, schedule, 0, axis="ep", dtype=jnp.bfloat16, abstract=True, core=stand_in.attention)
    mesh = abstract_mesh({"pp": RANKS, "ep": devices}, chip)
    params = trainer.abstract_params(model, mesh)
    batch = trainer.abstract_batch(small, MICROBATCHES * devices * microbatch_size)
    found = jaxpipe.plan(
        trainer.pipelined(model, schedule, mesh), params, batch, chip, achieved=achieved,
        devices_per_node=devices_per_node, kernels=KERNELS,
    )  # fmt: skip
    rows, works = model.arrangement.stage_kinds, found.work
    sums = sum_seconds(model, {"pp": RANKS, "ep": devices}, chip, achieved)

    def seconds(work: DeviceWork) -> Seconds:
        added = sum(one.times * one.seconds(chip, achieved) for one in work.kernels if _adds(one))
        return Seconds(work.compute(chip, achieved) - added, work.communicate(found.network), max(0.0, added - sums))

    times = {
        row: {letter: seconds(work) for letter, work in actions.items()}
        for row, actions in zip(rows, works.kinds, strict=True)
    }
    held = {row: _held(actions, works.boundary) for row, actions in zip(rows, works.kinds, strict=True)}
    return Probe(
        times=times,
        held=held,
        prepared=dict(zip(rows, works.prepared, strict=True)),
        boundary=sum(works.boundary),
        transient=found.memory.transient,
        ends=works.ends,
        unknown=tuple(name for name, _ in found.uncounted),
    )


def sum_seconds(model: DeepSeekModel, sizes: Mapping[str, int], chip: Chip, achieved: Achieved) -> float:
    """Seconds for reading and writing the sums of the gradients of a stage, those of all its slots."""
    rows = model.arrangement.stages // sizes["pp"]
    leaves = zip(*(jax.tree.leaves(tree.stages) for tree in (model.params, model.specs, model.trained)), strict=True)
    held = sum(local_bytes(leaf, spec, sizes) for leaf, spec, trained in leaves if trained) / rows
    return 2 * held / (chip.hbm * achieved.memory)


def local_bytes(leaf: Any, spec: Any, sizes: Mapping[str, int]) -> int:
    """Bytes that a device has of a parameter, on a mesh of these sizes."""
    axes = [name for entry in spec if entry is not None for name in ((entry,) if isinstance(entry, str) else entry)]
    return leaf.size * leaf.dtype.itemsize // math.prod(sizes[name] for name in axes)


def slot_bytes(several: Iterable[Arrays]) -> int:
    """Bytes of a slot that can hold what any of several kinds of stages keeps: arrays of one dtype share places."""
    most: dict[str, list[int]] = {}
    for arrays in several:
        mine: dict[str, list[int]] = collections.defaultdict(list)
        for (_, dtype), (count, nbytes) in arrays.items():
            mine[dtype] += [nbytes] * count
        for dtype, sizes in mine.items():
            pairs = itertools.zip_longest(most.get(dtype, ()), sorted(sizes, reverse=True), fillvalue=0)
            most[dtype] = [max(pair) for pair in pairs]
    return sum(map(sum, most.values()))


def _adds(kernel: Kernel) -> bool:
    """Whether a kernel adds a gradient to its sum."""
    return kernel.scope == "write" and kernel.name == "add"


def _held(actions: Mapping[str, DeviceWork], boundary: Sequence[int]) -> Held:
    message = [array for array in actions["F"].loaded if array.nbytes in boundary][: len(boundary)]
    gone = _counted(message)
    forward, crossing = (_minus(_counted(actions[letter].stored), gone) for letter in "FI")
    read_by_w = _minus(_counted(actions["W"].loaded), crossing)
    weight = {key: (min(count, forward.get(key, (0, 0))[0]), size) for key, (count, size) in read_by_w.items()}
    weight = {key: value for key, value in weight.items() if value[0]}
    return Held(_minus(forward, weight), weight, crossing)


def _counted(arrays: Iterable[SlotArray]) -> Arrays:
    arrays = list(arrays)
    counts = collections.Counter(array[:2] for array in arrays)
    return {array[:2]: (counts[array[:2]], array.nbytes) for array in arrays}


def _plus(left: Arrays, right: Arrays) -> Arrays:
    keys = {**left, **right}
    return {key: (left.get(key, (0, 0))[0] + right.get(key, (0, 0))[0], keys[key][1]) for key in keys}


def _minus(left: Arrays, right: Arrays) -> Arrays:
    found = {key: (count - right.get(key, (0, 0))[0], size) for key, (count, size) in left.items()}
    return {key: value for key, value in found.items() if value[0] > 0}
