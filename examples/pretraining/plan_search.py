"""`plan --search`: the fastest ways to train a model on so many devices, of those that fit.

Each precision, recomputation and size of the experts' axis is traced once (`pretraining.probes`); meshes, schedules
and microbatches follow by arithmetic. A candidate is simulated only where no rank's work alone makes it too slow.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxpipe
from jaxpipe.deepseek import DeepSeekModel, build_model
from jaxpipe.deepseek.config import ModelConfig
from jaxpipe.planning.chips import Achieved, Chip
from jaxpipe.planning.mesh import Network
from jaxpipe.planning.rates import PROGRAMS
from jaxpipe.schedule import Schedule
from jaxpipe.schedule.action import Group
from jaxpipe.schedule.registry import BUILDERS
from jaxpipe.schedule.simulator import StageCosts, Timeline, simulate
from pretraining.flags import ENDS
from pretraining.probes import RANKS, Probe, local_bytes, probe, slot_bytes, sum_seconds
from pretraining.tables import markdown_head, markdown_row

COLUMNS = (
    "schedule", "mesh", "microbatches", "precision", "computed again", "ends", "GB", "stash", "s a step", "bubble",
    "tokens/s a device", "TFLOP/s a device",
)  # fmt: skip
GIGA = 1e9
BEST = 10
MESSAGES = 5
"""Slots for messages of each array between stages, the dummy among them: what schedules take, 1F1B fewer."""


@dataclasses.dataclass(frozen=True)
class Space:
    """What is searched.

    Attributes:
      gpus: devices in all; the rest of them, over ``pp`` times ``ep``, is dp.
      pp, ep: sizes of these axes.
      schedules: by name.
      microbatches: of a step, as multiples of the pipeline ranks.
      most_microbatches: and no more than so many.
      counts: numbers of microbatches in place of both; None: by those.
      microbatch_size: sequences of a microbatch on a device.
      precisions, remats: of `ModelConfig.in_precision`, and what is computed again.
      ends: whether all ranks run embedding and head "together", or those with the first and the last stage "apart".
    """

    gpus: int
    pp: tuple[int, ...] = (8, 16, 32)
    ep: tuple[int, ...] = (64,)
    schedules: tuple[str, ...] = tuple(name for name in BUILDERS if name != "gpipe")
    microbatches: tuple[int, ...] = (2, 4, 6, 8)
    most_microbatches: int = 128
    counts: tuple[int, ...] | None = None
    microbatch_size: int = 1
    precisions: tuple[str, ...] = ("bf16", "fp8")
    remats: tuple[str, ...] = ("none", "attention", "layer")
    ends: tuple[str, ...] = tuple(ENDS)

    def numbers(self, ranks: int) -> list[int]:
        """Microbatches of a step on so many pipeline ranks.

        >>> Space(64).numbers(16)
        [32, 64, 96, 128]
        """
        if self.counts is not None:
            return list(self.counts)
        return sorted({many * ranks for many in self.microbatches if many * ranks <= self.most_microbatches})

    def meshes(self) -> list[tuple[int, int, int]]:
        """(pp, dp, ep) whose product is the devices.

        Raises:
          ValueError: there is none.
        """
        found = [
            (pp, self.gpus // (pp * ep), ep)
            for pp, ep in itertools.product(self.pp, self.ep)
            if self.gpus % (pp * ep) == 0
        ]
        if not found:
            raise ValueError(
                f"--gpus {self.gpus} is no multiple of pp times ep for any of pp {self.pp} and ep {self.ep}: give "
                "other sizes with --search-pp and --search-ep"
            )
        return found


class Found(NamedTuple):
    """One way to train.

    Attributes:
      schedule: its name.
      mesh: pp, dp, ep.
      microbatches: of a step.
      precision, remat: of the model.
      ends: who runs embedding and head.
      nbytes: memory of a device.
      stash: of it, what slots hold.
      seconds: of a step.
      bubble: share of it in which the rank that is idle longest waits.
      tokens: a second and device.
    """

    schedule: str
    mesh: tuple[int, int, int]
    microbatches: int
    precision: str
    remat: str
    ends: str
    nbytes: float
    stash: float
    seconds: float
    bubble: float
    tokens: float


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a search found; prints as text.

    Attributes:
      chip: that was planned for.
      memory: bytes of it that may be taken.
      best: those that fit, the fastest first.
      beyond: the fastest that does not fit; None: none is faster than those that do.
      tried, simulated: candidates in all, and those that were simulated.
      flops: of a token, forward and backward, as the model needs them.
    """

    chip: Chip
    memory: float
    best: tuple[Found, ...]
    beyond: Found | None
    tried: int
    simulated: int
    flops: float

    def __str__(self) -> str:
        lines = [
            f"{self.tried} candidates, {self.simulated} simulated; the fastest that take at most "
            f"{self.memory / GIGA:.3g} GB of a {self.chip.name}, devices in the order pp, dp, ep",
            "",
            markdown_head(COLUMNS),
            *(self._row(found) for found in self.best),
        ]
        if not self.best:
            lines.append("none fits: take more devices, or a smaller model")
        if self.beyond is not None:
            lines += ["", "faster, and too large:", "", markdown_head(COLUMNS), self._row(self.beyond)]
        return "\n".join(lines)

    def _row(self, found: Found) -> str:
        mesh = ",".join(f"{name}={size}" for name, size in zip(("pp", "dp", "ep"), found.mesh, strict=True))
        measures = f"{found.nbytes / GIGA:.1f}", f"{found.stash / GIGA:.1f}", f"{found.seconds:.2f}"
        rates = f"{found.bubble:.1%}", f"{found.tokens:,.0f}", f"{found.tokens * self.flops / 1e12:.0f}"
        named = found.schedule, mesh, str(found.microbatches), found.precision, found.remat, found.ends
        return markdown_row([*named, *measures, *rates])


