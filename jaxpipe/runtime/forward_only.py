"""The operations of a forward-only program: no residuals, and outputs instead of gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxpipe.runtime.buffers import Buffers, add, put, take
from jaxpipe.runtime.fsdp import tie
from jaxpipe.runtime.model import Context, Model
from jaxpipe.runtime.operations import Operation, embed_operation, make_context
from jaxpipe.runtime.program import Field, Op


@dataclasses.dataclass(frozen=True)
class ForwardStep:
    """What the forward-only operations have in common on one rank; see `operations.TrainStep`."""

    model: Model
    parts: tuple[tuple[int, int], ...]
    chunks: tuple[Any, ...]
    outer: Any
    batch: Any
    rng: jax.Array | None
    step_inputs: Any
    num_stages: int
    gathers: bool

    def operation(self, op: Op, part: int) -> Operation:
        """The operation of a kind on a part."""
        if op is Op.F:
            return self.forward(*self.parts[part])
        if op is Op.EMBED:
            return embed_operation(self.model, self.outer, self.batch, self.rng, self.step_inputs)
        return self.head()

    def forward(self, chunk: int, kind: int) -> Operation:
        """X -> y."""

        def compute(x: Any, operands: jax.Array) -> Any:
            ctx = make_context(
                self.batch, self.rng, self.step_inputs, operands[Field.STAGE], operands[Field.MICROBATCH]
            )
            (y, _), metrics = self.run(chunk, kind, x, ctx)
            return y, metrics

        def write(buffers: Buffers, operands: jax.Array, result: Any) -> Buffers:
            y, metrics = result
            return buffers._replace(
                in_flight=put(buffers.in_flight, operands[Field.TARGET], y),
                stage_metrics=add(buffers.stage_metrics, metrics),
            )

        return Operation(read_source, compute, write)

    def run(self, chunk: int, kind: int, x: Any, ctx: Context) -> Any:
        """((y, auxiliary loss), metrics) of a stage."""
        params, x = tie(self.chunks[chunk], x) if self.gathers else (self.chunks[chunk], x)
        return self.model.run_kind(kind, params, x, ctx)

    def head(self) -> Operation:
        """The last stage's y -> outputs of the microbatch."""

        def compute(y: Any, operands: jax.Array) -> Any:
            end, microbatch = self.num_stages, operands[Field.MICROBATCH]
            ctx = make_context(self.batch, self.rng, self.step_inputs, end, microbatch, end)
            return run_outputs(self.model, self.outer, y, ctx)

        def write(buffers: Buffers, operands: jax.Array, outputs: Any) -> Buffers:
            return buffers._replace(outputs=put(buffers.outputs, operands[Field.MICROBATCH], outputs))

        return Operation(read_source, compute, write)


def run_outputs(model: Model, outer: Any, y: Any, ctx: Any) -> Any:
    """What a forward-only program returns for a microbatch: the head's result, or y without a head."""
    return y if model.head is None else model.head(outer, y, ctx.data, ctx)


def read_source(buffers: Buffers, operands: jax.Array) -> Any:
    """The message that an operation starts with."""
    return take(buffers.in_flight, operands[Field.SOURCE])
