"""Finds what an event does from its names, by an ordered table of rules; the first rule that matches counts."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Sequence
from typing import Any

from profiling.classify.names import parse_kernel
from profiling.classify.programs import DEEPSEEK, KERNELS, XLA, rules_for
from profiling.classify.rules import FIELDS, Rule
from profiling.event import Event, Trace

__all__ = [
    "DEEPSEEK",
    "FIELDS",
    "KERNELS",
    "OTHER",
    "XLA",
    "Classifier",
    "Rule",
    "classify",
    "is_unclassified",
    "rules_for",
    "unclassified_names",
    "unclassified_share",
]

OTHER = "other kernel"
"""The kind of events that no rule knows; they count as compute."""


_MOST = 2000
"""The number of characters of a name that are searched. Arguments of arguments follow, which say nothing."""


class Classifier:
    """Finds kind and group by rules. Each combination of names is looked up once, as many events share it.

    >>> Classifier(KERNELS)("void cutlass::Kernel2<cutlass_80_tensorop_s16816gemm_nn>(int)")
    ('GEMM', 'compute')
    >>> Classifier(KERNELS)("void my::kernel<my::all_reduce>(int)")
    ('other kernel', 'compute')
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = [(re.compile(rule.pattern).search, rule.field, (rule.kind, rule.group)) for rule in rules]
        used = {rule.field for rule in rules}
        self._parses = bool(used & {"function", "kernel"})
        self._used = tuple(field in used for field in ("hlo_op", "scope", "phase", "lane"))
        self._found: dict[tuple[str, ...], tuple[str, str]] = {}

    def __call__(
        self, name: str, hlo_op: str = "", scope: str = "", phase: str = "", lane: str = ""
    ) -> tuple[str, str]:
        """The kind and group of an event; one that no rule matches is an other kernel, which computes."""
        by_op, by_scope, by_phase, by_lane = self._used
        key = (
            name,
            hlo_op if by_op else "",
            scope if by_scope else "",
            phase if by_phase else "",
            lane if by_lane else "",
        )
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._look_up(key)
        return found

    def _look_up(self, key: tuple[str, ...]) -> tuple[str, str]:
        texts: dict[str, str] = dict(zip(("name", "hlo_op", "scope", "phase", "lane"), key, strict=True))
        if self._parses:
            parsed = parse_kernel(key[0])
            texts |= {"function": parsed.function[:_MOST], "kernel": parsed.kernel[:_MOST]}
        return next((found for search, field, found in self._rules if search(texts[field])), (OTHER, "compute"))


_FIELDS = [field.name for field in dataclasses.fields(Event)]
_BEFORE = operator.attrgetter(*_FIELDS[: _FIELDS.index("kind")])
_AFTER = operator.attrgetter(*_FIELDS[_FIELDS.index("group") + 1 :])
"""The fields of an event before and after kind and group, to copy it. `dataclasses.replace` would take four times as
long, and a trace has millions of events."""


def classify(trace: Trace, rules: Sequence[Rule]) -> Trace:
    """Sets the kind and group of every event by the first rule that matches it.

    Your own rules go in front: ``classify(trace, (Rule(r"^my_kernel", "dispatch", "transfer"), *KERNELS))``. An event
    that no rule matches is a transfer if the profiler says that it is part of a collective. All others are `OTHER`
    kernels and count as compute, so look at `unclassified_share` before you believe a ratio.

    >>> trace = Trace("", "xplane", (Event(0, "s", 0.0, 2.0, "nvjet_hsh"), Event(0, "s", 3.0, 4.0, "mystery")))
    >>> [(event.kind, event.group) for event in classify(trace, XLA).events]
    [('GEMM', 'compute'), ('other kernel', 'compute')]
    """
    classifier = Classifier(rules)

    def classified(event: Event) -> Event:
        kind, group = classifier(event.name, event.hlo_op, event.scope, event.phase, event.lane)
        if kind == OTHER and event.collective is not None:
            kind, group = event.collective.kind, "transfer"
        if kind == event.kind and group == event.group:
            return event
        values: tuple[Any, ...] = (*_BEFORE(event), kind, group, *_AFTER(event))
        return Event(*values)

    return dataclasses.replace(trace, events=tuple(map(classified, trace.events)))


def is_unclassified(event: Event) -> bool:
    """Whether no rule knows the event, or nothing has classified it."""
    return event.kind == OTHER or event.group == "unclassified"


def unclassified_share(trace: Trace) -> float:
    """The time of events that no rule matched, as a share of the time of all events; 0 if there is none.

    >>> events = (Event(0, "s", 0.0, 3.0, "a", kind="GEMM", group="compute"), Event(0, "s", 3.0, 4.0, "mystery"))
    >>> unclassified_share(Trace("", "xplane", events))
    0.25
    """
    total = sum(event.duration for event in trace.events if event.group != "control")
    return sum(event.duration for event in trace.events if is_unclassified(event)) / total if total else 0.0


def unclassified_names(trace: Trace, top: int = 10) -> tuple[tuple[str, float], ...]:
    """The names that no rule matched, with their microseconds, the longest first. Write rules for these.

    >>> unclassified_names(Trace("", "xplane", (Event(0, "s", 3.0, 4.0, "mystery"),)))
    (('mystery', 1.0),)
    """
    times: dict[str, float] = {}
    for event in trace.events:
        if is_unclassified(event):
            name = event.hlo_op or event.name
            times[name] = times.get(name, 0.0) + event.duration
    return tuple(sorted(times.items(), key=lambda item: -item[1])[:top])
