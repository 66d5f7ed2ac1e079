"""Options of XLA's compiler for a pipelined step on GPUs."""

from __future__ import annotations

XLA_SHARE = 0.8
"""What XLA takes for the memory of a GPU that a program may use, inputs and outputs included."""


CUBLAS = {"xla_gpu_enable_triton_gemm": False}
"""Keeps XLA from wrapping products into kernels of Triton's."""


TRANSFERS = {"xla_gpu_experimental_parallel_async_compute_limit": 64}
"""Lets XLA have so many transfers to the host and back under way at once, where it has two."""


def compiler_options(
    arguments: int, memory: float, *, share: float = 0.92, offload: bool = False
) -> dict[str, int | bool]:
    """What a training step wants of XLA: for ``jax.jit(step, compiler_options=...)`` on GPUs.

    Products are cuBLAS's, which add a weight gradient to its sum in place. XLA may otherwise wrap product and sum for a
    kernel of Triton's, find cuBLAS faster, and add in a pass of its own: a step of dense layers on one H200 took 391
    ms so, and 373 with this option (docs/measured/gpus.md).

    XLA's scheduler may use the memory that there is.
    XLA hides communication behind compute until it takes memory to run short: at 80% of the GPU's, less inputs and
    outputs, less 5% of the rest. From there on it orders operations to save memory, and does not hide collectives that
    it could have hidden. A large model's step always gets there, since its parameters and sums of gradients take most
    of the GPU. The step of DeepSeek-V2-Lite on eight H100s needs 69 GB with either limit; by the order of its
    operations 29% of the time of its all-to-alls is hidden with XLA's limit and 83% with this one. Between two GPUs of
    a node such a difference was worth 1% of a step (docs/measured/gpus.md); slower links have more to hide.

    Args:
      arguments: bytes of a device's inputs; outputs that are not written over them count too.
      memory: bytes of the device.
      share: the part of it that the step may use. The rest is for code, NCCL, and fragmentation. Set the environment
        variable XLA_PYTHON_CLIENT_MEM_FRACTION to the same number, or JAX's allocator takes 75%.
      offload: whether the step keeps residuals in the host's memory (`offload=` of `jaxpipe.value_and_grad`). Transfers
        then leave right behind what makes an array, and all that an action needs is under way when it begins. With
        XLA's own limit of two at a time nearly all run one after the other, before the action or behind it. The option
        is of JAX 0.11.

    Returns:
      Options; without the factor where the arguments alone exceed XLA's limit, since none helps there.

    Raises:
      ValueError: sizes that are not positive, a share above 1.

    Source: `GetSchedulerMemoryLimit` in XLA's ``gpu_hlo_schedule.cc``.

    >>> compiler_options(arguments=21_300_000_000, memory=80e9)
    {'xla_gpu_enable_triton_gemm': False, 'xla_gpu_memory_limit_slop_factor': 122}
    >>> compiler_options(arguments=0, memory=80e9)
    {'xla_gpu_enable_triton_gemm': False, 'xla_gpu_memory_limit_slop_factor': 115}
    >>> list(compiler_options(arguments=64_000_000_000, memory=80e9, offload=True))
    ['xla_gpu_enable_triton_gemm', 'xla_gpu_experimental_parallel_async_compute_limit']
    """
    if arguments < 0 or memory <= 0 or not 0 < share <= 1:
        raise ValueError(
            f"arguments={arguments}, memory={memory}, share={share}: sizes are bytes, and the share above 0, at most 1"
        )
    usable = XLA_SHARE * memory - arguments
    always: dict[str, int | bool] = {**CUBLAS, **(TRANSFERS if offload else {})}
    if usable <= 0:
        return always
    return always | {"xla_gpu_memory_limit_slop_factor": int(100 * max(0.0, share * memory - arguments) / usable)}
