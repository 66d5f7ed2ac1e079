"""Data parallelism, ZeRO-1 and FSDP beside a pipeline: memory of a device and time of a training step, as a table.

A Llama of 16 layers (width 2048, 1.1 billion parameters with 32,000 tokens), AdamW, float32 masters and bfloat16
products, zb1p. "FSDP in jit" is no pipeline: all devices share the batch, parameters are sharded over them, the
compiler gathers, and layers are computed again in the backward pass. Memory is the compiled step's: parameters with
the optimizer's state, and all that it makes besides.

    python examples/benchmarks/recipes.py [--ranks 2] [--copies 2] [--microbatches 8] [--memory] [--tiny]
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from record import Recorder, machine, make_parser, medians_ms

import jaxpipe
from jaxpipe.flax import layered_stages

RECIPES = {
    "data parallel": {},
    "ZeRO-1": {"zero1_axis": "dp"},
    "FSDP": {"fsdp_axis": "dp"},
}


@dataclasses.dataclass(frozen=True)
class LlamaSizes:
    """Of the model and of a sequence."""

    layers: int = 16
    width: int = 2048
    hidden: int = 8192
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 32_000
    length: int = 4096

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """(parameters of the layers, ``[layers, ...]``; of the embedding and the head)."""
        size = self.width // self.heads
        shapes = {
            "q": (self.width, self.width),
            "k": (self.width, self.kv_heads * size),
            "v": (self.width, self.kv_heads * size),
            "out": (self.width, self.width),
            "gate": (self.width, self.hidden),
            "up": (self.width, self.hidden),
            "down": (self.hidden, self.width),
        }
        keys = jax.random.split(key, len(shapes) + 2)
        layers = {
            name: jax.random.normal(each, (self.layers, *shape)) * shape[0] ** -0.5
            for (name, shape), each in zip(shapes.items(), keys, strict=False)
        }
        norms = {name: jnp.ones((self.layers, self.width)) for name in ("norm1", "norm2")}
        tables = {
            name: jax.random.normal(each, (self.vocabulary, self.width)) * self.width**-0.5
            for name, each in zip(("embedding", "head"), keys[-2:], strict=True)
        }
        return layers | norms, tables

    def layer(self, params: Any, x: jax.Array, ctx: Any) -> jax.Array:
        """Attention of grouped queries with rotary positions, and a gated MLP."""

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], -1, self.width // self.heads)

        y = _norm(x, params["norm1"])
        q, k, v = (heads(y @ params[name]) for name in ("q", "k", "v"))
        y = _attend(_rotate(q), _rotate(k), v)
        x = x + y.reshape(x.shape) @ params["out"]
        y = _norm(x, params["norm2"])
        return x + (jax.nn.silu(y @ params["gate"]) * (y @ params["up"])) @ params["down"]


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype) * scale


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention that keeps no scores: cuDNN's on GPUs."""
    if jax.default_backend() == "gpu":
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return jax.checkpoint(functools.partial(jax.nn.dot_product_attention, is_causal=True))(q, k, v)


