"""Where the tensors of a Hugging Face folder are in the parameters of a schedule: from the model's order to stages."""

from __future__ import annotations

import dataclasses

from jaxpipe.deepseek.arrange import Arrangement
from jaxpipe.deepseek.config import DENSE, MTP
from jaxpipe.deepseek.hf_names import Index, Path, TensorPart


def in_stages(part: TensorPart, arrangement: Arrangement) -> TensorPart:
    """A part of a tensor with its path and place in `jaxpipe.Params` instead of those in `DeepSeekModel.to_layers`.

    >>> arrangement = Arrangement((1, 2), (1, 0), ("dense", "moe", "moe"))
    >>> bias = TensorPart(("layers", "moe", "bias"), (1,), (8,), (slice(None),), (0,))
    >>> moved = in_stages(bias, arrangement)
    >>> moved.path, moved.index
    (('stages', 'layer_1', 'moe', 'bias'), (0,))
    """
    path, index = _place(part.path, part.index, arrangement)
    return dataclasses.replace(part, path=path, index=index)


def _place(path: Path, index: Index, arrangement: Arrangement) -> tuple[Path, Index]:
    """Path and index in stages of those in the order of layers."""
    kinds, places = arrangement.layer_kinds, arrangement.places
    room, *rest = path
    if room == "layers":
        layer, *within = index
        assert isinstance(layer, int)
        row, slot = places[kinds.count(DENSE) + layer]
        return ("stages", f"layer_{slot}", *rest), (row, *within)
    name, *rest = rest
    if name == "norm" and MTP in kinds:
        return ("stages", MTP, "main_norm", *rest), (places[-1][0], *index)
    if name == MTP:
        row, slot = places[-1]
        name, *rest = (f"layer_{slot}", *rest[1:]) if rest[0] == "block" else (MTP, *rest)
        return ("stages", name, *rest), (row, *index)
    if name.startswith("layer_"):
        row, slot = places[int(name.removeprefix("layer_"))]
        return ("stages", f"layer_{slot}", *rest), (row, *index)
    return path, index
