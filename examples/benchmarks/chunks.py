"""What the benchmarks run: a chunk of a model as a pipeline stage, compiled several at a time.

Shapes: T tokens of a microbatch, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jaxpipe
from eplb_jax import MoEConfig, RouterConfig
from jaxpipe.deepseek import attend, causal_attention, feed_forward
from profiling.workloads import SIZES, Sizes
from profiling.workloads.layer import AXIS, apply_layer, init_layers, layer_specs

HEADS = 128
"""Width of a head of the dense chunk."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some layers as a stage of `jaxpipe.value_and_grad`, to be run within a mesh of pp and ep.

    Attributes:
      name: for tables.
      width: of the activations, D.
      tokens: of a microbatch.
      stage: (params, x [1, T, D], ctx) -> y.
      init: key -> float32 masters of one stage.
      specs: PartitionSpecs of one stage's masters over the mesh's ep axis.
    """

    name: str
    width: int
    tokens: int
    stage: Callable[..., jax.Array]
    init: Callable[[jax.Array], Any]
    specs: Any


def moe_chunk(layers: int, size: str = "dsv3", tokens: int | None = None, mesh: Mesh | None = None) -> Chunk:
    """MLA attention and experts, those that one device of 64 holds, as `profiling.workloads` has them.

    A mesh of several devices, of the one axis ep, holds experts of its own: 8 a device, or 4 from four devices on.
    """
    sizes: Sizes = dataclasses.replace(SIZES[size], layers=layers)
    tokens = sizes.sequence if tokens is None else tokens
    mesh = Mesh(jax.devices()[:1], (AXIS,), axis_types=(AxisType.Auto,)) if mesh is None else mesh
    if mesh.size > 1:
        router = dataclasses.replace(sizes.moe.router, num_experts=mesh.size * (8 if mesh.size < 4 else 4))
        moe = dataclasses.replace(sizes.moe, router=router)
        sizes = dataclasses.replace(sizes, moe=moe, expert_parallel={"train": mesh.size})

    def attention(params: Any, x: jax.Array) -> tuple[jax.Array, None]:
        return attend(params, x[None], sizes)[0][0], None

    def stage(params: Any, x: jax.Array, ctx: jaxpipe.Context) -> jax.Array:
        y = x[0]
        for i, layer in enumerate(params):
            with jax.named_scope(f"layer_{i}"):
                y, _, _ = apply_layer(layer, y, sizes, attention)
        return y[None]

    def init(key: jax.Array) -> Any:
        return init_layers(key, sizes, "train", mesh, jnp.float32)

    name = "DeepSeek-V3" if size == "dsv3" else size
    return Chunk(f"{layers} MoE layers of {name}", sizes.width, tokens, stage, init, layer_specs(sizes))


def dense_chunk(layers: int, width: int = 2048, tokens: int = 4096) -> Chunk:
    """Attention and a gated feed-forward layer of four times the width."""
    heads = max(1, width // HEADS)
    head = width // heads

    def stage(params: Any, x: jax.Array, ctx: jaxpipe.Context) -> jax.Array:
        for i in range(layers):
            with jax.named_scope(f"layer_{i}"):
                with jax.named_scope("attention"):
                    qkv = (x @ params["qkv"][i]).reshape(*x.shape[:2], 3, heads, head)
                    mixed = causal_attention(*(qkv[:, :, part] for part in range(3)))
                    x = x + mixed.reshape(x.shape) @ params["out"][i]
                with jax.named_scope("mlp"):
                    x = x + feed_forward(x, params["up"][i], params["down"][i])
        return x

    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 8 * width), "down": (4 * width, width)}

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(shapes))
        return {
            name: jax.random.normal(key, (layers, *shape)) * 0.5 * shape[0] ** -0.5
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    specs: Any = {name: P() for name in shapes}
    return Chunk(f"{layers} dense layers of {width}", width, tokens, stage, init, specs)


def chunks(tiny: bool) -> tuple[Chunk, Chunk]:
    """The chunks that the benchmarks run: two layers of DeepSeek-V3 a stage, and four dense ones."""
    if tiny:
        return moe_chunk(1, "tiny"), dense_chunk(1, 64, 64)
    return moe_chunk(2), dense_chunk(4)


def tiny_fp8() -> Sizes:
    """Small sizes of widths that FP8 takes."""
    router = RouterConfig(16, 4, 4, 2, balanced=True)
    moe = MoEConfig(width=128, hidden=128, router=router, capacity_factor=1.25, backend="xla")
    return dataclasses.replace(SIZES["tiny"], moe=moe, sequence=128)


def compile_all(lowered: Sequence[Any]) -> list[Any]:
    """Compiled programs, several at a time: XLA leaves Python free meanwhile."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda program: program.compile(), lowered))


def gib(size: float) -> float:
    """Bytes in GiB."""
    return size / 2**30


def nbytes(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
