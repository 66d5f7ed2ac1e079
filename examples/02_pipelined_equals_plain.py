"""A pipeline's loss and gradients are those of the plain program.

    python examples/02_pipelined_equals_plain.py

DeepSeek's own example, an MLP 512-2048-512 with gelu per stage, through DualPipe on 8 devices in float64.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np

import jaxpipe

RANKS, MICROBATCHES, WIDTH, HIDDEN, SEQUENCE = 8, 20, 512, 2048, 32


def stage(params, x, ctx):
    """One stage: two matrix products round a gelu."""
    return jax.nn.gelu(x @ params["up"]) @ params["down"]


def embed(outer, data, ctx):
    """The batch already holds activations."""
    return data["x"]


def head(outer, y, data, ctx):
    """Mean square error."""
    return jnp.mean((y - data["target"]) ** 2)


def plain_loss(stages, batch):
    """The same model as one function."""
    x = batch["x"]
    for params in stages:
        x = stage(params, x, None)
    return jnp.mean((x - batch["target"]) ** 2)


def main() -> None:
    """Compares the two."""
    keys = jax.random.split(jax.random.key(233), (RANKS, 2))
    stages = [
        {
            "up": jax.random.normal(up, (WIDTH, HIDDEN)) / WIDTH**0.5,
            "down": jax.random.normal(down, (HIDDEN, WIDTH)) / HIDDEN**0.5,
        }
        for up, down in keys
    ]
    shape = (MICROBATCHES * 3, SEQUENCE, WIDTH)
    batch = {"x": jax.random.normal(jax.random.key(0), shape), "target": jax.random.normal(jax.random.key(1), shape)}

    schedule = jaxpipe.schedule.build("dualpipe", RANKS, MICROBATCHES)
    step = jaxpipe.value_and_grad(stage, schedule, jaxpipe.make_mesh(pp=RANKS), embed=embed, head=head)
    (loss, _), grads = jax.jit(step)(jaxpipe.Params(jaxpipe.stack_stages(stages, schedule)), batch)
    expected_loss, expected = jax.jit(jax.value_and_grad(plain_loss))(stages, batch)

    print(f"loss {float(loss):.15f} through DualPipe, {float(expected_loss):.15f} without")
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    for got, want in zip(jaxpipe.unstack_stages(grads.stages, schedule), expected, strict=True):
        for name in want:
            x, y = np.asarray(got[name]), np.asarray(want[name])
            assert 1 - 2 * (x * y).sum() / (x * x + y * y).sum() < 1e-13
    print("every gradient agrees: cosine difference below 1e-13")


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
