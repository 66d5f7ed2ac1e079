"""Finds the host's annotation that each GPU event belongs to, and its step, layer and microbatch."""

from __future__ import annotations

import bisect
import collections
import re
from collections.abc import Mapping, Sequence

import numpy as np

from profiling.event import Step
from profiling.read.kineto_collective import ANNOTATION
from profiling.read.kineto_columns import Annotation

_PROFILER_STEP = re.compile(r"ProfilerStep#(\d{1,18})")
_NUMBERED = re.compile(r"(\w[^#]*?)\s*#\s*(\d{1,18})")
_USER_STEP = re.compile(r"\W*((?:\w+[\W_])?(?:step|iter|iteration))[\W_]*(\d{1,18})\W*", re.IGNORECASE)
_LAYER = re.compile(
    r"(?:^|[^a-z])(?:(?:(?:encoder|decoder|transformer|dense|moe)[._ -]?)?(?:layers?|blocks?)|h(?=[._]))"
    r"[._ #:\[(-]*(\d{1,6})(?!\d)",
    re.IGNORECASE,
)
_MICROBATCH = re.compile(
    r"[^()]*\((\d{1,18})\)|.*(?:^|[^a-z])(?:micro[-_ ]?batch|mb)[-_ #:]*(\d{1,18})\W*", re.IGNORECASE
)
_PART_OF_STEP = re.compile(
    r"forward|backward|optimi[sz]er|zero_grad|loss|step|iter|batch|data|wait|all2all|clip|metric|compiledfxgraph"
    r"|^\W*(?:fwd|bwd|[fbwi]|fb)\W*$",
    re.IGNORECASE,
)
"""Names of annotations that are no part of a layer, however often they occur."""

_BULK = 0.5
"""The least share of a step's work that the phases of its layers must hold."""


class Phases:
    """The phases of N GPU events of one file, found by their launches; `work` is the time of each that is evidence.

    Attributes:
      innermost: int[N], annotation that each event belongs to; -1 for none.
      step: int64[N], number of the step that was open at the launch; -1 for none.
      scopes: path of names from the outermost annotation down to each one, without steps.
      layers: layers of annotations, by index.
      steps: annotations of the profiler's steps, and those that contain others.
      notes: what could not be found out.
    """

    def __init__(
        self, annotations: Sequence[Annotation], launched: np.ndarray, thread: np.ndarray, work: np.ndarray
    ) -> None:
        steps = _step_numbers(annotations)
        parents = _parents(annotations)
        self.innermost = _innermost(annotations, steps, launched, thread)
        self.step = _steps_open(annotations, steps, launched)
        self.scopes = _scopes(annotations, parents, steps)
        busy = np.bincount(self.innermost + 1, work, len(annotations) + 1)[1:]
        used = set(np.unique(self.innermost).tolist()) - {-1}
        self.layers, self.notes = _layers(annotations, parents, steps, used, busy)
        holds = {parent for parent in parents if parent >= 0}
        outer = [i for i in range(len(annotations)) if i in holds or i in steps]
        self.steps = tuple(_step(annotations[i]) for i in outer)


def microbatch(phase: str) -> int | None:
    """The number in brackets at the end of a phase, or after "microbatch"; None without one.

    >>> [microbatch(name) for name in ("ATTN(1)", "attn(F)", "microbatch 3", "execute_context_1(88)_generation_0(0)")]
    [1, None, 3, None]
    """
    found = _MICROBATCH.fullmatch(phase)
    return int(found[1] or found[2]) if found else None


def layer(name: str) -> int | None:
    """The index of the layer that a name holds; None without one.

    >>> [layer(name) for name in ("layer_3", "model.layers.11.mlp", "Block #4", "layer_norm", "h.2", "player 3")]
    [3, 11, 4, None, 2, None]
    """
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def _step(annotation: Annotation) -> Step:
    """An annotation as a step. Its number is split off only if the name ends with it: "## backward ##" has none.

    >>> names = "ProfilerStep#5", "## backward ##", "Optimizer.step#SGD.step"
    >>> [_step(Annotation(name, 0.0, 1.0, 0)).name for name in names]
    ['ProfilerStep', '## backward ##', 'Optimizer.step#SGD.step']
    """
    found = _NUMBERED.fullmatch(annotation.name) or _USER_STEP.fullmatch(annotation.name)
    name, number = (found[1].strip(" _-#"), int(found[2])) if found else (annotation.name, None)
    return Step(name, number, annotation.start, annotation.end)


def _step_numbers(annotations: Sequence[Annotation]) -> dict[int, int]:
    """``{annotation: number}`` of the annotations that are steps: the profiler's own, or else the user's."""
    for pattern, group in ((_PROFILER_STEP, 1), (_USER_STEP, 2)):
        found = ((i, pattern.fullmatch(annotation.name)) for i, annotation in enumerate(annotations))
        steps = {i: int(match[group]) for i, match in found if match}
        if steps:
            return steps
    return {}


def _parents(annotations: Sequence[Annotation]) -> list[int]:
    """The innermost annotation that contains each one, on its own thread if there is one; -1 for none."""
    parents: list[int] = []
    around: dict[int, list[int]] = {}
    for i, annotation in enumerate(annotations):
        own = around.setdefault(annotation.thread, [])
        while own and annotations[own[-1]].end < annotation.end:
            own.pop()
        if own:
            parents.append(own[-1])
        else:
            # The backward pass runs on a thread of its own, while the thread that called it waits.
            holding = (_containing(annotations, stack, annotation.end) for stack in around.values())
            parents.append(max(holding, default=-1))
        own.append(i)
    return parents


def _containing(annotations: Sequence[Annotation], stack: Sequence[int], end: float) -> int:
    return next((i for i in reversed(stack) if annotations[i].end >= end), -1)


