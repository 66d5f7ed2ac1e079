"""Small models for the equality tests, each with everything a pipeline must carry."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxpipe

WIDTH, VOCAB, SEQUENCE = 8, 11, 4


def deepseek_stage(params, x, ctx):
    """DeepSeek's example: two bias-free matmuls round a gelu."""
    return jax.nn.gelu(x @ params["up"]) @ params["down"]


def deepseek_head(outer, y, data, ctx):
    return jnp.mean((y - data["target"]) ** 2)


def deepseek_embed(outer, data, ctx):
    return data["x"]


def deepseek_params(schedule, width, hidden, seed=233):
    rng = np.random.default_rng(seed)
    stages = [
        {
            "up": jnp.asarray(rng.uniform(-1, 1, (width, hidden)) / width**0.5),
            "down": jnp.asarray(rng.uniform(-1, 1, (hidden, width)) / hidden**0.5),
        }
        for _ in range(schedule.num_stages)
    ]
    return jaxpipe.Params(jaxpipe.stack_stages(stages, schedule))


def deepseek_batch(schedule, width, microbatch=3, sequence=256, seed=1):
    rng = np.random.default_rng(seed)
    shape = (schedule.num_microbatches * microbatch, sequence, width)
    return {"x": jnp.asarray(rng.normal(size=shape)), "target": jnp.asarray(rng.normal(size=shape))}


def token_embed(outer, data, ctx):
    return {"h": outer["embedding"][data["tokens"]], "position": jnp.arange(SEQUENCE)}


def token_stage(params, x, ctx):
    """A residual MLP over a pytree with an integer leaf, with dropout, an auxiliary loss and metrics."""
    keep = jax.random.bernoulli(ctx.rng, 0.9, x["h"].shape)
    inner = jnp.where(keep, jnp.tanh(x["h"] @ params["w"] + params["b"]), 0)
    gate = jax.nn.softmax(x["h"].mean((0, 1)))
    h = x["h"] + inner + params["b"] * jnp.cos(x["position"].astype(inner.dtype))[:, None]
    metrics = {"mean": inner.mean(), "visits": jnp.zeros(16, jnp.int32).at[ctx.stage].add(1)}
    return jaxpipe.Output({"h": h, "position": x["position"]}, aux_loss=(gate**2).sum() / 7, metrics=metrics)


def token_head(outer, y, data, ctx):
    """Cross-entropy against the tied embedding, a mean over the real tokens."""
    logits = (y["h"] * outer["scale"]) @ outer["embedding"].T
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), data["targets"][..., None], -1)[..., 0]
    loss = (losses * data["mask"]).sum() / data["mask"].sum()
    return jaxpipe.Output(loss, metrics={"correct": (logits.argmax(-1).astype(jnp.int32) == data["targets"]).sum()})


def token_weight(data):
    return data["mask"].sum()


def token_params(schedule, seed=0):
    rng = np.random.default_rng(seed)
    stages = [
        {
            "w": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5),
            "b": jnp.asarray(rng.normal(size=WIDTH)),
        }
        for _ in range(schedule.num_stages)
    ]
    outer = {"embedding": jnp.asarray(rng.normal(size=(VOCAB, WIDTH))), "scale": jnp.asarray(rng.normal(size=WIDTH))}
    return jaxpipe.Params(jaxpipe.stack_stages(stages, schedule), outer)


def token_batch(size, seed=2):
    rng = np.random.default_rng(seed)
    mask = (rng.random((size, SEQUENCE)) < 0.7).astype(np.float64)
    mask[:, 0] = 1
    return {
        "tokens": jnp.asarray(rng.integers(0, VOCAB, (size, SEQUENCE)), jnp.int32),
        "targets": jnp.asarray(rng.integers(0, VOCAB, (size, SEQUENCE)), jnp.int32),
        "mask": jnp.asarray(mask),
    }
