"""What layers of each kind cost, by which stages get their layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Self

_ENDS = ("head", "embedding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """What a layer of each kind and the ends cost for one microbatch, forward and backward, all in one unit; any.

    Attributes:
      dense, moe, mtp: of a layer of the kind; None where the model has none.
      head: of what the last stage's rank does besides its layers, where ends are apart: logits and loss, of
        multi-token prediction too.
      embedding: of what the first stage's rank does besides.

    Raises:
      ValueError: no layers; costs of layers that are not positive, of ends that are negative; what is not finite.

    >>> str(LayerCosts(dense=1.5, moe=2, head=3.25))
    'dense=1.5,moe=2,head=3.25'
    """

    dense: float | None = None
    moe: float | None = None
    mtp: float | None = None
    head: float = 0.0
    embedding: float = 0.0

    def __post_init__(self) -> None:
        wrong = [cost for cost in self.layers.values() if not 0 < cost < math.inf]
        if wrong or not self.layers or not all(0 <= getattr(self, end) < math.inf for end in _ENDS):
            raise ValueError(
                f"{dataclasses.asdict(self)}: give a positive number for each kind of layer that the model has, and "
                "one that is not negative for head and embedding"
            )

    @property
    def layers(self) -> dict[str, float]:
        """Of each kind of layer that there is."""
        each = ((name, getattr(self, name)) for name in ("dense", "moe", "mtp"))
        return {name: cost for name, cost in each if cost is not None}

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads what `str` writes.

        Raises:
          ValueError: text of another form; see `LayerCosts`.

        >>> LayerCosts.parse("moe=2,head=3.25")
        LayerCosts(dense=None, moe=2.0, mtp=None, head=3.25, embedding=0.0)
        """
        names = {field.name for field in dataclasses.fields(cls)}
        parts = [part.strip().partition("=") for part in text.split(",")]
        if any(name not in names for name, *_ in parts) or len({name for name, *_ in parts}) < len(parts):
            raise ValueError(
                f"{text!r}: give what each kind of layer costs, and the ends, once each, as in "
                "dense=1.5,moe=2,mtp=2.5,head=3.25,embedding=0.1"
            )
        try:
            costs = {name: float(number) for name, _, number in parts}
        except ValueError:
            raise ValueError(f"{text!r}: costs are numbers, as in dense=1.5,moe=2") from None
        return cls(**costs)

    def __str__(self) -> str:
        ends = {name: getattr(self, name) for name in _ENDS if getattr(self, name)}
        return ",".join(f"{name}={cost}" for name, cost in {**self.layers, **ends}.items())

    def rounded(self) -> Self:
        """The same to three digits."""
        costs = dataclasses.asdict(self)
        return dataclasses.replace(self, **{name: cost and float(f"{cost:.3g}") for name, cost in costs.items()})

    def check(self, kinds: Sequence[str]) -> None:
        """Refuses costs of other kinds than a model's layers'.

        Raises:
          ValueError: a kind without a cost; the cost of a kind that there is not.
        """
        if set(self.layers) != set(kinds):
            raise ValueError(
                f"layer_costs={self} of a model with layers of {list(dict.fromkeys(kinds))}: give a positive number "
                f"for each of {list(dict.fromkeys(kinds))} and no other kind of layer"
            )
