"""A small model, and batches for it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxpipe
from eplb_jax import MoEConfig, RouterConfig
from jaxpipe.deepseek import ModelConfig, build_model

SMALL = ModelConfig(
    moe=MoEConfig(
        width=16,
        hidden=8,
        router=RouterConfig(num_experts=4, top_k=2, num_groups=1, top_groups=1, scale=1.0),
        backend="xla",
    ),
    vocab=64,
    layers=5,
    dense_layers=1,
    dense_hidden=24,
    heads=2,
    query_rank=8,
    latent=8,
    content=8,
    rotary=4,
    value=6,
    sequence=8,
    redundant=2,
)


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


def make_batch(step, rows, config=SMALL):
    """Sequences in which each token depends on the one before."""
    rng = np.random.default_rng((7, step))
    text = np.cumsum(rng.integers(1, 4, (rows, config.sequence + 1)), 1) % config.vocab
    mask = (rng.random((rows, config.sequence)) > 0.1).astype(np.float32)
    return {"tokens": text[:, :-1].astype(np.int32), "targets": text[:, 1:].astype(np.int32), "mask": mask}


@functools.cache
def built(config, name, ranks, microbatches, **options):
    return build_model(config, jaxpipe.schedule.build(name, ranks, microbatches), 0, **options)


def with_zeros(config, name, ranks, microbatches):
    """A model for what does not depend on most parameters' values: all are zero."""
    model = built(config, name, ranks, microbatches, abstract=True)
    return dataclasses.replace(model, params=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.params))
