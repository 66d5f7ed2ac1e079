"""What each operation of a Program reads, computes and writes on one rank.

An operation is written for one microbatch and one local chunk. It is three functions, so that a group of two can
read both its inputs, compute both in one block of code that the compiler may interleave, and then write both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.params import Params
from jaxpipe.runtime.buffers import Buffers, Taken, add, put, select, take
from jaxpipe.runtime.fsdp import tie
from jaxpipe.runtime.loss_weights import Shares
from jaxpipe.runtime.model import Context, Model
from jaxpipe.runtime.offload import Chosen, PlacedPool
from jaxpipe.runtime.program import Branch, Field, Op
from jaxpipe.runtime.row_grads import add_with_rows, pull_back_rows
from jaxpipe.runtime.stage_kinds import SharedPool
from jaxpipe.stage import Residuals, SplitStage, vjp_once


class Operation(NamedTuple):
    """One kind of work of one part; ``operands`` are its row of the Program's.

    ``after_read`` makes whatever writes into a slot in host memory wait until this is read; None: nothing is there.
    """

    read: Callable[[Buffers, jax.Array], Any]
    compute: Callable[[Any, jax.Array], Any]
    write: Callable[[Buffers, jax.Array, Any], Buffers]
    after_read: Callable[[Any, Buffers], tuple[Any, Buffers]] | None = None


class Pools(NamedTuple):
    """How kinds of stages share slots, and the sums of each local chunk; see `Buffers`."""

    stash: PlacedPool
    weight_stash: PlacedPool
    cross: SharedPool
    sums: tuple[SharedPool, ...] = ()

    @classmethod
    def of(
        cls,
        splits: Sequence[SplitStage],
        parts: Sequence[tuple[int, int]] = (),
        offloaded: Sequence[Chosen] | None = None,
        *,
        crosses: bool = True,
        flat: bool = False,
    ) -> Pools:
        """The pools of the divided stages; without ``crosses`` no half hands anything to another.

        With ``flat`` slots of arrays of several shapes share memory; what a compiler divides over its mesh axes would
        have to be whole for that. A rank runs one stage of each chunk, so kinds of a chunk share sums, too; ``parts``
        are (chunk, kind) pairs. ``offloaded`` says of each kind which residuals go to the host; None: none do.
        """
        crossing = [s.crossing if crosses else () for s in splits]
        if offloaded is None:
            offloaded = [jax.tree.map(lambda _: False, s.residuals) for s in splits]
        chunks = range(max((chunk + 1 for chunk, _ in parts), default=0))
        summed = ([s.summands if (chunk, k) in parts else () for k, s in enumerate(splits)] for chunk in chunks)
        stash, weight_stash = (
            PlacedPool.of([s.residuals[i] for s in splits], [chosen[i] for chosen in offloaded], flat=flat)
            for i in range(2)
        )
        return cls(stash, weight_stash, SharedPool.of(crossing, flat=flat), tuple(map(SharedPool.of, summed)))


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """What the operations of one training step have in common on one rank.

    Attributes:
      model: the user's functions.
      splits: forward, input gradient and weight gradient of each kind of stage.
      pools: how the kinds share slots, of stash, weight stash and crossing, and sums.
      parts: the (local chunk, kind) of each part.
      prepared: for each part, what its kind's ``prepare`` made of its chunk's parameters and of ``step_inputs``.
      outer: outer parameters in compute dtype.
      trainable: which parameters have a gradient, a tree of bools.
      batch: leaves ``[num_microbatches, microbatch, ...]``.
      shares: each microbatch's share of the mean loss.
      rng: key or None.
      step_inputs: of `Context`, for embed and head; ``prepared`` holds the stages'.
      num_stages: stages of the model.
      gathers: whether ``prepared`` holds shards, which the stage gathers.
      wide_products: whether products that are gradients of stages come in float32; see `SplitStage.backward_weight`.
    """

    model: Model
    splits: tuple[SplitStage, ...]
    pools: Pools
    parts: tuple[tuple[int, int], ...]
    prepared: tuple[Any, ...]
    outer: Any
    trainable: Params
    batch: Any
    shares: Shares
    rng: jax.Array | None
    step_inputs: Any
    num_stages: int
    gathers: bool = False
    wide_products: bool = False

    def operation(self, op: Op, part: int) -> Operation:
        """The operation of a kind on a part."""
        makers = {
            Op.F: self.forward,
            Op.B: self.backward,
            Op.I: self.backward_input,
            Op.W: self.backward_weight,
            Op.EMBED: lambda _: embed_operation(self.model, self.outer, self.batch, self.rng, self.step_inputs),
            Op.HEAD: self.head,
            Op.EMBED_GRAD: self.embed_grad,
        }
        return makers[op](part)

    def forward(self, part: int) -> Operation:
        """X -> y, and the residuals into the stash."""
        kind, pools = self.parts[part][1], self.pools

        def read(buffers: Buffers, operands: jax.Array) -> Any:
            return take(buffers.in_flight, operands[Field.SOURCE])

        def compute(x: Any, operands: jax.Array) -> Any:
            ctx = make_context(self.batch, self.rng, None, operands[Field.STAGE], operands[Field.MICROBATCH])
            prepared, x = self._use(part, x)
            return self.splits[kind].forward(prepared, x, ctx)

        def write(buffers: Buffers, operands: jax.Array, result: Any) -> Buffers:
            (y, aux_loss), metrics, residuals = result
            stash, host_stash = pools.stash.put(
                buffers.stash, buffers.host_stash, operands[Field.STASH], kind, residuals.input
            )
            weight_stash, host_weight_stash = pools.weight_stash.put(
                buffers.weight_stash,
                buffers.host_weight_stash,
                operands[Field.WEIGHT_STASH],
                kind,
                residuals.weight,
            )
            return buffers._replace(
                in_flight=put(buffers.in_flight, operands[Field.TARGET], y),
                stash=stash,
                weight_stash=weight_stash,
                host_stash=host_stash,
                host_weight_stash=host_weight_stash,
                aux_loss=self._add_loss(buffers.aux_loss, aux_loss, operands),
                stage_metrics=add(buffers.stage_metrics, metrics),
            )

        return Operation(read, compute, write)

    def backward(self, part: int) -> Operation:
        """Output cotangent -> input cotangent, and the weight gradient accumulated."""
        kind = self.parts[part][1]
        split = self.splits[kind]

        def compute(inputs: Any, operands: jax.Array) -> Any:
            prepared, (residuals, dy) = self._use(part, inputs)
            ct = self._cotangent(split, dy, operands)
            grads, dx = split.backward(prepared, residuals, ct, **self._summed)
            return grads, select(dx, self._counts("stage", operands))

        def write(buffers: Buffers, operands: jax.Array, result: Any) -> Buffers:
            grads, dx = result
            return self._accumulate(buffers, part, grads, operands)._replace(
                in_flight=put(buffers.in_flight, operands[Field.TARGET], dx)
            )

        return Operation(functools.partial(self._read_backward, kind), compute, write, self._after_backward(kind))

    def backward_input(self, part: int) -> Operation:
        """Output cotangent -> input cotangent, and what the weight gradient still needs."""
        kind = self.parts[part][1]
        split = self.splits[kind]

        def compute(inputs: Any, operands: jax.Array) -> Any:
            prepared, (residuals, dy) = self._use(part, inputs)
            ct = self._cotangent(split, dy, operands)
            dx, crossing = split.backward_input(prepared, residuals, ct)
            return select(dx, self._counts("stage", operands)), crossing

        def write(buffers: Buffers, operands: jax.Array, result: Any) -> Buffers:
            dx, crossing = result
            return buffers._replace(
                in_flight=put(buffers.in_flight, operands[Field.TARGET], dx),
                cross=self.pools.cross.put(buffers.cross, operands[Field.CROSS], kind, crossing),
            )

        return Operation(functools.partial(self._read_backward, kind), compute, write, self._after_backward(kind))

    def backward_weight(self, part: int) -> Operation:
        """The weight gradient accumulated."""
        kind, pools = self.parts[part][1], self.pools

        def read(buffers: Buffers, operands: jax.Array) -> Any:
            weight_stash = pools.weight_stash.take(
                buffers.weight_stash, buffers.host_weight_stash, operands[Field.WEIGHT_STASH], kind
            )
            return weight_stash, pools.cross.take(buffers.cross, operands[Field.CROSS], kind)

        def compute(inputs: Any, operands: jax.Array) -> Any:
            prepared, inputs = self._use(part, inputs)
            split = self.splits[kind]
            return split.backward_weight(prepared, *inputs, **self._summed)

        def write(buffers: Buffers, operands: jax.Array, grads: Any) -> Buffers:
            return self._accumulate(buffers, part, grads, operands)

        def after_read(inputs: Any, buffers: Buffers) -> tuple[Any, Buffers]:
            kept, host = pools.weight_stash.after_take(inputs[0], buffers.host_weight_stash, kind)
            return (kept, inputs[1]), buffers._replace(host_weight_stash=host)

        return Operation(read, compute, write, after_read)

    def embed_grad(self, part: int) -> Operation:
        """The embedding's gradient accumulated from stage 0's input cotangent."""

        def read(buffers: Buffers, operands: jax.Array) -> Any:
            return take(buffers.in_flight, operands[Field.SOURCE])

        def compute(dx: Any, operands: jax.Array) -> Any:
            ctx = make_context(self.batch, self.rng, self.step_inputs, -1, operands[Field.MICROBATCH])
            diff, rest = partition(self.outer, self.trainable.outer)
            if not jax.tree.leaves(diff):
                return diff

            def floating(diff: Any) -> Any:
                return partition(self.model.run_embed(merge(diff, rest), ctx))[0]

            pull_back = vjp_once(floating, diff, ran=True)[1]
            return pull_back_rows(lambda ct: pull_back(ct)[0], partition(dx)[0])

        def write(buffers: Buffers, operands: jax.Array, grads: Any) -> Buffers:
            total = add_with_rows(buffers.outer_grads, grads, self._counts("embed", operands))
            return buffers._replace(outer_grads=total)

        return Operation(read, compute, write)

    def head(self, part: int) -> Operation:
        """The last stage's y -> its loss, y's cotangent and the head's gradient accumulated.

        Forward and backward of the head run at once: its residuals (the logits) are never stashed.
        """

        def read(buffers: Buffers, operands: jax.Array) -> Any:
            return take(buffers.in_flight, operands[Field.SOURCE])

        def compute(y: Any, operands: jax.Array) -> Any:
            if self.model.head is None:
                return jax.tree.map(jnp.zeros_like, y), None, None, {}
            end, microbatch = self.num_stages, operands[Field.MICROBATCH]
            ctx = make_context(self.batch, self.rng, self.step_inputs, end, microbatch, end)
            outer_diff, outer_rest = partition(self.outer, self.trainable.outer)
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

    @property
    def _summed(self) -> dict[str, bool]:
        """How gradients come that are to be added to sums."""
        return {"summands": True, "wide_products": self.wide_products, "addends": True}

    def _use(self, part: int, inputs: Any) -> tuple[Any, Any]:
        """(what is prepared of a part's parameters, inputs) for an operation."""
        return tie(self.prepared[part], inputs) if self.gathers else (self.prepared[part], inputs)

    def _read_backward(self, kind: int, buffers: Buffers, operands: jax.Array) -> Any:
        stash = self.pools.stash.take(buffers.stash, buffers.host_stash, operands[Field.STASH], kind)
        weight_stash = self.pools.weight_stash.take(
            buffers.weight_stash, buffers.host_weight_stash, operands[Field.WEIGHT_STASH], kind
        )
        return Residuals(stash, weight_stash), take(buffers.in_flight, operands[Field.SOURCE])

    def _after_backward(self, kind: int) -> Callable[[Any, Buffers], tuple[Any, Buffers]]:
        def after_read(inputs: Any, buffers: Buffers) -> tuple[Any, Buffers]:
            residuals, dy = inputs
            stash, host_stash = self.pools.stash.after_take(residuals.input, buffers.host_stash, kind)
            weight_stash, host_weight_stash = self.pools.weight_stash.after_take(
                residuals.weight, buffers.host_weight_stash, kind
            )
            buffers = buffers._replace(host_stash=host_stash, host_weight_stash=host_weight_stash)
            return (Residuals(stash, weight_stash), dy), buffers

        return after_read

    def _seed(self, operands: jax.Array) -> jax.Array:
        return self.shares.seeds[operands[Field.MICROBATCH]]

    def _counts(self, where: str, operands: jax.Array) -> jax.Array | None:
        counts = getattr(self.shares.counts, where)
        return None if counts is None else counts[operands[Field.MICROBATCH]]

    def _add_loss(self, total: Any, loss: Any, operands: jax.Array) -> Any:
        return add_loss(total, loss, self.shares, operands)

    def _cotangent(self, split: SplitStage, dy: Any, operands: jax.Array) -> Any:
        _, aux_loss = split.out
        return dy, jax.tree.map(lambda aval: self._seed(operands).astype(aval.dtype), aux_loss)

    def _accumulate(self, buffers: Buffers, part: int, grads: tuple[Any, ...], operands: jax.Array) -> Buffers:
        (chunk, kind), totals = self.parts[part], list(buffers.grads)
        pool = self.pools.sums[chunk]
        total = add(pool.of_kind(totals[chunk], kind), grads, self._counts("stage", operands))
        totals[chunk] = pool.with_kind(totals[chunk], kind, total)
        return buffers._replace(grads=tuple(totals))


def add_loss(total: Any, loss: Any, shares: Shares, operands: jax.Array) -> Any:
    """Total + a microbatch's loss times its weight."""
    weight = shares.weights[operands[Field.MICROBATCH]]
    weighted = jax.tree.map(lambda t, value: value.astype(t.dtype) * weight.astype(t.dtype), total, loss)
    counts = shares.counts.loss
    return add(total, weighted, None if counts is None else counts[operands[Field.MICROBATCH]])


def embed_operation(model: Model, outer: Any, batch: Any, rng: jax.Array | None, step_inputs: Any) -> Operation:
    """A microbatch's input to stage 0."""

    def read(buffers: Buffers, operands: jax.Array) -> None:
        return None

    def compute(_: Any, operands: jax.Array) -> Any:
        return model.run_embed(outer, make_context(batch, rng, step_inputs, -1, operands[Field.MICROBATCH]))

    def write(buffers: Buffers, operands: jax.Array, x: Any) -> Buffers:
        return buffers._replace(in_flight=put(buffers.in_flight, operands[Field.TARGET], x))

    return Operation(read, compute, write)


def make_context(
    batch: Any, rng: jax.Array | None, step_inputs: Any, stage: Any, microbatch: Any, num_stages: int | None = None
) -> Context:
    """A Context with the microbatch's slice of the batch; ``num_stages`` where the stage may be the head's."""
    microbatch = jnp.asarray(microbatch, jnp.int32)
    data = take(batch, microbatch)
    return Context.make(stage, microbatch, rng, data, num_stages=num_stages, step_inputs=step_inputs)


def run_branch(
    branch: Branch, operation: Callable[[Op, int], Operation], *, apart: bool = False, in_order: bool = False
) -> Callable[[Buffers, Any], Buffers]:
    """The code of a branch: read all, compute all, write all; each under the scope of its action.

    Args:
      branch: the operations.
      operation: makes each.
      apart: whether pools are `Apart` and the slots in ``operands`` integers.
      in_order: whether a message is out of its slot before another is written. In straight code, and with slots that
        are constants, XLA would otherwise copy the whole pool: a kernel may read the slot when all else is done.
    """
    parts = [(op, operation(op, part)) for op, part in branch]

    def run(buffers: Buffers, operands: Any) -> Buffers:
        inputs, results, source = [], [], buffers
        for i, (op, part) in enumerate(parts):
            with jax.named_scope(op.value), jax.named_scope("read"):
                if in_order and len(parts) == 1 and op not in (Op.EMBED, Op.W):
                    message = take(buffers.in_flight, operands[i][Field.SOURCE])
                    message, in_flight = lax.optimization_barrier((message, buffers.in_flight))
                    source, buffers = (buffers._replace(in_flight=each) for each in (Taken(message), in_flight))
                inputs.append(part.read(source, operands[i]))
                if part.after_read is not None:
                    inputs[i], buffers = part.after_read(inputs[i], buffers)
        for i, (op, part) in enumerate(parts):
            with jax.named_scope(op.value):
                results.append(part.compute(inputs[i], operands[i]))
        if len(parts) > 1 and not apart:
            # One part writes a pool that the other reads. Without an order XLA would copy the whole pool. Sums are no
            # pool: each is read where it is written, if possible by the product that adds to it.
            results, buffers = _in_order(parts, results, buffers)
        for i, (op, part) in enumerate(parts):
            with jax.named_scope(op.value), jax.named_scope("write"):
                buffers = part.write(buffers, operands[i], results[i])
        return buffers

    return run


def _in_order(parts: Sequence[tuple[Op, Operation]], results: list[Any], buffers: Buffers) -> tuple[list[Any], Buffers]:
    """Results and buffers behind a barrier, but for the stages' gradients and their sums."""
    grads = {i: results[i] for i, (op, _) in enumerate(parts) if op is Op.W}
    grads |= {i: results[i][0] for i, (op, _) in enumerate(parts) if op is Op.B}
    rest = [
        None if op is Op.W else result[1:] if op is Op.B else result
        for (op, _), result in zip(parts, results, strict=True)
    ]
    rest, behind = lax.optimization_barrier((rest, buffers._replace(grads=())))
    for i, (op, _) in enumerate(parts):
        if op is Op.W:
            rest[i] = grads[i]
        elif op is Op.B:
            rest[i] = (grads[i], *rest[i])
    return rest, behind._replace(grads=buffers.grads)


def run_sequential(
    branch: Branch, operation: Callable[[Op, int], Operation]
) -> tuple[Callable[[Buffers, jax.Array], Buffers], ...]:
    """The code of each operation of a branch by itself, for backends that overlap nothing."""

    def one(index: int) -> Callable[[Buffers, jax.Array], Buffers]:
        run = run_branch(branch[index : index + 1], operation)
        return lambda buffers, operands: run(buffers, operands[index:])

    return tuple(one(index) for index in range(len(branch)))


def partition(tree: Any, chosen: Any = None) -> tuple[Any, Any]:
    """(chosen leaves, other leaves) of a tree, None in the others' places; by default inexact leaves are chosen."""
    if chosen is None:
        chosen = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact), tree)
    return (
        jax.tree.map(lambda leaf, keep: leaf if keep else None, tree, chosen),
        jax.tree.map(lambda leaf, keep: None if keep else leaf, tree, chosen),
    )


def merge(left: Any, right: Any) -> Any:
    """The tree of which `partition` made left and right."""
    return jax.tree.map(lambda a, b: b if a is None else a, left, right, is_leaf=lambda leaf: leaf is None)
