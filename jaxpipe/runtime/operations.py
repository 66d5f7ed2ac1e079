"""What each operation of a Program reads, computes and writes on one rank.

An operation is written for one microbatch and one local chunk. It is three functions, so that a group of two can
read both its inputs, compute both in one block of code that the compiler may interleave, and then write both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.runtime.buffers import Buffers, add, put, select, take
from jaxpipe.runtime.fsdp import tie
from jaxpipe.runtime.loss_weights import Shares
from jaxpipe.runtime.model import Context, Model
from jaxpipe.runtime.program import Branch, Field, Op
from jaxpipe.stage import SplitStage, vjp_once


class Operation(NamedTuple):
    """One kind of work of one local chunk; ``operands`` are its row of the Program's."""

    read: Callable[[Buffers, jax.Array], Any]
    compute: Callable[[Any, jax.Array], Any]
    write: Callable[[Buffers, jax.Array, Any], Buffers]


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """What the operations of one training step have in common on one rank.

    Attributes:
      model: the user's functions.
      split: the stage's forward, input gradient and weight gradient.
      prepared: for each local chunk, what ``split.prepare`` made of its parameters.
      outer: outer parameters in compute dtype.
      batch: leaves ``[num_microbatches, microbatch, ...]``.
      shares: each microbatch's share of the mean loss.
      rng: key or None.
      num_stages: stages of the model.
      gathers: whether ``prepared`` holds shards, which the stage gathers.
    """

    model: Model
    split: SplitStage
    prepared: tuple[Any, ...]
    outer: Any
    batch: Any
    shares: Shares
    rng: jax.Array | None
    num_stages: int
    gathers: bool = False

    def operation(self, op: Op, chunk: int) -> Operation:
        """The operation of a kind on a local chunk."""
        makers = {
            Op.F: self.forward,
            Op.B: self.backward,
            Op.I: self.backward_input,
            Op.W: self.backward_weight,
            Op.EMBED: lambda _: embed_operation(self.model, self.outer, self.batch, self.rng),
            Op.HEAD: self.head,
            Op.EMBED_GRAD: self.embed_grad,
        }
        return makers[op](chunk)

    def forward(self, chunk: int) -> Operation:
        """X -> y, and the residuals into the stash."""

        def read(buffers: Buffers, operands: jax.Array) -> Any:
            return take(buffers.in_flight, operands[Field.SOURCE])

        def compute(x: Any, operands: jax.Array) -> Any:
            ctx = make_context(self.batch, self.rng, operands[Field.STAGE], operands[Field.MICROBATCH])
            prepared, x = self._use(chunk, x)
            return self.split.forward(prepared, x, ctx)

        def write(buffers: Buffers, operands: jax.Array, result: Any) -> Buffers:
            (y, aux_loss), metrics, residuals = result
            return buffers._replace(
                in_flight=put(buffers.in_flight, operands[Field.TARGET], y),
                stash=put(buffers.stash, operands[Field.STASH], residuals.input),
                weight_stash=put(buffers.weight_stash, operands[Field.WEIGHT_STASH], residuals.weight),
                aux_loss=self._add_loss(buffers.aux_loss, aux_loss, operands),
                stage_metrics=add(buffers.stage_metrics, metrics),
            )

        return Operation(read, compute, write)

    def backward(self, chunk: int) -> Operation:
        """Output cotangent -> input cotangent, and the weight gradient accumulated."""

        def compute(inputs: Any, operands: jax.Array) -> Any:
            prepared, (residuals, dy) = self._use(chunk, inputs)
            grads, dx = self.split.backward(prepared, residuals, self._cotangent(dy, operands), narrow=True)
            return grads, select(dx, self._counts("stage", operands))

        def write(buffers: Buffers, operands: jax.Array, result: Any) -> Buffers:
            grads, dx = result
            return self._accumulate(buffers, chunk, grads, operands)._replace(
                in_flight=put(buffers.in_flight, operands[Field.TARGET], dx)
            )

        return Operation(self._read_backward, compute, write)

    def backward_input(self, chunk: int) -> Operation:
        """Output cotangent -> input cotangent, and what the weight gradient still needs."""

        def compute(inputs: Any, operands: jax.Array) -> Any:
            prepared, (residuals, dy) = self._use(chunk, inputs)
            dx, crossing = self.split.backward_input(prepared, residuals, self._cotangent(dy, operands))
            return select(dx, self._counts("stage", operands)), crossing

        def write(buffers: Buffers, operands: jax.Array, result: Any) -> Buffers:
            dx, crossing = result
            return buffers._replace(
                in_flight=put(buffers.in_flight, operands[Field.TARGET], dx),
                cross=put(buffers.cross, operands[Field.CROSS], crossing),
            )

        return Operation(self._read_backward, compute, write)

    def backward_weight(self, chunk: int) -> Operation:
        """The weight gradient accumulated."""

        def read(buffers: Buffers, operands: jax.Array) -> Any:
            return take(buffers.weight_stash, operands[Field.WEIGHT_STASH]), take(buffers.cross, operands[Field.CROSS])

        def compute(inputs: Any, operands: jax.Array) -> Any:
            prepared, inputs = self._use(chunk, inputs)
            return self.split.backward_weight(prepared, *inputs, narrow=True)

        def write(buffers: Buffers, operands: jax.Array, grads: Any) -> Buffers:
            return self._accumulate(buffers, chunk, grads, operands)

        return Operation(read, compute, write)

    def embed_grad(self, chunk: int) -> Operation:
        """The embedding's gradient accumulated from stage 0's input cotangent."""

        def read(buffers: Buffers, operands: jax.Array) -> Any:
            return take(buffers.in_flight, operands[Field.SOURCE])

        def compute(dx: Any, operands: jax.Array) -> Any:
            ctx = make_context(self.batch, self.rng, -1, operands[Field.MICROBATCH])
            diff, rest = partition(self.outer)

            def floating(diff: Any) -> Any:
                return partition(self.model.run_embed(merge(diff, rest), ctx))[0]

            return vjp_once(floating, diff, ran=True)[1](partition(dx)[0])[0]

        def write(buffers: Buffers, operands: jax.Array, grads: Any) -> Buffers:
            return buffers._replace(outer_grads=add(buffers.outer_grads, grads, self._counts("embed", operands)))

        return Operation(read, compute, write)

    def head(self, chunk: int) -> Operation:
        """The last stage's y -> its loss, y's cotangent and the head's gradient accumulated.

        Forward and backward of the head run at once: its residuals (the logits) are never stashed.
        """

        def read(buffers: Buffers, operands: jax.Array) -> Any:
            return take(buffers.in_flight, operands[Field.SOURCE])

        def compute(y: Any, operands: jax.Array) -> Any:
            if self.model.head is None:
                return jax.tree.map(jnp.zeros_like, y), None, None, {}
            ctx = make_context(self.batch, self.rng, self.num_stages, operands[Field.MICROBATCH], self.num_stages)
            outer_diff, outer_rest = partition(self.outer)
            y_diff, y_rest = partition(y)

            def loss_of(outer_diff: Any, y_diff: Any) -> Any:
                return self.model.run_head(merge(outer_diff, outer_rest), merge(y_diff, y_rest), ctx)

            loss, vjp, metrics = vjp_once(loss_of, outer_diff, y_diff, has_aux=True)
            outer_grads, dy = vjp(self._seed(operands).astype(loss.dtype))
            dy = select(dy, self._counts("head", operands))
            return merge(dy, jax.tree.map(jnp.zeros_like, y_rest)), outer_grads, loss, metrics

        def write(buffers: Buffers, operands: jax.Array, result: Any) -> Buffers:
            dy, outer_grads, loss, metrics = result
            buffers = buffers._replace(in_flight=put(buffers.in_flight, operands[Field.TARGET], dy))
            if loss is None:
                return buffers
            return buffers._replace(
                outer_grads=add(buffers.outer_grads, outer_grads, self._counts("head", operands)),
                loss=self._add_loss(buffers.loss, loss, operands),
                head_metrics=add(buffers.head_metrics, metrics),
            )

        return Operation(read, compute, write)

    def _use(self, chunk: int, inputs: Any) -> tuple[Any, Any]:
        """(what is prepared of a chunk's parameters, inputs) for an operation."""
        return tie(self.prepared[chunk], inputs) if self.gathers else (self.prepared[chunk], inputs)

    def _read_backward(self, buffers: Buffers, operands: jax.Array) -> Any:
        stash = take(buffers.stash, operands[Field.STASH])
        weight_stash = take(buffers.weight_stash, operands[Field.WEIGHT_STASH])
        return type(self.split.residuals)(stash, weight_stash), take(buffers.in_flight, operands[Field.SOURCE])

    def _seed(self, operands: jax.Array) -> jax.Array:
        return self.shares.seeds[operands[Field.MICROBATCH]]

    def _counts(self, where: str, operands: jax.Array) -> jax.Array | None:
        counts = getattr(self.shares.counts, where)
        return None if counts is None else counts[operands[Field.MICROBATCH]]

    def _add_loss(self, total: Any, loss: Any, operands: jax.Array) -> Any:
        weight = self.shares.weights[operands[Field.MICROBATCH]]
        weighted = jax.tree.map(lambda t, value: value.astype(t.dtype) * weight.astype(t.dtype), total, loss)
        return add(total, weighted, self._counts("loss", operands))

    def _cotangent(self, dy: Any, operands: jax.Array) -> Any:
        _, aux_loss = self.split.out
        return dy, jax.tree.map(lambda aval: self._seed(operands).astype(aval.dtype), aux_loss)

    def _accumulate(self, buffers: Buffers, chunk: int, grads: Any, operands: jax.Array) -> Buffers:
        totals = list(buffers.grads)
        totals[chunk] = add(totals[chunk], partition(grads)[0], self._counts("stage", operands))
        return buffers._replace(grads=tuple(totals))


