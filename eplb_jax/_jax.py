"""Every use of JAX beside its documented interface; tried with jax 0.10 to 0.12.

| name | what for |
|---|---|
| `jax.core.Tracer` | tells traced arrays from those whose values are known here and can be checked |
| `jax._src.pallas.mosaic_gpu.interpret` | runs Mosaic kernels for GPUs on the CPU, for tests |
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from jax.core import Tracer as Tracer


def interpreted(**parameters: Any) -> AbstractContextManager[Any]:
    """Within it, Mosaic kernels for GPUs run in JAX's interpreter on the CPU.

    Args:
      parameters: of JAX's ``InterpretGPUParams``.

    Raises:
      NotImplementedError: this JAX has no such interpreter, or has it elsewhere.
    """
    try:
        from jax._src.pallas.mosaic_gpu.interpret.params import (  # noqa: PLC0415
            InterpretGPUParams,
            force_gpu_interpret_mode,
        )
    except ImportError as error:
        raise NotImplementedError(f"JAX has no interpreter of Mosaic kernels for GPUs here: {error}") from error
    return force_gpu_interpret_mode(InterpretGPUParams(**parameters))
