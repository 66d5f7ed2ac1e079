"""One mixture-of-experts layer, forward and backward, against its grouped matrix products alone: a Markdown table.

DeepSeek-V3's sizes: width 7168, hidden 2048, 32 experts of a device (256 over 8), 8 a token, bfloat16. The layer with
and without its shared expert and its six grouped products take turns; then each other part, compiled by itself,
forward and backward. Times are medians in ms of calls one behind the other, ratios are to the products.

    python examples/benchmarks/moe_layer.py [--tokens 4096,8192,16384] [--tiny]
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from record import Recorder, machine, make_parser, medians_ms

from eplb_jax import (
    ExpertParams,
    MoEConfig,
    MoEParams,
    RouterConfig,
    grouped_matmul,
    init_moe,
    moe_layer,
    route,
    router_logits,
)
from eplb_jax.moe import permute
from eplb_jax.moe.dispatch import make_capacities, sort_by_slot
from eplb_jax.moe.experts import gated_backward, shared_in, shared_out, swiglu

ON_THEIR_WAY = 4
"""Calls of a turn, one behind the other, so that the host's share hides behind the device's as in a training step."""


def times_ms(calls: list[tuple[Callable[..., Any], tuple[Any, ...]]], repeats: int) -> list[float]:
    """Median times of functions with their arguments, compiled, taking turns."""
    compiled = [functools.partial(jax.jit(function), *arguments) for function, arguments in calls]
    return medians_ms(compiled, repeats, inner=ON_THEIR_WAY, warm=2)


def with_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """(cotangent, *arguments) -> the value and all gradients."""

    def call(ct: jax.Array, *arguments: Any) -> Any:
        value, pull = jax.vjp(function, *arguments)
        return value, pull(ct)

    return call


def bare(params: MoEParams, config: MoEConfig) -> tuple[MoEParams, MoEConfig]:
    """The layer without its shared expert."""
    return params._replace(shared=None), dataclasses.replace(config, num_shared=0)


def products(experts: ExpertParams, rows: jax.Array, hidden: jax.Array, ct: jax.Array, ct_hidden: jax.Array,
             sizes: jax.Array, backend: Any) -> Any:  # fmt: skip
    """The layer's six grouped products: both weights, forward, input gradient and weight gradient."""
    first, pull_first = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend=backend), rows, experts.w_in)
    second, pull_second = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend=backend), hidden, experts.w_out)
    return first, second, pull_first(ct_hidden), pull_second(ct)


def measure(tokens: int, config: MoEConfig, repeats: int) -> dict[str, Any]:
    """A row of the table."""
    router, experts = config.router, config.router.num_experts
    params = init_moe(jax.random.key(0), config, jnp.bfloat16)
    keys = jax.random.split(jax.random.key(1), 5)
    x, ct = (jax.random.normal(key, (tokens, config.width), jnp.bfloat16) for key in keys[:2])
    layer = with_gradient(lambda params, x: _output(params, x, config))
    part, part_config = bare(params, config)
    without = with_gradient(lambda params, x: _output(params, x, part_config))

    routing = jax.jit(lambda x: route(router_logits(x, params.router), router, bias=params.bias))(x)
    capacities = make_capacities(tokens, router.top_k, 1, experts, config.capacity_factor)
    found = jax.jit(functools.partial(sort_by_slot, num_slots=experts, num_rows=capacities.rows))(routing.experts)
    rows, ct_rows = (jax.random.normal(key, (capacities.rows, config.width), jnp.bfloat16) for key in keys[2:4])
    ct_hidden = jax.random.normal(keys[4], (capacities.rows, 2 * config.hidden), jnp.bfloat16)
    weight = jnp.ones(capacities.rows, jnp.float32)
    gemms = functools.partial(products, backend=config.backend)
    operands = params.experts, rows, ct_hidden[:, : config.hidden], ct_rows, ct_hidden, found.sizes
    alone, routed, whole = times_ms([(gemms, operands), (without, (ct, part, x)), (layer, (ct, params, x))], repeats)

    def time_of(function: Callable[..., Any], *arguments: Any) -> float:
        return times_ms([(function, arguments)], repeats)[0]

    flops = 6 * 3 * tokens * router.top_k * config.width * config.hidden
    chosen = with_gradient(lambda x, w: route(router_logits(x, w), router, bias=params.bias).weights)

    def gate(ct: jax.Array, hidden: jax.Array, weight: jax.Array) -> Any:
        return swiglu(hidden, weight), gated_backward(hidden, weight, ct, config.backend)

    shared = with_gradient(lambda shared, x: shared_out(shared, shared_in(shared, x)))
    return {
        "tokens": tokens,
        "rows": tokens * router.top_k,
        "products ms": alone,
        "TFLOP/s": round(flops / alone / 1e9),
        "without shared expert ms": routed,
        "without / products": routed / alone,
        "layer ms": whole,
        "layer / products": whole / alone,
        "beside the products ms": whole - alone,
        "router ms": time_of(chosen, routing.weights, x, params.router),
        "sort ms": time_of(lambda slots: sort_by_slot(slots, experts, capacities.rows), routing.experts),
        "permute ms": time_of(with_gradient(lambda x: permute.permute(x, found.moves)), ct_rows, x),
        "unpermute ms": time_of(with_gradient(lambda rows: permute.unpermute(rows, found.moves)), ct, rows),
        "SwiGLU ms": time_of(gate, ct_hidden[:, : config.hidden], ct_hidden, weight),
        "shared expert ms": time_of(shared, ct, params.shared, x),
    }


def _output(params: MoEParams, x: jax.Array, config: MoEConfig) -> jax.Array:
    return moe_layer(params, x, config)[0]


def main() -> None:
    """Prints the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", default="4096,8192,16384", help="of a call")
    parser.add_argument("--repeats", type=int, default=10, help="runs of which the median counts")
    parser.add_argument("--backend", default="auto", choices=["auto", "xla", "mosaic"], help="of the grouped products")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that the script runs")
    arguments = parser.parse_args()
    config = MoEConfig(router=RouterConfig(32, 8, 1, 1), backend=arguments.backend)
    tokens = [int(count) for count in arguments.tokens.split(",")]
    if arguments.tiny:
        config = dataclasses.replace(config, width=64, hidden=32)
        tokens = [128]
    rows = (measure(count, config, arguments.repeats) for count in tokens)
    Recorder.begin(arguments, machine(), f"backend {config.backend}").table(rows)


if __name__ == "__main__":
    main()
