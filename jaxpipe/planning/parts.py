"""Where the planned time of a step goes: of each action by part of the layer, with what was assumed.

A part is told by the scopes (`jax.named_scope`) that an operation stands in; those of this library's layers are known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from jaxpipe.planning.chips import Achieved, Chip
from jaxpipe.planning.mesh import Network
from jaxpipe.planning.planner import GIGA, Plan, stages_text
from jaxpipe.planning.work import DeviceWork, Kernel, Message

SCOPES: Mapping[str, str] = MappingProxyType(
    {
        "core": "attention",
        "attention": "attention's projections",
        "shared_expert": "shared expert",
        "experts": "experts",
        "copies": "copies of experts",
        "router": "router",
        "permute": "rows moved",
        "unpermute": "rows moved",
        "dispatch": "rows moved",
        "combine": "rows moved",
        "gather": "matrices gathered",
        "project": "multi-token prediction's projection",
        "head": "head",
        "mtp": "head",
        "share": "head",
        "embedding": "embedding",
        "mlp": "dense layer",
        "read": "slots",
        "write": "slots and sums of gradients",
    }
)
"""The part of a layer that a scope stands for; of several, the innermost counts."""

EXCHANGE = "exchange"
TRANSFERS = "to the host and back, not hidden"
CASTS = "casts"
ELEMENTWISE = "elementwise"
OTHER = "other"

_CASTS = re.compile(r"quantise|columns_of")
_WORDS = re.compile(r"[a-zA-Z_]\w*")


class Spent(NamedTuple):
    """Seconds of a part in one run of an action.

    Attributes:
      compute: of its kernels.
      communicate: of its collectives.
      again: of both together, what a backward pass does again.
    """

    compute: float = 0.0
    communicate: float = 0.0
    again: float = 0.0

    @property
    def total(self) -> float:
        """Of both."""
        return self.compute + self.communicate


def part_of(one: Kernel | Message, scopes: Mapping[str, str] = SCOPES) -> str:
    """The part that a kernel or collective belongs to.

    A kernel without products is elementwise work, unless it has a name of its own, moves rows, or is of
    slots.

    >>> part_of(Kernel("dot_general", "bf16", 1.0, 8.0, 1.0, scope="transpose(jvp(layer_0))/attention/core"))
    'attention'
    >>> part_of(Message("all-to-all", ("ep",), 8.0, 1.0, scope="jvp(layer_1)/mlp/combine"))
    'exchange'
    """
    words = _WORDS.findall(one.scope)
    known = next((scopes[word] for word in reversed(words) if word in scopes), OTHER)
    if isinstance(one, Message):
        return EXCHANGE if known == scopes.get("dispatch") else known
    if _CASTS.search(one.name):
        return CASTS
    made_of_fusions = not one.unit and one.name not in words[-1:] and not one.name.endswith(("_rows", "_backward"))
    if made_of_fusions and known not in {scopes.get(name) for name in ("dispatch", "read", "write")}:
        return ELEMENTWISE
    return known


def spent_by_part(work: DeviceWork, chip: Chip, achieved: Achieved, network: Network) -> dict[str, Spent]:
    """Seconds of one run of an action by part, most first.

    >>> from jaxpipe.planning.chips import CHIPS
    >>> work = DeviceWork((Kernel("dot_general", "bf16", 989.4e9, 8.0, 1.0, scope="mlp/experts"),))
    >>> network = Network((("pp", 1),), 8, 1.0, 1.0, 0.0)
    >>> achieved = Achieved(matmul=1.0, kernel_us=0.0)
    >>> spent_by_part(work, CHIPS["H100"], achieved, network)
    {'experts': Spent(compute=0.001, communicate=0.0, again=0.0)}
    """
    found: dict[str, Spent] = {}

    def add(one: Kernel | Message, compute: float, communicate: float) -> None:
        part, more = part_of(one), (compute, communicate, (compute + communicate) * one.recomputed)
        found[part] = Spent(*(a + b for a, b in zip(found.get(part, Spent()), more, strict=True)))

    clock = work.clock(chip, achieved)
    for kernel in work.kernels:
        add(kernel, kernel.times * kernel.seconds(chip, achieved, clock), 0.0)
    for message in work.messages:
        add(message, 0.0, message.times * message.seconds(network))
    if work.transfers:
        found[TRANSFERS] = Spent(communicate=work.exposed(chip, achieved, network))
    return dict(sorted(found.items(), key=lambda item: -item[1].total))


def detail_lines(plan: Plan) -> list[str]:
    """A plan's times by part, as Markdown: a table for each kind of stage, one for the ends, and what was assumed."""
    lines: list[str] = []
    for kind, actions in enumerate(plan.work.kinds):
        stages = [stage for stage, its in enumerate(plan.work.kind_of) if its == kind]
        lines += [f"One run of {stages_text(stages)}, ms; in brackets what is computed again", ""]
        lines += [*_table(plan, actions), ""]
        pair = plan.stage_costs.stages[stages[0]].overlapped
        if pair is not None:
            computes, communicates = (
                sum(getattr(plan.work.of(letter, kind), name)(*given) for letter in "FB")
                for name, given in (("compute", (plan.chip, plan.achieved)), ("communicate", (plan.network,)))
            )
            ways = [plan.work.of(letter, kind).transfer(plan.chip, plan.achieved) for letter in "FB"]
            there, back = (1e3 * sum(way) for way in zip(*ways, strict=True))
            transfers = f"transfers to the host {there:.3g} ms and back {back:.3g} ms, " if there or back else ""
            lines += [
                f"An overlapped F and B: kernels {1e3 * computes:.3g} ms, collectives {1e3 * communicates:.3g} ms, "
                f"{transfers}{1e3 * pair:.3g} ms together",
                "",
            ]
    if plan.work.ends:
        lines += ["One run of embedding (E), head with its gradient (H) and embedding's gradient (G), ms", ""]
        lines += [*_table(plan, plan.work.ends), ""]
    lines += ["Once a step, ms", "", *_table(plan, {"once": plan.work.once}), ""]
    return [*lines, *assumptions(plan)]


