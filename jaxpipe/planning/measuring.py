"""Times of a pipeline's own stage on its own devices: each action, the ends, and a message, as medians."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpipe import inputs
from jaxpipe.api import Pipeline
from jaxpipe.batches import with_mask
from jaxpipe.params import Params, dtype_of
from jaxpipe.runtime import fsdp
from jaxpipe.runtime.buffers import accumulator, add
from jaxpipe.runtime.by_rank import as_dispatched
from jaxpipe.runtime.copies import cast
from jaxpipe.runtime.model import Context, Model
from jaxpipe.runtime.operations import make_context, merge, partition
from jaxpipe.runtime.options import COPY_NOTHING
from jaxpipe.runtime.prepared_outer import run_prepare, trainable_of_prepared
from jaxpipe.runtime.row_grads import pull_back_rows
from jaxpipe.runtime.shared_ends import share_ends
from jaxpipe.runtime.stash import divide_stages
from jaxpipe.schedule.simulator import Costs, StageCosts
from jaxpipe.stage import SplitStage, vjp_once
from jaxpipe.stage.split import Divisible

_TURN = 0.02
"""Seconds that calls of a turn should take together, so that starting them hides behind running them."""

_CALLS = 50
"""Calls of a turn at most."""

_SUMMING = ("W", "B", "F&B")
"""Actions that add gradients to sums."""


def measure_costs(
    pipeline: Pipeline,
    params: Params,
    batch: Any,
    rng: Any = None,
    step_inputs: Any = None,
    *,
    num_microbatches: int | None = None,
    repeats: int = 5,
) -> StageCosts:
    """Seconds of each stage's actions on one microbatch, of embedding and head, and of a message between ranks.

    All ranks run the same action at the same time, on parameters and a microbatch of their own, with the axes, working
    copies and collectives of the pipeline. Stages of one kind are measured once. The pipeline itself is not compiled.

    Args:
      pipeline: from `jaxpipe.value_and_grad`, on a mesh of devices.
      params, batch: as the pipeline is called with, or their shapes, for which values are made: floats at random, all
        else zeros, which routers send to few experts. Of the batch one microbatch is used.
      rng, step_inputs: as the pipeline is called with.
      num_microbatches: that the batch is cut into; None: as many as the pipeline's schedule has.
      repeats: turns of which the median counts; in a turn each action runs for some 20 ms.

    Raises:
      ValueError: a pipeline without devices or without gradients; params or a batch that do not fit it.
    """
    count = pipeline.program.schedule.num_microbatches if num_microbatches is None else num_microbatches
    return Stopwatch(pipeline, params, batch, rng, step_inputs, count).measure(repeats)


class Stopwatch:
    """A pipeline's actions as programs of their own.

    Args:
      pipeline, params, batch, rng, step_inputs: see `measure_costs`.
      count: microbatches of the batch.
    """

    def __init__(self, pipeline: Pipeline, params: Params, batch: Any, rng: Any, step_inputs: Any, count: int) -> None:
        if not isinstance(pipeline.mesh, Mesh):
            raise ValueError(f"{pipeline!r} has a mesh without devices, on which nothing can be measured")
        if pipeline.program.forward_only:
            raise ValueError(f"{pipeline!r} has no gradients to measure: pass what jaxpipe.value_and_grad returned")
        schedule, axes = pipeline.program.schedule, pipeline.axes
        inputs.check_params(params, schedule)
        inputs.check_key(rng)
        self.pipeline, self.axes, self.mesh = pipeline, axes, pipeline.mesh
        self.kind_of = pipeline.model.kind_of or (0,) * schedule.num_stages
        sharded = pipeline._sharded(params)
        self._trainable = pipeline.trainable_mask(params)
        self._model = self._prepare(fsdp.gather_where_used(pipeline.model, sharded.shards))
        self._specs = jax.tree.map(
            functools.partial(inputs.manual_part, axes.names), sharded.specs, is_leaf=inputs.is_spec
        )
        self._stage_specs = sharded.specs.stages
        self._given = (
            jax.tree.map(_array, params, pipeline.shardings(params)),
            self._microbatch(batch, count),
            rng,
            inputs.as_step_inputs(step_inputs),
        )
        self._splits: tuple[SplitStage, ...] = ()
        self._sums: list[Any] = []

    def _prepare(self, model: Model) -> Model:
        """The model as the executor calls it: without embed in compute dtype, its ends shared."""
        dtype = self.pipeline.compute_dtype
        if model.embed is None and dtype is not None:
            model = dataclasses.replace(model, embed=lambda outer, data, ctx: cast(data, dtype))
        if not self.pipeline.program.shared_ends:
            return model
        return share_ends(model, self.pipeline.program.schedule, self.axes.pipeline, forward_only=False)

    def _microbatch(self, batch: Any, count: int) -> Any:
        """The first of so many microbatches, leaves ``[1, microbatch, ...]``."""
        mask = self.pipeline.options.example_mask
        multiple = count * int(np.prod([self.axes.sizes[axis] for axis in self.axes.data], dtype=int))
        spec, mesh = self.pipeline.batch_spec, self.mesh
        whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), dtype_of(leaf)), batch)
        if mask is None:
            inputs.check_batch(whole, count, self.axes, spec)
        sharding = NamedSharding(mesh, P(None, *spec))

        def first(leaf: Any) -> jax.Array:
            size = -(-np.shape(leaf)[0] // multiple) * multiple // count
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return _array(jax.ShapeDtypeStruct((1, size, *leaf.shape[1:]), leaf.dtype), sharding)
            rows = np.minimum(np.arange(size), np.shape(leaf)[0] - 1)
            if isinstance(leaf, jax.Array):
                return jax.jit(lambda leaf: leaf[rows][None], out_shardings=sharding)(leaf)
            return jax.device_put(jnp.asarray(np.asarray(leaf)[rows][None]), sharding)

        if mask is None:
            return jax.tree.map(first, batch)
        if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(batch)):
            return jax.tree.map(first, with_mask(batch, mask, multiple))
        masked = jax.tree.map(first, jax.eval_shape(lambda batch: with_mask(batch, mask, multiple), batch))
        return {**masked, mask: jnp.ones_like(masked[mask])}  # all examples count

    def _program(self, body: Callable[..., Any], held: Any, sums: Any = ()) -> Any:
        """A body of each device's parameters, microbatch, held values and sums, lowered; it may write over the sums.

        Values that it returns stay where they are: each device has its own.
        """
        batch_spec = inputs.manual_part(self.axes.names, P(None, *self.pipeline.batch_spec))
        specs = (self._specs, jax.tree.map(lambda _: batch_spec, self._given[1]), P(), P(), P(), P())
        mapped = jax.shard_map(
            body, mesh=self.mesh, in_specs=specs, out_specs=P(), axis_names=set(self.axes.names), check_vma=False
        )
        if not jax.tree.leaves(sums):
            return jax.jit(mapped).lower(*self._given, held, ())
        stay = (None, jax.tree.map(lambda leaf: leaf.sharding, sums))
        return jax.jit(mapped, donate_argnums=5, out_shardings=stay).lower(*self._given, held, sums)

    def _start(self, params: Params, batch: Any, rng: Any, step_inputs: Any) -> tuple[Any, Any, Context]:
        """(parameters of a stage, those of the ends, a context) of a device."""
        dtype = self.pipeline.compute_dtype
        chunk = cast(jax.tree.map(lambda leaf: leaf[0], params.stages), dtype)
        return chunk, run_prepare(self._model, cast(params.outer, dtype)), make_context(batch, rng, step_inputs, 0, 0)

    def _split(self, kind: int, chunk: Any, x: Any, ctx: Context) -> SplitStage:
        """A kind of stage; all are divided when the first is asked for."""
        if not self._splits:
            step_inputs = ctx.step_inputs

            def stage(kind: int, given: Any, x: Any, ctx: Context) -> Any:
                params, step_inputs = given
                return self._model.run_kind(kind, params, x, ctx._replace(step_inputs=step_inputs))

            kinds = [
                Divisible(
                    functools.partial(stage, kind),
                    (chunk, step_inputs),
                    x,
                    ctx._replace(step_inputs=None),
                    has_aux=True,
                    trainable=(self._trainable.stages, jax.tree.map(lambda _: False, step_inputs)),
                    max_growth=self.pipeline.options.max_growth,
                )
                for kind in range(len(self._model.stages))
            ]
            self._splits = divide_stages(
                kinds,
                as_dispatched(self.pipeline.program, self.pipeline.dispatch),
                self.pipeline.options.stash,
                copied=self.pipeline.dispatch not in COPY_NOTHING,
                flat=self.pipeline.options.axes.complete,
                kind_of=self._model.kind_of,
            )
        return self._splits[kind]

    def measure(self, repeats: int) -> StageCosts:
        """The costs."""
        with ThreadPoolExecutor(8) as pool:
            programs = self.programs(pool)
            calls = [self._call(*key, program.result(), held) for key, (program, held) in programs.items()]
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        seconds = dict(zip(programs, medians(calls, repeats, queued=not on_cpu), strict=True))
        kinds = [
            Costs(*[seconds[letter, kind] for letter in "FIWB"], overlapped=seconds.get(("F&B", kind)))
            for kind in range(len(self._model.stages))
        ]
        ends = {name: seconds.get((name, 0), 0.0) for name in ("embed", "embed_grad", "head")}
        p2p = seconds.get(("message", 0), 0.0)
        return StageCosts(tuple(kinds[kind] for kind in self.kind_of), p2p, **ends)

    def _place(self, split: SplitStage, sums: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Sums, those of a parameter's gradient sharded over the compiler's axes as the parameter is."""
        compiler_axes = frozenset(self.mesh.axis_names) - self.axes.names
        specs = jax.tree.leaves(partition(self._stage_specs, self._trainable.stages)[0], is_leaf=inputs.is_spec)

        def place(total: jax.Array, number: int | None) -> jax.Array:
            if number is None:
                return total
            spec = P(*inputs.manual_part(compiler_axes, specs[number])[1:])
            return jax.device_put(total, NamedSharding(self.mesh, spec))

        return tuple(map(place, sums, split.gradient_of))

    def _call(self, name: str, kind: int, program: Any, held: Any) -> Callable[[], Any]:
        """Runs an action; one that adds gradients up does so in place, in the sums that all of its kind share."""
        if name not in _SUMMING:
            return functools.partial(program, *self._given, held, ())

        def call() -> Any:
            out, self._sums[kind] = program(*self._given, held, self._sums[kind])
            return out, self._sums[kind]

        return call

    def programs(self, pool: ThreadPoolExecutor) -> dict[tuple[str, int], tuple[Future[Any], Any]]:
        """By action and kind of stage: the program, which is being compiled, and what it is called with besides.

        What one makes for another stays where the compiler puts it, also over axes that are the compiler's.
        """
        found: dict[tuple[str, int], tuple[Future[Any], Any]] = {}

        def start(name: str, kind: int, body: Callable[..., Any], held: Any) -> None:
            sums = self._sums[kind] if name in _SUMMING else ()
            found[name, kind] = pool.submit(self._program(body, held, sums).compile), held

        def run(name: str, kind: int) -> Any:
            program, held = found[name, kind]
            return program.result()(*self._given, held, ())

        prepared, outer, x, sums = self._program(self._begin, ()).compile()(*self._given, (), ())
        self._sums = list(map(self._place, self._splits, sums))
        bodies = [self._bodies(split) for split in self._splits]
        for kind, mine in enumerate(prepared):
            start("F", kind, bodies[kind]["F"], (mine, x))
        if self.pipeline.model.embed is not None:
            start("embed", 0, self._embed, outer)
            if any(jax.tree.leaves(self._trainable.outer)):
                start("embed_grad", 0, self._embed_grad, (outer, x))
        if self._model.head is not None:
            start("head", 0, self._head, (outer, x))
        if self.axes.sizes[self.axes.pipeline] > 1:
            start("message", 0, self._message, x)
        kept = [run("F", kind)[1] for kind in range(len(prepared))]
        for kind, mine in enumerate(prepared):
            both = (mine, kept[kind], x)
            start("I", kind, bodies[kind]["I"], both)
            start("B", kind, bodies[kind]["B"], both)
            if self.pipeline.dispatch != "sequential":  # which runs the halves of a pair one after the other
                start("F&B", kind, bodies[kind]["F&B"], (both, x))
        for kind, mine in enumerate(prepared):
            start("W", kind, bodies[kind]["W"], (mine, kept[kind].weight, run("I", kind)[1]))
        return found

    def _begin(self, params: Params, batch: Any, rng: Any, step_inputs: Any, held: Any, none: Any) -> Any:
        """What actions work on: the kinds' prepared parameters, the ends' parameters, x, and sums."""
        chunk, outer, ctx = self._start(params, batch, rng, step_inputs)
        x = self._model.run_embed(outer, ctx)
        splits = [self._split(kind, chunk, x, ctx) for kind in range(len(self._model.stages))]
        prepared = tuple(split.prepare((chunk, step_inputs)) for split in splits)
        zeros = functools.partial(accumulator, dtype=self.pipeline.options.grad_dtype)
        sums = tuple(jax.tree.map(zeros, split.summands) for split in splits)
        return prepared, outer, x, sums

    def _bodies(self, split: SplitStage) -> dict[str, Callable[..., Any]]:
        """A stage's actions, each of what a device is given, held values and sums."""
        summed = {"summands": True, "wide_products": self.pipeline.options.wide_products, "addends": True}

        def forward(given: Any, prepared: Any, x: Any) -> Any:
            *_, ctx = self._start(*given)
            out, metrics, kept = split.forward(prepared, x, ctx._replace(step_inputs=None))
            return (out, metrics), kept

        def cotangent(dy: Any) -> Any:
            return dy, jax.tree.map(lambda aval: jnp.ones(aval.shape, aval.dtype), split.out[1])

        def backward(both: Any, sums: Any) -> Any:
            prepared, kept, dy = both
            more, dx = split.backward(prepared, kept, cotangent(dy), **summed)
            return dx, add(sums, more)

        def run_input(*args: Any) -> Any:
            prepared, kept, dy = args[-2]
            return split.backward_input(prepared, kept, cotangent(dy))

        def run_weight(*args: Any) -> Any:
            *_, (prepared, kept, crossing), sums = args
            more = split.backward_weight(prepared, kept, crossing, **summed)
            return (), add(sums, more)

        def run_pair(*args: Any) -> Any:
            *given, (both, x), sums = args
            dx, sums = backward(both, sums)
            return (forward(given, both[0], x), dx), sums

        return {
            "F": lambda *args: forward(args[:-2], *args[-2]),
            "I": run_input,
            "W": run_weight,
            "B": lambda *args: backward(*args[-2:]),
            "F&B": run_pair,
        }

    def _embed(self, params: Params, batch: Any, rng: Any, step_inputs: Any, outer: Any, none: Any) -> Any:
        return self._model.run_embed(outer, self._start(params, batch, rng, step_inputs)[2])

    def _embed_grad(self, params: Params, batch: Any, rng: Any, step_inputs: Any, held: Any, none: Any) -> Any:
        outer, dx = held
        ctx = self._start(params, batch, rng, step_inputs)[2]
        diff, rest = partition(outer, self._trainable_ends(params))

        def floating(diff: Any) -> Any:
            return partition(self._model.run_embed(merge(diff, rest), ctx))[0]

        pull_back = vjp_once(floating, diff, ran=True)[1]
        return pull_back_rows(lambda ct: pull_back(ct)[0], partition(dx)[0])

    def _head(self, params: Params, batch: Any, rng: Any, step_inputs: Any, held: Any, none: Any) -> Any:
        outer, y = held
        num_stages = self.pipeline.program.schedule.num_stages
        ctx = make_context(batch, rng, step_inputs, num_stages, 0, num_stages)
        diff, rest = partition(outer, self._trainable_ends(params))
        y_diff, y_rest = partition(y)

        def loss_of(diff: Any, y_diff: Any) -> Any:
            return self._model.run_head(merge(diff, rest), merge(y_diff, y_rest), ctx)

        loss, vjp, metrics = vjp_once(loss_of, diff, y_diff, has_aux=True)
        return loss, vjp(jnp.ones(loss.shape, loss.dtype)), metrics

    def _trainable_ends(self, params: Params) -> Any:
        """Which leaves of what embed and head get have a gradient."""
        outer = cast(params.outer, self.pipeline.compute_dtype)
        return trainable_of_prepared(self._model, outer, self._trainable.outer)

    def _message(self, params: Params, batch: Any, rng: Any, step_inputs: Any, x: Any, none: Any) -> Any:
        axis, size = self.axes.pipeline, self.axes.sizes[self.axes.pipeline]
        ring = [(rank, (rank + 1) % size) for rank in range(size)]
        return jax.tree.map(lambda leaf: lax.ppermute(leaf, axis, ring), x)


