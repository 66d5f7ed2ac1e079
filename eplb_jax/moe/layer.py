"""The mixture-of-experts layer: route, dispatch, experts, combine.

One function of one device's tokens, to be called within `jax.shard_map` over the experts' axis (other axes may be the
compiler's), or with all experts on one device and no axis.

Shapes: T tokens of this device, D width, k choices, E logical experts, S slots of this device, F hidden width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from eplb_jax.kernels.dtypes import wide
from eplb_jax.kernels.mesh_axis import is_bound, size_and_index
from eplb_jax.kernels.recipe import RECIPES, Recipe
from eplb_jax.kernels.registry import Backend
from eplb_jax.moe import exchange
from eplb_jax.moe.carried import Products, add_results, scale_tokens
from eplb_jax.moe.dispatch import Capacities, check_capacity_factor, plan_sends, sort_by_slot
from eplb_jax.moe.dispatchers import DISPATCHERS, NODES, Dense
from eplb_jax.moe.exact import plan_gift, why_not, with_gift
from eplb_jax.moe.experts import ExpertParams, apply_experts, init_experts, shared_in, shared_out, working_copies
from eplb_jax.moe.fp8_experts import ScaledExperts, scaled_working_copies
from eplb_jax.moe.fp8_layer import Ways, local_results, scaled_layer
from eplb_jax.moe.levels import Level, make_levels
from eplb_jax.moe.permute import permute, permute_each, unpermute
from eplb_jax.moe.replica import CHOICES, choose_replicas, node_size
from eplb_jax.moe.router import RouterConfig, balance_loss, of_real_tokens, route, router_logits
from eplb_jax.moe.split import choose_by_amounts
from eplb_jax.plan.placement import Placement

ROWS = 8
"""Masters have a multiple of so many rows unless told otherwise, and so divide over the devices of a host."""


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Sizes and choices of a layer; static.

    Attributes:
      width: of the activations, D.
      hidden: of an expert, F.
      router: how tokens choose experts.
      num_shared: shared experts, which every token goes to.
      masters: rows of the routed experts' masters. Rows after the last expert are zeros that nothing reads; with them
        masters divide over devices whose number does not divide the experts. None: a multiple of `ROWS`.
      capacity_factor: rows for tokens, as a factor of what evenly spread choices need; None: for the worst case, so
        that nothing is ever dropped.
      replicas: which replica a token goes to, "hash", "nearest" or "split", by the loads of the step, for which devices
        tell each other how many tokens chose each expert; see `eplb_jax.moe.replica`.
      devices_per_node: consecutive devices that share a node, for "nearest", "split" and "nodes"; None: all.
      exchange: "dense", an all-to-all of fixed size; "nodes", one between nodes of ``devices_per_node`` and one within
        each, for which a token travels at most once to a node, see `eplb_jax.moe.levels`; or "ragged",
        `jax.lax.ragged_all_to_all`: GPU only.
      fp8: short for the precision "fp8".
      backend: of the grouped matrix products and of moved rows, see `eplb_jax.grouped_matmul`; the gate's gradient gets
        its kernel where that can make it, but for "xla".
      fetched: experts that one device may get from another for its working copies, `eplb_jax.most_fetched`; None: all
        masters are gathered. See `eplb_jax.working_copies`.
      exact: experts that a device may get from the other for a microbatch, so that both have equally many tokens, and
        ``capacity_factor=1.0`` drops none where these experts suffice; for an axis of two devices, without a placement.
        See `eplb_jax.moe.exact`. None: tokens go where their experts are.
      precision: "bf16", which leaves all numbers as they are, "fp8", which makes the products of routed and shared
        experts in 8 bits as DeepSeek-V3 does, or another name of `eplb_jax.kernels.recipe.RECIPES`: how rows travel and
        what products are made of. None: what ``fp8`` says.

    Raises:
      ValueError: sizes below 1 or that do not fit, unknown choices, two different recipes.
    """

    width: int = 7168
    hidden: int = 2048
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    num_shared: int = 1
    masters: int | None = None
    capacity_factor: float | None = None
    replicas: str = "hash"
    devices_per_node: int | None = None
    exchange: str = "dense"
    fp8: bool = False
    backend: Backend = "auto"
    precision: str | None = None
    fetched: int | None = None
    exact: int | None = None

    def __post_init__(self) -> None:
        """Checks sizes and choices."""
        if min(self.width, self.hidden) < 1 or self.num_shared < 0:
            raise ValueError(f"width={self.width}, hidden={self.hidden}, num_shared={self.num_shared}: sizes below 1")
        if self.masters is not None and self.masters < self.router.num_experts:
            raise ValueError(
                f"masters={self.masters}: {self.router.num_experts} experts need as many rows or more, or None"
            )
        check_capacity_factor(self.capacity_factor)
        if self.replicas not in CHOICES:
            raise ValueError(f"replicas={self.replicas!r}: it must be one of {CHOICES}")
        if self.exchange not in (*DISPATCHERS, NODES):
            raise ValueError(f"exchange={self.exchange!r}: it must be one of {(*DISPATCHERS, NODES)}")
        if self.precision not in (None, *RECIPES):
            raise ValueError(f"precision={self.precision!r}: it must be one of {tuple(RECIPES)}, or None")
        if self.fp8 and self.precision not in (None, "fp8"):
            raise ValueError(f"fp8=True and precision={self.precision!r} ask for two recipes: give one of them")
        for name in ("fetched", "exact"):
            count = getattr(self, name)
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise ValueError(f"{name}={count!r}: it must be an integer of at least 1, experts, or None")
        if self.exact is not None and self.recipe.arithmetic is not None:
            raise ValueError(
                f"exact={self.exact} with precision={self.recipe.name!r}: experts are given as plain numbers only, so "
                "take precision='bf16', or exact=None"
            )
        travels = Dense() if self.exchange == NODES else DISPATCHERS[self.exchange]
        if reason := self.recipe.why_not(self.width, self.hidden) or travels.why_not(self.recipe):
            raise ValueError(reason)

    @property
    def recipe(self) -> Recipe:
        """The recipe that ``precision`` names, or ``fp8`` where it is None.

        >>> MoEConfig(fp8=True).recipe is MoEConfig(precision="fp8").recipe
        True
        """
        return RECIPES[self.precision or ("fp8" if self.fp8 else "bf16")]

    @property
    def num_masters(self) -> int:
        """Rows of the routed experts' masters.

        >>> [MoEConfig(router=RouterConfig(experts, 2, 1, 1)).num_masters for experts in (12, 64)]
        [16, 64]
        """
        experts = self.router.num_experts
        return experts + -experts % ROWS if self.masters is None else self.masters


