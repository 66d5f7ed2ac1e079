"""Runs a workload, profiles it, and leaves the profile, the compiled program, a Perfetto file and a report."""

from __future__ import annotations

import dataclasses
import gzip
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from profiling.event import Trace
from profiling.read.xplane import read_xplane
from profiling.recording import annotate_step, capture
from profiling.workloads.decode import make_decode
from profiling.workloads.layer import AXIS, init_layers
from profiling.workloads.prefill import make_prefill
from profiling.workloads.sizes import Sizes
from profiling.workloads.train import make_train

WORKLOADS = ("train", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Ran:
    """What `run` leaves.

    Attributes:
      trace: of the profiled calls.
      folder: of the profile.
      hlo: the compiled program's text, as scheduled.
      dropped: choices of experts that were dropped for lack of capacity; 0 with balanced routing.
      temp_bytes: temporary memory of the program on one device, as the compiler counts it.
    """

    trace: Trace
    folder: pathlib.Path
    hlo: str
    dropped: int
    temp_bytes: int


def make_mesh(devices: int | None = None) -> Mesh:
    """The first devices, all by default, on one axis.

    Raises:
      ValueError: more devices than there are.
    """
    count = jax.device_count()
    if devices is not None and not 1 <= devices <= count:
        raise ValueError(f"{devices} devices: there are {count}")
    return Mesh(np.asarray(jax.devices()[:devices]), (AXIS,), axis_types=(AxisType.Auto,))


def prepare(
    workload: str,
    sizes: Sizes,
    mesh: Mesh,
    dtype: Any,
    *,
    pairs: int = 2,
    split_prompts: bool = False,
    precision: str | None = None,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A workload's jitted function and its arguments on the mesh.

    Args:
      workload, sizes, mesh, dtype, pairs, split_prompts: see `run`.
      precision: "bf16" or "fp8", of all Linears and experts; None: what ``sizes`` has. In FP8 training quantises its
        matrices once a call, inference is given matrices in 8 bits.

    Raises:
      ValueError: an unknown workload; see also `init_layers` and the workload's own.
    """
    if workload not in WORKLOADS:
        raise ValueError(f"workload={workload!r}: choose one of {', '.join(WORKLOADS)}")
    sizes = sizes if precision is None else sizes.in_precision(precision)
    devices = mesh.devices.size
    layers = init_layers(jax.random.key(0), sizes, workload, mesh, dtype)

    def normal(shape: tuple[int, ...], *spec: str | None) -> jax.Array:
        make = jax.jit(
            lambda: jax.random.normal(jax.random.key(1), shape, dtype),
            out_shardings=NamedSharding(mesh, P(*(spec or (AXIS,)))),
        )
        return make()

    if workload == "train":
        x = normal((pairs + 1, devices * sizes.sequence, sizes.width), None, AXIS)
        return make_train(sizes, mesh, pairs), (layers, x)
    if workload == "prefill":
        prompts = normal((devices * sizes.prompts, sizes.prompt, sizes.width))
        return make_prefill(sizes, mesh, split_prompts=split_prompts), (layers, prompts)
    half = (devices * sizes.requests // 2, sizes.context, sizes.latent + sizes.rotary)
    caches = tuple((normal(half), normal(half)) for _ in range(sizes.layers))
    lengths = jax.device_put(
        np.full(devices * sizes.requests, sizes.context - 1, np.int32), NamedSharding(mesh, P(AXIS))
    )
    return make_decode(sizes, mesh), (layers, normal((devices * sizes.requests, sizes.width)), caches, lengths)


def run(
    workload: str,
    sizes: Sizes,
    folder: str | pathlib.Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = jnp.bfloat16,
    calls: int = 2,
    pairs: int = 2,
    split_prompts: bool = False,
    precision: str | None = None,
) -> Ran:
    """Compiles a workload, warms it up, and profiles some calls of it.

    Args:
      workload: one of `WORKLOADS`.
      sizes: of the model and the batch.
      folder: for the profile and ``program.hlo.gz``; what an earlier run left in it is removed.
      mesh: see `make_mesh`.
      dtype: of parameters and activations.
      calls: how many calls are profiled.
      pairs: of a training call; see `make_train`.
      split_prompts: of prefill; see `make_prefill`.
      precision: see `prepare`.

    Raises:
      ValueError: see `prepare`.
    """
    mesh = make_mesh() if mesh is None else mesh
    options = {"pairs": pairs, "split_prompts": split_prompts, "precision": precision}
    function, arguments = prepare(workload, sizes, mesh, dtype, **options)
    compiled = function.lower(*arguments).compile()
    folder = pathlib.Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    hlo = compiled.as_text() or ""
    with gzip.open(folder / "program.hlo.gz", "wt", encoding="utf-8") as file:
        file.write(hlo)
    for _ in range(2):
        _, arguments = _call(compiled, workload, arguments)
    dropped = []  # read once the capture is over: a copy to the host is none of the workload's work
    with capture(folder):
        for call in range(calls):
            with annotate_step(call, workload):
                result, arguments = _call(compiled, workload, arguments)
            dropped.append(result[-1])
    trace = dataclasses.replace(read_xplane(folder), title=f"{workload} on {mesh.devices.size} devices")
    memory: Any = compiled.memory_analysis()
    return Ran(trace, folder, hlo, sum(map(int, dropped)), memory.temp_size_in_bytes if memory else 0)


def _call(compiled: Any, workload: str, arguments: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The result, once it is there, and the arguments of the next call: decode gets its caches back."""
    result = jax.block_until_ready(compiled(*arguments))
    if workload == "decode":
        layers, tokens, _, lengths = arguments
        arguments = layers, tokens, result[1], lengths
    return result, arguments
