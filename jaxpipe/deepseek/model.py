"""The model as the functions and parameters that `jaxpipe.value_and_grad` takes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxpipe
from eplb_jax import MoEStats, Placement, update_bias
from eplb_jax.kernels.dtypes import wide
from jaxpipe.deepseek.arrange import Arrangement
from jaxpipe.deepseek.balance import busiest_rank
from jaxpipe.deepseek.block import DenseBlock, MoEBlock
from jaxpipe.deepseek.config import DENSE, MOE, MTP, ModelConfig
from jaxpipe.deepseek.head import EmbeddingAndHead
from jaxpipe.deepseek.kernels import causal_attention
from jaxpipe.deepseek.lora import is_adapter, merge
from jaxpipe.deepseek.mla import Core
from jaxpipe.deepseek.model_order import ROUTED, from_layers, parts_of, to_layers, without
from jaxpipe.deepseek.mtp import MTPLayer
from jaxpipe.flax import NNXFunction, nnx_function

PLACEMENT = ("phy2log", "log2phy", "logcnt")
UNTRAINED = (*PLACEMENT, "bias")
"""Parameters that the optimizer leaves alone, by name."""

EXACT = ("scale", "router", "bias")
"""Parameters that are float32 whatever the others are, by name."""

EMBEDDING, OUTPUT = ("embedding",), ("output",)
VOCABULARY = (EMBEDDING, OUTPUT)
"""Outer parameters with a row for each token of the vocabulary."""

REAL = "real"
"""Of a batch, and not of every one: ``bool[B, T]``, which tokens are no filling behind a sequence's last target."""

SEGMENTS = "segments"
"""Of a batch, and not of every one: ``int32[B, T]``, which document of its sequence each token is of."""

BLOCKS: Mapping[str, Callable[..., nnx.Module]] = {DENSE: DenseBlock, MOE: MoEBlock, MTP: MTPLayer}

EXPERTS = (("moe", "w_in"), ("moe", "w_out"))
IN_PARTS = (("mlp", "w_in"), ("mlp", "w_out"), ("mtp", "project"))
"""Matrices that few stages use and every rank has a place for: each device of the experts' axis keeps some rows."""


