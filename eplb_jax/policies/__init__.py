"""Policies beyond DeepSeek's, all of the same return type."""

from eplb_jax.policies.balanced import balanced as balanced
from eplb_jax.policies.no_duplicate import no_duplicate as no_duplicate
