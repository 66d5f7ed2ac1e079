"""How even experts' loads were: a line for each step, of its microbatches and layers, and a page that draws them."""

from __future__ import annotations

import dataclasses
import html
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from eplb_jax import Placement, balancedness, gpu_loads

LOADS, PAGE = "loads.jsonl", "loads.html"
EDGES = (1.0, 1.02, 1.05, 1.1, 1.2, 1.35, 1.5, 2.0, 3.0, 5.0)
"""Where the histogram's bars begin; the last one has no end."""

SHARES = (50, 90, 99, 100)
"""Percentiles of microbatches that are recorded."""

WIDTH, HEIGHT, LEFT = 720, 180, 48
"""Of a chart, in pixels, and of its left margin."""

COLOURS = {50: "#4477aa", 90: "#ccbb44", 99: "#ee6677", 100: "#bbbbbb"}


@dataclasses.dataclass(frozen=True)
class Evenness:
    """How even loads are over the devices that a placement puts experts on.

    Attributes:
      placement: on the host.
      devices: that its slots divide over.
    """

    placement: Placement
    devices: int

    def mean(self, loads: np.ndarray) -> float:
        """Mean over maximal load of a device for a step's loads ``[layers, experts]``, mean of layers."""
        return float(balancedness(self.placement, loads, self.devices).mean())

    def heaviest(self, loads: np.ndarray) -> np.ndarray:
        """The heaviest device over the mean, ``[microbatches, layers]``; replicas of an expert share its tokens evenly.

        >>> placement = Placement.from_phy2log(np.array([[0, 1, 0, 2]]), 3)
        >>> Evenness(placement, 2).heaviest(np.array([[[4, 1, 3]], [[2, 1, 1]]])).tolist()
        [[1.25], [1.0]]
        """
        found = np.stack([gpu_loads(self.placement, counts, self.devices) for counts in loads])
        mean = found.mean(2)
        return np.where(mean > 0, found.max(2) / np.where(mean > 0, mean, 1), 1.0)


def record_of(step: int, ratios: np.ndarray) -> dict[str, Any]:
    """The line of a step, given `Evenness.heaviest`: a histogram, and percentiles of each layer's microbatches.

    >>> record_of(3, np.array([[1.0, 1.3], [1.04, 1.3]]))["histogram"]
    [1, 1, 0, 0, 2, 0, 0, 0, 0, 0]
    """
    histogram = np.histogram(np.maximum(ratios, EDGES[0]), [*EDGES, math.inf])[0]
    layers = np.percentile(ratios, SHARES, axis=0).T
    return {"step": step, "edges": EDGES, "histogram": histogram.tolist(), "layers": layers.round(4).tolist()}


def percentiles_of(ratios: np.ndarray) -> dict[str, float]:
    """A step's metrics: percentiles of all its microbatches and layers."""
    return {
        f"heaviest_over_mean_p{share}": float(value)
        for share, value in zip(SHARES, np.percentile(ratios, SHARES), strict=True)
    }


def write_page(path: pathlib.Path, lines: Sequence[Mapping[str, Any]], moves: Iterable[float]) -> None:
    """Draws the lines of a run: percentiles by step, layers by step, and the histogram of all.

    Args:
      path: of the page.
      lines: of `LOADS`, at least one.
      moves: the steps that were the first with another placement.
    """
    steps = np.array([line["step"] for line in lines])
    layers = np.array([line["layers"] for line in lines])  # [steps, layers, shares]
    counts = np.sum([line["histogram"] for line in lines], axis=0)
    parts = [
        "<!doctype html><meta charset='utf-8'><title>Loads of experts</title>",
        "<style>body{font:14px system-ui;margin:2em;max-width:50em}svg text{font:11px system-ui}</style>",
        "<h1>Loads of experts</h1><p>Tokens of the heaviest device over the mean, in each microbatch and layer, where "
        "replicas of an expert share its tokens evenly. Dashed: the first step with another placement.</p>",
        "<h2>By step, mean of layers</h2>",
        _curves(steps, layers.mean(1), [step for step in moves if steps[0] <= step <= steps[-1]]),
        f"<h2>By layer and step: {SHARES[2]}% of microbatches are below</h2>",
        _heat_map(steps, layers[:, :, 2]),
        "<h2>All microbatches, layers and steps</h2>",
        _bars(counts),
    ]
    path.write_text("\n".join(parts), encoding="utf-8")


