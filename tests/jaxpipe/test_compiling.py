"""Compiler options for GPUs."""

import pytest

import jaxpipe


def limit(arguments, memory, factor):
    """What XLA makes of a factor: `GetSchedulerMemoryLimit`."""
    return (0.8 * memory - arguments) * factor / 100


@pytest.mark.parametrize("arguments", [0, 10e9, 40e9, 60e9])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_scheduler_may_use_its_share(arguments, share):
    """Arguments and XLA's limit together are the share of the memory, if arguments alone are less."""
    factor = jaxpipe.compiler_options(int(arguments), 80e9, share=share)["xla_gpu_memory_limit_slop_factor"]
    assert max(share * 80e9, arguments) - 0.01 * 80e9 <= arguments + limit(arguments, 80e9, factor)
    assert arguments + limit(arguments, 80e9, factor) <= max(share * 80e9, arguments)


def test_no_factor_helps_where_arguments_exceed_the_limit():
    assert jaxpipe.compiler_options(64_000_000_000, 80e9) == {"xla_gpu_enable_triton_gemm": False}


def test_transfers_to_the_host_may_be_more_than_two():
    plain, offloaded = (jaxpipe.compiler_options(0, 80e9, offload=offload) for offload in (False, True))
    assert offloaded == plain | {"xla_gpu_experimental_parallel_async_compute_limit": 64}


@pytest.mark.parametrize("bad", [dict(arguments=-1, memory=1.0), dict(arguments=1, memory=0.0)])
def test_bad_sizes(bad):
    with pytest.raises(ValueError, match="sizes are bytes"):
        jaxpipe.compiler_options(**bad)
    with pytest.raises(ValueError, match=r"share=1\.5"):
        jaxpipe.compiler_options(1, 1.0, share=1.5)