def search(
    config: ModelConfig,
    space: Space,
    chip: Chip,
    *,
    memory: float | None = None,
    achieved: Achieved = PROGRAMS,
    devices_per_node: int = 8,
    workers: int = 2,
) -> SearchResult:
    """The fastest ways to train a model on so many devices.

    Times and memory are estimated from what one layer of each kind takes, within 8% of `jaxpipe.plan` in the tests:
    plan what was found in full before it is run.

    Args:
      config: the model; of it, precision and recomputation are searched.
      space: what is searched.
      chip: of the devices.
      memory: bytes that a device may take; None: 95% of the chip's.
      achieved, devices_per_node: as `jaxpipe.plan` takes them.
      workers: processes that trace; 0: this one does.

    Raises:
      ValueError: no mesh of so many devices; sizes that do not fit.
    """
    memory = 0.95 * chip.memory if memory is None else memory
    meshes = space.meshes()
    # The ends alone cost something else where they are apart: that is traced once for each size of the experts' axis.
    sizes, (precision, *_), (remat, *_) = sorted({ep for _, _, ep in meshes}), space.precisions, space.remats
    together = config.vocab % RANKS == 0
    settings = list(itertools.product(space.precisions, space.remats, sizes, [together]))
    settings = list(dict.fromkeys([*settings, *((precision, remat, ep, False) for ep in sizes)]))
    configs = [
        dataclasses.replace(config.in_precision(precision), remat=remat, shared_ends=shared)
        for precision, remat, _, shared in settings
    ]
    devices = [ep for _, _, ep, _ in settings]
    rest = [[each] * len(settings) for each in (space.microbatch_size, chip, achieved, devices_per_node)]
    with _mapper(workers) as mapping:
        probes = dict(zip(settings, mapping(probe, configs, devices, *rest), strict=True))
    apart = {ep: probes[precision, remat, ep, False] for ep in sizes}
    pieces = [
        _Piece(name, count, mesh, precision, remat, ends, probes[precision, remat, mesh[2], together], apart[mesh[2]])
        for mesh in meshes
        for name in space.schedules
        for count in space.numbers(mesh[0])
        for precision in space.precisions
        for remat in space.remats
        for ends in space.ends
    ]
    sizing = _Sizing(config, space, chip, achieved, devices_per_node)
    known = [found for found in map(sizing.estimate, pieces) if found is not None]
    known.sort(key=lambda one: -one.most_tokens)
    fitting: list[Found] = []
    beyond: list[Found] = []
    simulated = 0
    for one in known:
        kept = fitting if one.nbytes <= memory else beyond
        enough = BEST if kept is fitting else 1
        if len(kept) >= enough and one.most_tokens <= kept[enough - 1].tokens:
            continue
        kept.append(sizing.simulated(one))
        kept.sort(key=lambda found: -found.tokens)
        simulated += 1
    fitting = fitting[:BEST]
    faster = [found for found in beyond if not fitting or found.tokens > fitting[0].tokens]
    return SearchResult(
        chip, memory, tuple(fitting), faster[0] if faster else None, len(known), simulated, config.flops_per_token
    )


