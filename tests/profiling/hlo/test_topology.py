"""Topologies to compile for with no GPU; where no CUDA build of JAX is installed, only what is said then."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpipe.planning.chips import chip
from profiling.hlo import topologies as module
from profiling.hlo.hiding import overlap
from profiling.hlo.topologies import has_cuda, target_names, topology


@pytest.fixture
def unregistered(monkeypatch):
    """No platform has a topology, as without a plugin."""

    def nothing(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", nothing)


@pytest.fixture
def asked(monkeypatch):
    """The options that would be given to JAX."""
    found = []
    monkeypatch.setattr(topologies, "get_topology_desc", lambda **options: found.append(options))
    return found


@pytest.mark.parametrize("name", target_names())
def test_targets_agree_with_the_data_sheets(asked, monkeypatch, name):
    monkeypatch.setattr(module, "_is_local", lambda chip: False)
    topology(name.lower())
    (options,) = asked
    text = options["target_config"]
    numbers = {key: float(value) for key, value in re.findall(r"^ *(\w+): ([\d.]+)$", text, re.MULTILINE)}
    assert numbers["core_count"] == chip(name).sms
    assert numbers["memory_bandwidth"] == pytest.approx(chip(name).hbm, rel=0.05)
    assert numbers["device_memory_size"] == pytest.approx(chip(name).memory, rel=0.08)
    assert f'"NVIDIA {name}' in text
    # Asked by this very name, XLA wants the device itself for the scratch memory of sorts.
    assert '"NVIDIA H100 80GB HBM3"' not in text


def test_nodes_are_domains_of_nvlink(asked, monkeypatch):
    monkeypatch.setattr(module, "_is_local", lambda chip: False)
    topology("H200", 16, nodes=2)
    assert asked[0]["topology"] == "2x1x8"
    assert asked[0].keys() == {"topology", "platform", "target_config"}


def test_a_gpu_of_that_kind_is_asked_itself(asked, monkeypatch):
    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    topology("h100")
    topology("H200")
    assert ["target_config" in options for options in asked] == [False, True]


def test_what_cannot_be_is_said(unregistered, monkeypatch):
    with pytest.raises(ValueError, match=r"no target 'H20': known are A100, B200, H100, H200"):
        topology("H20")
    for devices, nodes in ((8, 3), (0, 1), (8, 0)):
        with pytest.raises(ValueError, match=f"devices={devices}, nodes={nodes}"):
            topology("H200", devices, nodes=nodes)
    monkeypatch.setattr(module, "has_cuda", lambda: False)
    with pytest.raises(RuntimeError, match=r'pip install "jax\[cuda13\]"'):
        topology("H200")
    monkeypatch.setattr(module, "has_cuda", lambda: True)
    with pytest.raises(RuntimeError, match="JAX_PLATFORMS=cpu before JAX is first used"):
        topology("H200")


def test_an_installed_plugin_is_seen(monkeypatch):
    for names, expected in (
        (set(), False),
        ({"jax_plugins"}, False),
        ({"jax_plugins", "jax_plugins.xla_cuda12"}, True),
    ):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, names=names: name in names or None)
        assert has_cuda() is expected


@pytest.mark.skipif(not has_cuda(), reason="no CUDA build of JAX is installed")
@pytest.mark.parametrize("name", target_names())
def test_a_program_is_compiled_for_eight_gpus(name):
    """An all-to-all that nothing waits for runs beside a product."""
    try:
        devices = topology(name).devices
    except RuntimeError as error:
        pytest.skip(str(error))
    mesh = Mesh(np.array(devices).reshape(2, 4), ("pp", "ep"), axis_types=(AxisType.Auto,) * 2)

    def body(x, w):
        return jax.lax.all_to_all(x, "ep", 0, 0, tiled=True), w @ w

    sharded = P(("pp", "ep"))
    f = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(sharded, P()), out_specs=(sharded, P())))

    def given(rows, spec):
        return jax.ShapeDtypeStruct((rows, 2048), jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    found = overlap(f.lower(given(8 * 4096, sharded), given(2048, P())).compile().as_text(), chip(name))
    (exchange,) = found.collectives
    assert (exchange.kind, exchange.devices, exchange.bytes) == ("all-to-all", 4, 3 / 4 * 4096 * 2048 * 2)
    assert exchange.products and found.synchronous == ()
