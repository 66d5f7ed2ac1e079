"""Low-rank adapters of a mixture-of-experts Llama in a pipeline: attention and experts are adapted, the rest is frozen.

    python examples/lora.py [--steps 40] [--tiny]

The model is plain Flax NNX: `nnx.LoRA` round projections of attention, and adapters of the experts' own beside their
stacked weights. ``trainable=nnx.LoRAParam`` is all that the pipeline is told. Frozen parameters then have no gradients,
no sums of gradients, no products for them and no state in the optimizer, and they are kept in bfloat16. The model is a
random one here, so the adapters learn what little they can: to count.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxpipe
from jaxpipe.flax import from_nnx


@dataclasses.dataclass(frozen=True)
class LlamaSizes:
    """Sizes of a model; ``rank`` is that of the adapters, 0 for none; ``dtype`` of activations and products."""

    vocabulary: int = 256
    width: int = 128
    hidden: int = 256
    heads: int = 4
    layers: int = 8
    experts: int = 4
    chosen: int = 2
    rank: int = 8
    dtype: Any = jnp.bfloat16


class Attention(nnx.Module):
    """Causal attention, queries and values adapted."""

    def __init__(self, sizes: LlamaSizes, rngs: nnx.Rngs) -> None:
        width, rank = sizes.width, sizes.rank

        def linear(*, adapted: bool) -> nnx.Module:
            base = nnx.Linear(width, width, use_bias=False, rngs=rngs)
            return nnx.LoRA(width, rank, width, base_module=base, rngs=rngs) if adapted and rank else base

        self.q, self.v = linear(adapted=True), linear(adapted=True)
        self.k, self.out = linear(adapted=False), linear(adapted=False)
        self.heads = sizes.heads

    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, length, width] -> the same."""
        q, k, v = (linear(x).reshape(*x.shape[:2], self.heads, -1) for linear in (self.q, self.k, self.v))
        return self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))


class Experts(nnx.Module):
    """Experts as stacked matrices, each with adapters of its own; every token meets all, weighted by its router."""

    def __init__(self, sizes: LlamaSizes, rngs: nnx.Rngs) -> None:
        experts, width, hidden, rank = sizes.experts, sizes.width, sizes.hidden, sizes.rank

        def matrices(kind: type[nnx.Variable], rows: int, columns: int, scale: float) -> nnx.Variable:
            return kind(jax.random.normal(rngs.params(), (experts, rows, columns)) * scale)

        self.router = nnx.Linear(width, experts, use_bias=False, rngs=rngs)
        self.up = matrices(nnx.Param, width, hidden, width**-0.5)
        self.down = matrices(nnx.Param, hidden, width, hidden**-0.5)
        self.up_a, self.up_b, self.down_a, self.down_b = (
            matrices(nnx.LoRAParam, rows, columns, scale) if rank else None
            for rows, columns, scale in (
                (width, rank, width**-0.5), (rank, hidden, 0.0), (hidden, rank, hidden**-0.5), (rank, width, 0.0),
            )
        )  # fmt: skip
        self.chosen = sizes.chosen

    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, length, width] -> the same."""
        scores = jax.nn.softmax(self.router(x))
        least = jax.lax.top_k(scores, self.chosen)[0][..., -1:]
        gates = jnp.where(scores >= least, scores, 0)

        def product(x: jax.Array, weight: Any, a: Any, b: Any, equation: str) -> jax.Array:
            y = jnp.einsum(equation, x, weight[...])
            return y if a is None else y + jnp.einsum("ebtr,eri->ebti", jnp.einsum(equation, x, a[...]), b[...])

        hidden = jax.nn.silu(product(x, self.up, self.up_a, self.up_b, "btd,edi->ebti"))
        y = product(hidden, self.down, self.down_a, self.down_b, "ebtd,edi->ebti")
        return jnp.einsum("bte,ebti->bti", gates, y)


class AdaptedBlock(nnx.Module):
    """Attention and experts, each behind a norm and beside a residual."""

    def __init__(self, sizes: LlamaSizes, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = (nnx.RMSNorm(sizes.width, rngs=rngs) for _ in range(2))
        self.attention, self.experts = Attention(sizes, rngs), Experts(sizes, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, length, width] -> the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.experts(self.norm2(x))


class AdaptedLlama(nnx.Module):
    """Tokens to logits."""

    def __init__(self, sizes: LlamaSizes, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(sizes.vocabulary, sizes.width, dtype=sizes.dtype, rngs=rngs)
        self.layers = nnx.List([AdaptedBlock(sizes, rngs) for _ in range(sizes.layers)])
        self.norm = nnx.RMSNorm(sizes.width, rngs=rngs)
        self.head = nnx.Linear(sizes.width, sizes.vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[batch, length] -> [batch, length, vocabulary]."""
        x = self.embed(tokens)
        for block in self.layers:
            x = block(x)
        return self.head(self.norm(x))