def medians(calls: Sequence[Callable[[], Any]], repeats: int, *, queued: bool = True) -> list[float]:
    """Median seconds of calls that take turns, so that a device that grows hot slows all of them down alike.

    Args:
      calls: what is timed.
      repeats: turns that count.
      queued: whether calls of a turn wait for none before them, as on a GPU; CPU devices that share threads can wait
        for each other for ever where several programs with collectives are under way.
    """

    def seconds(call: Callable[[], Any], count: int) -> float:
        start, result = time.perf_counter(), None
        for _ in range(count):
            result = call()
            if not queued:
                jax.block_until_ready(result)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / count

    for call in calls:
        seconds(call, 1)
    counts = [max(1, min(_CALLS, round(_TURN / seconds(call, 1)))) for call in calls]
    counts = [int(count) for count in of_first_process(counts)]  # who calls more often would wait for the others
    turns = [[seconds(call, count) for call, count in zip(calls, counts, strict=True)] for _ in range(repeats)]
    return of_first_process([statistics.median(taken) for taken in zip(*turns, strict=True)])


def of_first_process(numbers: Sequence[float]) -> list[float]:
    """The numbers that the first of several processes has: all then do the same."""
    if jax.process_count() == 1:
        return list(numbers)
    return multihost_utils.broadcast_one_to_all(np.asarray(numbers, np.float64)).tolist()


def _array(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """A leaf where it belongs; of a shape, values: small ones at random of floats, zeros of all else."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.device_put(leaf, sharding)

    def make() -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return 0.02 * jax.random.normal(jax.random.key(0), leaf.shape, jnp.float32).astype(leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0), leaf.shape)
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.jit(make, out_shardings=sharding)()
