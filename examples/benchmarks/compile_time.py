"""Compile time and program size of a DualPipeV training step against the number of microbatches.

python examples/benchmarks/compile_time.py [--ranks 4]
"""

import argparse
import os
import platform
import time

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp

import jaxpipe


def stage(params, x, ctx):
    """Four residual MLP layers."""
    for layer in range(4):
        x = x + jax.nn.gelu(x @ params["up"][layer]) @ params["down"][layer]
    return x


def head(outer, y, data, ctx):
    """Mean square."""
    return jnp.mean(y**2)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    ranks = parser.parse_args().ranks
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}, "
          f"{ranks} ranks\n")  # fmt: skip
    print("| microbatches | lowering tables s | tracing s | compiling s | HLO kB | steps |")
    print("|---|---|---|---|---|---|")
    for microbatches in (8, 16, 32, 64, 128, 256):
        start = time.perf_counter()
        schedule = jaxpipe.schedule.build("dualpipev", ranks, microbatches)
        step = jaxpipe.value_and_grad(stage, schedule, jaxpipe.make_mesh(pp=ranks), head=head, order="storage")
        tables = time.perf_counter()
        params = {"up": jnp.ones((2 * ranks, 4, 64, 256)), "down": jnp.ones((2 * ranks, 4, 256, 64))}
        lowered = jax.jit(step).lower(jaxpipe.Params(params), jnp.ones((2 * microbatches, 64)))
        traced = time.perf_counter()
        compiled = lowered.compile()
        done = time.perf_counter()
        size = len(compiled.as_text() or "") / 1e3
        print(f"| {microbatches} | {tables - start:.2f} | {traced - tables:.2f} | {done - traced:.2f} "
              f"| {size:.0f} | {step.program.num_steps} |")  # fmt: skip


if __name__ == "__main__":
    main()
