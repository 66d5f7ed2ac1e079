"""Low-rank adapters of the pretrained model: equal to changed matrices, nothing else trained, resumed and merged."""

import dataclasses
import functools
import json
import pathlib
import runpy
import signal
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.examples.sizes import make_batch, small  # first: it makes the example importable

from pretraining import trainer  # isort: skip
import jaxpipe
from jaxpipe.deepseek import LoRA, build_model
from jaxpipe.deepseek.hf_files import open_folder
from jaxpipe.deepseek.model import names

ROOT = pathlib.Path(__file__).resolve().parents[2]

if jax.device_count() < 8:
    pytest.skip("needs 8 devices", allow_module_level=True)

CONFIG = small(layers=2, redundant=0, bias_update_speed=0.01, lora=LoRA(2, alpha=3.0))


def with_adapters(params):
    """Second halves of adapters that are not zero, so that all of them count."""

    def fill(path, leaf):
        if not names(path)[-1].endswith("_lora_b"):
            return leaf
        return jax.random.normal(jax.random.key(sum(map(ord, str(path)))), leaf.shape) / 4

    return jax.tree_util.tree_map_with_path(fill, params)


def changed_by_hand(stages):
    """Of each slot's attention the matrices w + 3 / 2 a b, by a loop over stages."""
    found = {}
    for slot, parts in stages.items():
        attention = dict(parts["attention"])
        for name in [name[:-7] for name in attention if name.endswith("_lora_a")]:
            a, b = attention.pop(f"{name}_lora_a"), attention.pop(f"{name}_lora_b")
            rows = [w + 1.5 * jnp.tensordot(x, y, 1) for w, x, y in zip(attention[name], a, b, strict=True)]
            attention[name] = jnp.stack(rows)
        found[slot] = {**parts, "attention": attention}
    return found


