"""Describes devices to compile for that need not be there. A mesh of them serves `lower` and `compile` only."""

from __future__ import annotations

import importlib.resources
import importlib.resources.abc
import importlib.util

import jax
from jax.experimental import topologies

_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


def topology(chip: str, devices: int = 8, *, nodes: int = 1) -> topologies.TopologyDescription:
    """NVIDIA GPUs to compile for, on a machine with one of them, with another GPU, or with none.

    Make a mesh of its ``devices`` instead of `jax.devices`, and use `jax.ShapeDtypeStruct` with shardings on that mesh
    instead of arrays::

        mesh = Mesh(np.array(topology("H200").devices).reshape(2, 4), ("pp", "ep"), axis_types=(AxisType.Auto,) * 2)
        x = jax.ShapeDtypeStruct((8, 4096), jnp.bfloat16, sharding=NamedSharding(mesh, P("ep")))
        hlo = jax.jit(f).lower(x).compile().as_text()        # for profiling.overlap

    A CUDA build of JAX must be installed, ``pip install "jax[cuda13]"``. Without a GPU the environment variable
    JAX_PLATFORMS must be ``cpu`` before JAX is first used. Programs that need a GPU to compile, such as those with
    cuDNN's attention, then fail. XLA chooses kernels by its cost model instead of trying them, and uses a slower sort.

    Args:
      chip: one of `target_names`, in any case.
      devices: number of devices in all.
      nodes: number of nodes that they are spread over; only devices of one node have NVLink between them.

    Raises:
      ValueError: the chip is unknown, or the devices do not spread evenly over the nodes.
      RuntimeError: no CUDA build of JAX is installed, or it was not registered.

    >>> topology("H200", devices=8, nodes=3)
    Traceback (most recent call last):
    ValueError: devices=8, nodes=3: each node has the same number of devices, at least one
    """
    if chip.upper() not in target_names():
        raise ValueError(f"no target {chip!r}: known are {', '.join(target_names())}")
    if nodes < 1 or devices < 1 or devices % nodes:
        raise ValueError(f"devices={devices}, nodes={nodes}: each node has the same number of devices, at least one")
    options = {"topology": f"{nodes}x1x{devices // nodes}"}  # NVLink domains, hosts of each, their devices
    if not _is_local(chip):
        options["target_config"] = _targets().joinpath(f"{chip.lower()}.txtpb").read_text(encoding="utf-8")
    try:
        return topologies.get_topology_desc(platform="cuda", **options)
    except NotImplementedError as error:
        raise RuntimeError(_remedy()) from error


def target_names() -> tuple[str, ...]:
    """The chips that `topology` knows.

    >>> target_names()
    ('A100', 'B200', 'H100', 'H200')
    """
    files = (file.name for file in _targets().iterdir())
    return tuple(sorted(name.removesuffix(".txtpb").upper() for name in files if name.endswith(".txtpb")))


def has_cuda() -> bool:
    """Whether a CUDA build of JAX is installed, registered or not."""
    return importlib.util.find_spec("jax_plugins") is not None and any(map(importlib.util.find_spec, _PLUGINS))


def _targets() -> importlib.resources.abc.Traversable:
    return importlib.resources.files("profiling.hlo").joinpath("targets")


def _is_local(chip: str) -> bool:
    """Whether the first device is such a chip; XLA then asks it instead of a file."""
    return jax.default_backend() == "gpu" and chip.upper() in jax.devices()[0].device_kind.upper().split()


def _remedy() -> str:
    if not has_cuda():
        return 'no CUDA build of JAX is installed: pip install "jax[cuda13]" (no GPU is needed to compile for one)'
    return (
        "a CUDA build of JAX is installed but was not registered, as it found no driver: set the environment variable "
        "JAX_PLATFORMS=cpu before JAX is first used, or JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1"
    )
