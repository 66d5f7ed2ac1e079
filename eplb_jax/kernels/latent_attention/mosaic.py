"""Attention of one token of each request over its cache of latents on Hopper GPUs: our own kernel, in Pallas' Mosaic.

A block has 64 heads of one request, and reads its part of the request's cache once, a tile of 64 keys at a time. One
warpgroup, the scorer, makes scores and their softmax as far as it is known; two, the mixers, multiply these weights by
half of the latents' columns each, whose sums fill the registers of one warpgroup for 64 heads and 256 columns. Weights,
and the factors by which earlier sums shrink when a larger score is found, go from the scorer to the mixers through
shared memory. Scores of a tile are made while the latents of the one before are mixed. Each warpgroup loads the columns
that it uses last: a mixer its latents, the scorer rotary keys.

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
KEYS = 64
"""Of a tile."""
STAGES = 2
"""Tiles in shared memory."""
MIXERS = 2
"""Warpgroups before the last, which is the scorer."""
CHUNK = 64
"""Columns of a swizzled tile."""
MOST_COLUMNS = 576
"""Of which queries and two tiles of keys fit into shared memory."""
FLOATS = ("bfloat16", "float16")
EDGES, COMBINING, COMBINED = 3.0, 4.0, 0.05
"""What begins and ends a block, combining parts, and each of them, in times of a tile: estimates for `splits_for`."""


@dataclasses.dataclass(frozen=True)
class _LatentBlock:
    """One block of the kernel: its part of the problem, and what its warpgroups share.

    Attributes:
      widths: of the parts of a query and a tile: what each mixer has of the latents, and rotary keys.
      scale: of the scores.
      request, heads, split: whose heads and which part of the keys it has.
      first: key of the part.
      tiles: how many the part has.
      length: keys of the request.
      query, cache, out, logs: the arrays in memory; ``logs`` only where there are splits.
      refs: shared memory and barriers.
    """

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

    def columns(self, part: int) -> Any:
        """Those of a part of a query or a tile, in memory."""
        return pl.ds(sum(self.widths[:part]), self.widths[part])

    def tile(self, part: int, slot: jax.Array) -> Any:
        """Some columns of the tile in a slot."""
        return self.refs["tiles"][part].at[pl.ds(pl.multiple_of(slot * KEYS, KEYS), KEYS)]

    def load(self, part: int, tile: jax.Array) -> None:
        """Copies some columns of a tile into its slot, if there is such a tile."""

        @pl.when(tile < self.tiles)
        def _():
            slot = slot_of(tile)
            keys = pl.ds(pl.multiple_of(self.first + tile * KEYS, KEYS), KEYS)
            source, barrier = self.cache.at[self.request, keys, self.columns(part)], self.refs["filled"][part].at[slot]
            plgpu.copy_gmem_to_smem(source, self.tile(part, slot), barrier)

    def load_first(self, part: int) -> None:
        """Copies the same columns of the query and of the first tiles."""
        query = self.query.at[self.request, self.heads, self.columns(part)]
        plgpu.copy_gmem_to_smem(query, self.refs["query"][part], self.refs["asked"])
        for tile in range(STAGES):
            self.load(part, jnp.int32(tile))


def slot_of(tile: jax.Array) -> jax.Array:
    """Where a tile is in shared memory."""
    return lax.rem(tile, jnp.int32(STAGES))


def why_not(query: Any, cache: Any, latent: int) -> str | None:
    """Why the kernel does not take operands of these shapes and dtypes; None if it does.

    >>> operand = jax.ShapeDtypeStruct((4, 128, 576), "bfloat16")
    >>> why_not(operand, jax.ShapeDtypeStruct((4, 100, 576), "bfloat16"), 512)
    'caches of 100 keys; a multiple of 8 will do'
    """
    if query.dtype not in FLOATS:
        return f"dtype {query.dtype} is none of {', '.join(FLOATS)}"
    if not all(isinstance(size, int) for size in (*query.shape, *cache.shape)):
        return f"query {query.shape} and cache {cache.shape} have symbolic sizes"
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
) -> Float[Array, "B H L"]:
    """`eplb_jax.kernels.latent_attention.xla.attend_latents`, of operands for which `why_not` has no reason."""
    requests, heads, _ = query.shape
    splits = splits_for(requests, heads, cache.shape[1], current_target().cores)
    return attend_in_parts(query, cache, lengths, latent=latent, scale=scale, splits=splits)


def splits_for(requests: int, heads: int, keys: int, cores: int) -> int:
    """How many blocks divide a request's keys: as many as end sooner, with all keys in use.

    >>> splits_for(64, 128, 4096, 132), splits_for(8, 128, 4096, 132)
    (1, 8)
    """
    units, tiles = requests * pl.cdiv(heads, HEADS), pl.cdiv(keys, KEYS)

    def end(splits: int) -> float:
        """In times of a tile: turns of all blocks, each with what begins and ends it, and what is combined."""
        turns = pl.cdiv(units * splits, cores)
        return turns * (pl.cdiv(tiles, splits) + EDGES) + (splits > 1) * (COMBINING + COMBINED * units * splits)

    return min(range(1, min(tiles, cores) + 1), key=end)


@traced_once("latent", "scale", "splits")
def attend_in_parts(
    query: Float[Array, "B H C"],
    cache: Float[Array, "B S C"],
    lengths: Int[Array, " B"],
    *,
    latent: int,
    scale: float,
    splits: int,
) -> Float[Array, "B H L"]:
    """`attend_latents` by this many blocks of a request's keys."""
    requests, heads, columns = query.shape
    groups = pl.cdiv(heads, HEADS)
    query = jnp.pad(query, ((0, 0), (0, groups * HEADS - heads), (0, 0)))
    widths = latent // MIXERS, latent // MIXERS, columns - latent

    def body(length_of, query_ref, cache_ref, *out_refs):
        def scoped(**refs):
            unit = lax.axis_index("unit")
            rest, group = lax.div(unit, jnp.int32(groups)), lax.rem(unit, jnp.int32(groups))
            request, part = lax.div(rest, jnp.int32(splits)), lax.rem(rest, jnp.int32(splits))
            length = jnp.minimum(length_of[request], cache.shape[1])
            tiles = lax.div(length + (KEYS - 1), jnp.int32(KEYS))
            share = lax.div(tiles + (splits - 1), jnp.int32(splits))
            begin = part * share
            heads_of = pl.ds(pl.multiple_of(group * HEADS, HEADS), HEADS)
            place = request, heads_of, part, begin * KEYS, jnp.clip(tiles - begin, 0, share), length
            logs = out_refs[1] if splits > 1 else None
            block = _LatentBlock(widths, scale, *place, query_ref, cache_ref, out_refs[0], logs, refs)
            warpgroup = lax.axis_index("warpgroup")
            for part in range(MIXERS):
                pl.when(warpgroup == part)(lambda part=part: _mix(block, part))
            pl.when(warpgroup == MIXERS)(lambda: _score(block))

        scratch = dict(
            query=[tiled(HEADS, width, dtype=query.dtype) for width in widths],
            tiles=[tiled(STAGES * KEYS, width, dtype=query.dtype) for width in widths],
            weights=tiled(HEADS, KEYS, dtype=query.dtype),
            factors=plgpu.SMEM((HEADS,), jnp.float32),
            asked=plgpu.Barrier(num_arrivals=len(widths)),
            filled=[plgpu.Barrier(num_barriers=STAGES) for _ in widths],
            weighed=plgpu.Barrier(),
            mixed=plgpu.Barrier(num_arrivals=MIXERS),
        )
        pl.run_scoped(scoped, **scratch, collective_axes="warpgroup")

    shape = requests, groups * HEADS, latent
    out: Any = jax.ShapeDtypeStruct(shape, query.dtype)
    if splits > 1:
        out = (
            jax.ShapeDtypeStruct((splits, *shape), jnp.float32),
            jax.ShapeDtypeStruct((splits, *shape[:2]), jnp.float32),
        )
    found = plgpu.kernel(
        body,
        out_type=out,
        grid=(requests * splits * groups,),
        grid_names=("unit",),
        num_threads=MIXERS + 1,
        thread_name="warpgroup",
        kernel_name="latent_attention",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            approx_math=True,
            reduction_scratch_bytes=1024,  # no row is divided between warps
        ),
    )(lengths, query, cache)
    if splits == 1:
        return found[:, :heads]
    sums, logs = (array[:, :, :heads] for array in found)
    return combine(sums, logs).astype(query.dtype)


