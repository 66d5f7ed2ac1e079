"""Stages of every kind the splitter must divide: name -> function returning (stage, params, x, args)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxpipe.flax import nnx_function

WIDTH, HIDDEN, POSITIONS, LAYERS = 4, 8, 5, 3


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape) / 2)


def mlp_params():
    return {"up": normal(WIDTH, HIDDEN), "down": normal(HIDDEN, WIDTH)}


def mlp_stage(params, x):
    return jax.nn.gelu(x @ params["up"]) @ params["down"]


def rotate(x):
    angles = jnp.arange(x.shape[1], dtype=x.dtype)[:, None, None] * jnp.ones(x.shape[-1] // 2, x.dtype)
    left, right = jnp.split(x, 2, -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], -1)


def attention_params():
    heads, size = 2, 2
    return {"qkv": normal(3, WIDTH, heads, size), "out": normal(heads, size, WIDTH), "scale": normal(WIDTH)}


def attention_stage(params, x):
    """RMSNorm, rotary positions, causal softmax."""
    h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * params["scale"]
    q, k, v = jnp.einsum("btd,cdnh->cbtnh", h, params["qkv"])
    scores = jnp.einsum("btnh,bsnh->bnts", rotate(q), rotate(k))
    causal = jnp.arange(x.shape[1])[:, None] >= jnp.arange(x.shape[1])
    weights = jax.nn.softmax(jnp.where(causal, scores, jnp.asarray(-1e30, scores.dtype)))
    return x + jnp.einsum("bnts,bsnh,nhd->btd", weights, v, params["out"])


def scan_params():
    return {"up": normal(LAYERS, WIDTH, HIDDEN), "down": normal(LAYERS, HIDDEN, WIDTH)}


def scan_stage(params, x, wrap=lambda layer: layer):
    def layer(x, p):
        return x + mlp_stage(p, x), None

    return jax.lax.scan(wrap(layer), x, params)[0]


def shared_stage(params, x):
    """The same weights in every iteration: their gradient is a carry of the backward loop."""

    def layer(x, _):
        return x + jax.nn.relu(x @ params["w"]) * params["s"], x.sum()

    return jax.lax.scan(layer, x, None, length=LAYERS)


@jax.custom_vjp
def scaled_product(x, w):
    return x @ w


scaled_product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, ct: (2 * ct @ kept[1].T, 3 * kept[0].T @ ct))


def dropout_stage(params, x, key):
    @jax.checkpoint
    def inner(params, x):
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.where(keep, jnp.tanh(x @ params), 0)

    return inner(params, x) + jnp.where(jax.random.bernoulli(key, 0.7, x.shape), x, 0)


def named_stage(params, x):
    h = checkpoint_name(x @ params["up"], "hidden")
    return jnp.sin(h) @ params["down"]


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs, param_dtype=jnp.float64, dtype=jnp.float64)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs, param_dtype=jnp.float64, dtype=jnp.float64)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs, param_dtype=jnp.float64, dtype=jnp.float64)

    def __call__(self, x):
        return x + self.down(jax.nn.gelu(self.up(self.norm(x))))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, param_dtype=jnp.float64)
        return x + dense(WIDTH)(nn.gelu(dense(HIDDEN)(nn.LayerNorm(param_dtype=jnp.float64)(x))))


def promoting(function):
    """Flax's LayerNorm mixes float32 constants into float64."""

    def call(*args):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args)

    return call


def nnx_case():
    function = nnx_function(NNXBlock(nnx.Rngs(0)))
    return promoting(function), function.params, normal(2, WIDTH), ()


def linen_case():
    module, x = LinenBlock(), normal(2, WIDTH)
    return promoting(module.apply), promoting(module.init)(jax.random.key(0), x), x, ()


def integers_stage(params, x):
    """Integers beside floats in input, parameters and output."""
    h = x["h"] * params["w"] + x["position"].astype(x["h"].dtype)
    return {"h": h, "position": x["position"] + params["offset"]}


def outputs_stage(params, x):
    """Several outputs: a view, a transpose, the input itself, an intermediate used twice."""
    h = x @ params
    return h.reshape(-1), h.T, x, (h * h).sum()


def embed_stage(params, tokens):
    """No input gradient exists: tokens are integers."""
    return jnp.tanh(params["table"][tokens] @ params["w"])


def cond_stage(params, x):
    return jax.lax.cond(x.sum() > 0, lambda p, x: x @ p, lambda p, x: x * 2, params, x)


def unused_stage(params, x):
    return x @ params["used"]


def array_case(stage, params, *args):
    return stage, params, normal(2, WIDTH, seed=1), args


def attention_case(wrap=lambda stage: stage):
    return wrap(attention_stage), attention_params(), normal(2, POSITIONS, WIDTH), ()


POLICIES = jax.checkpoint_policies
CASES = {
    "mlp": lambda: array_case(mlp_stage, mlp_params()),
    "attention": attention_case,
    "scan": lambda: array_case(scan_stage, scan_params()),
    "remat": lambda: attention_case(jax.checkpoint),
    "remat saving dots": lambda: attention_case(functools.partial(jax.checkpoint, policy=POLICIES.checkpoint_dots)),
    "remat saving names": lambda: array_case(
        jax.checkpoint(named_stage, policy=POLICIES.save_only_these_names("hidden")), mlp_params()
    ),
    "remat of a scan": lambda: array_case(jax.checkpoint(scan_stage), scan_params()),
    "scan of remat": lambda: array_case(functools.partial(scan_stage, wrap=jax.checkpoint), scan_params()),
    "shared weights": lambda: array_case(shared_stage, {"w": normal(WIDTH, WIDTH), "s": normal(WIDTH)}),
    "custom vjp": lambda: array_case(lambda w, x: jnp.sin(scaled_product(x, w)), normal(WIDTH, WIDTH)),
    "custom jvp": lambda: array_case(lambda w, x: jax.nn.relu(jax.nn.silu(x @ w)), normal(WIDTH, WIDTH)),
    "jit inside": lambda: array_case(lambda p, x: jax.jit(mlp_stage)(p, x), mlp_params()),
    "dropout in remat": lambda: array_case(dropout_stage, normal(WIDTH, WIDTH), jax.random.key(5)),
    "nnx": nnx_case,
    "linen": linen_case,
    "integers": lambda: (
        integers_stage,
        {"w": normal(WIDTH), "offset": jnp.int32(3)},
        {"h": normal(2, WIDTH), "position": jnp.arange(WIDTH, dtype=jnp.int32)},
        (),
    ),
    "outputs": lambda: array_case(outputs_stage, normal(WIDTH, WIDTH)),
    "tokens": lambda: (
        embed_stage,
        {"table": normal(7, WIDTH), "w": normal(WIDTH, WIDTH)},
        jnp.asarray([[1, 2], [0, 6]], jnp.int32),
        (),
    ),
    "cond": lambda: array_case(cond_stage, normal(WIDTH, WIDTH)),
    "unused": lambda: array_case(unused_stage, {"used": normal(WIDTH, WIDTH), "unused": normal(3)}),
    "product of parameters": lambda: array_case(lambda p, x: x @ (p["up"] @ p["down"]), mlp_params()),
}