class MoEParams(NamedTuple):
    """Parameters of a layer as it computes.

    Attributes:
      router: float32 whatever the compute dtype.
      bias: for selection only, changed by `eplb_jax.moe.router.update_bias`, not by gradients; or None.
      experts: by slot; see `eplb_jax.moe.experts.working_copies`. This device's part.
      shared: the shared experts side by side, [1, ...], or None.
    """

    router: Float[Array, "D E"]
    bias: Float[Array, " E"] | None
    experts: ExpertParams | ScaledExperts
    shared: ExpertParams | ScaledExperts | None


class MoEStats(NamedTuple):
    """What a layer returns besides its output; of this device's tokens, so sums over devices are global.

    Attributes:
      loads: tokens that chose each logical expert; int32.
      dropped: choices that were dropped for lack of capacity, counted on the device that dropped them; int32.
      balance_loss: without its factor; the mean over this device's tokens, or where there is a mask, the same on all
        devices of the axis: over all their real tokens. So the mean over devices is that over real tokens either way.
      not_finite: blocks of numbers that share a scale, among the operands of this device's products in 8 bits, that
        hold something infinite or NaN; int32. They make results and gradients NaN. Scales are made of the numbers
        themselves, so none ever saturates. 0 where products are not in 8 bits.
    """

    loads: Int[Array, " E"]
    dropped: Int[Array, ""]
    balance_loss: Float[Array, ""]
    not_finite: Int[Array, ""]


