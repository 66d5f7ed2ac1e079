"""Attention of one token of each request over its cache of latents on Hopper GPUs: our own kernel, in Pallas' Mosaic.

A block has 64 heads of one request, and reads its part of the request's cache once, a tile of keys at a time. One
warpgroup loads tiles; one, the scorer, makes scores and their softmax as far as it is known; two, the mixers, multiply
these weights by half of the latents' columns each, whose sums fill the registers of one warpgroup for 64 heads and 256
columns. Weights, and the factors by which earlier sums shrink when a larger score is found, go from the scorer to the
mixers through shared memory. Scores of a tile are made while the latents of the one before are mixed.

Where there are fewer requests than would fill the GPU, several blocks divide a request's keys. Each then gives its
sums, normalised, and the logarithm of what it divided them by, in float32; XLA combines them.

Source of the division of the columns: FlashMLA's description of its kernel for Hopper, DeepSeek, 2025-04-22.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from eplb_jax.kernels.backend import current_target
from eplb_jax.kernels.grouped_gemm.ring import accumulator
from eplb_jax.kernels.once import traced_once
from eplb_jax.kernels.scaled_tiles import tiled

HEADS = 64
"""Of a block: rows of a product of the tensor cores."""
SCORER, MIXERS, LOADER = 0, 2, 3
"""Warpgroups: the first, how many follow it, the last."""
CHUNK = 64
"""Columns of a swizzled tile."""
MOST_COLUMNS = 576
"""Of which queries and two tiles of keys fit into shared memory."""
FLOATS = ("bfloat16", "float16")
EDGES, COMBINING, COMBINED = 3.0, 4.0, 0.05
"""What begins and ends a block, combining parts, and each of them, in times of a tile: estimates for `plan_for`."""


@dataclasses.dataclass(frozen=True)
class LatentPlan:
    """How the kernel divides its work.

    Attributes:
      keys: of a tile; a multiple of 16.
      stages: tiles in shared memory.
      weights: tiles' weights in shared memory.
      splits: how many blocks divide a request's keys.
      cluster: 2 lets the blocks of 128 heads load the keys that they share once.
    """

    keys: int = 64
    stages: int = 2
    weights: int = 1
    splits: int = 1
    cluster: int = 1


@dataclasses.dataclass(frozen=True)
class _LatentBlock:
    """One block of the kernel: its part of the problem, and what its warpgroups share.

    Attributes:
      plan: the division of the work.
      widths: of the parts of a query and a tile: what each mixer has of the latents, and rotary keys.
      scale: of the scores.
      request, heads, split: whose heads and which part of the keys it has.
      first: key of the part.
      tiles: how many the part has.
      length: keys of the request.
      query, cache, out, logs: the arrays in memory; ``logs`` only where there are splits.
      refs: shared memory and barriers.
    """

    plan: LatentPlan
    widths: tuple[int, int, int]
    scale: float
    request: jax.Array
    heads: Any
    split: jax.Array
    first: jax.Array
    tiles: jax.Array
    length: jax.Array
    query: Any
    cache: Any
    out: Any
    logs: Any
    refs: dict[str, Any]


def why_not(query: Any, cache: Any, latent: int) -> str | None:
    """Why the kernel does not take operands of these shapes and dtypes; None if it does.

    >>> operand = jax.ShapeDtypeStruct((4, 128, 576), "bfloat16")
    >>> why_not(operand, jax.ShapeDtypeStruct((4, 100, 576), "bfloat16"), 512)
    'caches of 100 keys; a multiple of 8 will do'
    """
    if query.dtype not in FLOATS:
        return f"dtype {query.dtype} is none of {', '.join(FLOATS)}"
    columns, keys = query.shape[2], cache.shape[1]
    if latent % (MIXERS * CHUNK) or columns % CHUNK or latent >= columns or columns > MOST_COLUMNS:
        return (
            f"{latent} latent of {columns} columns; multiples of {MIXERS * CHUNK} of {CHUNK}, up to {MOST_COLUMNS}, "
            "the others rotary keys, will do"
        )
    if not all((*query.shape, *cache.shape)):
        return f"query {query.shape} and cache {cache.shape} leave nothing to do"
    return f"caches of {keys} keys; a multiple of 8 will do" if keys % 8 else None


def attend_latents(
    query: Float[Array, "B H C"],
    cache: Float[Array, "B S C"],
    lengths: Int[Array, " B"],
    *,
    latent: int,
    scale: float,
    plan: LatentPlan | None = None,
) -> Float[Array, "B H L"]:
    """`eplb_jax.kernels.latent_attention.xla.attend_latents`.

    Args:
      query, cache, lengths, latent, scale: as there; operands for which `why_not` has no reason.
      plan: how to divide the work; by default as `plan_for` says.
    """
    plan = plan or plan_for(*query.shape[:2], cache.shape[1], current_target().cores)
    return attend_by_plan(query, cache, lengths, latent=latent, scale=scale, plan=plan)


def plan_for(requests: int, heads: int, keys: int, cores: int) -> LatentPlan:
    """The division of the work: requests' keys are divided as far as that ends sooner, with all keys in use.

    >>> plan_for(64, 128, 4096, 132).splits, plan_for(8, 128, 4096, 132).splits
    (1, 8)
    """
    plan, units = LatentPlan(), requests * pl.cdiv(heads, HEADS)
    tiles = pl.cdiv(keys, plan.keys)

    def end(splits: int) -> float:
        """In times of a tile: turns of all blocks, each with what begins and ends it, and what is combined."""
        turns = pl.cdiv(units * splits, cores)
        return turns * (pl.cdiv(tiles, splits) + EDGES) + (splits > 1) * (COMBINING + COMBINED * units * splits)

    return dataclasses.replace(plan, splits=min(range(1, min(tiles, cores) + 1), key=end))


@traced_once("latent", "scale", "plan")
def attend_by_plan(
    query: Float[Array, "B H C"],
    cache: Float[Array, "B S C"],
    lengths: Int[Array, " B"],
    *,
    latent: int,
    scale: float,
    plan: LatentPlan,
) -> Float[Array, "B H L"]:
    """`attend_latents` with a given division of the work."""
    requests, heads, columns = query.shape
    groups = pl.cdiv(heads, HEADS)
    query = jnp.pad(query, ((0, 0), (0, groups * HEADS - heads), (0, 0)))
    widths = latent // MIXERS, latent // MIXERS, columns - latent
    splits, split, pairs = plan.splits, plan.splits > 1, groups // plan.cluster

    def body(length_of, query_ref, cache_ref, *out_refs):
        def scoped(**refs):
            unit = lax.axis_index("unit")
            rest, group = lax.div(unit, jnp.int32(pairs)), lax.rem(unit, jnp.int32(pairs))
            group = group * plan.cluster + lax.axis_index("pair")
            request, part = lax.div(rest, jnp.int32(splits)), lax.rem(rest, jnp.int32(splits))
            length = length_of[request]
            tiles = lax.div(length + (plan.keys - 1), jnp.int32(plan.keys))
            share = lax.div(tiles + (splits - 1), jnp.int32(splits))
            begin = part * share
            heads_of = pl.ds(pl.multiple_of(group * HEADS, HEADS), HEADS)
            mine = jnp.clip(tiles - begin, 0, share)
            place = request, heads_of, part, begin * plan.keys, mine, length
            block = _LatentBlock(
                plan, widths, scale, *place, query_ref, cache_ref, out_refs[0], out_refs[-1] if split else None, refs
            )
            warpgroup = lax.axis_index("warpgroup")
            pl.when(warpgroup == SCORER)(lambda: _score(block))
            for part in range(MIXERS):
                pl.when(warpgroup == part + 1)(lambda part=part: _mix(block, part))
            pl.when(warpgroup == LOADER)(lambda: _load(block))

        slots = plan.stages * plan.keys

        def users(count: int, barriers: int) -> Any:
            shape = dict(num_arrivals=count, num_barriers=barriers)
            if plan.cluster > 1:
                return plgpu.ClusterBarrier(collective_axes=("pair",), **shape)
            return plgpu.Barrier(**shape)

        scratch = dict(
            query=[tiled(HEADS, width, dtype=query.dtype) for width in widths],
            tiles=[tiled(slots, width, dtype=query.dtype) for width in widths],
            weights=tiled(plan.weights, HEADS, plan.keys, dtype=query.dtype),
            factors=plgpu.SMEM((plan.weights, HEADS), jnp.float32),
            asked=plgpu.Barrier(num_arrivals=len(widths)),
            filled=[plgpu.Barrier(num_barriers=plan.stages) for _ in widths],
            free=[users(count, plan.stages) for count in (2, 2, 1)],  # the scorer, and a mixer of latents
            weighed=plgpu.Barrier(num_barriers=plan.weights),
            mixed=plgpu.Barrier(num_arrivals=MIXERS, num_barriers=plan.weights),
        )
        pl.run_scoped(scoped, **scratch, collective_axes="warpgroup")

    shape = requests, groups * HEADS, latent
    out: Any = jax.ShapeDtypeStruct(shape, query.dtype)
    if split:
        out = (
            jax.ShapeDtypeStruct((splits, *shape), jnp.float32),
            jax.ShapeDtypeStruct((splits, *shape[:2]), jnp.float32),
        )
    found = plgpu.kernel(
        body,
        out_type=out,
        grid=(requests * splits * pairs,),
        grid_names=("unit",),
        cluster=(plan.cluster,),
        cluster_names=("pair",),
        num_threads=LOADER + 1,
        thread_name="warpgroup",
        kernel_name="latent_attention",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            approx_math=True,
            reduction_scratch_bytes=1024,  # no row is divided between warps
        ),
    )(lengths, query, cache)
    if not split:
        return found[:, :heads]
    sums, logs = (array[:, :, :heads] for array in found)
    return combine(sums, logs).astype(query.dtype)


def combine(sums: Float[Array, "P B H L"], logs: Float[Array, "P B H"]) -> Float[Array, "B H L"]:
    """One attention of those over parts of the keys, and the binary logarithms of their normalisers."""
    shares = jnp.exp2(logs - logs.max(0))
    return (sums * (shares / shares.sum(0))[..., None]).sum(0)


def _load(block: _LatentBlock) -> None:
    """The loader: copies the query, and tiles into shared memory as soon as all warpgroups have left one."""
    plgpu.set_max_registers(32, action="decrease")
    plan, refs = block.plan, block.refs
    columns = [pl.ds(sum(block.widths[:i]), width) for i, width in enumerate(block.widths)]
    for wide, query in zip(columns, refs["query"], strict=True):
        plgpu.copy_gmem_to_smem(block.query.at[block.request, block.heads, wide], query, refs["asked"])

    def load(tile, _):
        slot = lax.rem(tile, jnp.int32(plan.stages))
        keys = pl.ds(pl.multiple_of(block.first + tile * plan.keys, plan.keys), plan.keys)
        for i, wide in enumerate(columns):
            pl.when(tile >= plan.stages)(lambda i=i: plgpu.barrier_wait(refs["free"][i].at[slot]))
            source, barrier = block.cache.at[block.request, keys, wide], refs["filled"][i].at[slot]
            common = "pair" if plan.cluster > 1 else None
            plgpu.copy_gmem_to_smem(source, _part(block, i, slot), barrier, collective_axes=common)

    lax.fori_loop(jnp.int32(0), block.tiles, load, None)
    if plan.cluster > 1:  # a block must not end while its pair still reaches into it

        def wait(tile, _):
            for free in refs["free"]:
                plgpu.barrier_wait(free.at[lax.rem(tile, jnp.int32(plan.stages))])

        lax.fori_loop(jnp.maximum(block.tiles - plan.stages, 0), block.tiles, wait, None)


def _part(block: _LatentBlock, part: int, slot: jax.Array) -> Any:
    """Some columns of the tile in a slot."""
    keys = block.plan.keys
    return block.refs["tiles"][part].at[pl.ds(pl.multiple_of(slot * keys, keys), keys)]


def _rows(vector: jax.Array) -> jax.Array:
    """A number for each head, where its scores are."""
    return plgpu.layout_cast(vector, plgpu.Layout.WGMMA.reduce(1))


def _spread(vector: jax.Array, columns: int) -> jax.Array:
    return lax.broadcast_in_dim(vector, (HEADS, columns), (0,))


def _score(block: _LatentBlock) -> None:
    """The scorer: weights of a tile's keys, relative to the largest score so far."""
    plan, refs = block.plan, block.refs
    factor = block.scale * math.log2(math.e)
    plgpu.barrier_wait(refs["asked"])

    def score(tile, carry, *, last: bool):
        largest, total = carry
        slot, place = (lax.rem(tile, jnp.int32(count)) for count in (plan.stages, plan.weights))

        def multiply(acc):
            for part, query in enumerate(refs["query"]):
                plgpu.barrier_wait(refs["filled"][part].at[slot])
                plgpu.wgmma(acc, query, _part(block, part, slot).transpose((1, 0)))
            return acc[...]

        scores = pl.run_scoped(multiply, accumulator(HEADS, plan.keys))
        for free in refs["free"]:
            plgpu.barrier_arrive(free.at[slot])
        if last:
            key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
            scores = jnp.where(key < block.length - (block.first + tile * plan.keys), scores, -jnp.inf)
        found = jnp.maximum(largest, scores.max(1) * factor)
        weights = jnp.exp2(scores * factor - _spread(found, plan.keys))
        shrink = jnp.exp2(largest - found)
        total = total * shrink + weights.sum(1)

        @pl.when(tile >= plan.weights)
        def _():
            plgpu.barrier_wait(refs["mixed"].at[place])

        refs["weights"].at[place][...] = weights.astype(refs["weights"].dtype)
        refs["factors"].at[place][...] = shrink
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs["weighed"].at[place])
        return found, total

    first = _rows(jnp.full((HEADS,), -jnp.inf, jnp.float32)), _rows(jnp.zeros((HEADS,), jnp.float32))
    whole = jnp.maximum(block.tiles - 1, 0)
    carry = lax.fori_loop(jnp.int32(0), whole, functools.partial(score, last=False), first)
    largest, total = lax.fori_loop(whole, block.tiles, functools.partial(score, last=True), carry)
    place = lax.rem(block.tiles, jnp.int32(plan.weights))

    @pl.when(block.tiles >= plan.weights)
    def _():
        plgpu.barrier_wait(refs["mixed"].at[place])

    refs["factors"].at[place][...] = jnp.where(total > 0, 1 / total, jnp.float32(0))
    plgpu.barrier_arrive(refs["weighed"].at[place])
    if block.logs is not None:
        block.logs.at[block.split, block.request, block.heads][...] = largest + jnp.log2(total)


