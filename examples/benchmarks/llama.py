"""A Llama of 1.2 billion parameters on the GPUs of a host: FSDP under plain jit, and pipelines made by `from_nnx`.

    python examples/benchmarks/llama.py [--devices 2] [--sequences 64] [--programs NAMES] [--memory] [--tiny]

One NNX model, that of Llama 3.2's 1B, and one loss; every program trains it on the same batch, float32 masters and
moments of AdamW, bfloat16 products. "plain" programs are one jitted step without this library: parameters are sharded
over the devices on their largest dimension, XLA gathers them, and gradients are accumulated over so many microbatches.
"remat" computes each block again in its backward pass. A pipeline's layers are spread so that the stage with the head
has fewer. Devices beside its ranks are data-parallel, with ZeRO-1 or FSDP where the name says so. MFU is of the chip's
published dense bfloat16 peak, six FLOPs for each parameter but the embedding's lookup, and causal attention's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from chunks import compile_all, gib
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from record import Recorder, machine, make_parser, medians_ms

import jaxpipe
from jaxpipe import flops
from jaxpipe.deepseek import causal_attention
from jaxpipe.flax import from_nnx
from jaxpipe.planning.chips import chip_of


@dataclasses.dataclass(frozen=True)
class LlamaShape:
    """LlamaShape of a Llama; the table of the embedding is the output matrix, too."""

    tokens: int = 128_256
    width: int = 2048
    hidden: int = 8192
    heads: int = 32
    kv_heads: int = 8
    layers: int = 16
    length: int = 2048

    @property
    def layer(self) -> int:
        """Parameters of a layer's matrices."""
        return self.width * (2 * self.width + 2 * self.width * self.kv_heads // self.heads + 3 * self.hidden)

    @property
    def total(self) -> int:
        """Parameters of all matrices."""
        return self.layers * self.layer + self.tokens * self.width

    @property
    def flops_per_token(self) -> float:
        """FLOPs of a training step for one token, six for each parameter and attention's scores."""
        size = self.width // self.heads
        return 6 * self.total + 3 * self.layers * flops.score_flops(self.length * self.heads, size, size)


TINY = LlamaShape(tokens=128, width=32, hidden=64, heads=4, kv_heads=2, layers=6, length=16)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions for ``x [B, T, H, C]``, base 500,000."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * 5e5 ** (
        -jnp.arange(half, dtype=jnp.float32) / half
    )
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class LlamaBlock(nnx.Module):
    """Attention of grouped queries and a gated feed-forward layer, each beside a residual branch."""

    def __init__(self, sizes: LlamaShape, rngs: nnx.Rngs) -> None:
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=jnp.bfloat16, rngs=rngs)
        kv = sizes.width * sizes.kv_heads // sizes.heads
        self.sizes = sizes
        self.norm1, self.norm2 = (nnx.RMSNorm(sizes.width, dtype=jnp.bfloat16, rngs=rngs) for _ in range(2))
        self.q, self.out = linear(sizes.width, sizes.width), linear(sizes.width, sizes.width)
        self.k, self.v = linear(sizes.width, kv), linear(sizes.width, kv)
        self.gate, self.up = linear(sizes.width, sizes.hidden), linear(sizes.width, sizes.hidden)
        self.down = linear(sizes.hidden, sizes.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[B, T, D] -> [B, T, D]``."""
        y = self.norm1(x)
        size = self.sizes.width // self.sizes.heads
        q, k, v = (each(y).reshape(*y.shape[:2], -1, size) for each in (self.q, self.k, self.v))
        k, v = (jnp.repeat(each, self.sizes.heads // self.sizes.kv_heads, axis=2) for each in (rotate(k), v))
        x = x + self.out(causal_attention(rotate(q), k, v).reshape(x.shape))
        y = self.norm2(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class Llama(nnx.Module):
    """Embedding, layers, and the embedding's table again as output matrix."""

    def __init__(self, sizes: LlamaShape, rngs: nnx.Rngs, *, remat: bool = False) -> None:
        self.embed = nnx.Embed(sizes.tokens, sizes.width, dtype=jnp.bfloat16, rngs=rngs)
        self.layers = nnx.List([LlamaBlock(sizes, rngs) for _ in range(sizes.layers)])
        self.norm = nnx.RMSNorm(sizes.width, dtype=jnp.bfloat16, rngs=rngs)
        self.remat = remat

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """``int[B, T] -> float32[B, T, V]``."""
        x = self.embed(tokens)
        call = nnx.remat(lambda layer, x: layer(x)) if self.remat else lambda layer, x: layer(x)
        for layer in self.layers:
            x = call(layer, x)
        return self.embed.attend(self.norm(x)).astype(jnp.float32)


def loss_of(model: Llama, batch: Any) -> jax.Array:
    """Mean cross-entropy of the next tokens, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["tokens"]), batch["targets"]).mean()


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all programs of a run have in common."""

    sizes: LlamaShape
    devices: int
    sequences: int
    microbatch_size: int

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW as Llama's."""
        return optax.adamw(3e-4, b2=0.95, weight_decay=0.1)

    def model(self, *, remat: bool) -> Llama:
        """The model, the same for all."""
        return Llama(self.sizes, nnx.Rngs(0), remat=remat)


Program = tuple[Callable[..., Any], Any, Any]
"""(step, its state, the batch's sharding); ``step(state, batch) -> (state, loss)``, to be jitted."""


def plain_fsdp(setting: Setting, parts: int, *, remat: bool) -> Program:
    """FSDP as one writes it with jit alone."""
    mesh = jaxpipe.make_mesh(dp=setting.devices)
    graph, _, rest = nnx.split(nnx.eval_shape(lambda: setting.model(remat=remat)), nnx.Param, ...)

    def shard(leaf: Any) -> NamedSharding:
        largest = int(np.argmax(leaf.shape)) if leaf.ndim else 0
        whole = leaf.ndim < 2 or leaf.shape[largest] % setting.devices
        return NamedSharding(mesh, P() if whole else P(*(None,) * largest, "dp"))

    def start() -> Any:
        params = nnx.state(setting.model(remat=remat), nnx.Param)
        return params, setting.optimizer.init(params)

    shardings = jax.tree.map(shard, jax.eval_shape(start))
    by_batch = NamedSharding(mesh, P(None, "dp"))

    def mean(params: Any, part: Any) -> jax.Array:
        low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        return loss_of(nnx.merge(graph, low, rest), part)

    def step(state: Any, batch: Any) -> Any:
        params, moments = state
        split = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)
        split = jax.lax.with_sharding_constraint(split, by_batch)

        def one(total: Any, part: Any) -> Any:
            found = jax.value_and_grad(mean)(params, part)
            total = jax.tree.map(jnp.add, total, found)
            return (total[0], jax.lax.with_sharding_constraint(total[1], shardings[0])), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        (loss, grads), _ = jax.lax.scan(one, zeros, split)
        grads = jax.tree.map(lambda leaf: leaf / parts, grads)
        updates, moments = setting.optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss / parts

    return step, jax.jit(start, out_shardings=shardings), NamedSharding(mesh, P("dp"))


