"""What XLA makes of a whole training step for GPUs that need not be there: its memory, and what communication it hides.

A CUDA build of JAX must be installed (see `profiling.topology`). Attention is a kernel of the same shapes; its time in
the estimate is that of its products.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpipe
from jaxpipe.deepseek import build_model, stand_in
from jaxpipe.deepseek.config import ModelConfig
from jaxpipe.planning.chips import Achieved, Chip
from jaxpipe.stage.kernel_flops import attention_flops
from pretraining import trainer
from pretraining.tables import markdown_head, markdown_row
from profiling.hlo.hiding import CompiledOverlap, overlap
from profiling.hlo.topologies import topology
from profiling.read.pipeline import loop_trips

COLUMNS = (
    "schedule", "planned", "arguments", "temporaries", "total", "total / planned", "all-to-alls hidden",
    "permutes hidden", "synchronous", "step by its order, s", "compiled in s",
)  # fmt: skip


class Compiled(NamedTuple):
    """A training step compiled for a device of a mesh.

    Attributes:
      arguments, temporary: bytes that it takes, its result written over them, and bytes that it allocates besides.
      overlap: its communication.
      seconds: that compiling took.
    """

    arguments: int
    temporary: int
    overlap: CompiledOverlap
    seconds: float


def compile_step(
    config: ModelConfig,
    schedule: jaxpipe.schedule.Schedule,
    sizes: Mapping[str, int],
    microbatch_size: int,
    chip: Chip,
    *,
    dtype: Any = jnp.bfloat16,
    grad_dtype: Any = jnp.float32,
    devices_per_node: int = 8,
    stash: int | None = None,
    offload: int = 0,
) -> Compiled:
    """Compiles a step of pipeline, optimizer and all.

    Args:
      config: the model.
      schedule: of the pipeline.
      sizes: of the axes "pp" and "ep", and of "dp" where there is one.
      microbatch_size: sequences of a microbatch on a device.
      chip: what to compile for, one of `profiling.target_names`.
      dtype: of activations and products.
      grad_dtype: of sums of gradients.
      devices_per_node: devices with fast links to each other.
      stash, offload: as of `jaxpipe.value_and_grad`.

    Raises:
      ValueError: no such target, or a model that does not fit the schedule.
      RuntimeError: no CUDA build of JAX is installed.
    """
    count = math.prod(sizes.values())
    devices = topology(chip.name, count, nodes=-(-count // devices_per_node)).devices
    axes = (AxisType.Auto,) * len(sizes)
    mesh = Mesh(np.array(devices).reshape(tuple(sizes.values())), tuple(sizes), axis_types=axes)
    model = build_model(config, schedule, 0, axis="ep", dtype=dtype, abstract=True, core=stand_in.attention)
    optimizer = trainer.make_optimizer(trainer.TrainConfig(steps=1), model)
    pipeline = trainer.pipelined(model, schedule, mesh, grad_dtype=grad_dtype, stash=stash, offload=offload)
    batch = trainer.abstract_batch(config, schedule.num_microbatches * count // sizes["pp"] * microbatch_size)
    rows = NamedSharding(mesh, P(tuple(name for name in sizes if name != "pp")))
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows), batch)
    state, rng = trainer.abstract_state(model, optimizer, mesh), jax.eval_shape(lambda: jax.random.key(0))
    start = time.perf_counter()
    step = trainer.make_step(pipeline, model, optimizer, mesh).lower(state, batch, rng).compile()
    seconds = time.perf_counter() - start
    attention = _attention_us(config, microbatch_size, chip, dtype)
    times = [(stand_in.FORWARD, attention), (stand_in.BACKWARD, 2.5 * attention)]
    trips = loop_trips(pipeline.program, dispatch=pipeline.dispatch)
    found = overlap(step.as_text() or "", chip, times=times, trips=trips, node_size=devices_per_node)
    memory: Any = step.memory_analysis()
    return Compiled(memory.argument_size_in_bytes, memory.temp_size_in_bytes, found, seconds)


def _attention_us(config: ModelConfig, microbatch_size: int, chip: Chip, dtype: Any) -> float:
    """Microseconds of one layer's attention, forward; backward is five products to the forward's two."""
    shape = (microbatch_size, config.sequence, config.heads)
    query, value = (
        jax.ShapeDtypeStruct((*shape, width), dtype) for width in (config.content + config.rotary, config.value)
    )
    flops = attention_flops(query, query, value, products=2, causal=True)
    return 1e6 * flops / (chip.flops("bf16" if jnp.dtype(dtype) == jnp.bfloat16 else "tf32") * Achieved().matmul)


def table(rows: Iterable[tuple[str, int, Compiled]], chip: Chip) -> Iterator[str]:
    """Lines of Markdown, a row as soon as it is asked for; bytes in GB.

    Args:
      rows: (schedule, bytes that a device takes by plan, what was compiled).
      chip: whose memory they should fit.
    """
    yield from markdown_head(COLUMNS).splitlines()
    for name, planned, one in rows:
        total = one.arguments + one.temporary
        fits = "" if total <= chip.memory else " (too much)"
        shares = [one.overlap.hidden_share(kind) for kind in ("all-to-all", "collective-permute")]
        hidden = ["-" if share is None else f"{share:.1%}" for share in shares]
        sizes = planned, one.arguments, one.temporary, total
        expected, arguments, temporary, whole = (f"{size / 1e9:.1f}" for size in sizes)
        estimates = [*hidden, str(len(one.overlap.synchronous)), f"{one.overlap.us / 1e6:.2f}"]
        memory = expected, arguments, temporary, whole + fits, f"{total / planned:.3f}"
        yield markdown_row([name, *memory, *estimates, f"{one.seconds:.0f}"])