class _Piece(NamedTuple):
    """A candidate, what is known of its stages, and of ends that are apart."""

    schedule: str
    microbatches: int
    mesh: tuple[int, int, int]
    precision: str
    remat: str
    ends: str
    probe: Probe
    apart: Probe


class _Estimate(NamedTuple):
    """A candidate before it is simulated: its memory, and how fast it could be at most."""

    piece: _Piece
    costs: StageCosts
    added: float
    nbytes: float
    stash: float
    most_tokens: float


@dataclasses.dataclass(frozen=True, eq=False)
class _Sizing:
    """Memory and time of candidates."""

    config: ModelConfig
    space: Space
    chip: Chip
    achieved: Achieved
    devices_per_node: int
    _schedules: dict[Any, Any] = dataclasses.field(default_factory=dict)
    _models: dict[Any, DeepSeekModel] = dataclasses.field(default_factory=dict)

    def estimate(self, piece: _Piece) -> _Estimate | None:
        """Memory and least time; None where there is no such schedule or model."""
        pp, _, ep = piece.mesh
        known = self._schedule(piece.schedule, pp, piece.microbatches)
        if known is None:
            return None
        schedule, groups, peaks = known
        if len(self.config.layer_kinds) < schedule.num_stages:
            return None
        try:
            model = self._model(schedule, ep, piece.ends)
        except ValueError:
            return None
        network = self._network(piece.mesh)
        rows = model.arrangement.rows
        boundary = network.seconds("permute", ["pp"], piece.probe.boundary)
        sizes = _sizes(piece.mesh)
        sums = sum_seconds(model, sizes, self.chip, self.achieved)
        of_row = {row: piece.probe.costs(row, self.achieved, sums) for row in set(rows)}
        shared = model.shared_ends
        costs = StageCosts(
            tuple(of_row[row] for row in rows), boundary, **({} if shared else self._apart(piece, network))
        )
        parts = _parameters(model, sizes)
        moments = self._moments(parts, piece.mesh)
        copies = _copies(schedule)
        added = shared * self._ends(piece, network) + self._once(parts, piece.mesh, moments, copies, network)
        stash = _stash(piece.probe, rows, peaks)
        busiest = max(sum(costs.group(group) * many for group, many in of_rank) for of_rank in groups)
        return _Estimate(
            piece=piece,
            costs=costs,
            added=added,
            nbytes=moments + self._held(piece, model, schedule, parts, stash),
            stash=stash,
            most_tokens=self._tokens(piece, busiest + added),
        )

    def simulated(self, one: _Estimate) -> Found:
        """The candidate with its simulated time."""
        piece = one.piece
        schedule, _, _ = self._schedule(piece.schedule, piece.mesh[0], piece.microbatches)
        timeline = simulate(schedule, one.costs)
        seconds = timeline.makespan + one.added
        named = piece.schedule, piece.mesh, piece.microbatches, piece.precision, piece.remat, piece.ends
        measures = seconds, max(timeline.bubble) / seconds, self._tokens(piece, seconds)
        return Found(*named, one.nbytes, one.stash, *measures)

    def _tokens(self, piece: _Piece, seconds: float) -> float:
        """A second and device."""
        return piece.microbatches * self.space.microbatch_size * self.config.sequence / piece.mesh[0] / seconds

    def _network(self, mesh: tuple[int, int, int]) -> Network:
        return Network.make(_sizes(mesh), self.chip, self.achieved, self.devices_per_node)

    def _schedule(self, name: str, ranks: int, count: int) -> Any:
        """(schedule, of each rank its different groups and how often it runs each, most of what is held), or None."""
        key = name, ranks, count
        if key not in self._schedules:
            try:
                schedule = jaxpipe.schedule.build(name, ranks, count)
            except ValueError:
                self._schedules[key] = None
            else:
                self._schedules[key] = schedule, [_counted(groups) for groups in schedule.ranks], _peaks(schedule)
        return self._schedules[key]

    def _model(self, schedule: Schedule, ep: int, ends: str) -> DeepSeekModel:
        key = schedule.num_ranks, schedule.storage_order, ep, ends
        if key not in self._models:
            config = dataclasses.replace(self.config.over_devices(ep), shared_ends=ENDS[ends])
            self._models[key] = build_model(config, schedule, 0, axis="ep", dtype=jnp.bfloat16, abstract=True)
        return self._models[key]

    def _ends(self, piece: _Piece, network: Network) -> float:
        """Seconds of the ends of all microbatches, which all ranks run together."""
        share = RANKS / piece.mesh[0]  # of the vocabulary, beside what each of the probe's ranks has
        total = 0.0
        for work in piece.probe.ends.values():
            for kernel in work.kernels:
                part = share if kernel.parted else 1.0
                scaled = kernel._replace(flops=kernel.flops * part, nbytes=kernel.nbytes * part)
                total += kernel.times * scaled.seconds(self.chip, self.achieved)
            total += sum(message.times * message.seconds(network) for message in work.messages)
        return piece.microbatches * total

    def _apart(self, piece: _Piece, network: Network) -> dict[str, float]:
        """Seconds of a microbatch's ends where one rank runs each."""
        names, given = {"E": "embed", "H": "head", "G": "embed_grad"}, (self.chip, self.achieved)
        return {
            names[letter]: work.compute(*given) + work.communicate(network) for letter, work in piece.apart.ends.items()
        }

    def _once(
        self, parts: _Parameters, mesh: tuple[int, int, int], moments: float, copies: float, network: Network
    ) -> float:
        """Seconds of the sums of gradients over devices, of stages that several ranks run, and of the update."""
        summed = network.seconds("all-reduce", ["dp", "ep"], parts.everywhere)
        summed += network.seconds("all-reduce", ["dp"], parts.trained - parts.everywhere)
        summed += parts.leaves * network.latency
        fetched = (copies - 1) * parts.trained_stages  # of parameters there, of gradients back
        summed += 2 * network.seconds("permute", ["pp"], fetched) if fetched else 0.0
        kept = self._kept(parts.masters, parts, mesh)
        moved = 2 * (2 * kept + moments) + 2 * parts.masters  # the update, and working copies
        return summed + moved / (self.chip.hbm * self.achieved.memory)

    def _moments(self, parts: _Parameters, mesh: tuple[int, int, int]) -> float:
        """Bytes of two moments of each parameter."""
        held = self._kept(parts.trained, parts, mesh)
        return 2 * held * jnp.dtype(self.config.moments).itemsize / 4

    def _kept(self, nbytes: float, parts: _Parameters, mesh: tuple[int, int, int]) -> float:
        """What a device keeps between steps of so many bytes of parameters: a part, if devices divide them."""
        if not self.config.zero1:
            return nbytes
        return parts.everywhere / (mesh[1] * mesh[2]) + (nbytes - parts.everywhere) / mesh[1]

    def _held(self, piece: _Piece, model: DeepSeekModel, schedule: Schedule, parts: _Parameters, stash: float) -> float:
        """Bytes but moments: parameters, copies, sums, and what is at work beside the slots, or behind them."""
        found = piece.probe
        rows = model.arrangement.rows
        prepared = {(chunk, rows[stage]) for stages in schedule.rank_stages for chunk, stage in enumerate(stages)}
        working = sum(found.copies(row) for _, row in prepared)
        again = (_copies(schedule) - 1) * parts.trained_stages
        busiest = found.transient if model.shared_ends else max(found.transient, piece.apart.transient)
        # Gradients of another rank's stages return to it, about half of them at once, when nothing is stashed any more.
        most = max(stash + busiest, again / 2)
        state = self._kept(parts.masters, parts, piece.mesh) + working + parts.trained + again
        return state + MESSAGES * found.boundary + most