def test_a_step_equals_the_plain_program_of_changed_matrices():
    """Loss, and gradients of adapters by the chain rule of jax.grad; and all else stays as it is, biases too."""
    schedule, mesh = jaxpipe.schedule.build("zb1p", 2, 2), jaxpipe.make_mesh(pp=2)
    model = build_model(CONFIG, schedule, 0)
    plain = build_model(dataclasses.replace(CONFIG, lora=None), schedule, 0, abstract=True)
    params = with_adapters(model.params)
    assert jax.tree.leaves(params.stages)[0].dtype == jnp.float32
    batch = make_batch(0, 4, CONFIG)
    (loss, _), grads = jax.jit(trainer.pipelined(model, schedule, mesh))(params, batch)

    def changed(params):
        return params._replace(stages=changed_by_hand(params.stages))

    adapters, structure = jax.tree.flatten(params)
    paths = [names(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    chosen = [place for place, path in enumerate(paths) if "_lora_" in path[-1]]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def expected(some, part, index):
        leaves = list(adapters)
        for place, leaf in zip(chosen, some, strict=True):
            leaves[place] = leaf
        loss, told = trainer.microbatch_loss(plain)(changed(jax.tree.unflatten(structure, leaves)), part, index, None)
        return loss, told[1]

    found, trained = jax.tree.leaves(grads), [adapters[place] for place in chosen]
    parts = [{name: array[start : start + 2] for name, array in batch.items()} for start in (0, 2)]
    made = [expected(trained, part, jnp.int32(index)) for index, part in enumerate(parts)]
    weight = sum(float(told) for (_, told), _ in made)
    assert float(loss) == pytest.approx(sum(float(loss) for (loss, _), _ in made) / weight, rel=1e-6)
    by_hand = [
        sum(map(np.asarray, both)) / np.float32(weight) for both in zip(*(some for _, some in made), strict=True)
    ]
    assert len(chosen) == 2 * 6  # halves, matrices of a low-rank query and of the rest; stages are rows of each
    for place, grad in zip(chosen, by_hand, strict=True):
        np.testing.assert_allclose(found[place], grad, atol=1e-6, rtol=1e-4, err_msg=str(paths[place]))
        assert np.abs(grad).max() > 1e-5
    assert all(leaf.dtype == jax.dtypes.float0 for place, leaf in enumerate(found) if place not in chosen)
    # Merged, the parameters are those of the plain model.
    same, merged = model.merged(params)
    assert same.config == plain.config
    for ours, theirs in zip(*map(jax.tree.leaves, (merged, changed(params))), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_step_changes_adapters_alone_and_is_planned_so():
    """Frozen matrices in bfloat16, without moments; the plan has the products of two passes, not of three."""
    config = dataclasses.replace(CONFIG, layers=1, dense_layers=0)
    schedule, mesh = jaxpipe.schedule.build("1f1b", 1, 1), jaxpipe.make_mesh(pp=1)
    model = build_model(config, schedule, 0, dtype=jnp.bfloat16, abstract=True)
    optimizer = trainer.make_optimizer(trainer.TrainConfig(2, warmup=0), model)
    state = trainer.init_state(model, optimizer, mesh)
    kept = {names(path): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    exact = {path for path, dtype in kept.items() if dtype == jnp.float32}
    assert {path[-1] for path in exact if "_lora_" not in path[-1]} == {"scale", "router", "bias"}
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * sum(
        leaf.size for leaf, on in zip(*map(jax.tree.leaves, (state.params, model.trained)), strict=True) if on
    )
    before = jax.tree.map(np.asarray, state.params)
    step = trainer.make_step(trainer.pipelined(model, schedule, mesh), model, optimizer, mesh)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention promotes
        for index in range(2):  # the first halves have a gradient from the second step on
            state, _ = step(state, make_batch(index, 2, config), jax.random.key(0))
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(state.params), strict=True
    ):
        assert bool((old != np.asarray(new)).any()) == ("_lora_" in names(path)[-1]), names(path)

    def products(config):
        model = build_model(config, schedule, 0, dtype=jnp.bfloat16, abstract=True)
        state = trainer.abstract_state(model, trainer.make_optimizer(trainer.TrainConfig(2), model), mesh)
        batch = trainer.abstract_batch(config, 2)
        with jax.numpy_dtype_promotion("standard"):
            return jaxpipe.plan(trainer.pipelined(model, schedule, mesh), state.params, batch, "H200").executed

    assert products(config) < 0.8 * products(dataclasses.replace(config, lora=None))


def test_adapters_that_cannot_be_had_are_refused():
    for arguments, message in (
        (dict(rank=0), "rank=0 of adapters: at least 1"),
        (dict(rank=2, alpha=-1.0), r"alpha=-1.0 of adapters"),
        (dict(rank=2, targets=("q_proj",)), "targets=.*: some of query"),
    ):
        with pytest.raises(ValueError, match=message):
            LoRA(**arguments)
    with pytest.raises(ValueError, match="attention has query_rank=8, and so none of them"):
        build_model(small(lora=LoRA(2, targets=("query",))), jaxpipe.schedule.build("1f1b", 1, 1), 0, abstract=True)
    with pytest.raises(ValueError, match="lora with precision='fp8'"):
        small(lora=LoRA(2), precision="fp8")


def write_talks(folder, golden):
    """A tokenizer of letters for the model of the folder, and conversations."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    pytest.importorskip("jinja2", reason="needs the package jinja2")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({chr(i): i for i in range(127)}, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    model.save(str(golden / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% if m.role == 'assistant' %}>{% endif %}{% endfor %}"
    )
    template += "{% if add_generation_prompt %}a{% endif %}"
    settings = {"eos_token": ">", "chat_template": template}
    (golden / "tokenizer_config.json").write_text(json.dumps(settings))
    talks = [
        [{"role": "user", "content": chr(97 + i % 9)}, {"role": "assistant", "content": chr(97 + i % 9) * 9}]
        for i in range(40)
    ]
    path = folder / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return str(path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*holds nothing of the multi-token prediction:UserWarning")
def test_a_run_goes_on_and_is_exported_merged(tmp_path, capsys):
    """Of answers of conversations: two steps and two more equal four; what is exported has the run's loss."""
    pytest.importorskip("orbax.checkpoint", reason="needs the package orbax-checkpoint")
    with tarfile.open(ROOT / "tests" / "golden" / "hf_v3.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    golden = tmp_path / "v3"
    talks = write_talks(tmp_path, golden)
    common = ["--from", str(golden), "--data", talks, "--mesh", "pp=1,ep=1", "--sequence", "16"]
    common += ["--schedule", "1f1b", "--microbatches", "2", "--microbatch-size", "2", "--eval-every", "0"]
    common += ["--lora", "2", "--learning-rate", "0.03", "--warmup", "0", "--rates", "wsd", "--decay", "0.01"]
    before = signal.getsignal(signal.SIGTERM)
    with jax.numpy_dtype_promotion("standard"):
        pretrain = runpy.run_path(str(ROOT / "examples" / "pretrain.py"))["main"]

        def losses(out, *more):
            assert pretrain([*common, "--out", str(tmp_path / out), *more]) == 0
            lines = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
            return [found["loss"] for found in map(json.loads, lines) if "loss" in found]

        whole = losses("whole", "--steps", "4")
        losses("parts", "--steps", "2")
        assert losses("parts", "--steps", "4") == pytest.approx(whole, rel=1e-6)
        assert pretrain([*common, "--out", str(tmp_path / "parts"), "--steps", "5", "--lora-alpha", "1"]) == 2
        assert "has adapters of" in capsys.readouterr().err
        assert pretrain(["export", str(tmp_path / "parts"), "--to", str(tmp_path / "new"), "--dtype", "float32"]) == 0
        told = []
        for which in (["--run", str(tmp_path / "parts")], ["--from", str(tmp_path / "new")], ["--from", str(golden)]):
            data = ["--data", talks, "--sequence", "16", "--batches", "1"]
            assert pretrain(["eval", *which, *data]) == 0
            told.append(float(capsys.readouterr().out.partition("loss ")[2].split()[0]))
    signal.signal(signal.SIGTERM, before)
    assert told[0] == pytest.approx(told[1], abs=2e-4) and told[0] < told[2] - 0.05
    first, second = open_folder(golden), open_folder(tmp_path / "new")
    assert first.keys() == second.keys()
    for name in first:
        same = np.array_equal(first[name].rows(), second[name].rows())
        assert same == ("_proj" not in name or "self_attn" not in name), name
