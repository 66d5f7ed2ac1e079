"""The three workloads compute what they say, on one device and on several, and can be predicted from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from eplb_jax import MoEParams, moe_layer
from eplb_jax.moe.experts import ExpertParams
from jaxpipe.deepseek import LayerConfig, ModelConfig, MoEBlock, attend, rms_norm
from profiling.__main__ import main
from profiling.metrics import measure
from profiling.predict.network import ClusterNetwork, exchange_us
from profiling.workloads import SIZES
from profiling.workloads.layer import AXIS, LayerParams, apply_layer, init_layers, layer_specs
from profiling.workloads.predict import predict
from profiling.workloads.run import make_mesh, prepare, run
from tests.cases import cases

TINY = SIZES["tiny"]


def mesh_of(devices):
    if jax.device_count() < devices:
        pytest.skip(f"needs {devices} devices")
    return make_mesh(devices)


def plain_loss(layers, x, devices):
    """Half the squared output of all microbatches, one after the other, every device's tokens by themselves."""
    total = 0.0
    for microbatch in x:
        for part in jnp.split(microbatch, devices):
            y = part
            for layer in layers:
                y = y + attend(layer.attention, rms_norm(y)[None], TINY)[0][0]
                y = y + moe_layer(layer.moe, rms_norm(y), TINY.moe)[0]
            total = total + 0.5 * jnp.sum(y * y)
    return total


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_overlapped_pairs_have_the_plain_programs_gradients(devices, x64):
    mesh = mesh_of(devices)
    function, (layers, x) = prepare("train", TINY, mesh, jnp.float64, pairs=2)
    grads, dropped = function(layers, x)
    gathered = jax.device_get(layers)
    expected = jax.grad(plain_loss, allow_int=True)(gathered, jax.device_get(x)[:2], devices)
    assert int(dropped) == 0
    for layer, plain in zip(grads, expected, strict=True):
        layer, plain = (tree._replace(moe=tree.moe._replace(bias=None)) for tree in (layer, plain))
        jax.tree.map(
            lambda found, wanted: np.testing.assert_allclose(
                found, wanted, rtol=2e-4, atol=1e-5 * np.abs(wanted).max()
            ),
            layer,
            plain,
        )  # gradients are summed in float32


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_prompts_may_be_split_between_microbatches(devices):
    mesh = mesh_of(devices)
    whole, arguments = prepare("prefill", TINY, mesh, jnp.float32)
    split, _ = prepare("prefill", TINY, mesh, jnp.float32, split_prompts=True)
    y, caches, dropped = whole(*arguments)
    y_split, caches_split, dropped_split = split(*arguments)
    # Tokens go to experts in turn, and the turns are as long as these prompts: each token has the same experts.
    assert int(dropped) == int(dropped_split) == 0
    np.testing.assert_allclose(y, y_split, rtol=2e-4, atol=2e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), caches, caches_split)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_a_layer_is_the_block_that_is_trained(devices):
    """The same weights and tokens through `MoEBlock`, every device's tokens by themselves."""
    mesh = mesh_of(devices)
    layer = {field.name: getattr(TINY, field.name) for field in dataclasses.fields(LayerConfig)}
    config = ModelConfig(**layer, vocab=8, layers=2, dense_layers=1, dense_hidden=8, sequence=TINY.sequence)
    block = MoEBlock(config, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (devices * TINY.sequence, TINY.width))
    expected = [block(part[None])[0][0] for part in jnp.split(x, devices)]

    moe, attention = block.moe, block.attention.params._replace(query_norm=None, latent_norm=None)  # ones
    experts, shared = ExpertParams(moe.w_in[...], moe.w_out[...]), ExpertParams(moe.shared_in[...], moe.shared_out[...])
    params = LayerParams(attention, MoEParams(moe.router[...], moe.bias[...], experts, shared))

    def attend_alone(params, x):
        return attend(params, x[None], TINY)[0][0], None

    run = jax.shard_map(
        lambda params, x: apply_layer(params, x, TINY, attend_alone)[::2],
        mesh=mesh,
        in_specs=(layer_specs(TINY)[0], P(AXIS)),
        out_specs=(P(AXIS), P()),
        check_vma=False,
    )
    y, dropped = jax.jit(run)(params, x)
    assert int(dropped) == 0
    np.testing.assert_allclose(y, jnp.concatenate(expected), rtol=1e-5, atol=1e-5)


