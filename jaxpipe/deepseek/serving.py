"""The model for inference: parameters layer by layer, and what runs on them, with and without a cache.

Attention caches latents and rotary keys, `jaxpipe.deepseek.Latents.rows`, and nothing of heads. Experts are spread over
the one axis of a mesh, or all on one device; each device has some of the requests.

Shapes: B requests of this device, T tokens of each, D width, V vocabulary, S tokens that a cache holds, C of one token
in it, E logical experts, L layers with experts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

import jaxpipe
from eplb_jax import ExpertParams, MoEParams, Placement, moe_layer, working_copies
from eplb_jax.kernels.dtypes import wide
from eplb_jax.kernels.fp8_linear import scaled_feed_forward
from eplb_jax.moe.carried import Products
from eplb_jax.moe.fp8_experts import quantise_experts
from jaxpipe.deepseek.block import apply_block
from jaxpipe.deepseek.config import ModelConfig
from jaxpipe.deepseek.kernels import causal_attention
from jaxpipe.deepseek.layers import feed_forward, rms_norm
from jaxpipe.deepseek.linear import takes_fp8
from jaxpipe.deepseek.mla import Core, MLAParams, attend, attend_cached, keep_mla
from jaxpipe.deepseek.model import PLACEMENT, build_model

AXIS = "ep"
"""The axis of a mesh that serves."""


class ServedLayer(NamedTuple):
    """Parameters of one layer, in the dtype of the activations but for norms, router and its bias.

    Attributes:
      attention_norm, mlp_norm: scales.
      attention: of `attend` and `attend_cached`.
      mlp: both matrices of a layer without experts, or None.
      moe: experts by slot, or None.
      placement: which slots; None: slot i holds expert i.
    """

    attention_norm: Float[Array, " D"]
    attention: MLAParams
    mlp_norm: Float[Array, " D"]
    mlp: tuple[jax.Array, jax.Array] | None
    moe: MoEParams | None
    placement: Placement | None


class ServedModel(NamedTuple):
    """Parameters of a model for inference.

    Attributes:
      embedding: rows of the vocabulary.
      layers: in the order of the forward pass, without multi-token prediction's.
      norm: the last scale.
      output: the output matrix; None: the embedding is.
    """

    embedding: Float[Array, "V D"]
    layers: tuple[ServedLayer, ...]
    norm: Float[Array, " D"]
    output: Float[Array, "V D"] | None


def serving_mesh(mesh: Mesh) -> Mesh:
    """All devices of a mesh, as of training, on one axis: experts and requests are spread over them.

    >>> serving_mesh(jax.make_mesh((1, 1), ("pp", "ep"))).axis_names
    ('ep',)
    """
    return Mesh(mesh.devices.reshape(-1), (AXIS,))


def serve(
    config: ModelConfig,
    tree: Mapping[str, Any],
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    placements: Placement | None = None,
    mesh: Mesh | None = None,
) -> ServedModel:
    """Parameters for inference of those of `DeepSeekModel.to_layers`.

    Args:
      config: of the model. Where its precision is "fp8", matrices are in 8 bits once and for all.
      tree: parameters in the order of the model, arrays anywhere.
      dtype: of activations and products.
      placements: of all layers with experts, as `eplb_jax.rebalance_experts` makes them; its slots are those of all
        devices. None: that of the tree, or without redundant slots, expert i in slot i.
      mesh: from `serving_mesh`, over which experts are spread; None: one device.

    Raises:
      ValueError: slots that do not divide over the devices, with a remedy; a placement of other layers or experts.

    >>> import jaxpipe
    >>> from jaxpipe.deepseek import MODELS, build_model
    >>> model = build_model(MODELS["tiny"], jaxpipe.schedule.build("1f1b", 1, 1), 0)
    >>> served = serve(model.config, model.to_layers(model.params))
    >>> len(served.layers), served.layers[1].moe.experts.w_in.shape
    (9, (12, 64, 96))
    """
    placed = _placements(config, placements, mesh)
    ends, dense, routed = _makers(config, jnp.dtype(dtype), mesh)
    outer = tree["outer"]
    layers = [dense(outer[f"layer_{index}"]) for index in range(config.dense_layers)]
    for index, own in enumerate(placed):
        # Arrays on the host go to the device layer by layer.
        layers.append(routed(jax.tree.map(lambda leaf, index=index: leaf[index], tree["layers"]), own))
    embedding, norm, output = ends({name: outer[name] for name in ("embedding", "norm", "output") if name in outer})
    return ServedModel(embedding, tuple(layers), norm, output)


def serve_random(
    config: ModelConfig,
    seed: int,
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    placements: Placement | None = None,
    mesh: Mesh | None = None,
) -> ServedModel:
    """As `serve`, of random parameters, which are made layer by layer: what runs is there, what it says means nothing.

    Args:
      config, dtype, placements, mesh: see there.
      seed: of the parameters.

    Raises:
      ValueError: see there.
    """
    one = dataclasses.replace(config, layers=config.dense_layers + 1, mtp=False, layer_costs=None)
    schedule = jaxpipe.schedule.build("1f1b", 1, 1)
    model = build_model(one, schedule, seed, abstract=True)
    placed = _placements(config, placements, mesh)
    ends, dense, routed = _makers(config, jnp.dtype(dtype), mesh)

    @jax.jit
    def layer(seed: jax.Array, placement: Placement | None) -> ServedLayer:
        stack = model.to_layers(model.init(seed))["layers"]
        return routed(jax.tree.map(lambda leaf: leaf[0], stack), placement)

    @jax.jit
    def others(seed: jax.Array) -> Any:
        outer = model.to_layers(model.init(seed))["outer"]
        return ends(outer), [dense(outer[f"layer_{index}"]) for index in range(config.dense_layers)]

    (embedding, norm, output), first = others(jnp.int32(seed))
    layers = [layer(jnp.int32(seed + index), own) for index, own in enumerate(placed)]
    return ServedModel(embedding, (*first, *layers), norm, output)


def _placements(config: ModelConfig, placements: Placement | None, mesh: Mesh | None) -> list[Placement | None]:
    """One for each layer with experts, checked."""
    devices = 1 if mesh is None else mesh.size
    slots = config.experts + config.redundant if placements is None else placements.num_replicas
    if slots % devices:
        raise ValueError(
            f"{slots} slots of experts do not divide over {devices} devices: give placements of "
            f"{slots + -slots % devices} slots"
        )
    if placements is None:
        return [None] * config.moe_layers
    if (placements.num_layers, placements.num_experts) != (config.moe_layers, config.experts):
        raise ValueError(
            f"placements of {placements.num_layers} layers and {placements.num_experts} experts: the model has "
            f"{config.moe_layers} and {config.experts}"
        )
    placements = placements.padded()
    return [jax.tree.map(jnp.asarray, placements.of_layer(index)) for index in range(config.moe_layers)]


def _makers(config: ModelConfig, dtype: jnp.dtype, mesh: Mesh | None) -> tuple[Any, Any, Any]:
    """Jitted functions that make embedding, norm and output; a layer without experts; one with."""

    def finish(made: Any) -> Any:
        return made if mesh is None else _constrained(made, mesh)

    @jax.jit
    def ends(outer: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        output = None if config.tied else outer["output"].astype(dtype)
        return finish((outer["embedding"].astype(dtype), outer["norm"]["scale"], output))

    @jax.jit
    def dense(layer: Any) -> ServedLayer:
        mlp = tuple(layer["mlp"][name].astype(dtype) for name in ("w_in", "w_out"))
        return finish(_common(config, layer, dtype)._replace(mlp=mlp))

    @jax.jit
    def routed(layer: Any, placement: Placement | None) -> ServedLayer:
        if placement is None and config.redundant:
            placement = Placement(*(layer["moe"][name] for name in PLACEMENT))
        common = _common(config, layer, dtype)
        return finish(common._replace(moe=_experts(config, layer["moe"], placement, dtype), placement=placement))

    return ends, dense, routed


def served_specs(model: ServedModel) -> ServedModel:
    """PartitionSpecs of served parameters, arrays or shapes: experts over the mesh's axis, all else whole."""
    whole = jax.tree.map(lambda _: P(), model._replace(layers=()))
    return whole._replace(layers=tuple(map(_layer_specs, model.layers)))