def init_moe(
    key: jax.Array, config: MoEConfig, dtype: jax.typing.DTypeLike = jnp.float32, *, axis: str | None = None
) -> MoEParams:
    """Parameters by logical expert: masters, which are working copies too while no expert has several replicas.

    Args:
      key: the same on all devices.
      config: sizes. Experts have ``config.num_masters`` rows, those behind the last expert zeros.
      dtype: of the parameters; the router has float32, or float64.
      axis: the mesh axis of the experts. Where a `jax.shard_map` binds it, experts are this device's rows of them.

    Raises:
      ValueError: rows that do not divide over the devices.

    >>> config = MoEConfig(width=8, hidden=4, router=RouterConfig(12, 2, 1, 1))
    >>> jax.tree.map(jnp.shape, init_moe(jax.random.key(0), config)).experts.w_out
    (16, 4, 8)
    """
    keys = jax.random.split(key, 3)
    experts = config.router.num_experts
    router = jax.random.normal(keys[0], (config.width, experts), wide(dtype))
    shared = None
    if config.num_shared:
        shared = init_experts(keys[1], 1, config.width, config.hidden * config.num_shared, dtype)
    bias = jnp.zeros(experts, wide(dtype))
    routed = init_experts(keys[2], experts, config.width, config.hidden, dtype)
    padding = (0, config.num_masters - experts), (0, 0), (0, 0)
    routed = jax.tree.map(lambda leaf: jnp.pad(leaf, padding), routed)
    if axis is not None and is_bound(axis):
        devices, device = size_and_index(axis)
        _check_masters(config, devices, axis)
        rows = config.num_masters // devices
        routed = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, device * rows, rows), routed)
    return MoEParams(router * config.width**-0.5, bias, routed, shared)


def param_specs(config: MoEConfig, axis: str) -> MoEParams:
    """How `jax.shard_map` shards parameters over the mesh axis of the experts: experts by rows, all else whole.

    Raises:
      ValueError: masters that do not divide over the axis, where a mesh with it is in scope (`jax.set_mesh`).

    >>> tuple(param_specs(MoEConfig(), "ep").experts.w_in)
    ('ep',)
    """
    _check_masters(config, dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1), axis)
    whole: Any = PartitionSpec()
    rows: Any = PartitionSpec(axis)
    shared = ExpertParams(whole, whole) if config.num_shared else None
    return MoEParams(whole, whole, ExpertParams(rows, rows), shared)


