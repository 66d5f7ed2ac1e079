"""Finds the part of a step that an operation belongs to, from the path of named scopes it was traced under."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

ACTIONS = ("F", "B", "I", "W", "E", "H", "G", "send", "prepare", "reduce", "update")
"""Scopes that name what a pipeline rank does: jaxpipe's actions, embedding and head, its messages, what it does once a
step, and by agreement the optimizer's update."""

PARTS: Mapping[str, str] = {
    "attention": "attn",
    "attn": "attn",
    "mlp": "mlp",
    "router": "mlp",
    "shared_expert": "mlp",
    "permute": "mlp",
    "experts": "mlp",
    "unpermute": "mlp",
    "dispatch": "dispatch",
    "combine": "combine",
}
"""``{name of a scope: part of a layer}``, with the parts of DeepSeek's traces."""

_COMPONENT = re.compile(r"(?:[^/()]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))+")
_LAYER = re.compile(r"(?:layer|layers|block|blocks)_?(\d+)")
_MICROBATCH = re.compile(r"microbatch_(\d+)")
_BRANCH = re.compile(r"branch_(\d+)")
_STEPS = re.compile(r"steps_(\d+)_(\d+)_(\d+)")
_PIECE = re.compile(r"piece_(\d+)")


class Place(NamedTuple):
    """The place of an operation in a step.

    Attributes:
      phase: the part and the action, "attn(F)"; the action alone outside of parts, "other" outside of actions.
      layer: index of the layer; None outside of layers.
      microbatch: index of the microbatch if a scope names it, else None.
      branch: index of the branch of jaxpipe's program; None outside.
      steps: steps of that program that run the operation, if each has code of its own; None if any step of the branch
        may run it.
      piece: index of the piece of the program's code, if it runs as stretches.
    """

    phase: str
    layer: int | None
    microbatch: int | None
    branch: int | None
    steps: range | None = None
    piece: int | None = None


def place(scope: str, parts: Mapping[str, str] = PARTS) -> Place:
    """The place that a scope names: the outermost layer and action in it, and the innermost part.

    The first of several operations that XLA joined, "a/(b:c)", counts. Without an action's scope, operations under
    `jax.grad` are F or B, as jax marks them.

    >>> place("jit(step)/shard_map/while/body/branch_2/W/transpose(jvp(layer_3))/attention/dot_general")
    Place(phase='attn(W)', layer=3, microbatch=None, branch=2, steps=None, piece=None)
    >>> place("jit(step)/while/body/branch_2/steps_5_4_3/F/dot_general").steps  # in a loop: every fourth, thrice
    range(5, 17, 4)
    >>> place("jit(step)/transpose(jvp(layer_0))/mlp/add").phase, place("jit(step)/broadcast").phase, place("").phase
    ('mlp(B)', 'other', '')
    """
    if not scope:
        return Place("", None, None, None)
    before, merged, rest = scope.partition("/(")
    if merged:
        scope = f"{before}/{rest.partition(':')[0]}"
    action = part = steps = None
    indices: dict[re.Pattern[str], int] = {}
    for component in _COMPONENT.findall(scope):
        name = component
        while (inner := re.fullmatch(r"(\w+)\((.*)\)", name)) and inner[1] not in ("jit", "pjit"):
            name = inner[2]
        if action is None and name in ACTIONS:
            action = name
        if steps is None and (found := _STEPS.fullmatch(name)):
            first, period, times = map(int, found.groups())
            steps = range(first, first + period * times, period)
        for pattern in (_LAYER, _MICROBATCH, _BRANCH, _PIECE):
            if found := pattern.fullmatch(name):
                indices.setdefault(pattern, int(found[1]))
        part = parts.get(name, part)
    if action is None and "jvp(" in scope:
        action = "B" if "transpose(" in scope else "F"
    phase = f"{part}({action})" if part and action else action or part or "other"
    layer, microbatch, branch, piece = map(indices.get, (_LAYER, _MICROBATCH, _BRANCH, _PIECE))
    return Place(phase, layer, microbatch, branch, steps, piece)


def action_of(phase: str) -> str:
    """The action of a phase.

    >>> action_of("attn(F)"), action_of("W")
    ('F', 'W')
    """
    found = re.fullmatch(r".*\((\w+)\)", phase)
    return found[1] if found else phase
