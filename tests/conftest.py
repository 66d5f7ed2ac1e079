"""Eight fake CPU devices, strict dtype promotion; set before anything imports jax."""

import os

# Eight devices on two cores may wait long for each other; XLA ends the process after 40 seconds by default.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    " --xla_cpu_collective_call_terminate_timeout_seconds=1200"
)

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
if jax.default_backend() == "cpu":
    # What runs once is compiled fast: LLVM's optimizations take twice as long and change no result beyond rounding.
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """float64 within a test."""
    with jax.enable_x64(True):
        yield