class Prefilled(NamedTuple):
    """What prompts leave behind.

    Attributes:
      features: of each request's last token.
      caches: of each layer.
      loads: tokens of this device that chose each expert; int32.
    """

    features: Float[Array, "B D"]
    caches: tuple[Float[Array, "B S C"], ...]
    loads: Int[Array, "L E"]


def prefill(
    model: ServedModel,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    space: int,
    config: ModelConfig,
    *,
    axis: str | None = None,
    core: Core = causal_attention,
) -> Prefilled:
    """Prompts of different lengths at once.

    Args:
      model: from `serve`; within `jax.shard_map` this device's part.
      tokens: prompts, then anything.
      lengths: tokens of each prompt, from 0: a request without any has features that mean nothing.
      space: tokens that the caches hold, T or more.
      config: of the model.
      axis: the mesh axis of the experts, or None.
      core: attention of queries to keys and values.
    """
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    real = places < lengths[:, None]
    features, rows, loads = _run(model, tokens, real, config, axis, core)
    caches = tuple(jnp.pad(row, ((0, 0), (0, space - row.shape[1]), (0, 0))) for row in rows)
    last = jnp.maximum(lengths - 1, 0)
    return Prefilled(jnp.take_along_axis(features, last[:, None, None], 1)[:, 0], caches, loads)