@dataclasses.dataclass(frozen=True, eq=False)
class DeepSeekModel:
    """A model for one schedule; made by `build_model`.

    Its layers are dense ones, those with experts, and with ``config.mtp`` one of multi-token prediction. Stages with
    the same row of such kinds run the same code; see `jaxpipe.StageKinds`. Parameters are stacked by slots; see
    `Arrangement`. What all layers have is one array a slot. Feed-forward layers and experts are where some
    stage's layer of that slot has them; other stages have zeros there, which nothing reads or changes.

    With multi-token prediction, activations are a pair: the layers' features and the next tokens' embeddings, of which
    the last layer makes its own features. Other layers hand them on. That layer has the model's last norm, as it reads
    normalised features, too.

    Attributes:
      config: sizes.
      arrangement: which stage has which layer.
      microbatches: of a step.
      axis: the mesh axis of the experts, or None: all are on one device.
      shared_ends: whether all pipeline ranks run embedding and head together.
      dtype: of activations and matrix products; parameters, norms and router are float32 whatever it is.
      seed: of the initial parameters.
      core: attention of queries to keys and values.
      params: initial parameters, or their shapes and dtypes.
    """

    config: ModelConfig
    arrangement: Arrangement
    microbatches: int
    axis: str | None
    shared_ends: bool
    dtype: Any
    seed: int
    core: Core
    params: Any
    _blocks: Mapping[str, NNXFunction]
    _embedding_and_head: NNXFunction

    def embed(self, outer: Any, data: Any, ctx: jaxpipe.Context) -> Any:
        """The first stage's input: the tokens' embeddings, with multi-token prediction also those of the next ones."""
        module = self._embedding_and_head.merge(outer)
        columns = self.axis if self._by_columns(EMBEDDING) else None
        if not self.config.mtp:
            return module.embed(data["tokens"], self.dtype, columns)
        both = module.embed(jnp.concatenate([data["tokens"], data["targets"]], 1), self.dtype, columns)
        return tuple(jnp.split(both, 2, 1))

    @functools.cached_property
    def stage(self) -> Callable[..., jaxpipe.Output] | jaxpipe.StageKinds:
        """One stage's layers, for stages of several kinds a function of each.

        Where a batch says which of its tokens are ``"real"``, the others go to no expert and count for no load. Where
        it has ``"segments"``, a token sees those of its own document alone.

        Metrics: ``loads [stages, slots, experts]`` at this stage's place, ``dropped``; in FP8 ``not_finite``.
        """
        shape = self.arrangement
        rows = (shape.layer_kinds[:1] * shape.slots,) if shape.alike else shape.stage_kinds
        functions = [functools.partial(self._run_layers, row) for row in rows]
        return jaxpipe.StageKinds(functions, shape.kind_of) if len(functions) > 1 else functions[0]

    def stage_of(self, stage: int) -> Callable[..., jaxpipe.Output]:
        """A stage's own function, for programs that know which stage they run."""
        found = self.stage
        return found.functions[found.kind_of[stage]] if isinstance(found, jaxpipe.StageKinds) else found

    def head(self, outer: Any, y: Any, data: Any, ctx: jaxpipe.Context) -> jax.Array | jaxpipe.Output:
        """The mean loss of a microbatch."""
        y, features = y if self.config.mtp else (y, None)
        module = self._embedding_and_head.merge(self._gather(outer))
        loss, second = module.loss(y, features, data["targets"], data["mask"])
        return loss if second is None else jaxpipe.Output(loss, self.config.mtp_weight * second)

    def losses(self, outer: Any, y: Any, data: Any, ctx: jaxpipe.Context) -> tuple[jax.Array, jax.Array]:
        """Of each sequence the sum of its targets' losses and how many they are; the head of an evaluation."""
        y = y[0] if self.config.mtp else y
        return self._embedding_and_head.merge(self._gather(outer)).losses(y, data["targets"], data["mask"])

    @property
    def prepare(self) -> Callable[..., Any] | None:
        """Makes what embedding and head get once a step, the output matrix whole; None where that is not to be."""
        gathers = bool(self.axis) and self.config.shard_outer and not self.shared_ends and not self.config.tied
        return self._gather if gathers and self.config.gather_head == "step" else None

    @staticmethod
    def weight(data: Any) -> jax.Array:
        """Targets of a microbatch that count."""
        return data["mask"].sum()

    def on_one_device(self) -> DeepSeekModel:
        """Of a program without a pipeline: parameters in the same places, shapes alone, and no mesh axis."""
        return _of_shapes(
            self.config, self.arrangement, self.microbatches, None, False, self.dtype, self.seed, self.core
        )

    def init(self, seed: jax.Array | int) -> jaxpipe.Params:
        """Initial parameters; traceable, so that jit with ``out_shardings`` makes each part where it belongs."""
        kinds = self.config.layer_kinds
        keys = jax.random.split(jax.random.key(seed), len(kinds) + 1)

        def layer(kind: str, key: jax.Array) -> Any:
            return nnx_function(BLOCKS[kind](self.config, nnx.Rngs(key), self.core, self.axis)).params

        of_kind = {kind: keys[1:][np.array([kind == other for other in kinds])] for kind in kinds}
        layers = jax.vmap(functools.partial(layer, MOE))(of_kind[MOE])
        outer = nnx_function(EmbeddingAndHead(self.config, nnx.Rngs(keys[0]))).params
        outer |= {f"layer_{index}": layer(DENSE, of_kind[DENSE][index]) for index in range(self.config.dense_layers)}
        if self.config.mtp:
            outer["mtp"] = layer(MTP, of_kind[MTP][0])
            outer["norm"] = outer["mtp"].pop("main_norm")
        return self.from_layers(self._narrowed({"layers": layers, "outer": outer}))

    def _narrowed(self, tree: Any) -> Any:
        """With adapters, frozen matrices are kept in the dtype of the products that they go into."""
        if self.config.lora is None:
            return tree

        def narrow(path: Any, leaf: jax.Array) -> jax.Array:
            name = names(path)[-1]
            exact = name in EXACT or is_adapter(name) or not jnp.issubdtype(leaf.dtype, jnp.floating)
            return leaf if exact else leaf.astype(self.dtype)

        return jax.tree_util.tree_map_with_path(narrow, tree)

    @property
    def specs(self) -> jaxpipe.Params:
        """PartitionSpec of every parameter: stages by rows over "pp", experts and some matrices over their axis too."""

        def stage(path: Any, leaf: Any) -> P:
            return P("pp", self.axis) if self.axis and names(path)[-2:] in (*EXPERTS, *IN_PARTS) else P("pp")

        def outer(path: Any, leaf: Any) -> P:
            if self.shared_ends and names(path) in VOCABULARY:
                return P("pp")
            if self._by_columns(names(path)):
                return P(None, self.axis)
            return P(self.axis) if self._in_parts(path, leaf) else P()

        return jaxpipe.Params(
            jax.tree_util.tree_map_with_path(stage, self.params.stages),
            jax.tree_util.tree_map_with_path(outer, self.params.outer),
        )

    @property
    def trained(self) -> jaxpipe.Params:
        """Of every parameter whether the optimizer changes it: all but routers' biases and placements.

        With adapters, these alone.
        """
        adapters = self.config.lora is not None

        def trained(path: Any, _: Any) -> bool:
            name = names(path)[-1]
            return is_adapter(name) if adapters else name not in UNTRAINED

        return jax.tree_util.tree_map_with_path(trained, self.params)

    @property
    def decayed(self) -> jaxpipe.Params:
        """Of every parameter whether weights decay: matrices, not the norms' scales."""
        return jax.tree_util.tree_map_with_path(
            lambda path, trained: trained and names(path)[-1] != "scale", self.trained
        )

    def merged(self, params: Any) -> tuple[DeepSeekModel, Any]:
        """The model without adapters, and parameters with these in them; both as they are where there are none.

        Merged matrices are float32, each on the devices that it is on.
        """
        if (lora := self.config.lora) is None:
            return self, params
        plain = dataclasses.replace(self.config, lora=None)
        model = _of_shapes(
            plain, self.arrangement, self.microbatches, self.axis, self.shared_ends, self.dtype, self.seed, self.core
        )
        return model, merge(params, lora)

    def to_layers(self, params: Any) -> dict[str, Any]:
        """A tree like the parameters in an order that depends on no schedule.

        Returns:
          ``"layers"``, those with experts, with leaves ``[layers, ...]`` in the order of the model; and ``"outer"``,
          all else: the dense layers as "layer_0" and so on, and multi-token prediction's as "mtp".
        """
        return to_layers(params, self.arrangement)

    def from_layers(self, tree: dict[str, Any]) -> jaxpipe.Params:
        """The inverse of `to_layers`, for this model's schedule."""
        return from_layers(tree, self.arrangement)

    def loads_of(self, aux: Any) -> jax.Array:
        """``int32[layers with experts, experts]``: tokens of the step that chose each expert."""
        return self.microbatch_loads_of(aux).sum(0, dtype=jnp.int32)

    def microbatch_loads_of(self, aux: Any) -> jax.Array:
        """``int32[microbatches, layers with experts, experts]``: the same of each microbatch."""
        stages, slots = zip(*self.arrangement.stages_and_slots(ROUTED), strict=True)
        return aux["loads"][:, jnp.asarray(stages), jnp.asarray(slots)]

    def dropped_of(self, aux: Any) -> jax.Array:
        """Choices of experts that the step dropped, beyond the capacity."""
        return aux["dropped"]

    def not_finite_of(self, aux: Any) -> jax.Array | None:
        """Blocks of numbers of the step's products in FP8 that were not finite; None where no products are in FP8."""
        return aux.get("not_finite")

    def placements(self, params: Any) -> Placement | None:
        """Of the layers with experts; None where these have no redundant slots."""
        if not self.config.redundant:
            return None
        moe = self.arrangement.to_layers(parts_of(params.stages, "moe"), ROUTED)
        return Placement(*(moe[name] for name in PLACEMENT))

    def with_placements(self, params: Any, placements: Placement) -> jaxpipe.Params:
        """Parameters with these placements, arrays of the same shapes, on the same devices."""
        if not self.config.redundant:
            raise ValueError("the model has redundant=0, so its experts stay where they are: there is no placement")
        placed = self.arrangement.from_layers(dict(zip(PLACEMENT, placements, strict=True)), ROUTED)

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
        """Parameters with selection biases moved towards equal loads ``[layers with experts, experts]``.

        With adapters, all else is frozen, and biases too.
        """
        speed = self.config.bias_update_speed
        if not speed or self.config.lora is not None:
            return params
        placed = self.arrangement.from_layers(loads.astype(jnp.float32), ROUTED)

        def move(path: Any, old: Any) -> Any:
            slot, *_, name = names(path)
            return update_bias(old, placed[slot], speed) if name == "bias" else old

        return params._replace(stages=jax.tree_util.tree_map_with_path(move, params.stages))

    def _run_layers(self, row: Sequence[str], params: Any, x: Any, ctx: jaxpipe.Context) -> jaxpipe.Output:
        """A stage with layers of these kinds; where all layers of the model are alike, they may be padding."""
        shape, config = self.arrangement, self.config
        x, known = x if config.mtp else (x, None)
        told = ctx.data if isinstance(ctx.data, Mapping) else {}
        real, segments = told.get(REAL), told.get(SEGMENTS)
        routed: dict[int, MoEStats] = {}
        for slot, kind in zip(shape.slots_of_row(row), row, strict=True):
            mask = real
            if shape.alike and shape.padded:
                here = slot < jnp.asarray(shape.counts, jnp.int32)[ctx.stage]
                mask = jnp.broadcast_to(here, x.shape[:2]) if real is None else here & real
            with jax.named_scope(f"layer_{slot}"):
                x, known, stats = self._run_layer(kind, params, slot, x, known, mask, segments)
            if stats is not None:
                routed[slot] = stats
        none = jnp.zeros(config.experts, jnp.int32)
        mine = [routed[slot].loads if slot in routed else none for slot in range(shape.slots)]
        loads = jnp.zeros((self.microbatches, shape.stages, shape.slots, config.experts), jnp.int32)
        loads = loads.at[ctx.microbatch % self.microbatches, ctx.stage].set(jnp.stack(mine))
        if routed:
            every = routed.values()
            losses, dropped = (sum(getattr(stats, name) for stats in every) for name in ("balance_loss", "dropped"))
        else:
            losses, dropped = jnp.zeros((), wide(x.dtype)), jnp.zeros((), jnp.int32)
        y = (x, known) if config.mtp else x
        metrics = {"loads": loads, "dropped": dropped}
        if config.moe.recipe.arithmetic is not None:
            metrics["not_finite"] = sum((stats.not_finite for stats in routed.values()), jnp.int32(0))
        return jaxpipe.Output(y, config.balance_factor * losses, metrics)

    def _run_layer(
        self,
        kind: str,
        params: Any,
        slot: int,
        x: jax.Array,
        known: jax.Array | None,
        mask: jax.Array | None,
        segments: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None, MoEStats | None]:
        """One layer: features, what goes beside them, and the routing's statistics."""
        again = jax.checkpoint if self.config.remat == "layer" else lambda function: function
        function, own = self._blocks[kind], params[f"layer_{slot}"]
        if kind == DENSE:
            block = again(lambda own, x, segments: function(own, x, segments))
            return block(without(own, "moe"), x, segments), known, None
        own = without(own, "mlp")
        if kind == MTP:
            block = again(lambda own, x, known, mask, segments: function(own, x, known, mask, segments))
            return block({**params["mtp"], "block": own}, x, known, mask, segments)
        block = again(lambda own, x, mask, segments: function(own, x, mask, segments))
        x, stats = block(own, x, mask, segments)
        return x, known, stats

    def _in_parts(self, path: Any, leaf: Any) -> bool:
        """Whether each device of the experts' axis keeps a part of an outer parameter."""
        if self.shared_ends and names(path) in VOCABULARY:
            return False
        return bool(self.axis) and self.config.shard_outer and leaf.ndim > 1

    def _by_columns(self, name: tuple[str, ...]) -> bool:
        """Whether each device of the experts' axis keeps columns of an outer parameter: the embedding's, if any.

        It then looks up all devices' tokens and sends each its part, a hundredth of what gathering the table takes.
        """
        return name == EMBEDDING and bool(self.axis) and self.config.shard_outer and not self.shared_ends

    def _gather(self, outer: Any) -> Any:
        """Outer parameters of the head whole, gathered in the compute dtype where each device has a part of them."""

        def gather(path: Any, leaf: jax.Array) -> jax.Array:
            used = self.config.tied or names(path) != EMBEDDING
            whole = leaf.shape == (self.config.vocab, self.config.width)
            if not self._in_parts(path, leaf) or not used or whole:
                return leaf
            columns = self._by_columns(names(path))
            return jax.lax.all_gather(leaf.astype(self.dtype), self.axis, axis=int(columns), tiled=True)

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

    Stages get layers so that the costliest, and the rank with most work, have as little to do as can be, by
    ``config.costs``.

    Args:
      config: sizes.
      schedule: whose stages get the layers.
      seed: of the initial parameters, which depend on neither schedule nor mesh.
      axis: the mesh axis that experts, and the batch, are spread over; None: one device has all.
      dtype: of activations and matrix products.
      abstract: parameters are shapes and dtypes only; `DeepSeekModel.init` makes them later.
      core: attention of queries to keys and values.

    Raises:
      ValueError: a vocabulary that does not divide over ranks that share it.

    >>> from jaxpipe.deepseek.config import MODELS
    >>> schedule = jaxpipe.schedule.build("dualpipev", 2, 4)
    >>> model = build_model(MODELS["tiny"], schedule, 0, axis="ep", abstract=True)
    >>> model.arrangement.counts, model.params.outer["embedding"].shape
    ((2, 3, 2, 2), (256, 64))
    """
    ranks = schedule.num_ranks
    shared = axis is not None and ranks > 1
    if shared:
        shared = sharing_pays(config, schedule) if config.shared_ends is None else config.shared_ends
    if shared and config.vocab % ranks:
        raise ValueError(
            f"a vocabulary of {config.vocab} does not divide over {ranks} pipeline ranks: take vocab="
            f"{config.vocab + -config.vocab % ranks} or shared_ends=False"
        )
    arrangement = _arrange(config, schedule, shared)
    model = _of_shapes(config, arrangement, schedule.num_microbatches, axis, shared, jnp.dtype(dtype), seed, core)
    return model if abstract else dataclasses.replace(model, params=jax.jit(lambda: model.init(seed))())


def sharing_pays(config: ModelConfig, schedule: jaxpipe.schedule.Schedule) -> bool:
    """Whether the rank with most work has less of it where all ranks run embedding and head together.

    Ranks that do must also wait for each other several times a microbatch, which is not counted.

    Args:
      config: the sizes, and what layers and ends cost.
      schedule: whose ranks have the layers.

    >>> from jaxpipe.deepseek import MODELS
    >>> [sharing_pays(MODELS["moe-1b"], jaxpipe.schedule.build("1f1b", ranks, 16)) for ranks in (2, 16)]
    [False, True]
    """
    if config.vocab % schedule.num_ranks:
        return False
    costs = config.costs

    def most(shared: bool) -> float:
        """Of a rank, for one microbatch."""
        stages = [sum(costs.layers[kind] for kind in row) for row in _arrange(config, schedule, shared).rows]
        if shared:
            return busiest_rank(stages, schedule.routes) + (costs.head + costs.embedding) / schedule.num_ranks
        stages[0] += costs.embedding
        stages[-1] += costs.head
        return busiest_rank(stages, schedule.routes)

    return most(True) < most(False)


def _of_shapes(
    config: ModelConfig,
    arrangement: Arrangement,
    microbatches: int,
    axis: str | None,
    shared: bool,
    dtype: Any,
    seed: int,
    core: Core,
) -> DeepSeekModel:
    """The model without arrays."""
    blocks = {
        kind: nnx_function(nnx.eval_shape(lambda kind=kind: BLOCKS[kind](config, nnx.Rngs(0), core, axis)))
        for kind in dict.fromkeys(config.layer_kinds)
    }
    outer = nnx_function(nnx.eval_shape(lambda: EmbeddingAndHead(config, nnx.Rngs(0), "pp" if shared else None)))
    model = DeepSeekModel(config, arrangement, microbatches, axis, shared, dtype, seed, core, None, blocks, outer)
    return dataclasses.replace(model, params=jax.eval_shape(lambda: model.init(seed)))


def names(path: Any) -> tuple[str, ...]:
    """The keys of a leaf's path as text, for example ("layer_0", "moe", "bias")."""
    return tuple(str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path)


def _arrange(config: ModelConfig, schedule: jaxpipe.schedule.Schedule, shared: bool) -> Arrangement:
    """The model's layers over a schedule's stages."""
    kinds, costs = config.layer_kinds, config.costs
    if config.layer_costs is None and len(set(kinds)) == 1:
        return Arrangement.of(kinds, schedule)
    return Arrangement.of(kinds, schedule, costs.layers, *((0.0, 0.0) if shared else (costs.head, costs.embedding)))
