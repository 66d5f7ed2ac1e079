"""Every use of JAX beside its documented interface; tried with jax 0.10 to 0.12.

| name | what for |
|---|---|
| `jax.core.Tracer` | tells traced arrays from those whose values are known here and can be checked |
"""

from jax.core import Tracer as Tracer