def _scopes(annotations: Sequence[Annotation], parents: Sequence[int], steps: Mapping[int, int]) -> list[str]:
    scopes: list[str] = []
    shared: dict[tuple[int, str], str] = {}
    for i, (annotation, parent) in enumerate(zip(annotations, parents, strict=True)):
        above = scopes[parent] if parent >= 0 else ""
        if i in steps:
            scopes.append(above)
        else:
            key = (id(above), annotation.name)
            scopes.append(shared.setdefault(key, "/".join(filter(None, (above, annotation.name)))))
    return scopes


def _innermost(
    annotations: Sequence[Annotation], steps: Mapping[int, int], launched: np.ndarray, thread: np.ndarray
) -> np.ndarray:
    """The annotation that started last among those open at each launch; -1 for none.

    Annotations of the launching thread come first, then those of other threads that launch work, then all others: the
    thread of the backward pass runs inside annotations of the thread that called it.
    """
    found = np.full(len(launched), -1, np.int64)
    order = np.argsort(launched, kind="stable")
    order = order[: len(order) - int(np.isnan(launched).sum())]
    if not annotations or not len(order):
        return found
    working = set(np.unique(thread).tolist())
    stacks: dict[int, list[int]] = {}
    entered = 0
    for i, time, of in zip(order.tolist(), launched[order].tolist(), thread[order].tolist(), strict=True):
        while entered < len(annotations) and annotations[entered].start <= time:
            if entered not in steps:
                stacks.setdefault(annotations[entered].thread, []).append(entered)
            entered += 1
        inside = _open(annotations, stacks.get(of, []), time)
        if inside < 0 and stacks:
            for threads in (working, stacks.keys() - working):
                inside = max((_open(annotations, stacks[each], time) for each in threads & stacks.keys()), default=-1)
                if inside >= 0:
                    break
        found[i] = inside
    return found


def _open(annotations: Sequence[Annotation], stack: list[int], time: float) -> int:
    while stack and annotations[stack[-1]].end < time:
        stack.pop()
    return _containing(annotations, stack, time)


def _steps_open(annotations: Sequence[Annotation], steps: Mapping[int, int], launched: np.ndarray) -> np.ndarray:
    """The number of the step that started last among those open at each launch; -1 for none."""
    if not steps:
        return np.full(len(launched), -1, np.int64)
    members = list(steps)
    starts = np.array([annotations[i].start for i in members])
    ends = np.array([annotations[i].end for i in members])
    at = np.searchsorted(starts, launched, side="right") - 1
    open_ = (at >= 0) & (launched <= ends[np.maximum(at, 0)])
    return np.where(open_, np.array([steps[i] for i in members], np.int64)[np.maximum(at, 0)], -1)


def _layers(
    annotations: Sequence[Annotation],
    parents: Sequence[int],
    steps: Mapping[int, int],
    used: set[int],
    busy: np.ndarray,
) -> tuple[dict[int, int], list[str]]:
    """The layer of each annotation that launched something, found by names or by repetition."""
    named: dict[int, int] = {}
    of_name = {name: layer(name) for name in {annotation.name for annotation in annotations}}
    for i, parent in enumerate(parents):
        index = of_name[annotations[i].name] if not ANNOTATION.match(annotations[i].name) else None
        index = named.get(parent) if index is None else index
        if index is not None:
            named[i] = index
    if named:
        return {i: index for i, index in named.items() if i in used}, []
    return _repeated(annotations, parents, steps, used, busy)


def _repeated(
    annotations: Sequence[Annotation],
    parents: Sequence[int],
    steps: Mapping[int, int],
    used: set[int],
    busy: np.ndarray,
) -> tuple[dict[int, int], list[str]]:
    """Counts layers: within a step, at least two phases that repeat equally often and always in the same order.

    They must hold at least half of the step's work: a few repeated communications or waits are no layers.
    """
    starts = [annotations[i].start for i in steps]
    holds = {parent for i, parent in enumerate(parents) if parent >= 0 and not ANNOTATION.match(annotations[i].name)}
    names = {annotations[i].name for i in used}
    regions: dict[int, dict[str, list[int]]] = {}
    times: collections.defaultdict[int, float] = collections.defaultdict(float)
    for i, annotation in enumerate(annotations):
        region = bisect.bisect_right(starts, annotation.start)
        times[region] += float(busy[i])
        # Repeated phases that nothing contains could be steps as well as layers.
        if annotation.name in names and parents[i] >= 0 and not _belongs_to_step(annotation.name):
            regions.setdefault(region, {}).setdefault(annotation.name, []).append(i)
    layers: dict[int, int] = {}
    notes: dict[str, None] = {}
    for region, members in sorted(regions.items()):
        leaves = {name: found for name, found in members.items() if len(found) > 1 and not holds & set(found)}
        counts = {len(found) for found in leaves.values()}
        held = sum(float(busy[i]) for found in leaves.values() for i in found)
        if len(leaves) < 2 or held < _BULK * times[region]:
            continue
        inside = sorted(i for found in leaves.values() for i in found)
        order = [annotations[i].name for i in inside]
        if len(counts) > 1:
            few = ", ".join(f"{name} {len(found)}" for name, found in list(leaves.items())[:5])
            notes[f"phases occur unequally often ({few}), so that layers could not be counted"] = None
        elif order != order[: len(leaves)] * counts.pop():
            notes["phases repeat in changing order, so that layers could not be counted"] = None
        else:
            layers |= {i: n for found in leaves.values() for n, i in enumerate(found)}
    return layers, list(notes)


def _belongs_to_step(name: str) -> bool:
    return bool(ANNOTATION.match(name) or _PART_OF_STEP.search(name))
