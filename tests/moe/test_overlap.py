"""Compiled ahead of time for 8 GPUs: communication is asynchronous, and the shared expert computes meanwhile."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from eplb_jax.moe import MoEConfig, init_moe, moe_layer, param_specs

LINE = re.compile(r"^\s*(?:ROOT )?%?(\S+) = (.*?)\s([a-z][a-z0-9-]*)\((.*)$")
HLO = """
ENTRY %main (p: bf16[8]) -> bf16[8] {
  %p = bf16[8] parameter(0)
  %a2a = ((bf16[8]), bf16[8]) all-to-all-start(%p), metadata={op_name="jit(f)/dispatch/all_to_all"}
  %gemm = bf16[8] custom-call(%p), custom_call_target="__cublas$gemm", metadata={op_name="jit(f)/shared_expert/dot"}
  %got = bf16[8] all-to-all-done(%a2a), metadata={op_name="jit(f)/dispatch/all_to_all"}
  ROOT %again = bf16[8] all-to-all(%got), metadata={op_name="jit(f)/combine/all_to_all"}
}
"""


def instructions(hlo):
    """(name, opcode, op_name, whole line) of the entry computation, in the order of the schedule."""
    found, inside = [], False
    for line in hlo.splitlines():
        if line.startswith("ENTRY"):
            inside = True
        elif inside and line.startswith("}"):
            break
        elif inside and (match := LINE.match(line)):
            label = re.search(r'op_name="([^"]*)"', line)
            found.append((match[1], match[3], label[1] if label else "", line))
    return found


def is_product(opcode, line):
    return opcode == "dot" or "__cublas" in line or "__triton_gemm" in line or "gemm_fusion" in line


def exchanges(hlo):
    """(synchronous all-to-alls, [(label, labels of the products between its start and done)])."""
    entry = instructions(hlo)
    synchronous = [line for _, opcode, _, line in entry if opcode in ("all-to-all", "ragged-all-to-all")]
    pairs = []
    for i, (name, opcode, label, line) in enumerate(entry):
        is_start = opcode == "all-to-all-start" or (opcode == "async-start" and "all-to-all" in line)
        if is_start:
            end = next(j for j in range(i, len(entry)) if (entry[j][1].endswith("-done") and f"%{name})" in entry[j][3])
                       or (entry[j][1].endswith("-done") and f"%{name}," in entry[j][3]))  # fmt: skip
            pairs.append((label, [entry[j][2] for j in range(i, end) if is_product(entry[j][1], entry[j][3])]))
    return synchronous, pairs


def test_the_reader_sees_pairs_and_what_is_none():
    synchronous, pairs = exchanges(HLO)
    assert len(synchronous) == 1 and "%again" in synchronous[0]
    assert pairs == [("jit(f)/dispatch/all_to_all", ["jit(f)/shared_expert/dot"])]


def test_exchanges_are_asynchronous_and_the_shared_expert_hides_the_dispatch():
    if jax.default_backend() != "gpu":
        pytest.skip("a CUDA jaxlib and a GPU are needed to compile for 8 GPUs")
    topology = topologies.get_topology_desc(platform="cuda", topology="1x8x1")
    mesh = Mesh(np.array(topology.devices), ("ep",), axis_types=(AxisType.Auto,))
    config = MoEConfig(capacity_factor=1.25)  # DeepSeek-V3's sizes
    specs = param_specs(config, "ep")
    body = jax.shard_map(
        lambda params, x: moe_layer(params, x, config, axis="ep")[0],
        mesh=mesh,
        in_specs=(specs, P("ep")),
        out_specs=P("ep"),
        check_vma=False,
    )

    def forward_and_backward(params, x, ct):
        y, pull = jax.vjp(body, params, x)
        return y, pull(ct * y)  # as of a loss: the backward pass waits for the forward

    def at(shape, spec):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))

    shapes = jax.eval_shape(lambda key: init_moe(key, config, jnp.bfloat16), jax.random.key(0))
    params = jax.tree.map(at, shapes, specs)
    x = at(jax.ShapeDtypeStruct((8 * 4096, config.width), jnp.bfloat16), P("ep"))
    hlo = jax.jit(forward_and_backward).lower(params, x, x).compile().as_text()
    synchronous, pairs = exchanges(hlo)
    assert synchronous == []
    assert len(pairs) >= 4  # dispatch and combine, forward and backward, besides slots and weights
    dispatched = [products for label, products in pairs if "dispatch" in label and "transpose" not in label]
    assert any(any("shared_expert" in label for label in products) for products in dispatched)
