"""Every use of JAX beside its documented interface; tried with jax 0.10 to 0.12.

| name | what for |
|---|---|
| `jax.core.Tracer` | tells traced arrays from those whose values are known here and can be checked |
| `jax._src.pallas.mosaic_gpu.interpret` | runs Mosaic kernels for GPUs on the CPU, for tests |
| `jax._src.pallas.mpmd`, `jax._src.config` | let a Mosaic kernel write its result over an operand |
| `jax.extend.core.Primitive`, `jax.interpreters` | an operation that says how its result is added to a sum |
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.core import Tracer as Tracer
from jax.extend.core import ClosedJaxpr as ClosedJaxpr
from jax.extend.core import Primitive as Primitive
from jax.extend.core import jaxpr_as_fun as jaxpr_as_fun
from jax.interpreters import ad as ad
from jax.interpreters import batching as batching
from jax.interpreters import mlir as mlir


def call_over_last(
    body: Callable[..., None], mesh: Any, name: str, compiler_params: Any, *operands: jax.Array
) -> jax.Array:
    """The result of a Mosaic kernel that is written over its last operand, as `plgpu.kernel` has no argument for.

    Args:
      body: takes a reference of each operand, and one of the result, which is the last operand's memory.
      mesh: a ``plgpu.Mesh``: the blocks and warpgroups.
      name: of the kernel.
      compiler_params: ``plgpu.CompilerParams``.
      operands: arrays, the last one of the result's shape and dtype.

    Raises:
      NotImplementedError: this JAX keeps it elsewhere.
    """
    try:
        from jax._src import config  # noqa: PLC0415
        from jax._src.pallas.mpmd import _mpmd_map  # noqa: PLC0415
    except ImportError as error:
        raise NotImplementedError(
            f"this JAX, {jax.__version__}, has no kernel that writes in place: {error}"
        ) from error
    total = operands[-1]
    out = jax.ShapeDtypeStruct(total.shape, total.dtype)
    with config._check_vma(False):  # as in plgpu.kernel
        (result,) = _mpmd_map(
            [(mesh, body)],
            (out,),
            input_output_aliases={len(operands) - 1: 0},
            compiler_params=compiler_params,
            interpret=config.pallas_tpu_interpret_mode_context_manager.value or False,
            name=name,
        )(*operands)
    return result


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
