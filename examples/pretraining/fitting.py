"""What would make a planned run fit its devices."""

from __future__ import annotations

import jaxpipe
from jaxpipe.deepseek.config import ModelConfig

GIGA = 1e9
_LESS = {"none": "attention, or layer", "attention": "layer"}


def lines(name: str, plan: jaxpipe.Plan, config: ModelConfig) -> list[str]:
    """Of a schedule that does not fit, what takes the memory and what makes it smaller; nothing where it fits."""
    memory, spare = plan.memory, plan.chip.memory - plan.memory.total
    if spare >= 0:
        return []
    program = plan.timeline
    pending, live = max(program.peak_pending_weight), max(program.peak_live)
    found = [f"{name} needs {-spare / GIGA:.3g} GB less. What makes it smaller:"]
    if pending:
        kept = max(_crossing(plan, kind) for kind in range(len(plan.work.kinds)))
        found.append(
            f"* {pending} weight gradients are put off at once, and each keeps {kept / GIGA:.3g} GB for it: a schedule "
            "whose backward is whole (1f1b, interleaved, gpipe) keeps none of that"
        )
    found.append(f"* the stash of {live} microbatches and stages, and what those keep, is {memory.stash / GIGA:.3g} GB")
    if not memory.host:
        found.append("* --offload all keeps what backward passes read in the host's memory, if its link is fast enough")
    if config.remat in _LESS:
        found.append(f"* --remat {_LESS[config.remat]} keeps less, and computes more again")
    if config.precision != "fp8":
        found.append("* --precision fp8 keeps inputs of products in 8 bits")
    if config.redundant:
        found.append(
            f"* {config.redundant} slots for copies of experts need working copies: --slots {config.experts} has none"
        )
    if "dualpipe" in name and name != "dualpipev":
        found.append("* dualpipe has two copies of a rank's stages: dualpipev has one")
    if not config.zero1:
        found.append(
            f"* --zero1 divides parameters, {memory.masters / GIGA:.3g} GB, and moments, {memory.optimizer / GIGA:.3g} "
            "GB, over devices that have the same"
        )
    found.append(
        f"* parameters, moments, their copies and gradients are "
        f"{(memory.masters + memory.optimizer + memory.working + memory.gradients) / GIGA:.3g} GB: more pipeline ranks "
        "or devices of ep have less each"
    )
    return found


def _crossing(plan: jaxpipe.Plan, kind: int) -> int:
    """Bytes that a stage of a kind keeps from I to W."""
    stored = plan.work.of("I", kind).stored
    return sum(array.nbytes for array in stored) - sum(plan.work.boundary)
