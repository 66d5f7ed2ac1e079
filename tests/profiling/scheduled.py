"""Programs of eight devices whose schedules are tested: here on CPU, and stored as compiled for eight GPUs.

    python -m tests.profiling.scheduled FOLDER [NAME ...]

writes the stored ones, data/*.hlo.gz: compiled for a node of eight H100s, with or without a GPU (see `topology`).
Other code or another XLA makes other schedules: docs/measured/overlap.md tells how much that changes.
"""

from __future__ import annotations

import gzip
import pathlib
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from eplb_jax import MoEConfig, RouterConfig, init_moe, moe_layer, param_specs
from profiling.hlo.topologies import topology

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))

from overlap_programs import BODY_STEPS, Variant, device_body

LAYERS = 2
STEPS = BODY_STEPS
SWAP = ((0, 1), (1, 0))


def lower_layer(devices, config, tokens):
    """One MoE layer, forward and backward, experts over all eight devices."""
    mesh = Mesh(np.array(devices).reshape(8), ("ep",), axis_types=(AxisType.Auto,))
    specs = param_specs(config, "ep")

    def run(params, x, ct):
        y, pull = jax.vjp(lambda params, x: moe_layer(params, x, config, axis="ep")[0], params, x)
        return y, pull(ct * y)  # as of a loss: the backward pass waits for the forward

    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(specs, P("ep"), P("ep")), out_specs=(P("ep"), (specs, P("ep"))), check_vma=False
    )
    params = jax.eval_shape(lambda key: init_moe(key, config, jnp.bfloat16), jax.random.key(0))
    x = _at(mesh, jax.ShapeDtypeStruct((8 * tokens, config.width), jnp.bfloat16), P("ep"))
    return jax.jit(mapped).lower(_at(mesh, params, specs), x, x)


def lower_body(devices, config, tokens):
    """DualPipe's steady state on pp=2, ep=4: a step is F of one microbatch, I and W of another, and both their sends.

    A stage is `LAYERS` layers, each with products in place of attention and an MoE layer; a rank holds two stages.
    """
    mesh = Mesh(np.array(devices).reshape(2, 4), ("pp", "ep"), axis_types=(AxisType.Auto,) * 2)

    def stage(params, x):
        for i, (w_in, w_out, moe) in enumerate(params):
            with jax.named_scope(f"layer_{i}"):
                with jax.named_scope("attention"):
                    x = x + jax.nn.silu(x @ w_in) @ w_out
                x = x + moe_layer(moe, x, config, axis="ep")[0]
        return x

    run = device_body(stage, SWAP, Variant("body"))
    moe = param_specs(config, "ep")
    grad_specs = [(P("pp"), P("pp"), _within(moe, "pp"))] * LAYERS
    specs = [(P("pp"), P("pp"), _within(moe, "pp", None))] * LAYERS
    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(specs, P(("pp", "ep")), P(("pp", "ep"))),
        out_specs=(P(("pp", "ep")), P(("pp", "ep")), grad_specs),
        check_vma=False,
    )

    def layer(key):
        wide = 2 * config.width
        w_in, w_out = jnp.zeros((config.width, wide), jnp.bfloat16), jnp.zeros((wide, config.width), jnp.bfloat16)
        return w_in, w_out, init_moe(key, config, jnp.bfloat16)

    params = [jax.eval_shape(layer, jax.random.key(0))] * LAYERS
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, 2, *leaf.shape), leaf.dtype), params)
    x = _at(mesh, jax.ShapeDtypeStruct((8 * tokens, config.width), jnp.bfloat16), P(("pp", "ep")))
    return jax.jit(mapped).lower(_at(mesh, params, specs), x, x)


def strip(text):
    """The text without what no reader needs: source locations, kernels' code, names given twice."""
    text = re.sub(r"^FileNames$.*?\n\n\n", "\n", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"backend_config=\{kernel_hash = .*$", "backend_config={}", text, flags=re.MULTILINE)
    text = re.sub(r' ?(?:(?:deduplicated|scheduling)_name="[^"]*"|stack_frame_id=\d+)', "", text)
    text = text.replace(", metadata={}", "")
    return re.sub(r', frontend_attributes=\{fingerprint_before_lhs="[^"]*"\}', "", text)


def _within(specs, *axes):
    return jax.tree.map(lambda spec: P(*axes, *spec), specs, is_leaf=lambda spec: isinstance(spec, P))


def _at(mesh, shapes, specs):
    def placed(shape, spec):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, shapes, specs)


PROGRAMS = {"moe_layer": lower_layer, "dualpipe_body": lower_body}


def main(folder, *names):
    devices = topology("H100", 8).devices
    # DeepSeek-V3's widths; with all its 256 experts on the body's four devices a step needs more memory than there is,
    # and XLA then made every collective of the loop synchronous.
    config = MoEConfig(router=RouterConfig(num_experts=32), capacity_factor=1.25)
    for name in names or PROGRAMS:
        start = time.monotonic()
        text = strip(PROGRAMS[name](devices, config, 4096).compile().as_text())
        (pathlib.Path(folder) / f"{name}.hlo.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
        print(name, f"{time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