class _Parameters(NamedTuple):
    """Bytes of a device, in float32.

    Attributes:
      masters: of all parameters.
      trained, trained_stages: of those that are trained.
      everywhere: of trained ones, what all devices of the experts' axis have.
      leaves: how many arrays are trained.
    """

    masters: int
    trained: int
    trained_stages: int
    everywhere: int
    leaves: int


def _parameters(model: DeepSeekModel, sizes: Mapping[str, int]) -> _Parameters:
    rows = [
        (local_bytes(leaf, spec, sizes), trained, place == "stages", "ep" in str(spec))
        for place in ("stages", "outer")
        for leaf, spec, trained in zip(
            *(jax.tree.leaves(getattr(tree, place)) for tree in (model.params, model.specs, model.trained)), strict=True
        )
    ]
    return _Parameters(
        masters=sum(size for size, *_ in rows),
        trained=sum(size for size, trained, *_ in rows if trained),
        trained_stages=sum(size for size, trained, stage, _ in rows if trained and stage),
        everywhere=sum(size for size, trained, _, sharded in rows if trained and not sharded),
        leaves=sum(trained for _, trained, *_ in rows),
    )


def _sizes(mesh: tuple[int, int, int]) -> dict[str, int]:
    """Sizes by axis, in the order of the devices."""
    pp, dp, ep = mesh
    return {"pp": pp, "dp": dp, "ep": ep}


