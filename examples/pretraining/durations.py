"""How long the parts of a training step should take, from the sizes of the model's products and messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from eplb_jax.moe.dispatch import make_capacities
from jaxpipe.planning.chips import Achieved, Chip
from jaxpipe.schedule.simulator import Costs
from pretraining.config import ModelConfig

WHOLE_LAYERS = Achieved(matmul=0.45)
"""Shares that whole layers reach, everything between their products included.

Of the products' peak, on H100s and H200s (docs/measured/gpus.md): a pair of DeepSeek-V3's layers 0.45, a step of
moe-1b 0.42, of five layers of moe-16b 0.44.
"""


@dataclasses.dataclass(frozen=True)
class Durations:
    """Seconds, unless said otherwise.

    Attributes:
      costs: of one stage on one microbatch.
      embed, head: of a microbatch's embedding with the dense layers, and of its head, forward and backward.
      output: of the head's products with the output matrix.
      attention: of one layer's scores and their sums of values, forward; backward takes 2.5 times that.
      token_flops: FLOPs that the model needs for a token, forward and backward, nothing computed again.
      memory: bytes per second that updates get.
      summed: bytes of gradients per second that are summed over the experts' devices.
    """

    costs: Costs
    embed: float
    head: float
    output: float
    attention: float
    token_flops: float
    memory: float
    summed: float

    def update(self, state: int, masters: int, replicated: int) -> float:
        """Summing gradients and updating parameters, of bytes of a device: all state is read and written.

        ``replicated``: of the masters, how many each of the experts' devices has.
        """
        return replicated / self.summed + (2 * state + 2 * masters) / self.memory


def durations(
    config: ModelConfig,
    layers: int,
    sizes: Mapping[str, int],
    microbatch_size: int,
    chip: Chip,
    achieved: Achieved,
    dtype: Any,
    devices_per_node: int,
) -> Durations:
    """What one device needs for a stage of ``layers`` layers on a mesh of these sizes of "pp" and "ep".

    A forward and a backward that overlap take as long as their products or their messages, whichever is longer; other
    actions take the sum of both. The backward of causal attention is five products to the forward's two.
    """
    devices = sizes["ep"]
    within, between = chip.interconnect * achieved.interconnect, chip.internode * achieved.internode
    tokens, sequence = microbatch_size * config.sequence, config.sequence
    rate = chip.flops("bf16" if jnp.dtype(dtype) == jnp.bfloat16 else "tf32") * achieved.matmul
    score = tokens * sequence * config.heads * (config.content + config.rotary + config.value)  # half of them masked
    matrices = 2 * tokens * config.layer_parameters(config.moe.router.top_k)
    dense = 2 * tokens * config.dense_layer_parameters
    output = 2 * tokens * config.vocab * config.width

    # Keys and values are always made again from their latents.
    expanded = 2 * tokens * config.latent * config.heads * (config.content + config.value)
    attention = 2 * tokens * config.attention_parameters + score
    again = {"none": expanded, "attention": attention, "layer": matrices + score}
    forward, inputs, weight = (layers * flops / rate for flops in (matrices + score, matrices + 2.5 * score, matrices))
    inputs += layers * again[config.remat] / rate
    # There in 8 bits where the model says so, back in full width; backwards the other way round.
    itemsize = jnp.dtype(dtype).itemsize
    there = _exchange(config, tokens, devices, chip, achieved, 1 if config.moe.fp8 else itemsize, devices_per_node)
    moves = layers * (there + _exchange(config, tokens, devices, chip, achieved, itemsize, devices_per_node))
    back = moves * (2 if config.remat == "layer" else 1)
    costs = Costs(
        forward=forward + moves,
        backward_input=inputs + back,
        weight=weight,
        overlapped=max(forward + inputs + weight, moves + back),
        p2p=tokens * config.width * itemsize / (within if devices * sizes["pp"] <= devices_per_node else between)
        + chip.latency_us * 1e-6,
    )
    repeated = dense + score if config.remat == "layer" else 0
    second = 3 * (dense + 2 * tokens * 2 * config.width**2 + output) + 3.5 * score if config.mtp else 0
    model = 3 * (config.moe_layers * matrices + config.dense_layers * dense + output) + second
    return Durations(
        costs=costs,
        embed=config.dense_layers * (3 * dense + 3.5 * score + repeated) / rate,
        head=(3 * output + second) / rate,
        attention=score / rate,
        output=3 * output * (2 if config.mtp else 1) / rate,
        token_flops=(model + 3 * config.layers * score) / tokens,
        memory=chip.hbm * achieved.memory,
        summed=(within if devices <= devices_per_node else between) * devices / max(2 * (devices - 1), 1e-9),
    )


def _exchange(
    config: ModelConfig, tokens: int, devices: int, chip: Chip, achieved: Achieved, itemsize: int, node: int
) -> float:
    """Seconds of one exchange of a layer's tokens: what stays in the node and what leaves it, whichever is longer."""
    if devices == 1:
        return 0.0
    slots = (config.experts + config.redundant) // devices
    room = make_capacities(tokens, config.moe.router.top_k, devices, slots, config.moe.capacity_factor).exchange
    each = room * config.width * itemsize
    inside = min(devices, node) - 1
    outside = devices - 1 - inside
    within = inside * each / (chip.interconnect * achieved.interconnect)
    between = outside * each / (chip.internode * achieved.internode)
    return max(within, between) + chip.latency_us * 1e-6