def _svg(body: Iterable[str], height: int = HEIGHT) -> str:
    return f"<svg viewBox='0 0 {WIDTH} {height + 24}' width='{WIDTH}'>{''.join(body)}</svg>"


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'>{html.escape(text)}</text>"


def _x(steps: np.ndarray, step: float) -> float:
    return LEFT + (WIDTH - LEFT - 8) * (step - steps[0]) / max(steps[-1] - steps[0], 1)


def _curves(steps: np.ndarray, values: np.ndarray, moves: Iterable[float]) -> str:
    top = max(float(values.max()), 1.01)
    y = lambda value: HEIGHT - (HEIGHT - 12) * (value - 1) / (top - 1)  # noqa: E731
    body = [
        f"<line x1='{_x(steps, step):.1f}' x2='{_x(steps, step):.1f}' y1='12' y2='{HEIGHT}' stroke='#999' "
        "stroke-dasharray='3 3'/>"
        for step in moves
    ]
    for number, share in enumerate(SHARES):
        points = " ".join(f"{_x(steps, s):.1f},{y(v):.1f}" for s, v in zip(steps, values[:, number], strict=True))
        body.append(f"<polyline points='{points}' fill='none' stroke='{COLOURS[share]}' stroke-width='1.5'/>")
        name = "maximum" if share == 100 else f"{share}%"
        body.append(f"<g fill='{COLOURS[share]}'>{_text(LEFT + 70 * number, HEIGHT + 20, name)}</g>")
    body += [_text(LEFT - 4, y(value) + 4, f"{value:.2f}", "end") for value in (1.0, top)]
    body += [_text(WIDTH - 8, HEIGHT + 20, f"steps {steps[0]} to {steps[-1]}", "end")]
    return _svg(body)


def _heat_map(steps: np.ndarray, values: np.ndarray) -> str:
    top, layers = max(float(values.max()), 1.01), values.shape[1]
    wide, high = (WIDTH - LEFT - 8) / len(steps), min(12.0, HEIGHT / layers)
    body = []
    for row in range(layers):
        for column, value in enumerate(values[:, row]):
            shade = 97 - 60 * (value - 1) / (top - 1)
            body.append(
                f"<rect x='{LEFT + wide * column:.1f}' y='{high * row:.1f}' width='{wide + 0.1:.1f}' "
                f"height='{high + 0.1:.1f}' fill='hsl(10 70% {shade:.0f}%)'><title>layer {row}, step {steps[column]}: "
                f"{value:.2f}</title></rect>"
            )
    height = math.ceil(high * layers)
    body += [_text(LEFT - 4, 10, "layer 0", "end"), _text(LEFT, height + 16, f"white 1.00, darkest {top:.2f}")]
    return _svg(body, height)


def _bars(counts: np.ndarray) -> str:
    wide, most = (WIDTH - LEFT - 8) / len(counts), max(int(counts.max()), 1)
    body = []
    for number, (edge, count) in enumerate(zip(EDGES, counts, strict=True)):
        high, x = (HEIGHT - 24) * count / most, LEFT + wide * number
        body.append(
            f"<rect x='{x + 2:.1f}' y='{HEIGHT - high:.1f}' width='{wide - 4:.1f}' height='{high:.1f}' fill='#4477aa'/>"
        )
        body.append(_text(x + wide / 2, HEIGHT - high - 4, f"{count / max(counts.sum(), 1):.1%}", "middle"))
        body.append(_text(x, HEIGHT + 16, f"{edge:g}"))
    return _svg(body)
