"""The model is that of transformers: logits, losses and greedy tokens of its own small models."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.deepseek import Server, build_model, serve
from jaxpipe.deepseek.__main__ import main
from jaxpipe.deepseek.folder import read_folder
from jaxpipe.deepseek.hf_files import encode_header
from jaxpipe.deepseek.hf_load import find_sources, folder_config, load_params
from jaxpipe.deepseek.hf_names import tensors
from tests.cases import cases
from tests.jaxpipe.deepseek.goldens import load_golden, unpack
from tests.jaxpipe.deepseek.models import make_batch, small


@cases("name", ["v3", pytest.param("v3_yarn_noq", marks=pytest.mark.slow), "v2_lite"], quick=["v3"])
def test_logits_loss_and_greedy_tokens(name, tmp_path):
    config, _, tree, reference = load_golden(name, tmp_path)
    server = Server(config, serve(config, tree, dtype=jnp.float32))
    tokens = reference["tokens"]
    np.testing.assert_allclose(server.logits(tokens), reference["logits"], atol=1e-4, rtol=0)
    scores = server.score(tokens[:, :-1], tokens[:, 1:], np.ones((2, 23)))
    assert scores.loss == pytest.approx(float(reference["loss"]), abs=1e-5)
    assert scores.loads.sum() == 2 * 23 * config.moe_layers * config.moe.router.top_k
    made = server.generate(reference["generated"][:, :8], 16)
    np.testing.assert_array_equal(made.tokens, reference["generated"][:, 8:])


def loss_of(model, params, data):
    """Of the model as a stage of a pipeline, its balance loss left out."""
    ctx = jaxpipe.Context.make(0, jnp.int32(0), None, data, num_stages=1)
    x = model.stage(jax.tree.map(lambda leaf: leaf[0], params.stages), model.embed(params.outer, data, ctx), ctx)
    return model.head(params.outer, x.value, data, ctx)


def test_stages_of_a_pipeline_compute_the_same_loss(tmp_path):
    """What training runs, beside what serves."""
    _, model, tree, reference = load_golden("v2_lite", tmp_path)
    tokens = jnp.asarray(reference["tokens"], jnp.int32)
    data = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": jnp.ones((2, 23))}
    loss = jax.jit(lambda params: loss_of(model, params, data))(model.from_layers(tree))
    assert float(loss) == pytest.approx(float(reference["loss"]), abs=1e-5)


@pytest.mark.slow
def test_every_setting_counts(tmp_path):
    """So the goldens tell them apart."""
    config, _, tree, reference = load_golden("v3_yarn_noq", tmp_path)

    def error(**changes):
        other = dataclasses.replace(config, **changes)
        return abs(Server(other, serve(other, tree, dtype=jnp.float32)).logits(reference["tokens"])
                   - reference["logits"]).max()  # fmt: skip

    yarn = dataclasses.replace(config.rope.yarn, mscale_all_dim=0.5, mscale=0.5)
    for changes in (
        {"norm_eps": 1e-5},
        {"rope": dataclasses.replace(config.rope, yarn=yarn)},
        {"rope": dataclasses.replace(config.rope, interleaved=False)},
    ):
        assert error(**changes) > 1e-3, changes


def test_the_command_line_writes_logits(tmp_path, capsys):
    folder = unpack("v2_lite", tmp_path)
    reference = np.load(folder / "reference.npz")
    np.save(tmp_path / "tokens.npy", reference["tokens"])
    out = tmp_path / "logits.npy"
    assert main(["logits", str(folder), str(tmp_path / "tokens.npy"), "--out", str(out)]) == 0
    assert "logits of 2 sequences of 24 tokens" in capsys.readouterr().out
    np.testing.assert_allclose(np.load(out), reference["logits"], atol=1e-4, rtol=0)
    np.save(tmp_path / "row.npy", reference["tokens"][0])
    np.savez(tmp_path / "tokens.npz", tokens=reference["tokens"])
    (tmp_path / "empty.npy").touch()
    for arguments, message in (
        ([str(folder), str(tmp_path / "tokens.npz")], "tokens.npz is no .npy file of integers"),
        ([str(folder), str(tmp_path / "empty.npy")], "empty.npy is no .npy file of integers"),
        ([str(tmp_path), str(tmp_path / "tokens.npy")], "config.json: name a folder as Hugging Face has it"),
        ([str(folder), str(tmp_path / "row.npy")], r"array of shape (24,): give [sequences, tokens]"),
        ([str(folder), str(tmp_path / "tokens.npy"), "--batch", "0"], "--batch 0: at least 1"),
    ):
        assert main(["logits", *arguments, "--out", str(out)]) == 2
        assert message in capsys.readouterr().err


def test_a_folder_without_multi_token_prediction_is_a_model_without(tmp_path):
    config, tree = read_folder(unpack("v3", tmp_path))
    assert not config.mtp and "mtp" not in tree["outer"]


def test_multi_token_prediction_is_that_of_published_files(tmp_path):
    """By the names of a file, in NumPy.

    What is projected is enorm of the next token's embedding and hnorm of the features that the main head reads, which
    model.norm has normalised; the block's features go through shared_head.norm alone.
    """
    config = small(mtp=True, layers=2, redundant=0, balance_factor=0.0)
    rng, arrays = np.random.default_rng(0), {}
    for name, tensor in tensors(config).items():
        same = arrays.get(tensor.copy_of)
        mean = 1.0 if "norm" in name else 0.0
        arrays[name] = rng.normal(mean, 0.3, tensor.shape).astype(np.float32) if same is None else same
    shapes = {name: ("F32", array.shape) for name, array in arrays.items()}
    (tmp_path / "model.safetensors").write_bytes(
        encode_header(shapes) + b"".join(array.tobytes() for array in arrays.values())
    )
    schedule, mesh = jaxpipe.schedule.build("1f1b", 1, 1), jaxpipe.make_mesh(pp=1)

    def of_files(config):
        model = build_model(config, schedule, 0, abstract=True)
        params = load_params(tmp_path, model, mesh, strict=False)
        return model, params, jax.tree.map(lambda leaf: leaf[0], params.stages)

    ctx = jaxpipe.Context.make(0, jnp.int32(0), None, {}, num_stages=1)
    data = {name: jnp.asarray(array) for name, array in make_batch(0, 2, config).items()}
    model, params, own = of_files(config)
    found = jax.jit(
        lambda own, outer: model.head(outer, model.stage(own, model.embed(outer, data, ctx), ctx).value, data, ctx)
    )(own, params.outer)

    def normal(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * arrays[name]

    with pytest.warns(UserWarning, match="that the model does not have"):
        main, params, own = of_files(dataclasses.replace(config, mtp=False))
    y = np.asarray(
        jax.jit(lambda own, outer: main.stage(own, main.embed(outer, data, ctx), ctx).value)(own, params.outer)
    )
    y = normal(y, "model.norm.weight")
    known = arrays["model.embed_tokens.weight"][data["targets"]]
    both = [normal(known, "model.layers.2.enorm.weight"), normal(y, "model.layers.2.hnorm.weight")]
    x = np.concatenate(both, -1) @ arrays["model.layers.2.eh_proj.weight"].T
    # The block is a layer like the others: that of a model with no other.
    one = dataclasses.replace(config, mtp=False, layers=1, dense_layers=0)
    parts = {name.replace("layers.2.", "layers.0."): name for name in arrays if "layers.2." in name}
    kept = {name: arrays[parts.get(name, name)] for name in tensors(one)}
    shapes = {name: ("F32", array.shape) for name, array in kept.items()}
    (tmp_path / "model.safetensors").write_bytes(
        encode_header(shapes) + b"".join(array.tobytes() for array in kept.values())
    )
    block, params, own = of_files(one)
    features = jax.jit(lambda own, x: block.stage(own, x, ctx).value)(own, jnp.asarray(x, jnp.float32))
    features = normal(np.asarray(features), "model.layers.2.shared_head.norm.weight")

    def loss(features, targets, mask):
        logits = features @ arrays["lm_head.weight"].T
        logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -(np.take_along_axis(logits, targets[..., None], -1)[..., 0] * mask).sum() / mask.sum()

    targets, mask = np.asarray(data["targets"]), np.asarray(data["mask"])
    assert float(found.value) == pytest.approx(loss(y, targets, mask), rel=1e-5)
    second = loss(features[:, :-1], targets[:, 1:], mask[:, 1:] * mask[:, :-1])
    assert float(found.aux_loss) == pytest.approx(config.mtp_weight * second, rel=1e-5)


def test_a_folder_without_files_is_refused(tmp_path):
    folder = unpack("v3", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has neither model\.safetensors\.index\.json nor"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 1 << 40},
            r"embed.* has shape \[128, 64\]: the config says \[128, 1099511627776\]",
        ),
        ({"n_routed_experts": 1 << 40}, rf"hold 118 tensors, and 4 layers, 3 of them with {1 << 40} experts"),
        ({"num_hidden_layers": 1 << 40, "first_k_dense_replace": 1 << 39}, rf"and {1 << 40} layers"),
        ({}, r"model.safetensors has SHA-256 .* and should have 0000"),
    ],
)
@pytest.mark.parametrize("read", [read_folder, lambda folder: find_sources(folder, folder_config(folder))])
def test_configs_and_checksums_that_do_not_fit_the_files_are_refused(tmp_path, read, changes, message):
    folder = unpack("v2_lite", tmp_path)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")
    with pytest.raises(ValueError, match=message):
        read(folder)


@pytest.mark.slow
def test_a_tied_head_is_the_embedding():
    schedule = jaxpipe.schedule.build("1f1b", 1, 1)
    tied, untied = small(tied=True, layers=2), small(layers=2)
    models = [build_model(config, schedule, 0, abstract=config is untied) for config in (tied, untied)]
    data = jax.tree.map(jnp.asarray, make_batch(0, 2))
    assert "output" not in models[0].params.outer and tied.total == untied.total - 64 * 16
    params = models[0].params
    outer = params.outer | {"output": params.outer["embedding"]}
    steps = [
        jax.jit(jax.value_and_grad(lambda params, model=model: loss_of(model, params, data), allow_int=True))
        for model in models
    ]
    values, other = steps[0](params), steps[1](params._replace(outer=outer))
    np.testing.assert_allclose(values[0], other[0], rtol=1e-6)
    both = other[1].outer["embedding"] + other[1].outer["output"]
    np.testing.assert_allclose(values[1].outer["embedding"], both, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_eps": 0.0}, r"norm_eps=0.0: a small positive number"),
        ({"selection_bias": False}, r"bias_update_speed=0.001 of a model with selection_bias=False"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
