"""The model as the functions and parameters that `jaxpipe.value_and_grad` takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxpipe
from eplb_jax import Placement, update_bias
from jaxpipe.deepseek.arrange import Arrangement
from jaxpipe.deepseek.block import MoEBlock
from jaxpipe.deepseek.config import ModelConfig
from jaxpipe.deepseek.head import EmbeddingAndHead
from jaxpipe.deepseek.kernels import causal_attention
from jaxpipe.deepseek.mla import Core
from jaxpipe.flax import NNXFunction, nnx_function

PLACEMENT = ("phy2log", "log2phy", "logcnt")
UNTRAINED = (*PLACEMENT, "bias")
"""Parameters that the optimizer leaves alone, by name."""

VOCABULARY = (("embedding",), ("output",))
"""Outer parameters with a row for each token of the vocabulary."""


@dataclasses.dataclass(frozen=True, eq=False)
class DeepSeekModel:
    """A model for one schedule; made by `build_model`.

    The pipelined layers are those with experts. The first, dense layers are part of `embed`, because all stages of a
    pipeline have the same structure.

    Attributes:
      config: sizes.
      arrangement: which stage has which layer.
      axis: the mesh axis of the experts, or None: all are on one device.
      shared_ends: whether all pipeline ranks run embedding and head together.
      dtype: of activations and matrix products; parameters, norms and router are float32 whatever it is.
      seed: of the initial parameters.
      core: attention of queries to keys and values.
      params: initial parameters, or their shapes and dtypes.
    """

    config: ModelConfig
    arrangement: Arrangement
    axis: str | None
    shared_ends: bool
    dtype: Any
    seed: int
    core: Core
    params: Any
    _block: NNXFunction
    _embedding_and_head: NNXFunction

    def embed(self, outer: Any, data: Any, ctx: jaxpipe.Context) -> jax.Array:
        """The first stage's input: embedding and dense layers."""
        return self._embedding_and_head.merge(self._gather(outer)).embed(data["tokens"], self.dtype)

    def stage(self, params: Any, x: jax.Array, ctx: jaxpipe.Context) -> jaxpipe.Output:
        """One stage's layers. Metrics: ``loads [stages, slots, experts]`` at this stage's place, ``dropped``."""
        shape, experts = self.arrangement, self.config.experts

        def block(own: Any, x: jax.Array, mask: jax.Array | None) -> Any:
            return self._block(own, x, mask)

        if self.config.remat == "layer":
            block = jax.checkpoint(block)
        every = []
        for slot in range(shape.slots):
            mask = None
            if shape.padded:
                here = slot < jnp.asarray(shape.counts, jnp.int32)[ctx.stage]
                mask = jnp.broadcast_to(here, x.shape[:2])
            with jax.named_scope(f"layer_{slot}"):
                x, stats = block(params[f"layer_{slot}"], x, mask)
            every.append(stats)
        loads = jnp.zeros((shape.stages, shape.slots, experts), jnp.int32)
        loads = loads.at[ctx.stage].set(jnp.stack([stats.loads for stats in every]))
        losses, dropped = (sum(getattr(stats, name) for stats in every) for name in ("balance_loss", "dropped"))
        return jaxpipe.Output(x, self.config.balance_factor * losses, {"loads": loads, "dropped": dropped})

    def head(self, outer: Any, y: jax.Array, data: Any, ctx: jaxpipe.Context) -> jax.Array | jaxpipe.Output:
        """The mean loss of a microbatch."""
        loss, second = self._embedding_and_head.merge(self._gather(outer)).loss(y, data["targets"], data["mask"])
        return loss if second is None else jaxpipe.Output(loss, self.config.mtp_weight * second)

    def losses(self, outer: Any, y: jax.Array, data: Any, ctx: jaxpipe.Context) -> tuple[jax.Array, jax.Array]:
        """Of each sequence the sum of its targets' losses and how many they are; the head of an evaluation."""
        return self._embedding_and_head.merge(self._gather(outer)).losses(y, data["targets"], data["mask"])

    @staticmethod
    def weight(data: Any) -> jax.Array:
        """Targets of a microbatch that count."""
        return data["mask"].sum()

    def init(self, seed: jax.Array | int) -> jaxpipe.Params:
        """Initial parameters; traceable, so that jit with ``out_shardings`` makes each part where it belongs."""
        keys = jax.random.split(jax.random.key(seed), self.config.moe_layers + 1)

        def layer(key: jax.Array) -> Any:
            return nnx_function(MoEBlock(self.config, nnx.Rngs(key), self.core, self.axis)).params

        layers = jax.vmap(layer)(keys[1:])
        outer = nnx_function(EmbeddingAndHead(self.config, nnx.Rngs(keys[0]), self.core)).params
        return self.from_layers({"layers": layers, "outer": outer})

    @property
    def specs(self) -> jaxpipe.Params:
        """PartitionSpec of every parameter: stages by rows over "pp", experts over their axis too."""

        def stage(path: Any, leaf: Any) -> P:
            expert = names(path)[-2:] in (("moe", "w_in"), ("moe", "w_out"))
            return P("pp", self.axis) if expert and self.axis else P("pp")

        def outer(path: Any, leaf: Any) -> P:
            if self.shared_ends and names(path) in VOCABULARY:
                return P("pp")
            return P(self.axis) if self._in_parts(path, leaf) else P()

        return jaxpipe.Params(
            jax.tree_util.tree_map_with_path(stage, self.params.stages),
            jax.tree_util.tree_map_with_path(outer, self.params.outer),
        )

    @property
    def trained(self) -> jaxpipe.Params:
        """Of every parameter whether the optimizer changes it: all but routers' biases and placements."""
        return jax.tree_util.tree_map_with_path(lambda path, _: names(path)[-1] not in UNTRAINED, self.params)

    @property
    def decayed(self) -> jaxpipe.Params:
        """Of every parameter whether weights decay: matrices, not the norms' scales."""
        return jax.tree_util.tree_map_with_path(
            lambda path, trained: trained and names(path)[-1] != "scale", self.trained
        )

    def to_layers(self, params: Any) -> dict[str, Any]:
        """A tree like the parameters in an order that depends on no schedule.

        Returns:
          ``"layers"``, with leaves ``[pipelined layers, ...]`` in the order of the model, and ``"outer"``.
        """
        return {"layers": self.arrangement.to_layers(params.stages), "outer": params.outer}

    def from_layers(self, tree: dict[str, Any]) -> jaxpipe.Params:
        """The inverse of `to_layers`, for this model's schedule."""
        return jaxpipe.Params(self.arrangement.from_layers(tree["layers"]), tree["outer"])

    def loads_of(self, aux: Any) -> jax.Array:
        """``int32[pipelined layers, experts]``: tokens of the step that chose each expert."""
        stages, slots = zip(*_in_order(self.arrangement), strict=True)
        return aux["loads"][jnp.asarray(stages), jnp.asarray(slots)]

    def dropped_of(self, aux: Any) -> jax.Array:
        """Choices of experts that the step dropped, beyond the capacity."""
        return aux["dropped"]

    def placements(self, params: Any) -> Placement | None:
        """Of the pipelined layers; None where experts have no redundant slots."""
        if not self.config.redundant:
            return None
        moe = self.arrangement.to_layers({slot: part["moe"] for slot, part in params.stages.items()})
        return Placement(*(moe[name] for name in PLACEMENT))

    def with_placements(self, params: Any, placements: Placement) -> jaxpipe.Params:
        """Parameters with these placements, arrays of the same shapes, on the same devices."""
        if not self.config.redundant:
            raise ValueError("the model has redundant=0, so its experts stay where they are: there is no placement")
        placed = self.arrangement.from_layers(dict(zip(PLACEMENT, placements, strict=True)))

        def swap(path: Any, old: Any) -> Any:
            slot, *_, name = names(path)
            if name not in PLACEMENT:
                return old
            new = placed[slot][name].astype(old.dtype)
            if new.shape != old.shape:
                raise ValueError(f"{name} has shape {new.shape} instead of {old.shape}: take Placement.padded()")
            return jax.device_put(new, old.sharding)

        return params._replace(stages=jax.tree_util.tree_map_with_path(swap, params.stages))

    def with_bias(self, params: Any, loads: jax.Array) -> jaxpipe.Params:
        """Parameters with selection biases moved towards equal loads ``[pipelined layers, experts]``."""
        speed = self.config.bias_update_speed
        if not speed:
            return params
        placed = self.arrangement.from_layers(loads.astype(jnp.float32))

        def move(path: Any, old: Any) -> Any:
            slot, *_, name = names(path)
            return update_bias(old, placed[slot], speed) if name == "bias" else old

        return params._replace(stages=jax.tree_util.tree_map_with_path(move, params.stages))

    def _in_parts(self, path: Any, leaf: Any) -> bool:
        """Whether each device of the experts' axis keeps a part of an outer parameter."""
        if self.shared_ends and names(path) in VOCABULARY:
            return False
        return bool(self.axis) and self.config.shard_outer and leaf.ndim > 1

    def _gather(self, outer: Any) -> Any:
        """Outer parameters whole, gathered in the compute dtype where each device has a part."""

        def gather(path: Any, leaf: jax.Array) -> jax.Array:
            if not self._in_parts(path, leaf):
                return leaf
            return jax.lax.all_gather(leaf.astype(self.dtype), self.axis, tiled=True)

        with jax.named_scope("gather"):
            return jax.tree_util.tree_map_with_path(gather, outer)