def loss(model: AdaptedLlama, tokens: jax.Array) -> jax.Array:
    """Cross-entropy of the next token."""
    logits = model(tokens[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def narrow_frozen(params: Any, trainable: Any) -> Any:
    """The parameters, frozen ones in bfloat16, which is what their working copies are."""
    return jax.tree.map(lambda leaf, trained: leaf if trained else leaf.astype(jnp.bfloat16), params, trainable)


def make_tokens(key: jax.Array, batch: int, length: int, vocabulary: int) -> jax.Array:
    """Rows that count up from anywhere."""
    return (jax.random.randint(key, (batch, 1), 0, vocabulary) + jnp.arange(length)) % vocabulary


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Trains adapters; returns the loss of a held-out batch before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of training")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    args = parser.parse_args(argv)
    ranks, sizes, length = 4, LlamaSizes(), 32
    if args.tiny:
        ranks, sizes, length = 2, LlamaSizes(vocabulary=16, width=16, hidden=16, heads=2, layers=2, rank=2), 8
    # Zero-bubble schedules fill bubbles with weight gradients, of which little is left.
    schedule = jaxpipe.schedule.build("1f1b", ranks, 2 * ranks)

    pipe = from_nnx(
        lambda: AdaptedLlama(sizes, nnx.Rngs(0)), schedule, jaxpipe.make_mesh(pp=ranks),
        blocks="layers", loss=loss, trainable=nnx.LoRAParam, compute_dtype=jnp.bfloat16,
    )  # fmt: skip
    params = start = narrow_frozen(pipe.params, pipe.trainable)
    optimizer = jaxpipe.floating_only(optax.adamw(1e-2), trainable=pipe.trainable)
    state = optimizer.init(params)

    @jax.jit
    def train(params: Any, state: Any, tokens: jax.Array) -> Any:
        (value, _), grads = pipe(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    evaluate = jax.jit(pipe.evaluation())

    def draw(seed: int) -> jax.Array:
        return make_tokens(jax.random.key(seed), 8 * schedule.num_microbatches, length + 1, sizes.vocabulary)

    before = float(evaluate(params, draw(0))[0])
    for step in range(1, args.steps + 1):
        params, state, value = train(params, state, draw(step))
        if step % max(args.steps // 4, 1) == 0:
            print(f"step {step}: loss {float(value):.3f}")
    after = float(evaluate(params, draw(0))[0])
    print(f"held-out loss: {before:.3f} before, {after:.3f} after")

    trained, frozen = (_count(params, pipe.trainable, kind) for kind in (True, False))
    print(f"{trained:,} parameters trained, {frozen:,} frozen; optimizer {_mib(state):.2f} of {_mib(params):.2f} MiB")
    same = jax.tree.map(lambda old, new, kind: kind or bool((old == new).all()), start, params, pipe.trainable)
    assert all(jax.tree.leaves(same)), "a frozen parameter changed"
    model = pipe.merge(params)
    assert model.layers[0].experts.up_a[...].shape == (sizes.experts, sizes.width, sizes.rank)
    return before, after


def _count(params: Any, trainable: Any, kind: bool) -> int:
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(trainable), strict=True)
    return sum(leaf.size for leaf, trained in leaves if trained is kind)


def _mib(tree: Any) -> float:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 2**20


if __name__ == "__main__":
    main()