def moe_layer(
    params: MoEParams,
    x: Float[Array, "T D"],
    config: MoEConfig,
    *,
    placement: Placement | None = None,
    axis: str | None = None,
    sequences: int = 1,
    mask: Bool[Array, " T"] | None = None,
) -> tuple[Float[Array, "T D"], MoEStats]:
    """Sends each token through its experts and the shared ones.

    Args:
      params: experts by slot, this device's slots. Where products are made in 8 bits, experts may be
        `eplb_jax.moe.fp8_experts.ScaledExperts`, quantised already.
      x: this device's tokens.
      config: sizes and choices.
      placement: of this layer, `Placement.of_layer`; its values may change from call to call without compiling again.
        None: slot i holds expert i.
      axis: the mesh axis that experts are sharded over, bound by `jax.shard_map`; None: all slots are here.
      sequences: how many sequences of equal length the tokens are, for the balance loss.
      mask: which tokens are real. The others may hold anything, even NaN: they go to no expert, routed or shared, come
        out as zeros, give and get no gradient, and count nowhere.

    Returns:
      The output, in x's dtype, and statistics.

    Raises:
      ValueError: sizes that do not fit, an axis that is not bound.

    Source: the DeepSeek-V3 report, arXiv 2412.19437, 2.1.2 and 3.2.2.

    >>> config = MoEConfig(width=8, hidden=4, router=RouterConfig(4, 2, 1, 1))
    >>> y, stats = moe_layer(init_moe(jax.random.key(0), config), jnp.ones((6, 8)), config)
    >>> y.shape, int(stats.loads.sum()), int(stats.dropped)
    ((6, 8), 12, 0)
    """
    devices, device = size_and_index(axis)
    alone = axis is None or devices == 1
    exact, per_node = (None, None) if alone else (config.exact, config.devices_per_node)
    slots = _check(params, x, config, placement, devices, axis)
    x = of_real_tokens(x, mask)
    with jax.named_scope("router"):
        routing = route(router_logits(x, params.router), config.router, bias=params.bias, mask=mask)
        # Without a mask all devices have as many tokens, and nothing needs to travel.
        everyone = None if mask is None else axis
        loss = balance_loss(routing, config.router, sequences=sequences, axis_name=everyone)
        chosen = routing.experts
        if placement is not None:
            counts = None
            if config.replicas == "split":
                counts = routing.loads[None] if alone else jax.lax.all_gather(routing.loads, axis)
            chosen = choose_replicas(
                chosen,
                placement,
                first_token=device * x.shape[0],
                choice=config.replicas,
                device=device,
                num_devices=devices,
                devices_per_node=per_node,
                counts=counts,
            )
        if exact is not None:
            counts = jax.lax.all_gather(routing.loads, axis)
            gift = plan_gift(counts.sum(0, dtype=jnp.int32), slots, exact)
            chosen = choose_by_amounts(chosen, gift.placement, counts, gift.wanted, device, per_node=1)
    if exact is not None:
        assert axis is not None
        with jax.named_scope("give_experts"):
            params = params._replace(experts=with_gift(params.experts, gift, axis))
        slots += exact
    sizes = x.shape[0], devices, slots, per_node
    levels, capacities = make_levels(config.exchange, config.router, config.capacity_factor, *sizes)
    if exact is not None:  # what a device computes is even, what it gets from either need not be
        levels = tuple(level._replace(capacity=x.shape[0]) for level in levels)
    bad = jnp.int32(0)
    if products := _products(config):
        way = None if axis is None or devices == 1 else Ways(levels, axis)
        experts = params.experts, params.shared
        y, dropped, bad = scaled_layer(*experts, x, chosen, routing.weights, slots, capacities, products, way)
    elif axis is None or devices == 1:
        y, dropped = local_experts(params.experts, x, chosen, routing.weights, slots, capacities, config)
        shared: Any = params.shared
        if shared is not None:
            with jax.named_scope("shared_expert"):
                y = y + shared_out(shared, shared_in(shared, x))
    else:
        y, dropped = _remote(params, x, chosen, routing.weights, slots, capacities, config, axis, levels)
    return of_real_tokens(y, mask), MoEStats(routing.loads, dropped, loss, bad)


def working_copies_for(
    masters: ExpertParams, phy2log: Int[Array | np.ndarray, " P"], config: MoEConfig, axis: str | None = None
) -> ExpertParams | ScaledExperts:
    """`eplb_jax.working_copies` of a layer's experts, gathered in 8 bits where its recipe says so.

    Args:
      masters, phy2log, axis: as there.
      config: of the layer.

    Raises:
      ValueError: as there.

    >>> config = MoEConfig(width=128, hidden=128, router=RouterConfig(4, 2, 1, 1), precision="fp8")
    >>> working_copies_for(init_moe(jax.random.key(0), config).experts, jnp.array([0, 1, 2, 3, 0]), config).w_in.shape
    (5, 128, 256)
    """
    products = _products(config)
    if products is None or not config.recipe.gather:
        with jax.named_scope("copies"):
            return working_copies(masters, phy2log, axis, fetched=config.fetched)
    with jax.named_scope("copies"):
        return scaled_working_copies(masters, phy2log, products, axis, fetched=config.fetched)