def add_product(sums: jax.Array, weights: Any, tile: Any) -> jax.Array:
    """``sums + weights @ tile``, in the registers of the sums."""
    return pl.run_state(lambda acc: plgpu.wgmma(acc, weights, tile))(plgpu.ACC.init(sums))


def _mix(block: _LatentBlock, part: int) -> None:
    """A mixer: sums of latents by their weights, of half of the columns."""
    plgpu.set_max_registers(176, action="increase")
    plan, refs, width = block.plan, block.refs, block.widths[part]

    def factors(place):
        return _spread(_rows(refs["factors"].at[place][...]), width)

    def mix(tile, sums):
        slot, place = (lax.rem(tile, jnp.int32(count)) for count in (plan.stages, plan.weights))
        plgpu.barrier_wait(refs["filled"][part].at[slot])
        plgpu.barrier_wait(refs["weighed"].at[place])
        sums = add_product(sums * factors(place), refs["weights"].at[place], _part(block, part, slot))
        plgpu.barrier_arrive(refs["mixed"].at[place])
        plgpu.barrier_arrive(refs["free"][part].at[slot])
        return sums

    zeros = plgpu.layout_cast(jnp.zeros((HEADS, width), jnp.float32), plgpu.Layout.WGMMA)
    sums = lax.fori_loop(jnp.int32(0), block.tiles, mix, zeros)
    place = lax.rem(block.tiles, jnp.int32(plan.weights))
    plgpu.barrier_wait(refs["weighed"].at[place])
    sums = sums * factors(place)
    columns = pl.ds(part * width, width)
    if block.logs is not None:
        block.out.at[block.split, block.request, block.heads, columns][...] = sums
        return
    piece = refs["tiles"][part].at[pl.ds(0, HEADS)]  # which no other warpgroup reads any more
    piece[...] = sums.astype(block.out.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(piece, block.out.at[block.request, block.heads, columns])
    plgpu.wait_smem_to_gmem(0)
