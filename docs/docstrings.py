"""Docstrings as this project writes them, made readable for mkdocstrings: examples and blocks become fenced code."""

from __future__ import annotations

import re
from typing import Any

import griffe

BLOCK = re.compile(r"(?m)^(?P<indent> *)>>> .*(?:\n(?!\s*$).*)*")
"""An example, up to the next empty line."""

LITERAL = re.compile(r"::(?=\n\n +)")
"""What introduces an indented block of code."""


GROUP = re.compile(r"(?m)^(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<text>.*(?:\n(?P=indent) +.*)*)")
"""Arguments that are described together."""

ARGUMENTS = re.compile(r"(?m)^Args:\n(?:(?: .*)?\n?)*")
"""The section of arguments."""


def apart(section: re.Match[str]) -> str:
    """Each argument by itself, with the text of its group."""

    def each(group: re.Match[str]) -> str:
        return "\n".join(f"{group['indent']}{name}: {group['text']}" for name in group["names"].split(", "))

    return GROUP.sub(each, section[0])


def fenced(text: str) -> str:
    """The docstring with its examples in fences."""

    def fence(match: re.Match[str]) -> str:
        indent = match["indent"]
        return f"{indent}```pycon\n{match[0]}\n{indent}```"

    return LITERAL.sub(":", BLOCK.sub(fence, text))


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **others: Any) -> None:
        """Of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = ARGUMENTS.sub(apart, fenced(obj.docstring.value))