@cases("workload", ["train", "prefill", "decode"], quick=["train"])
def test_one_device_stands_for_one_of_many(workload, tmp_path):
    ran = run(workload, TINY, tmp_path, mesh=mesh_of(1), dtype=jnp.float32, calls=1)
    assert ran.dropped == 0 and (tmp_path / "program.hlo.gz").exists()
    assert measure(ran.trace).unattributed_share < 0.02
    held = TINY.moe.router.num_experts // TINY.expert_parallel[workload]
    layers = init_layers(jax.random.key(0), TINY, workload, mesh_of(1), jnp.float32)
    assert layers[0].moe.experts.w_in.shape[0] == held and layers[0].moe.router.shape[1] == 16
    slow, fast = (
        predict(ran.trace, workload, TINY, ClusterNetwork(internode=rate, intranode=rate, latency_us=latency, sms=0))
        for rate, latency in ((1e6, 1.0), (1e15, 0.0))
    )
    assert slow.window[1] > fast.window[1]
    transfers = measure(fast).summary.overlaps["transfer"].communication
    assert transfers < 1 and measure(slow).summary.overlaps["transfer"].exposed > 0
    exchanges = {event.phase for event in slow.events if event.group == "transfer"}
    assert len(exchanges) == 4


def test_exchanges_of_low_latency_kernels_are_near_the_published_ones():
    """DeepEP, docs/legacy.md: 128 tokens of width 7168, e4m3 there and bfloat16 back, 128 devices: 192 and 369 us."""
    network = ClusterNetwork(internode=39e9, latency_us=5.0, sms=0)
    there = exchange_us(network, 128, 128, 8, 4, 7168 * (1 + 4 / 128), direct=True)
    back = exchange_us(network, 128, 128, 8, 4, 7168 * 2, direct=True)
    assert there == pytest.approx(192, rel=0.1) and back == pytest.approx(369, rel=0.1)


def test_exchanges_stay_within_a_node_where_there_is_but_one():
    network = ClusterNetwork(internode=1.0, intranode=100e9, latency_us=0.0)
    assert exchange_us(network, 8, 1000, 8, 4, 1000) == pytest.approx(1e6 * 1000 * 8 * 1000 * 7 / 8 / 100e9)


def test_bad_input_is_refused(tmp_path):
    mesh = mesh_of(1)
    with pytest.raises(ValueError, match="workload='serve'"):
        prepare("serve", TINY, mesh, jnp.float32)
    with pytest.raises(ValueError, match="pairs=0"):
        prepare("train", TINY, mesh, jnp.float32, pairs=0)
    with pytest.raises(ValueError, match="make them even"):
        dataclasses.replace(TINY, prompts=3)
    with pytest.raises(ValueError, match="does not divide"):
        dataclasses.replace(TINY, expert_parallel={"train": 7})
    with pytest.raises(ValueError, match="do not split"):
        prepare("prefill", dataclasses.replace(TINY, prompt=31), mesh, jnp.float32, split_prompts=True)
    with pytest.raises(ValueError, match="devices: there are"):
        make_mesh(1000)
    with pytest.raises(ValueError, match="take a number of devices"):
        prepare("train", dataclasses.replace(TINY, expert_parallel={"train": 2}), mesh_of(4), jnp.float32)
    with pytest.raises(ValueError, match="at least 1"):
        exchange_us(ClusterNetwork(), 0, 1, 1, 1, 1.0)
    with pytest.raises(ValueError, match="positive"):
        ClusterNetwork(internode=0.0)


def test_the_command_line_runs_reports_compares_and_predicts(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    mesh_of(1)
    folder = tmp_path / "decode"
    assert main(["run", "decode", "--size", "tiny", "--mesh", "ep=1", "--calls", "1", "--out", str(folder)]) == 0
    assert {"report.html", "predicted.html", "report.pftrace", "program.hlo.gz", "proc0"} <= {
        path.name for path in folder.iterdir()
    }
    hlo = str(folder / "program.hlo.gz")
    assert main(["report", str(folder), "--hlo", hlo, "--perfetto", str(tmp_path / "a.json.gz")]) == 0
    assert main(["compare", str(folder), str(folder)]) == 0
    assert main(["predict", "decode", str(folder), "--size", "tiny", "--internode", "40", "--sms", "4"]) == 0
    assert main(["overlap", hlo]) == 0
    assert "decode on 16 devices, predicted" in capsys.readouterr().out
    assert main(["run", "train", "--mesh", "pp=2"]) == 2
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "ep=N" in capsys.readouterr().err
