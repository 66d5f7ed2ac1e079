"""Every use of JAX beside its documented interface."""

from jax.core import Tracer as Tracer