def _rotate(x: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def embed(outer: Any, data: Any, ctx: Any) -> jax.Array:
    """Looks tokens up."""
    return outer["embedding"][data["tokens"]]


def head(outer: Any, y: jax.Array, data: Any, ctx: Any) -> jax.Array:
    """Cross-entropy."""
    logits = jnp.matmul(y, outer["head"].T, preferred_element_type=jnp.float32)
    target = jnp.take_along_axis(logits, data["targets"][..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - target).mean()


def pipelined(sizes: LlamaSizes, args: Any, options: Any) -> tuple[Any, Any, Any, Any]:
    """(mesh; makes parameters; (params, batch) -> ((loss, aux), grads); optimizer) of a pipeline."""
    mesh = jaxpipe.make_mesh(pp=args.ranks, dp=args.copies)
    schedule = jaxpipe.schedule.build("zb1p", args.ranks, args.microbatches)
    shapes = jax.eval_shape(sizes.init, jax.random.key(0))[0]
    stage, _ = layered_stages(sizes.layer, jax.tree.map(lambda s: jnp.zeros(s.shape[:1]), shapes), schedule)
    step = jaxpipe.value_and_grad(
        stage, schedule, mesh, embed=embed, head=head, data_axes="dp", compute_dtype=jnp.bfloat16, **options
    )

    def make(key: jax.Array) -> jaxpipe.Params:
        layers, outer = sizes.init(key)
        return jaxpipe.Params(layered_stages(sizes.layer, layers, schedule)[1], outer)

    shardings = step.shardings(jax.eval_shape(make, jax.random.key(0)))
    optimizer = jaxpipe.shard_optimizer(optax.adamw(1e-3), step)  # without zero1_axis as parameters are
    return mesh, jax.jit(make, out_shardings=shardings), step, optimizer


def in_jit(sizes: LlamaSizes, args: Any) -> tuple[Any, Any, Any, Any]:
    """The same of a program without a pipeline, whose parameters the compiler gathers."""
    mesh = jaxpipe.make_mesh(dp=args.ranks * args.copies)

    def loss(params: Any, data: Any) -> jax.Array:
        layers, outer = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        body = jax.checkpoint(lambda x, row: (sizes.layer(row, x, None), None))
        y, _ = jax.lax.scan(body, embed(outer, data, None), layers)
        return head(outer, y, data, None)

    def spec(leaf: Any) -> NamedSharding:
        dims = [d for d in range(leaf.ndim - 2, leaf.ndim) if leaf.shape[d] % mesh.size == 0 and leaf.size > 2**20]
        entries = [None] * leaf.ndim
        if dims:
            entries[max(dims, key=lambda d: leaf.shape[d])] = "dp"
        return NamedSharding(mesh, P(*entries))

    def step(params: Any, batch: Any) -> Any:
        def body(total: Any, data: Any) -> Any:
            value, grads = jax.value_and_grad(loss)(params, data)
            return jax.tree.map(jnp.add, total, (value, grads)), None

        # A microbatch of all devices is one of each copy of a pipeline.
        split = jax.tree.map(
            lambda leaf: jax.lax.with_sharding_constraint(
                leaf.reshape(-1, mesh.size, *leaf.shape[1:]), NamedSharding(mesh, P(None, "dp"))
            ),
            batch,
        )
        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(body, zeros, split)
        value, grads = jax.tree.map(lambda leaf: leaf / jax.tree.leaves(split)[0].shape[0], total)
        return (value, {}), grads

    shardings = jax.tree.map(spec, jax.eval_shape(sizes.init, jax.random.key(0)))
    adam = optax.adamw(1e-3)

    def init(params: Any) -> Any:
        constrain = jax.lax.with_sharding_constraint
        return optax.tree_utils.tree_map_params(adam, constrain, adam.init(params), shardings)

    optimizer = optax.GradientTransformation(init, adam.update)
    return mesh, jax.jit(sizes.init, out_shardings=shardings), step, optimizer


def abstract(function: Any, *args: Any) -> Any:
    """Shapes and shardings of what a jitted function returns, which is not run."""

    def shape(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        named = sharding if isinstance(sharding, NamedSharding) else None  # of a count it is one device's
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named)

    return jax.tree.map(shape, jax.eval_shape(function, *args), function.lower(*args).compile().output_shardings)


def measure(name: str, parts: tuple[Any, Any, Any, Any], sizes: LlamaSizes, args: Any) -> dict[str, Any]:
    """One row of the table."""
    mesh, make, value_and_grad, optimizer = parts

    def update(params: Any, state: Any, batch: Any) -> Any:
        (loss, _), grads = value_and_grad(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    count = args.microbatches * args.copies
    ids = jax.random.randint(jax.random.key(1), (count, sizes.length + 1), 0, sizes.vocabulary)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:]}
    batch = jax.device_put(batch, NamedSharding(mesh, P()))
    call = abstract if args.memory else lambda function, *given: function(*given)
    params = call(make, jax.random.key(0))
    state = call(jax.jit(optimizer.init), params)
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not report memory"
    kept, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    temporary += memory.output_size_in_bytes - memory.alias_size_in_bytes
    row = {"recipe": name, "state GiB": kept / 2**30, "temporary GiB": temporary / 2**30}
    row["total GiB"] = (kept + temporary) / 2**30
    if args.memory:
        return row
    held = [params, state]
    del params, state

    def run() -> jax.Array:
        held[0], held[1], loss = compiled(*held, batch)
        return loss

    first = float(run())
    (milliseconds,) = medians_ms([run], args.repeats)
    return row | {"step ms": milliseconds, "tokens/s": count * sizes.length / milliseconds * 1e3, "first loss": first}


def main() -> None:
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="of the pipeline")
    parser.add_argument("--copies", type=int, help="of the pipeline, data-parallel; by default all devices are used")
    parser.add_argument("--microbatches", type=int, default=8, help="of one sequence for each copy")
    parser.add_argument("--repeats", type=int, default=5, help="steps of which the median counts")
    parser.add_argument("--memory", action="store_true", help="of the compiled steps alone: nothing runs")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args()
    args.copies = args.copies or len(jax.devices()) // args.ranks
    sizes = LlamaSizes(2, 128, 256, 4, 2, 512, 16) if args.tiny else LlamaSizes()
    devices = args.ranks * args.copies
    report = Recorder.begin(
        args, machine(devices), f"pp={args.ranks} dp={args.copies}", f"{args.microbatches} microbatches"
    )
    makers: dict[str, Callable[[], Any]] = {
        name: lambda options=options: pipelined(sizes, args, options) for name, options in RECIPES.items()
    }
    makers["FSDP in jit"] = lambda: in_jit(sizes, args)

    def rows() -> Iterator[dict[str, Any]]:
        for name, make in makers.items():
            with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes, and so does JAX's attention
                row = measure(name, make(), sizes, args)
            yield row
            gc.collect()

    report.table(rows())


if __name__ == "__main__":
    main()