def local_experts(
    experts: ExpertParams | ScaledExperts,
    x: jax.Array,
    slots: jax.Array,
    weights: jax.Array,
    num_slots: int,
    capacities: Capacities,
    config: MoEConfig,
) -> tuple[jax.Array, jax.Array]:
    """Runs tokens [N, D] with slots and weights [N, k] through this device's experts.

    This is the part of the layer between dispatch and combine. Choices with slots outside of 0 to num_slots - 1 count
    as no choice.

    Args:
      experts: by slot, this device's.
      x: tokens.
      slots, weights: of each choice.
      num_slots: slots of this device.
      capacities: from `make_capacities`.
      config: the backend of products and moves, and the recipe of products.

    Returns:
      The output [N, D], and how many choices were dropped for lack of capacity.
    """
    if products := _products(config):
        results, dropped, _ = local_results(
            experts, scale_tokens(x, products), slots, weights, num_slots, capacities, products
        )
        return add_results((results,), products), dropped
    with jax.named_scope("permute"):
        found = sort_by_slot(slots, num_slots, capacities.rows)
        rows = permute(x, found.moves, backend=config.backend)
        weight = permute_each(weights, found.assignment, found.moves.rows)
    with jax.named_scope("experts"):
        plain: Any = experts
        if (dtype := config.recipe.product_dtype) is not None:
            plain, rows = jax.tree.map(lambda leaf: leaf.astype(dtype), (plain, rows))
        rows = apply_experts(plain, rows, weight, found.sizes, config.backend).astype(x.dtype)
    with jax.named_scope("unpermute"):
        return unpermute(rows, found.moves, backend=config.backend), found.dropped


def _remote(
    params: MoEParams,
    x: jax.Array,
    slots: jax.Array,
    weights: jax.Array,
    num_slots: int,
    capacities: Capacities,
    config: MoEConfig,
    axis: str,
    levels: Sequence[Level],
) -> tuple[jax.Array, jax.Array]:
    """The layer for slots of all devices of the axis: tokens travel there and back, level by level.

    The shared experts' first product runs while tokens travel there, the second while they travel back. Barriers fix
    this order, because a scheduler that sees forward and backward at once chooses another. Their transposes do too.
    """
    level, *further = levels
    devices, top_k, dispatcher = level.size, slots.shape[1], level.dispatcher
    shared: Any = params.shared
    hidden: Any = None
    with jax.named_scope("dispatch"):
        sends = plan_sends(slots, devices, level.slots, level.capacity)
        sent = permute_each(weights, sends.choices.reshape(-1), sends.entries).reshape(sends.slots.shape)
        rows = permute(x, sends.moves, backend=config.backend).reshape(devices, -1, x.shape[1])
        rows, sent = _return_after(dispatcher.dispatch(rows, sends.counts, axis, config.recipe), sent)
        message: Any = exchange.all_to_all_listed(sends.slots, sent, axis, level.groups)
    if shared is not None:
        with jax.named_scope("shared_expert"):
            rows, hidden = jax.lax.optimization_barrier((rows, shared_in(shared, x)))
    shape = rows.shape
    slots_here, weights_here = (array.reshape(-1, top_k) for array in message)
    arrived = rows.reshape(-1, x.shape[1]), slots_here, weights_here, num_slots, capacities, config
    if further:
        y, dropped = _remote(params._replace(shared=None), *arrived, axis, further)
    else:
        y, dropped = local_experts(params.experts, *arrived)
    if shared is not None:
        y, hidden = jax.lax.optimization_barrier((y, hidden))
    with jax.named_scope("combine"):
        back = dispatcher.combine(y.reshape(shape), sends.counts, axis, config.recipe)
    if shared is not None:
        with jax.named_scope("shared_expert"):
            back, hidden = jax.lax.optimization_barrier((back, shared_out(shared, hidden)))
    with jax.named_scope("combine"):
        y = unpermute(back.reshape(-1, x.shape[1]), sends.moves, backend=config.backend)
    return y if shared is None else y + hidden, dropped + sends.dropped


def _products(config: MoEConfig) -> Products | None:
    """Who makes products in 8 bits; None where they are made of plain numbers."""
    arithmetic = config.recipe.arithmetic
    return None if arithmetic is None else Products(arithmetic, config.backend)


