"""The loss and metrics of a step, without its gradients: a forward-only program with the training's objective."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxpipe.runtime.buffers import Buffers, add, put
from jaxpipe.runtime.forward_only import ForwardStep, read_source
from jaxpipe.runtime.loss_weights import Shares
from jaxpipe.runtime.operations import Operation, add_loss, make_context
from jaxpipe.runtime.program import Field


@dataclasses.dataclass(frozen=True)
class EvaluationStep(ForwardStep):
    """What the operations of an evaluation have in common on one rank; see `operations.TrainStep`."""

    shares: Shares

    def forward(self, chunk: int, kind: int) -> Operation:
        """X -> y and its auxiliary loss."""

        def compute(x: Any, operands: jax.Array) -> Any:
            stage, microbatch = operands[Field.STAGE], operands[Field.MICROBATCH]
            ctx = make_context(self.batch, self.rng, self.step_inputs, stage, microbatch)
            return self.run(chunk, kind, x, ctx)

        def write(buffers: Buffers, operands: jax.Array, result: Any) -> Buffers:
            (y, aux_loss), metrics = result
            return buffers._replace(
                in_flight=put(buffers.in_flight, operands[Field.TARGET], y),
                aux_loss=add_loss(buffers.aux_loss, aux_loss, self.shares, operands),
                stage_metrics=add(buffers.stage_metrics, metrics),
            )

        return Operation(read_source, compute, write)

    def head(self) -> Operation:
        """The last stage's y -> the loss of the microbatch."""

        def compute(y: Any, operands: jax.Array) -> Any:
            if self.model.head is None:
                return None
            end, microbatch = self.num_stages, operands[Field.MICROBATCH]
            return self.model.run_head(
                self.outer, y, make_context(self.batch, self.rng, self.step_inputs, end, microbatch, end)
            )

        def write(buffers: Buffers, operands: jax.Array, result: Any) -> Buffers:
            if result is None:
                return buffers
            loss, metrics = result
            return buffers._replace(
                loss=add_loss(buffers.loss, loss, self.shares, operands),
                head_metrics=add(buffers.head_metrics, metrics),
            )

        return Operation(read_source, compute, write)
