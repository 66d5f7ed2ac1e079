"""Hugging Face's names of a model's tensors: a table from each to its places in our parameters, with shapes.

`tensors` is a pure function of a `ModelConfig`. It says of every tensor of a checkpoint, in the order in which
checkpoints list them, what shape it has in the file, and where its elements are in the tree of
`DeepSeekModel.to_layers`, which depends on no schedule and no mesh: ``{"layers": {...}, "outer": {...}}``. Nothing is
computed on the way, elements are moved only, so that what is read and written again is the same bit for bit.

How to use it. A `Tensor` has one or two `TensorPart` s, each for one leaf of the tree:

* reading: ``leaf[part.index] = part.from_file(array)``, array of the tensor's shape;
* writing: ``part.to_file(leaf[part.index], array)`` fills the part's elements of an array of the tensor's shape.

Both are views where NumPy can have views, and take any object with ``reshape``, ``transpose`` and slices.
``tensor.copy_of`` names another tensor with the same values, which a file repeats: nothing is read of it, and writing
repeats it. All tensors together fill every leaf but for `made_here`: placements, masters' rows after the last expert,
and selection biases where the model has none.

Facts are those of the published files and of transformers' modules of the same names:
github.com/deepseek-ai/DeepSeek-V3, README_WEIGHTS.md and inference/convert.py; github.com/huggingface/transformers,
models/deepseek_v3 and models/deepseek_v2; github.com/vllm-project/vllm, model_executor/models/deepseek_mtp.py.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from jaxpipe.deepseek.config import DENSE, MOE, MTP, ModelConfig
from jaxpipe.deepseek.hf_fp8 import BLOCK

Path = tuple[str, ...]
Index = tuple[int | slice, ...]


@dataclasses.dataclass(frozen=True)
class TensorPart:
    """Elements of a tensor that are in one leaf.

    Attributes:
      path: keys of the leaf in the tree of `DeepSeekModel.to_layers`, as ("layers", "moe", "w_in").
      index: where in the leaf; axes that it does not name are whole.
      split: the tensor's shape with some axes divided, as rows into heads and their widths.
      take: slices of that, one an axis.
      order: its axes in the order that the leaf has them.
    """

    path: Path
    index: Index
    split: tuple[int, ...]
    take: tuple[slice, ...]
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ``leaf[index]``."""
        sizes = [len(range(*cut.indices(size))) for size, cut in zip(self.split, self.take, strict=True)]
        return tuple(sizes[axis] for axis in self.order)

    def from_file(self, array: Any) -> Any:
        """The elements as ``leaf[index]`` has them, of an array with the tensor's shape.

        >>> gate = TensorPart(("w_in",), (slice(None), slice(0, 3)), (3, 2), (slice(None),) * 2, (1, 0))
        >>> gate.from_file(np.arange(6).reshape(3, 2)).tolist()
        [[0, 2, 4], [1, 3, 5]]
        """
        return array.reshape(self.split)[self.take].transpose(self.order)

    def to_file(self, block: Any, array: np.ndarray) -> None:
        """Writes ``leaf[index]`` to its elements of a contiguous array with the tensor's shape."""
        array.reshape(self.split)[self.take] = np.asarray(block).transpose(np.argsort(self.order))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint.

    Attributes:
      shape: in the file.
      parts: where its elements are here; none where it is a copy.
      exact: whether files keep it in float32 when all else is in 16 bits: selection biases.
      quantised: whether DeepSeek's FP8 files have it in 8 bits, with `scale_name` beside it: the matrices of attention,
        feed-forward layers and experts.
      copy_of: the name of the tensor with the same values, for those that files repeat.
      mtp: whether it is multi-token prediction's; transformers neither reads nor writes those.
    """

    shape: tuple[int, ...]
    parts: tuple[TensorPart, ...]
    exact: bool = False
    quantised: bool = False
    copy_of: str | None = None
    mtp: bool = False

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape of the FP8 scales: one a block of 128 rows and 128 columns, the last ones smaller.

        >>> Tensor((576, 7168), (), quantised=True).scale_shape
        (5, 56)
        """
        return tuple(-(-size // BLOCK) for size in self.shape)


def scale_name(name: str) -> str:
    """The name of the scales of a tensor in FP8.

    >>> scale_name("model.layers.0.self_attn.o_proj.weight")
    'model.layers.0.self_attn.o_proj.weight_scale_inv'
    """
    return f"{name}_scale_inv"


def tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of this model, by name.

    >>> from jaxpipe.deepseek.config import MODELS
    >>> table = tensors(MODELS["dsv3-671b"])
    >>> table["model.layers.3.mlp.experts.7.up_proj.weight"].parts[0].index
    (0, 7, slice(None, None, None), slice(2048, 4096, None))
    >>> table["model.layers.61.shared_head.head.weight"].copy_of
    'lm_head.weight'
    """
    width, vocab = config.width, config.vocab
    table = {EMBEDDING: _plain((vocab, width), ("outer", "embedding"))}
    for layer, kind in enumerate(config.layer_kinds):
        prefix = f"model.layers.{layer}."
        made = _mtp_tensors(config) if kind == MTP else _layer_tensors(config, kind, layer)
        table |= {prefix + name: tensor for name, tensor in made.items()}
    table[NORM] = _plain((width,), ("outer", "norm", "scale"))
    if not config.tied:
        table[HEAD] = _plain((vocab, width), ("outer", "output"))
    return table


def made_here(config: ModelConfig) -> dict[str, str]:
    """Last keys of leaves that files do not fill, or not whole, and what is there instead.

    >>> from jaxpipe.deepseek.config import MODELS
    >>> sorted(made_here(MODELS["tiny"]))
    ['log2phy', 'logcnt', 'phy2log']
    """
    found = {}
    if not config.selection_bias:
        found["bias"] = "zeros"
    if (config.moe.masters or config.experts) > config.experts:
        found |= dict.fromkeys(("w_in", "w_out"), "zeros in the rows after the last expert")
    if config.redundant:
        found |= dict.fromkeys(("phy2log", "log2phy", "logcnt"), "the placement, as a new model has it")
    return found


EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def _layer_tensors(config: ModelConfig, kind: str, layer: int) -> dict[str, Tensor]:
    """Of a layer of the model, names without their prefix."""
    if kind == DENSE:
        path, index = ("outer", f"layer_{layer}"), ()
    else:
        path, index = ("layers",), (layer - config.dense_layers,)
    return _block(config, kind, path, index)


def _mtp_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Of multi-token prediction: its projection reads the embedding first, ours the features."""
    width, path = config.width, ("outer", "mtp")
    shape, whole = (width, 2 * width), slice(None)
    halves = slice(0, width), slice(width, 2 * width)
    project = tuple(
        TensorPart((*path, "project"), (rows,), shape, (whole, columns), (1, 0))
        for rows, columns in zip(halves[::-1], halves, strict=True)
    )
    made = {
        "embed_tokens.weight": Tensor((config.vocab, width), (), copy_of=EMBEDDING),
        "enorm.weight": _plain((width,), (*path, "embedding_norm", "scale")),
        "hnorm.weight": _plain((width,), (*path, "hidden_norm", "scale")),
        "eh_proj.weight": Tensor(shape, project),
        **_block(config, MOE, (*path, "block"), ()),
        "shared_head.norm.weight": _plain((width,), (*path, "norm", "scale")),
        "shared_head.head.weight": Tensor((config.vocab, width), (), copy_of=EMBEDDING if config.tied else HEAD),
    }
    return {name: dataclasses.replace(tensor, mtp=True) for name, tensor in made.items()}


def _block(config: ModelConfig, kind: str, path: Path, index: Index) -> dict[str, Tensor]:
    """Attention and what follows it, with their norms."""
    width = config.width
    made = _attention(config, (*path, "attention"), index)
    if kind == DENSE:
        mlp = (*path, "mlp")
        made |= _swiglu("mlp.", width, config.dense_hidden, ((*mlp, "w_in"), (*mlp, "w_out")), index)
    else:
        made |= _experts(config, (*path, "moe"), index)
    made["input_layernorm.weight"] = _plain((width,), (*path, "attention_norm", "scale"), index)
    made["post_attention_layernorm.weight"] = _plain((width,), (*path, "mlp_norm", "scale"), index)
    return made


def _attention(config: ModelConfig, path: Path, index: Index) -> dict[str, Tensor]:
    """Rows of files are outputs, head by head, and columns inputs; here inputs come first."""
    width, heads, latent = config.width, config.heads, config.latent
    head, both, whole = config.content + config.rotary, config.content + config.value, slice(None)

    def matrix(name: str, split: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
        part = TensorPart((*path, name), index, split, (whole,) * len(split), order)
        rows, columns = split[: len(split) - 1], split[-1]
        return Tensor((math.prod(rows), columns), (part,), quantised=True)

    rank = config.query_rank
    if rank is None:
        made = {"q_proj.weight": matrix("query", (heads, head, width), (2, 0, 1))}
    else:
        made = {
            "q_a_proj.weight": matrix("query_down", (rank, width), (1, 0)),
            "q_a_layernorm.weight": _plain((rank,), (*path, "query_norm", "scale"), index),
            "q_b_proj.weight": matrix("query_up", (heads, head, rank), (2, 0, 1)),
        }
    made["kv_a_proj_with_mqa.weight"] = matrix("latent_down", (latent + config.rotary, width), (1, 0))
    made["kv_a_layernorm.weight"] = _plain((latent,), (*path, "latent_norm", "scale"), index)
    halves = {"key_up": slice(0, config.content), "value_up": slice(config.content, both)}
    split = heads, both, latent
    parts = (TensorPart((*path, name), index, split, (whole, cut, whole), (2, 0, 1)) for name, cut in halves.items())
    made["kv_b_proj.weight"] = Tensor((heads * both, latent), tuple(parts), quantised=True)
    out = TensorPart((*path, "out"), index, (width, heads, config.value), (whole,) * 3, (1, 2, 0))
    made["o_proj.weight"] = Tensor((width, heads * config.value), (out,), quantised=True)
    return {f"self_attn.{name}": tensor for name, tensor in made.items()}


def _experts(config: ModelConfig, path: Path, index: Index) -> dict[str, Tensor]:
    """The router, routed experts and, side by side as one, shared experts."""
    width, hidden, experts = config.width, config.moe.hidden, config.experts
    router = TensorPart((*path, "router"), index, (experts, width), (slice(None),) * 2, (1, 0))
    made = {"mlp.gate.weight": Tensor((experts, width), (router,))}
    if config.selection_bias:
        bias = _plain((experts,), (*path, "bias"), index)
        made["mlp.gate.e_score_correction_bias"] = dataclasses.replace(bias, exact=True)
    leaves = (*path, "w_in"), (*path, "w_out")
    for expert in range(experts):
        made |= _swiglu(f"mlp.experts.{expert}.", width, hidden, leaves, (*index, expert))
    if shared := config.moe.num_shared:
        leaves = (*path, "shared_in"), (*path, "shared_out")
        made |= _swiglu("mlp.shared_experts.", width, hidden * shared, leaves, (*index, 0))
    return made


def _swiglu(prefix: str, width: int, hidden: int, leaves: tuple[Path, Path], index: Index) -> dict[str, Tensor]:
    """Gate and up side by side in the first matrix, in this order."""
    whole = slice(None)
    cuts = {"gate_proj": slice(0, hidden), "up_proj": slice(hidden, 2 * hidden)}
    made = {
        f"{prefix}{name}.weight": TensorPart(leaves[0], (*index, whole, cut), (hidden, width), (whole,) * 2, (1, 0))
        for name, cut in cuts.items()
    }
    made[f"{prefix}down_proj.weight"] = TensorPart(leaves[1], index, (width, hidden), (whole,) * 2, (1, 0))
    return {name: Tensor(part.split, (part,), quantised=True) for name, part in made.items()}


def _plain(shape: tuple[int, ...], path: Path, index: Index = ()) -> Tensor:
    """A tensor that is in the file as it is here."""
    order = tuple(range(len(shape)))
    return Tensor(shape, (TensorPart(path, index, shape, (slice(None),) * len(shape), order),))