def combine(sums: Float[Array, "P B H L"], logs: Float[Array, "P B H"]) -> Float[Array, "B H L"]:
    """One attention of those over parts of the keys, and the binary logarithms of their normalisers."""
    shares = jnp.exp2(logs - logs.max(0))
    return (sums * (shares / shares.sum(0))[..., None]).sum(0)


def _spread(vector: jax.Array, columns: int) -> jax.Array:
    """A number for each head, beside itself."""
    return lax.broadcast_in_dim(vector, (HEADS, columns), (0,))


def _score(block: _LatentBlock) -> None:
    """The scorer: weights of a tile's keys, relative to the largest score so far."""
    refs, factor = block.refs, block.scale * math.log2(math.e)
    block.load_first(MIXERS)
    plgpu.barrier_wait(refs["asked"])

    def score(tile, carry, *, last: bool):
        largest, total = carry
        slot = slot_of(tile)

        def multiply(acc):
            for part, query in enumerate(refs["query"]):
                plgpu.barrier_wait(refs["filled"][part].at[slot])
                plgpu.wgmma(acc, query, block.tile(part, slot).transpose((1, 0)))
            return acc[...]

        scores = pl.run_scoped(multiply, accumulator(HEADS, KEYS))
        block.load(MIXERS, tile + STAGES)
        if last:
            key = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            scores = jnp.where(key < block.length - (block.first + tile * KEYS), scores, -jnp.inf)
        found = jnp.maximum(largest, scores.max(1) * factor)
        weights = jnp.exp2(scores * factor - _spread(found, KEYS))
        shrink = jnp.exp2(largest - found)
        total = total * shrink + weights.sum(1)
        pl.when(tile > 0)(lambda: plgpu.barrier_wait(refs["mixed"]))
        refs["weights"][...] = weights.astype(refs["weights"].dtype)
        refs["factors"][...] = shrink
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs["weighed"])
        return found, total

    first = jnp.full((HEADS,), -jnp.inf, jnp.float32), jnp.zeros((HEADS,), jnp.float32)
    whole = jnp.maximum(block.tiles - 1, 0)
    carry = lax.fori_loop(jnp.int32(0), whole, functools.partial(score, last=False), first)
    largest, total = lax.fori_loop(whole, block.tiles, functools.partial(score, last=True), carry)
    pl.when(block.tiles > 0)(lambda: plgpu.barrier_wait(refs["mixed"]))
    refs["factors"][...] = jnp.where(total > 0, 1 / total, jnp.float32(0))
    plgpu.barrier_arrive(refs["weighed"])
    if block.logs is not None:
        block.logs.at[block.split, block.request, block.heads][...] = largest + jnp.log2(total)