def pipelined(setting: Setting, name: str, pp: int, recipe: str) -> Program:
    """The same model, loss and optimizer as a pipeline."""
    dp = setting.devices // pp
    mesh = jaxpipe.make_mesh(pp=pp, dp=dp)
    schedule = jaxpipe.schedule.build(name, pp, setting.sequences // dp // setting.microbatch_size)
    costs = [float(setting.sizes.layer)] * setting.sizes.layers
    costs[-1] += setting.sizes.tokens * setting.sizes.width  # with the last layer comes the head
    pipe = from_nnx(
        lambda: setting.model(remat=False),
        schedule,
        mesh,
        blocks="layers",
        loss=loss_of,
        data_axes=("dp",),
        compute_dtype=jnp.bfloat16,
        layer_costs=costs,
        **RECIPES[recipe],
    )
    optimizer = jaxpipe.shard_optimizer(setting.optimizer, pipe.pipeline) if recipe == "ZeRO-1" else setting.optimizer

    def step(state: Any, batch: Any) -> Any:
        params, moments = state
        (loss, _), grads = pipe(params, batch)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    def start() -> Any:
        init = jax.jit(optimizer.init) if recipe == "ZeRO-1" else functools.partial(jaxpipe.init_optimizer, optimizer)
        return pipe.params, init(pipe.params)

    return step, start, NamedSharding(mesh, P("dp"))


RECIPES: dict[str, dict[str, Any]] = {"": {}, "ZeRO-1": {"zero1_axis": "dp"}, "FSDP": {"fsdp_axis": "dp"}}
"""Options of `from_nnx` for devices beside the ranks."""


def programs(setting: Setting) -> dict[str, Callable[[], Program]]:
    """All programs that fit the devices, by name."""
    found: dict[str, Callable[[], Program]] = {}
    for parts in (1, 2, 4, 8):
        for remat in (False, True):
            name = f"plain FSDP, {parts} accumulated" + ", remat" * remat
            found[name] = functools.partial(plain_fsdp, setting, parts, remat=remat)
    for pp in (size for size in range(1, setting.devices + 1) if setting.devices % size == 0):
        for name in ("1f1b", "zb1p", "dualpipev"):
            for recipe in RECIPES if pp < setting.devices else [""]:
                key = f"{name}, pp={pp}" + f", {recipe}" * bool(recipe)
                found[key] = functools.partial(pipelined, setting, name, pp, recipe)
    return found


def batch_of(setting: Setting) -> Any:
    """Random tokens, the same for all."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, setting.sizes.tokens, (setting.sequences, setting.sizes.length + 1), np.int32)
    return {"tokens": text[:, :-1], "targets": text[:, 1:]}


def memory_of(compiled: Any) -> dict[str, float]:
    """What the compiler says that a device holds: state and batch, and all that a step makes besides."""
    memory = compiled.memory_analysis()
    made = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {"arguments GiB": gib(memory.argument_size_in_bytes), "temporaries GiB": gib(made)}


def measure(setting: Setting, compiled: Any, state: Any, batch: Any, repeats: int) -> dict[str, Any]:
    """Time, speed and the first loss of a program, whose state it takes over."""
    held = [state]
    del state

    def call() -> jax.Array:
        held[0], loss = compiled(held[0], batch)
        return loss

    first = float(call())
    (ms,) = medians_ms([call], repeats)
    tokens, chip = setting.sequences * setting.sizes.length, chip_of(jax.devices()[0].device_kind)
    peak = setting.devices * chip.flops("bf16") if chip else math.nan
    mfu = 100 * setting.sizes.flops_per_token * tokens / ms * 1e3 / peak
    return {"step ms": ms, "tokens/s": round(tokens / ms * 1e3), "MFU %": mfu, "first loss": first}


def rows(setting: Setting, makers: dict[str, Callable[[], Program]], repeats: int) -> Iterator[dict[str, Any]]:
    """The table, of memory alone without ``repeats``; programs are compiled side by side and run one by one."""
    made = {name: make() for name, make in makers.items()}
    batches = {name: jax.device_put(batch_of(setting), sharding) for name, (_, _, sharding) in made.items()}
    lowered = [jax.jit(step, donate_argnums=0).lower(start(), batches[name]) for name, (step, start, _) in made.items()]
    for (name, (_, start, _)), compiled in zip(made.items(), compile_all(lowered), strict=True):
        times = measure(setting, compiled, start(), batches[name], repeats) if repeats else {}
        yield {"program": name, **times, **memory_of(compiled)}


def main() -> None:
    """Measures."""
    parser = make_parser(__doc__)
    parser.add_argument("--devices", type=int, default=2, help="how many")
    parser.add_argument("--sequences", type=int, default=64, help="of a step, on all devices")
    parser.add_argument("--microbatch-size", type=int, default=4, help="sequences of a pipeline's microbatch")
    parser.add_argument("--programs", help="their names, separated by semicolons; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median counts")
    parser.add_argument("--memory", action="store_true", help="what the compiler says of memory, without running")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args()
    sizes = TINY if args.tiny else LlamaShape()
    setting = Setting(sizes, args.devices, args.sequences, args.microbatch_size)
    found = programs(setting)
    short = {name.replace(" ", ""): name for name in found}
    asked = args.programs.replace(" ", "").split(";") if args.programs else list(short)
    if unknown := set(asked) - set(short):
        raise ValueError(f"--programs {sorted(unknown)}: there are {'; '.join(found)}")
    names = [short[name] for name in asked]
    size = f"{sizes.total / 1e9:.2f} billion parameters, {args.sequences} sequences of {sizes.length} tokens a step"
    report = Recorder.begin(args, machine(args.devices), size)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes, and so do Flax's norms
        report.table(rows(setting, {name: found[name] for name in names}, 0 if args.memory else args.repeats))


if __name__ == "__main__":
    main()
