"""Eight fake CPU devices, strict dtype promotion; set before anything imports jax."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def x64():
    """float64 within a test."""
    with jax.enable_x64(True):
        yield