def build_model(
    config: ModelConfig,
    schedule: jaxpipe.schedule.Schedule,
    seed: int,
    *,
    axis: str | None = None,
    dtype: Any = jnp.float32,
    abstract: bool = False,
    core: Core = causal_attention,
) -> DeepSeekModel:
    """The model for a schedule.

    Args:
      config: sizes.
      schedule: whose stages get the layers.
      seed: of the initial parameters, which depend on neither schedule nor mesh.
      axis: the mesh axis that experts, and the batch, are spread over; None: one device has all.
      dtype: of activations and matrix products.
      abstract: parameters are shapes and dtypes only; `DeepSeekModel.init` makes them later.
      core: attention of queries to keys and values.

    Raises:
      ValueError: fewer layers with experts than stages; a vocabulary that does not divide over ranks that share it.

    >>> from jaxpipe.deepseek.config import MODELS
    >>> schedule = jaxpipe.schedule.build("dualpipev", 2, 4)
    >>> model = build_model(MODELS["tiny"], schedule, 0, abstract=True)
    >>> model.arrangement.counts, model.params.outer["embedding"].shape
    ((2, 2, 2, 2), (256, 64))
    """
    ranks = schedule.num_ranks
    shared = config.shared_ends and axis is not None and ranks > 1
    if shared and config.vocab % ranks:
        raise ValueError(
            f"a vocabulary of {config.vocab} does not divide over {ranks} pipeline ranks: take vocab="
            f"{config.vocab + -config.vocab % ranks} or shared_ends=False"
        )
    block = nnx_function(nnx.eval_shape(lambda: MoEBlock(config, nnx.Rngs(0), core, axis)))
    outer = nnx_function(nnx.eval_shape(lambda: EmbeddingAndHead(config, nnx.Rngs(0), core, "pp" if shared else None)))
    arrangement = Arrangement.of(config.moe_layers, schedule)
    model = DeepSeekModel(config, arrangement, axis, shared, jnp.dtype(dtype), seed, core, None, block, outer)
    params: Callable[[], Any] = jax.jit(lambda: model.init(seed))
    return dataclasses.replace(model, params=jax.eval_shape(params) if abstract else params())


def names(path: Any) -> tuple[str, ...]:
    """The keys of a leaf's path as text, for example ("layer_0", "moe", "bias")."""
    return tuple(str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path)


def _in_order(arrangement: Arrangement) -> list[tuple[int, int]]:
    """(stage, slot) of each layer, stages in the order of the forward pass."""
    return [(stage, slot) for stage, count in enumerate(arrangement.counts) for slot in range(count)]
