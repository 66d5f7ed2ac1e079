"""What it costs to compute a node again, in seconds of one device: its products, its bytes, or what it sends.

These are estimates, and only their ratios matter: a budget of bytes decides how much is computed again, they decide
what. They are a Hopper GPU's, whose ratios other chips share within a factor of two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jaxpipe._jax import CHEAP, COLLECTIVES, HEAVY, LIGHT, PRODUCTS, SILENT
from jaxpipe.stage.flops import eqn_flops
from jaxpipe.stage.graph import Node, has_effect
from jaxpipe.stage.kernel_flops import kernel_flops, multiplying_unit

RECOMPUTED = "rematted_computation"
"""JAX's scope for what `jax.checkpoint` computes again."""

MEMORY = 3.35e12
"""Bytes/s of a device's memory."""

COPY = 2 / MEMORY
"""Seconds of a byte that is written to a slot and read back."""

_NETWORK = 40e9
"""Bytes/s that a device sends to others, of other nodes."""

_LATENCY = 15e-6
_KERNEL = 1e-6
"""Seconds of a collective, and of a kernel, however small."""

_RATES: Mapping[str, float] = {"fp8": 1330e12, "bf16": 670e12, "tf32": 335e12, "f32": 60e12, "f64": 30e12}
"""FLOP/s that products reach, by what multiplies."""

_FUSED = 0.1
"""Of the time to write a result, what it takes to compute it where it is read."""

_UNKNOWN_KERNEL = 16
"""How often a kernel that nobody knows is taken to go through memory: attention of thousands of tokens does so."""

_NEVER = frozenset({"while", "shard_map", "pure_callback", "custom_call", "mpmd_map", "rng_uniform"})
"""Nobody knows how long they run, or whether they may run once more and give the same."""

_CHOICES = frozenset({"sort", "top_k", "approx_top_k", "argmax", "argmin"})
"""What decides between numbers that may be equal but for rounding: made again, they might decide otherwise."""


def seconds_again(node: Node) -> float | None:
    """Seconds to compute a node once more, with all in its body or branches; None: it never is.

    Collectives may be: all devices that take part in one run the same action.

    >>> import jax, jax.numpy as jnp
    >>> from jaxpipe.stage.graph import make_graph
    >>> x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
    >>> graph = make_graph(jax.make_jaxpr(lambda x: jnp.sin(x @ x))(x))
    >>> product, sine = map(seconds_again, graph.nodes)
    >>> product > 10 * sine > 0
    True
    """
    if has_effect(node) or node.name in _NEVER or node.name in _CHOICES:
        return None
    if node.scan is not None:
        turn = _sum(node.scan.nodes)
        return None if turn is None else turn * node.scan.length
    if node.cond is not None:
        branches = [_sum(body) for body in node.bodies]
        return None if None in branches else max(seconds for seconds in branches if seconds is not None)
    made = sum(value.nbytes for value in node.outs)
    if node.name in LIGHT or node.eqn is None:
        return _FUSED * made / MEMORY
    if node.name in SILENT:
        return 0.0
    if node.name in COLLECTIVES:
        read = sum(value.nbytes for value in node.ins)
        return _LATENCY + max(read, made) / _NETWORK
    if node.name in CHEAP:
        # A gather reads no more of its table than it returns.
        return _KERNEL + 2 * made / MEMORY
    if node.name not in HEAVY:
        return None
    return _kernel(node, made + sum(value.nbytes for value in node.ins))


def _sum(nodes: Iterable[Node]) -> float | None:
    total = 0.0
    for node in nodes:
        seconds = seconds_again(node)
        if seconds is None:
            return None
        total += seconds
    return total


def _kernel(node: Node, nbytes: int) -> float:
    """Seconds of one kernel: of its products or of its bytes, whichever takes longer."""
    assert node.eqn is not None
    flops = eqn_flops(node.eqn) if node.name in PRODUCTS else kernel_flops(node.eqn, {})
    if flops is None:
        return _KERNEL + _UNKNOWN_KERNEL * nbytes / MEMORY
    return _KERNEL + max(flops / _RATES[multiplying_unit(node.eqn)], nbytes / MEMORY)
