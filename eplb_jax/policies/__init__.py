"""Policies beyond DeepSeek's, all of the same return type."""

from eplb_jax.policies.balanced import balanced as balanced
from eplb_jax.policies.elastic import elastic as elastic
from eplb_jax.policies.no_duplicate import no_duplicate as no_duplicate
from eplb_jax.policies.sticky import sticky as sticky