def assumptions(plan: Plan) -> list[str]:
    """What the times of a plan rest on."""
    chip, achieved, network = plan.chip, plan.achieved, plan.network
    own = [
        f"{name} {share:.0%} of {what}"
        + (f", {shares.fill:g} more of a sum" if shares.fill and what == "FLOP/s" else "")
        for name, shares in achieved.kernels.items()
        for what, share in (("FLOP/s", shares.matmul), ("bytes/s", shares.memory))
        if share is not None
    ]
    narrow = achieved.memory if achieved.narrow is None else achieved.narrow
    axes = ", ".join(name for name, _ in network.axes)
    return [
        f"Assumed of {chip.name}: {chip.bf16 / 1e12:.0f} TFLOP/s in bfloat16 and {chip.fp8 / 1e12:.0f} in FP8, of "
        f"which products reach {achieved.matmul:.0%} without a pause, up to {achieved.most_clock:g} times that where "
        f"other work lets the clock rise; memory {chip.hbm / 1e12:.3g} TB/s, {achieved.memory:.0%}, {narrow:.0%} where "
        f"numbers have less than four bytes; {achieved.kernel_us:g} us a kernel, {achieved.product_us:g} more of "
        f"products; {achieved.step_us / 1e3:g} ms a step for the host",
        *([f"by kernel: {', '.join(own)}"] if own else []),
        *([f"link to the host: {chip.host / GIGA:.3g} GB/s each way, {achieved.host:.0%}"] if plan.memory.host else []),
        f"network: nodes of {network.node} devices, numbered in the order of {axes}; "
        f"{network.within / GIGA:.3g} GB/s a device within a node and {network.between / GIGA:.3g} between nodes, each "
        f"way, of {chip.interconnect / GIGA:.3g} and {chip.internode / GIGA:.3g}; {network.latency * 1e6:.3g} us a "
        f"collective; kernels beside collectives have {1 - achieved.occupied:.0%} of the chip",
    ]


def imbalance(plan: Plan) -> float:
    """Time that the rank with most work works, over the mean of all ranks."""
    busy = plan.timeline.busy
    return max(busy) * len(busy) / sum(busy) if sum(busy) else 1.0


def _table(plan: Plan, actions: Mapping[str, DeviceWork]) -> list[str]:
    given = plan.chip, plan.achieved, plan.network
    columns = {letter: spent_by_part(work, *given) for letter, work in actions.items()}
    parts = dict.fromkeys(part for spent in columns.values() for part in spent)
    ranked = sorted(parts, key=lambda part: -sum(spent.get(part, Spent()).total for spent in columns.values()))
    lines = [f"| part | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for part in ranked:
        lines.append(f"| {part} | {' | '.join(_cell(spent.get(part)) for spent in columns.values())} |")
    sums = (Spent(*map(sum, zip(*spent.values(), strict=True))) if spent else None for spent in columns.values())
    return [*lines, f"| all | {' | '.join(map(_cell, sums))} |"]


def _cell(spent: Spent | None) -> str:
    if spent is None or 1e3 * spent.total < 0.005:
        return ""
    return f"{1e3 * spent.total:.2f}" + (f" ({1e3 * spent.again:.2f})" if 1e3 * spent.again >= 0.005 else "")
