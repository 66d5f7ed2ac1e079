"""Sizes of a layer and of the models made of such layers, as data, with the parameters and FLOPs that follow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Self

from eplb_jax import MoEConfig, RouterConfig
from jaxpipe import flops
from jaxpipe.deepseek.costs import LayerCosts
from jaxpipe.deepseek.linear import PRECISIONS
from jaxpipe.deepseek.lora import LoRA
from jaxpipe.deepseek.rope import PLAIN, Rope

REMATS = ("none", "attention", "layer")
DENSE, MOE, MTP = "dense", "moe", "mtp"
"""Kinds of layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """A layer of multi-head latent attention and experts.

    Attributes:
      moe: width of the activations, experts and routing.
      heads: of attention.
      query_rank: of the low-rank query; None: one whole matrix.
      latent: width of what keys and values are made of.
      content, rotary, value: widths of a head's query and key without and with positions, and of its value.
      precision: of the layer's Linears but for the experts', which ``moe`` has: "bf16" for the dtype of the
        activations, or "fp8"; see `jaxpipe.deepseek.linear`. `in_precision` sets both.
      rope: how queries and keys rotate with their positions.
      norm_eps: what norms add to the mean square.
      lora: adapters of attention's matrices, which alone are trained; None: there are none.

    Raises:
      ValueError: sizes below 1, an odd rotary width, an unknown precision, a ``norm_eps`` that is not positive;
        adapters of Linears in FP8.
    """

    moe: MoEConfig
    heads: int
    query_rank: int | None
    latent: int
    content: int
    rotary: int
    value: int
    precision: str = "bf16"
    rope: Rope = PLAIN
    norm_eps: float = 1e-6
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        """Checks what would otherwise fail within a traced function."""
        sizes = {name: getattr(self, name) for name in ("heads", "latent", "content", "rotary", "value")}
        if min(sizes.values()) < 1 or self.rotary % 2:
            raise ValueError(f"{sizes}: all are at least 1, and rotary is even, because rotations need pairs")
        if self.query_rank is not None and self.query_rank < 1:
            raise ValueError(f"query_rank={self.query_rank}: at least 1, or None for a query of full rank")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: it must be one of {', '.join(PRECISIONS)}")
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps={self.norm_eps}: a small positive number, such as 1e-6")
        if self.lora is not None and self.precision == "fp8":
            raise ValueError("lora with precision='fp8': adapters are beside matrices of 16 bits or more; take 'bf16'")

    def in_precision(self, precision: str) -> Self:
        """The same sizes with all Linears, those of experts too, in a precision: "bf16" or "fp8".

        Raises:
          ValueError: an unknown precision; experts of widths that it does not take.

        >>> fp8 = MODELS["dsv3-671b"].in_precision("fp8")
        >>> fp8.precision, fp8.moe.precision
        ('fp8', 'fp8')
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r}: it must be one of {', '.join(PRECISIONS)}")
        moe = dataclasses.replace(self.moe, fp8=False, precision=precision)
        return dataclasses.replace(self, precision=precision, moe=moe)

    @property
    def width(self) -> int:
        """Width of the activations."""
        return self.moe.width

    @property
    def experts(self) -> int:
        """Logical experts of a layer."""
        return self.moe.router.num_experts

    @property
    def attention_matrices(self) -> int:
        """Elements of one layer's attention matrices."""
        head, rank = self.heads * (self.content + self.rotary), self.query_rank
        query = self.width * head if rank is None else self.width * rank + rank * head
        latent = self.width * (self.latent + self.rotary)
        return query + latent + self.heads * (self.latent * (self.content + self.value) + self.value * self.width)

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's attention, its norms' included."""
        return self.attention_matrices + self.latent + (self.query_rank or 0)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return 3 * self.width * self.moe.hidden

    def layer_matrices(self, experts: int) -> int:
        """Elements of the matrices of a layer of which that many routed experts count, the router's included."""
        mlp = (experts + self.moe.num_shared) * self.expert_parameters + self.width * self.experts
        return self.attention_matrices + mlp

    def layer_parameters(self, experts: int) -> int:
        """Parameters of such a layer: its matrices, the scales of its norms and the router's bias."""
        norms = self.attention_parameters - self.attention_matrices + 2 * self.width
        return self.layer_matrices(experts) + norms + self.experts

    @property
    def score_scale(self) -> float:
        """What products of queries and keys are multiplied by.

        >>> round(MODELS["dsv3-671b"].score_scale, 4)
        0.0722
        """
        return (self.content + self.rotary) ** -0.5 * self.rope.score_scale

    def score_flops(self, sequence: int) -> int:
        """FLOPs of one layer's causal attention for one token of a sequence, forward, projections left out.

        Two products, of queries with keys and of weights with values, for half of the sequence on average.

        >>> MODELS["dsv3-671b"].score_flops(4096)
        167772160
        """
        return int(flops.score_flops(sequence * self.heads, self.content + self.rotary, self.value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(LayerConfig):
    """A decoder of layers as `LayerConfig` describes them, and how its state is kept.

    Attributes:
      vocab: rows of the embedding and of the output matrix.
      layers: of the whole model.
      dense_layers: how many of them, the first ones, have one SwiGLU instead of experts.
      dense_hidden: its hidden width.
      redundant: slots for further copies of experts, which live rebalancing fills; 0: experts stay where they are.
      sequence: tokens of a training sequence.
      mtp: whether one more layer makes features that predict the token after the next one; its block has experts.
      mtp_weight: its loss's factor.
      balance_factor: of the sequence-wise balance loss.
      bias_update_speed: what a router's bias changes by in a step; 0: never.
      tied: whether the embedding is the output matrix too; otherwise they are two.
      selection_bias: whether routers have a bias that selects experts. Otherwise it is zero, and neither changes nor is
        in files.
      remat: what the backward pass computes again instead of keeping it: "none", "attention", "layer".
      shared_ends: whether all pipeline ranks run embedding and head together, each with a part of the vocabulary, which
        must divide over them; otherwise the ranks with the first and the last stage do. None: together where that
        leaves the rank with most work less of it, by `costs`; see `jaxpipe.deepseek.sharing_pays`.
      shard_outer: whether embedding and output matrix, where the ranks with the first and the last stage have them, are
        kept in parts over the experts' axis: the output matrix gathered for use, the embedding looked up by all
        devices, each of which has some columns.
      gather_head: how often such an output matrix is gathered: for each "microbatch", or once a "step", which takes the
        network less and keeps the matrix and the sum of its gradient whole on all devices. One that is the embedding
        too is gathered for each microbatch.
      layer_costs: what layers of each kind and the ends cost, by which stages get their layers; None: `costs` by
        operations, and layers that are all alike are divided evenly.
      moments: dtype in which the optimizer keeps its moments, "float32" or "bfloat16".
      zero1: whether devices that have the same parameters keep a part of them and of their moments each (ZeRO-1).

    Raises:
      ValueError: sizes below 1 or that do not fit each other, unknown choices.
    """

    vocab: int
    layers: int
    dense_layers: int
    dense_hidden: int
    sequence: int
    redundant: int = 0
    mtp: bool = False
    mtp_weight: float = 0.3
    balance_factor: float = 1e-4
    bias_update_speed: float = 1e-3
    remat: str = "none"
    shared_ends: bool | None = None
    shard_outer: bool = False
    gather_head: str = "microbatch"
    layer_costs: LayerCosts | None = None
    moments: str = "float32"
    zero1: bool = False
    tied: bool = False
    selection_bias: bool = True

    def __post_init__(self) -> None:
        """Checks what would otherwise fail within a traced function."""
        super().__post_init__()
        sizes = {name: getattr(self, name) for name in ("vocab", "sequence", "dense_hidden")}
        if min(sizes.values()) < 1:
            raise ValueError(f"{sizes}: all are at least 1")
        if not 0 <= self.dense_layers < self.layers:
            raise ValueError(
                f"dense_layers={self.dense_layers} of layers={self.layers}: at least one layer has experts, so take "
                "fewer dense ones"
            )
        if self.redundant < 0:
            raise ValueError(f"redundant={self.redundant}: the number of further slots is at least 0")
        if self.remat not in REMATS or self.moments not in ("float32", "bfloat16"):
            raise ValueError(f"remat={self.remat!r} is one of {REMATS}, moments={self.moments!r} float32 or bfloat16")
        if self.gather_head not in ("microbatch", "step"):
            raise ValueError(f"gather_head={self.gather_head!r} is one of microbatch, step")
        if not self.selection_bias and self.bias_update_speed:
            raise ValueError(
                f"bias_update_speed={self.bias_update_speed} of a model with selection_bias=False: take "
                "bias_update_speed=0.0, or selection_bias=True"
            )
        if self.layer_costs is not None:
            self.layer_costs.check(self.layer_kinds)

    def over_devices(self, devices: int, slots: int | None = None) -> ModelConfig:
        """The model with so many slots of experts, copies included, on the devices of the experts' axis.

        Args:
          devices: that experts and slots must divide over.
          slots: None: experts and redundant slots as they are.

        Raises:
          ValueError: fewer slots than experts; what does not divide, with what does.
        """
        slots = self.experts + self.redundant if slots is None else slots
        masters = self.moe.masters or self.experts
        if masters % devices:
            raise ValueError(
                f"{masters} experts do not divide over the {devices} devices of axis ep: take a divisor of {masters}"
            )
        if slots < self.experts or slots % devices:
            least = max(slots, self.experts)
            raise ValueError(
                f"{self.experts} experts in {slots} slots on the {devices} devices of axis ep: there are at least as "
                f"many slots as experts, and they divide over the devices; take --slots {least + -least % devices}"
            )
        columns = self.shard_outer and self.shared_ends is not True  # of the embedding, which each device keeps some of
        rows = {"width": self.width} if self.dense_layers or self.mtp or columns else {}
        rows |= {"dense_hidden": self.dense_hidden} if self.dense_layers else {}
        rows |= {"vocab": self.vocab} if self.shard_outer and self.shared_ends is False else {}
        if any(count % devices for count in rows.values()):
            raise ValueError(
                "rows of matrices of dense layers, multi-token prediction and the head, or columns of the embedding, "
                f"{rows}, do not divide over the {devices} devices of axis ep, each of which keeps some: take a "
                f"divisor of {math.gcd(*rows.values())}"
            )
        return dataclasses.replace(self, redundant=slots - self.experts)

    @property
    def moe_layers(self) -> int:
        """Layers with experts; that of multi-token prediction, which published counts leave out, is not among them."""
        return self.layers - self.dense_layers

    @property
    def routed_layers(self) -> int:
        """Layers whose experts' loads are counted and balanced: `moe_layers`, and that of multi-token prediction."""
        return self.moe_layers + self.mtp

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each layer in the order of the forward pass: "dense", "moe", "mtp".

        >>> MODELS["dsv3-671b"].layer_kinds[:4], MODELS["dsv3-671b"].layer_kinds[-1]
        (('dense', 'dense', 'dense', 'moe'), 'mtp')
        """
        return (DENSE,) * self.dense_layers + (MOE,) * self.moe_layers + (MTP,) * self.mtp

    def layer_flops(self, kind: str) -> float:
        """FLOPs of a layer for one token of a sequence, forward: of the matrices that it meets, and of attention.

        >>> [f"{MODELS['dsv3-671b'].layer_flops(kind):.2e}" for kind in ("dense", "moe", "mtp")]
        ['1.33e+09', '1.34e+09', '1.54e+09']
        """
        matrices = {
            DENSE: self.attention_matrices + 3 * self.width * self.dense_hidden,
            MOE: self.layer_matrices(self.moe.router.top_k),
            MTP: self.layer_matrices(self.moe.router.top_k) + 2 * self.width**2,
        }
        return 2.0 * matrices[kind] + self.score_flops(self.sequence)

    @property
    def head_flops(self) -> float:
        """FLOPs of the output matrix for one token, forward: once, or twice with multi-token prediction."""
        return 2.0 * self.vocab * self.width * (1 + self.mtp)

    @property
    def costs(self) -> LayerCosts:
        """What layers and ends cost: ``layer_costs``, or their operations.

        >>> MODELS["tiny"].costs.layers["moe"] == MODELS["tiny"].layer_flops("moe")
        True
        """
        layers = {kind: self.layer_flops(kind) for kind in dict.fromkeys(self.layer_kinds)}
        return LayerCosts(**layers, head=self.head_flops) if self.layer_costs is None else self.layer_costs

    @property
    def dense_layer_parameters(self) -> int:
        """Parameters of a layer without experts, with its two norms."""
        return self.attention_parameters + 3 * self.width * self.dense_hidden + 2 * self.width

    @property
    def embedding_and_head_parameters(self) -> int:
        """Parameters of embedding, output matrix and last norm."""
        return (1 if self.tied else 2) * self.vocab * self.width + self.width

    @property
    def mtp_parameters(self) -> int:
        """Parameters of multi-token prediction: three norms, projection and block; the rest it shares.

        >>> f"{MODELS['dsv3-671b'].mtp_parameters / 1e9:.1f}"
        '11.6'
        """
        return self.layer_parameters(self.experts) + 2 * self.width**2 + 3 * self.width if self.mtp else 0

    @property
    def total(self) -> int:
        """Parameters, those of multi-token prediction left out, as published sizes leave them out.

        >>> f"{MODELS['dsv3-671b'].total / 1e9:.1f}"
        '671.0'
        """
        outside = self.dense_layers * self.dense_layer_parameters + self.embedding_and_head_parameters
        return outside + self.moe_layers * self.layer_parameters(self.experts)

    @property
    def active(self) -> int:
        """Parameters that one token uses, embedding and output matrix included.

        >>> f"{MODELS['dsv3-671b'].active / 1e9:.1f}"
        '37.6'
        """
        outside = self.dense_layers * self.dense_layer_parameters + self.embedding_and_head_parameters
        return outside + self.moe_layers * self.layer_parameters(self.moe.router.top_k)

    @property
    def flops_per_token(self) -> float:
        """FLOPs of forward and backward pass for one token: six for each parameter it meets, and causal attention's.

        Those of multi-token prediction are not in it, nor what is computed again.

        >>> f"{MODELS['dsv3-671b'].flops_per_token:.2e}"
        '2.50e+11'
        """
        products = self.active - (0 if self.tied else self.vocab * self.width)
        return 6.0 * products + 3.0 * self.layers * self.score_flops(self.sequence)


MODELS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "tiny": ModelConfig(
            moe=MoEConfig(
                width=64,
                hidden=48,
                router=RouterConfig(num_experts=8, top_k=2, num_groups=1, top_groups=1, scale=1.0),
                backend="xla",
            ),
            vocab=256,
            layers=9,
            dense_layers=1,
            dense_hidden=192,
            heads=4,
            query_rank=32,
            latent=32,
            content=16,
            rotary=8,
            value=16,
            sequence=64,
            redundant=4,
        ),
        # As "tiny", in widths of which blocks of 128 are made: the smallest that trains in FP8.
        "tiny-128": ModelConfig(
            moe=MoEConfig(
                width=128,
                hidden=128,
                router=RouterConfig(num_experts=8, top_k=2, num_groups=1, top_groups=1, scale=1.0),
                backend="xla",
            ),
            vocab=256,
            layers=4,
            dense_layers=1,
            dense_hidden=256,
            heads=4,
            query_rank=128,
            latent=128,
            content=32,
            rotary=32,
            value=32,
            sequence=64,
            redundant=4,
        ),
        "moe-1b": ModelConfig(
            moe=MoEConfig(
                width=2048,
                hidden=1024,
                router=RouterConfig(num_experts=16, top_k=4, num_groups=1, top_groups=1, scale=1.0),
                capacity_factor=1.25,
            ),
            vocab=32_768,
            layers=9,
            dense_layers=1,
            dense_hidden=6144,
            heads=16,
            query_rank=None,
            latent=512,
            content=128,
            rotary=64,
            value=128,
            sequence=2048,
        ),
        # DeepSeek-V2-Lite: DeepSeek-V2, arXiv 2405.04434, appendix B.1.
        "moe-16b": ModelConfig(
            moe=MoEConfig(
                width=2048,
                hidden=1408,
                router=RouterConfig(
                    num_experts=64,
                    top_k=6,
                    num_groups=1,
                    top_groups=1,
                    scoring="softmax",
                    normalise=False,
                    scale=1.0,
                ),
                num_shared=2,
                capacity_factor=1.25,
            ),
            vocab=102_400,
            layers=27,
            dense_layers=1,
            dense_hidden=10_944,
            heads=16,
            query_rank=None,
            latent=512,
            content=128,
            rotary=64,
            value=128,
            sequence=4096,
            balance_factor=3e-3,
            bias_update_speed=0.0,
            selection_bias=False,
            moments="bfloat16",
        ),
        # DeepSeek-V3: arXiv 2412.19437, 4.2; 64 redundant slots are one a device of its 64-way expert parallelism.
        "dsv3-671b": ModelConfig(
            moe=MoEConfig(capacity_factor=1.25, precision="fp8_exchange"),
            vocab=129_280,
            layers=61,
            dense_layers=3,
            dense_hidden=18_432,
            heads=128,
            query_rank=1536,
            latent=512,
            content=128,
            rotary=64,
            value=128,
            sequence=4096,
            mtp=True,
            remat="layer",
            shard_outer=True,
            moments="bfloat16",
        ),
    }
)
"""Models by name."""


def model_config(name: str) -> ModelConfig:
    """The model of that name.

    >>> model_config("tiny").moe_layers
    8
    """
    if name not in MODELS:
        raise ValueError(f"no model {name!r}: known are {', '.join(MODELS)}")
    return MODELS[name]