def decode(
    model: ServedModel,
    tokens: Int[Array, " B"],
    caches: tuple[Float[Array, "B S C"], ...],
    lengths: Int[Array, " B"],
    alive: Bool[Array, " B"],
    config: ModelConfig,
    *,
    axis: str | None = None,
) -> Prefilled:
    """One more token of each request.

    Args:
      model: as of `prefill`.
      tokens: that come next.
      caches: of all tokens before, from `prefill` or the last call.
      lengths: tokens cached of each request.
      alive: which requests go on; the others' tokens go to no expert.
      config: of the model.
      axis: the mesh axis of the experts, or None.

    Returns:
      Features of the new tokens, and the caches with them at ``lengths``.
    """
    x = model.embedding[tokens]
    filled, loads = [], []
    for index, (layer, cache) in enumerate(zip(model.layers, caches, strict=True)):
        attention = functools.partial(_cached, layer, cache, lengths, config)
        with jax.named_scope(f"layer_{index}"):
            x, cache, counted = _apply(layer, x, attention, config, axis, alive)
        filled.append(cache)
        loads += counted
    return Prefilled(x, tuple(filled), jnp.stack(loads))


def token_features(
    model: ServedModel,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    config: ModelConfig,
    *,
    axis: str | None = None,
    core: Core = causal_attention,
) -> tuple[Float[Array, "B T D"], Int[Array, "L E"]]:
    """The last layer's features of every token of whole sequences, without a cache, and experts' loads.

    Args:
      model: as of `prefill`.
      tokens: sequences.
      mask: which tokens are real: the others come after all that are.
      config: of the model.
      axis: the mesh axis of the experts, or None.
      core: attention of queries to keys and values.

    Returns:
      What `head_logits` takes, and how many tokens of this device chose each expert.
    """
    features, _, loads = _run(model, tokens, mask, config, axis, core)
    return features, loads


def head_logits(model: ServedModel, features: Float[Array, "*batch D"], config: ModelConfig) -> jax.Array:
    """``[..., D] -> float32[..., V]``; float64 for float64."""
    matrix = model.embedding if model.output is None else model.output
    with jax.named_scope("head"):
        normal = rms_norm(features, model.norm, config.norm_eps)
        return jnp.einsum("...d,vd->...v", normal, matrix, preferred_element_type=wide(features.dtype))


def _run(
    model: ServedModel, tokens: jax.Array, real: jax.Array, config: ModelConfig, axis: str | None, core: Core
) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """Whole sequences through all layers: features, `Latents.rows` of each layer, loads."""
    x = model.embedding[tokens]
    kept, loads = [], []
    for index, layer in enumerate(model.layers):
        attention = functools.partial(_whole, layer, config, core)
        with jax.named_scope(f"layer_{index}"):
            x, rows, counted = _apply(layer, x, attention, config, axis, real)
        kept.append(rows)
        loads += counted
    return x, kept, jnp.stack(loads)