@jax.custom_vjp
def _return_after(rows: jax.Array, sent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns both, and orders their cotangents: that of the rows is sent when that of the weights has arrived.

    So the small transfer of the weights runs beside matrix products. Without an order, XLA's scheduler finds nothing to
    do while it travels.
    """
    return rows, sent


_return_after.defvjp(lambda *both: (both, None), lambda _, cts: jax.lax.optimization_barrier(cts))


def _check(
    params: MoEParams,
    x: jax.Array,
    config: MoEConfig,
    placement: Placement | None,
    devices: int,
    axis: str | None,
) -> int:
    """Slots of this device, after checking that all sizes fit."""
    experts, width, hidden = config.router.num_experts, config.width, config.hidden
    if x.ndim != 2 or x.shape[1] != width or not x.shape[0]:
        raise ValueError(f"x has shape {x.shape}: it must be [tokens, {width}], sequences joined and not empty")
    if reason := config.recipe.why_not_dtype(x.dtype):
        raise ValueError(reason)
    if config.recipe.arithmetic is None and isinstance(params.experts, ScaledExperts):
        raise ValueError(
            f"experts are quantised, and {config.recipe.name} multiplies plain numbers: take precision='fp8', or "
            "params.experts as they were"
        )
    total = _count_slots(params, config, placement, devices, axis)
    slots = total // devices
    if config.exact is not None:
        if placement is not None:
            raise ValueError(
                f"exact={config.exact} and a placement: experts are given each microbatch, so leave one out"
            )
        if reason := why_not(devices, slots, config.exact):
            raise ValueError(reason)
    _check_shapes(
        "experts",
        params.experts,
        {"w_in": (slots, width, 2 * hidden), "w_out": (slots, hidden, width)},
        f"{total} slots on {devices} devices need {{}} on each; working_copies makes slots of logical experts",
    )
    shared = config.num_shared * hidden
    if (params.shared is None) != (not shared):
        raise ValueError(
            f"num_shared={config.num_shared}, but params.shared is {'None' if params.shared is None else 'not None'}"
        )
    if params.shared is not None:
        wanted = {"w_in": (1, width, 2 * shared), "w_out": (1, shared, width)}
        _check_shapes("shared", params.shared, wanted, f"num_shared={config.num_shared} need {{}}")
    if axis is not None:
        node_size(devices, config.devices_per_node)
    if params.router.shape != (width, experts):
        raise ValueError(f"router has shape {params.router.shape}: it must be ({width}, {experts})")
    return slots


def _count_slots(
    params: MoEParams, config: MoEConfig, placement: Placement | None, devices: int, axis: str | None
) -> int:
    """Slots of all devices, over which they divide."""
    experts = config.router.num_experts
    masters = params.experts.w_in.shape[0] * devices
    total = masters if placement is None and masters == config.num_masters else experts
    if placement is not None:
        if placement.phy2log.ndim != 1 or placement.num_experts != experts:
            raise ValueError(
                f"the placement has phy2log of shape {placement.phy2log.shape} and {placement.num_experts} experts: "
                f"give one layer of {experts} experts, placement.of_layer(i)"
            )
        total = placement.phy2log.shape[0]
    if total % devices:
        remedy = f"plan for {total - total % devices} or {total + -total % devices} slots"
        remedy = _nearest(config, devices) if placement is None else remedy
        raise ValueError(f"{total} slots do not divide over the {devices} devices of axis {axis!r}: {remedy}")
    return total


def _check_shapes(
    name: str, found: ExpertParams | ScaledExperts, wanted: dict[str, tuple[int, ...]], remedy: str
) -> None:
    for leaf, shape in wanted.items():
        if getattr(found, leaf).shape != shape:
            raise ValueError(f"{name}.{leaf} has shape {getattr(found, leaf).shape}: {remedy.format(shape)}")


def _check_masters(config: MoEConfig, devices: int, axis: str) -> None:
    if config.num_masters % devices:
        raise ValueError(
            f"{config.num_masters} masters of {config.router.num_experts} experts do not divide over the {devices} "
            f"devices of axis {axis!r}: {_nearest(config, devices)}"
        )


def _nearest(config: MoEConfig, devices: int) -> str:
    """How to make masters divide over so many devices."""
    experts = config.router.num_experts
    return f"take MoEConfig(masters={experts + -experts % devices}), whose last rows nothing reads"