def add_product(sums: jax.Array, weights: Any, tile: Any) -> jax.Array:
    """``sums + weights @ tile``, in the registers of the sums."""
    acc: Any = plgpu.ACC.init(sums)  # pyright: ignore[reportPrivateImportUsage]
    return pl.run_state(lambda acc: plgpu.wgmma(acc, weights, tile))(acc)


def _mix(block: _LatentBlock, part: int) -> None:
    """A mixer: sums of latents by their weights, of half of the columns."""
    refs, width = block.refs, block.widths[part]
    block.load_first(part)

    def factors():
        return _spread(refs["factors"][...], width)

    def mix(tile, sums):
        slot = slot_of(tile)
        plgpu.barrier_wait(refs["filled"][part].at[slot])
        plgpu.barrier_wait(refs["weighed"])
        sums = add_product(sums * factors(), refs["weights"], block.tile(part, slot))
        plgpu.barrier_arrive(refs["mixed"])
        block.load(part, tile + STAGES)
        return sums

    zeros = jnp.zeros((HEADS, width), jnp.float32)
    sums = lax.fori_loop(jnp.int32(0), block.tiles, mix, zeros)
    plgpu.barrier_wait(refs["weighed"])
    sums = sums * factors()
    columns = block.columns(part)
    if block.logs is not None:
        block.out.at[block.split, block.request, block.heads, columns][...] = sums
        return
    piece = refs["tiles"][part].at[pl.ds(0, HEADS)]  # which no other warpgroup reads any more
    piece[...] = sums.astype(block.out.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(piece, block.out.at[block.request, block.heads, columns])
    plgpu.wait_smem_to_gmem(0)