def _copies(schedule: Schedule) -> float:
    """How many ranks run each stage: 2 of DualPipe, 1 of others."""
    return len(schedule.rank_stages[0]) * schedule.num_ranks / schedule.num_stages


def _peaks(schedule: Schedule) -> tuple[int, int, int]:
    """Most microbatches and stages of a rank from F to B or I, from F to W or B, and from I to W."""
    held = Timeline(schedule, StageCosts(()), ())
    return max(held.peak_activations), max(held.peak_live), max(held.peak_pending_weight)


def _stash(found: Probe, rows: Sequence[tuple[str, ...]], peaks: tuple[int, int, int]) -> float:
    """Bytes of all slots."""
    kept = [found.kept(row) for row in dict.fromkeys(rows)]
    pools = (slot_bytes(arrays) for arrays in zip(*kept, strict=True))
    return sum(count * size for count, size in zip(peaks, pools, strict=True))


def _counted(groups: Sequence[Group]) -> list[tuple[Group, int]]:
    """The groups that differ in stages or kinds, and how often each is run."""
    one = {tuple((action.stage, action.kind) for action in group): group for group in groups}
    counts = collections.Counter(tuple((action.stage, action.kind) for action in group) for group in groups)
    return [(group, counts[key]) for key, group in one.items()]


@contextlib.contextmanager
def _mapper(workers: int) -> Iterator[Any]:
    """A map over processes, or in this one."""
    if not workers:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield functools.partial(pool.map)
