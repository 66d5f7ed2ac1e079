"""Eight fake CPU devices unless XLA_FLAGS says otherwise, strict dtype promotion; set before anything imports jax."""

import functools
import importlib.metadata
import math
import os
import sys
import types

# Of a flag's values the last counts. Eight devices on two cores may wait long for each other; XLA ends the process
# after 40 seconds by default. Command buffers of GPUs hide from profiles which operation a kernel belongs to.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=1200 "
    "--xla_gpu_enable_command_buffer= " + os.environ.get("XLA_FLAGS", "")
)

# The older emitters compile what runs once in three quarters of the time; later versions of XLA have one kind alone.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false " + os.environ["XLA_FLAGS"]

import jax
import pytest

try:
    from tests import shapes
except ImportError:  # without beartype shapes are not executed, and test_shapes.py says so
    collect_ignore = ["shapes.py"]
else:
    shapes.install()

import jaxpipe.api

jax.config.update("jax_numpy_dtype_promotion", "strict")
if jax.default_backend() == "cpu":
    # What runs once is compiled fast: LLVM's optimizations take twice as long and change no result beyond rounding.
    jax.config.update("jax_disable_most_optimizations", True)


def skipping(make):
    """Makes meshes, but skips the test or doctest that needs up to 8 devices where there are fewer."""

    @functools.wraps(make)
    def wrapped(shape=None, *args, devices=None, **others):
        count = math.prod(others.values() if shape is None else shape)
        if len(jax.devices() if devices is None else devices) < count <= 8:
            pytest.skip(f"needs {count} devices, there are {jax.device_count()} ({jax.default_backend()})")
        if shape is None:
            return make(**others)
        return make(shape, *args, devices=devices, **others)

    return wrapped


if jax.device_count() < 8:
    jax.make_mesh = skipping(jax.make_mesh)
    jaxpipe.make_mesh = jaxpipe.api.make_mesh = skipping(jaxpipe.make_mesh)


def without_hypothesis():
    """Modules that stand in for hypothesis where it is not installed: its tests skip, others of their files run."""

    class Anything:
        def __getattr__(self, name):
            return self

        def __call__(self, *args, **options):
            return self

    def given(*args, **options):
        return pytest.mark.skip(reason="needs the package hypothesis")

    strategies = types.ModuleType("hypothesis.strategies")
    strategies.__getattr__ = lambda name: Anything()
    hypothesis = types.ModuleType("hypothesis")
    hypothesis.given, hypothesis.settings, hypothesis.HealthCheck = given, lambda **_: lambda test: test, Anything()
    hypothesis.strategies = strategies
    return {"hypothesis": hypothesis, "hypothesis.strategies": strategies}


try:
    import hypothesis as hypothesis
except ImportError:
    sys.modules |= without_hypothesis()


def pytest_sessionstart(session):
    """Makes warnings errors, now that all plugins of pytest have started.

    In pyproject.toml this would end the run where a plugin that has nothing to do with these tests warns as it is
    imported or configured. Later warnings of plugins, known by their modules' names, are shown.
    """
    for line in ("error", r"default:::(.+\.)?_?pytest_"):
        session.config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module():
    """Compiled programs are parts of memory of their own, of which the kernel gives a process only so many."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """float64 within a test."""
    with jax.enable_x64(True):
        yield