def _whole(layer: ServedLayer, config: ModelConfig, core: Core, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y, latents = attend(layer.attention, x, config, core=core)
    return y, latents.rows()


def _cached(
    layer: ServedLayer, cache: jax.Array, lengths: jax.Array, config: ModelConfig, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return attend_cached(layer.attention, x, cache, lengths, config)


def _apply(
    layer: ServedLayer, x: jax.Array, attention: Any, config: ModelConfig, axis: str | None, real: jax.Array
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """One layer: tokens, what the attention keeps, and experts' loads where it has some."""

    def mlp(x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        if layer.mlp is not None:
            with jax.named_scope("mlp"):
                return _feed_forward(x, *layer.mlp, config), []
        assert layer.moe is not None
        flat, moe = x.reshape(-1, x.shape[-1]), without_drops(config).moe
        y, stats = moe_layer(layer.moe, flat, moe, placement=layer.placement, axis=axis, mask=real.reshape(-1))
        return y.reshape(x.shape), [stats.loads]

    def norm(scale: jax.Array) -> Any:
        return lambda x: rms_norm(x, scale, config.norm_eps)

    return apply_block(x, norm(layer.attention_norm), attention, norm(layer.mlp_norm), mlp)


def _feed_forward(x: jax.Array, w_in: jax.Array, w_out: jax.Array, config: ModelConfig) -> jax.Array:
    if config.precision == "fp8" and takes_fp8(*w_in.shape) and takes_fp8(*w_out.shape):
        return scaled_feed_forward(x, w_in, w_out)
    return feed_forward(x, w_in, w_out)


def without_drops(config: ModelConfig) -> ModelConfig:
    """The model with room for the worst case, so that no choice of an expert is ever dropped."""
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, capacity_factor=None))


def _common(config: ModelConfig, layer: Any, dtype: jnp.dtype) -> ServedLayer:
    """What all layers have."""

    def part(name: str) -> Any:
        value = layer["attention"].get(name)
        if isinstance(value, Mapping):
            return value["scale"]
        return None if value is None else value.astype(dtype)

    attention = MLAParams._make(map(part, MLAParams._fields))
    if config.precision == "fp8":
        attention = keep_mla(attention)
    return ServedLayer(layer["attention_norm"]["scale"], attention, layer["mlp_norm"]["scale"], None, None, None)


def _experts(config: ModelConfig, moe: Any, placement: Placement | None, dtype: jnp.dtype) -> MoEParams:
    """Experts by slot."""
    phy2log = jnp.arange(config.experts, dtype=jnp.int32) if placement is None else placement.phy2log
    masters = ExpertParams(moe["w_in"].astype(dtype), moe["w_out"].astype(dtype))
    experts: Any = working_copies(masters, phy2log)
    shared: Any = None
    if config.moe.num_shared:
        shared = ExpertParams(moe["shared_in"].astype(dtype), moe["shared_out"].astype(dtype))
    if (arithmetic := config.moe.recipe.arithmetic) is not None:
        products = Products(arithmetic, config.moe.backend)
        experts = quantise_experts(experts, products, differentiable=False)
        shared = None if shared is None else quantise_experts(shared, products, differentiable=False)
    exact = wide(dtype)
    return MoEParams(moe["router"].astype(exact), moe["bias"].astype(exact), experts, shared)


def _constrained(made: Any, mesh: Mesh) -> Any:
    """Within a jitted function: experts spread over the mesh, all else whole on each device."""
    specs = _layer_specs(made) if isinstance(made, ServedLayer) else jax.tree.map(lambda _: P(), made)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.lax.with_sharding_constraint(made, shardings)


def _layer_specs(layer: ServedLayer) -> ServedLayer:
    specs = jax.tree.map(lambda _: P(), layer)
    if layer.moe is None:
        return specs
    experts = jax.tree.map(lambda _: P(AXIS), layer.moe.experts)
    return specs._replace(moe=specs.moe._replace(experts=experts))