def embed_operation(model: Model, outer: Any, batch: Any, rng: jax.Array | None) -> Operation:
    """A microbatch's input to stage 0."""

    def read(buffers: Buffers, operands: jax.Array) -> None:
        return None

    def compute(_: Any, operands: jax.Array) -> Any:
        return model.run_embed(outer, make_context(batch, rng, -1, operands[Field.MICROBATCH]))

    def write(buffers: Buffers, operands: jax.Array, x: Any) -> Buffers:
        return buffers._replace(in_flight=put(buffers.in_flight, operands[Field.TARGET], x))

    return Operation(read, compute, write)


def make_context(
    batch: Any, rng: jax.Array | None, stage: Any, microbatch: Any, num_stages: int | None = None
) -> Context:
    """A Context with the microbatch's slice of the batch; ``num_stages`` where the stage may be the head's."""
    microbatch = jnp.asarray(microbatch, jnp.int32)
    return Context.make(stage, microbatch, rng, take(batch, microbatch), num_stages=num_stages)


def run_branch(
    branch: Branch, operation: Callable[[Op, int], Operation], *, apart: bool = False
) -> Callable[[Buffers, Any], Buffers]:
    """The code of a branch: read all, compute all, write all; each under the scope of its action.

    ``apart``: whether pools are `Apart` and the slots in ``operands`` integers.
    """
    parts = [(op, operation(op, chunk)) for op, chunk in branch]

    def run(buffers: Buffers, operands: Any) -> Buffers:
        inputs, results = [], []
        for i, (op, part) in enumerate(parts):
            with jax.named_scope(op.value), jax.named_scope("read"):
                inputs.append(part.read(buffers, operands[i]))
        for i, (op, part) in enumerate(parts):
            with jax.named_scope(op.value):
                results.append(part.compute(inputs[i], operands[i]))
        if len(parts) > 1 and not apart:
            # One part writes a pool that the other reads. Without an order XLA would copy the whole pool.
            results, buffers = lax.optimization_barrier((results, buffers))
        for i, (op, part) in enumerate(parts):
            with jax.named_scope(op.value), jax.named_scope("write"):
                buffers = part.write(buffers, operands[i], results[i])
        return buffers

    return run


def run_sequential(
    branch: Branch, operation: Callable[[Op, int], Operation]
) -> tuple[Callable[[Buffers, jax.Array], Buffers], ...]:
    """The code of each operation of a branch by itself, for backends that overlap nothing."""

    def one(index: int) -> Callable[[Buffers, jax.Array], Buffers]:
        run = run_branch(branch[index : index + 1], operation)
        return lambda buffers, operands: run(buffers, operands[index:])

    return tuple(one(index) for index in range(len(branch)))


def partition(tree: Any) -> tuple[Any, Any]:
    """(inexact leaves, other leaves) of a tree, None in the others' places."""
    inexact = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact), tree)
    return (
        jax.tree.map(lambda leaf, keep: leaf if keep else None, tree, inexact),
        jax.tree.map(lambda leaf, keep: None if keep else leaf, tree, inexact),
    )


def merge(left: Any, right: Any) -> Any:
    """The tree of which `partition` made left and right."""
    return jax.tree.map(lambda a, b: b if a is None else a, left, right, is_leaf=lambda leaf: leaf is None)
