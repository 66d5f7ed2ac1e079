"""Training that begins with the weights of a Hugging Face folder, and folders that come out of it."""

import pathlib
import runpy
import signal
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.examples.sizes import make_batch  # first: it makes the example importable

from pretraining import flags, progress, trainer  # isort: skip
from pretraining.export_folder import export_folder  # isort: skip
import jaxpipe
from jaxpipe.deepseek import load, save
from jaxpipe.deepseek.hf_files import open_folder, read_json
from jaxpipe.deepseek.model import build_model

ROOT = pathlib.Path(__file__).resolve().parents[2]

if jax.device_count() < 8:
    pytest.skip("needs 8 devices", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:.*holds nothing of the multi-token prediction:UserWarning")


@pytest.fixture
def golden(tmp_path):
    """A folder that transformers saved, of four layers."""
    with tarfile.open(ROOT / "tests" / "golden" / "hf_v3.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "v3"


@pytest.fixture
def pretrain():
    """The program's main function, with promotion as a user has it."""
    before = signal.getsignal(signal.SIGTERM)
    with jax.numpy_dtype_promotion("standard"):
        yield runpy.run_path(str(ROOT / "examples" / "pretrain.py"))["main"]
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_fine_tuning_equals_the_plain_program_and_goes_on_elsewhere(golden, tmp_path):
    """Three steps of AdamW through DualPipeV against one device, then the same loss from what is saved.

    Four layers in eight stages: half of these hand on what they get.
    """
    schedule, mesh = jaxpipe.schedule.build("dualpipev", 4, 8), jaxpipe.make_mesh(pp=4, ep=2)
    config, params = load(golden, mesh, schedule)
    model = build_model(config, schedule, 0, axis="ep", abstract=True)
    optimizer = trainer.make_optimizer(trainer.TrainConfig(3, 1e-4, 1), model)
    plain = model.on_one_device()
    one = jax.device_put(jax.tree.map(np.asarray, params), jax.devices()[0])
    with jax.numpy_dtype_promotion("standard"):
        plain_state = trainer.TrainState(one, optimizer.init(one), *(jnp.int32(0) for _ in range(3)))
    state = trainer.state_from(params, model, optimizer, mesh)
    steps = {
        "pipeline": trainer.make_step(trainer.pipelined(model, schedule, mesh), model, optimizer, mesh),
        "plain": trainer.make_step(trainer.plain_value_and_grad(plain, parts=16), plain, optimizer),
    }
    sizes = type("Sizes", (), {"sequence": 16, "vocab": config.vocab})
    rng = jax.random.key(0)
    batches = [make_batch(step, 16, sizes) for step in range(4)]
    for batch in batches[:3]:
        state, metrics = steps["pipeline"](state, batch, rng)
        plain_state, expected = steps["plain"](plain_state, batch, rng)
        assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
    for ours, theirs in zip(*map(jax.tree.leaves, (state.params, plain_state.params)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    save(tmp_path / "saved", state.params, config, schedule, dtype="float32", like=golden)
    evaluate = trainer.make_evaluate(model, schedule, mesh)
    before = float(evaluate(state.params, batches[3]))
    schedule, mesh = jaxpipe.schedule.build("1f1b", 2, 4), jaxpipe.make_mesh(pp=2, ep=1)
    config, params = load(tmp_path / "saved", mesh, schedule)
    model = build_model(config, schedule, 0, axis="ep", abstract=True)
    after = float(trainer.make_evaluate(model, schedule, mesh)(params, batches[3]))
    assert after == pytest.approx(before, rel=1e-6)


@pytest.mark.slow
def test_the_program_begins_with_weights_and_exports_them(golden, tmp_path, pretrain, monkeypatch, capsys):
    """A learning rate of zero keeps the weights: export gives back the folder; what resumes does not begin anew."""
    pytest.importorskip("orbax.checkpoint", reason="needs the package orbax-checkpoint")
    np.save(tmp_path / "tokens.npy", (np.arange(200_000) % 127).astype(np.uint16))
    (golden / "tokenizer.json").write_text("{}")
    common = ["--from", str(golden), "--data", str(tmp_path / "tokens.npy"), "--mesh", "pp=2,ep=2", "--sequence", "16"]
    common += ["--out", str(tmp_path / "run"), "--eval-every", "0", "--learning-rate", "0", "--warmup", "0"]
    assert pretrain([*common, "--steps", "1"]) == 0
    out = tmp_path / "out"
    assert (
        pretrain(["export", str(tmp_path / "run"), "--to", str(out), "--dtype", "float32", "--max-file", "0.0002"]) == 0
    )
    assert "step 1: " in capsys.readouterr().out
    first, second = open_folder(golden), open_folder(out)
    assert first.keys() == second.keys()
    for name in first:
        if "e_score" not in name:  # which moves with the loads
            np.testing.assert_array_equal(first[name].rows(), second[name].rows(), err_msg=name)
    assert (out / "tokenizer.json").read_text() == "{}" and (out / "generation_config.json").exists()
    assert read_json(out / "config.json")["max_position_embeddings"] == 256
    monkeypatch.setattr("pretraining.run.load_params", None)
    assert pretrain([*common, "--steps", "1"]) == 0


def test_folders_are_converted_tensor_by_tensor(golden, tmp_path):
    pytest.importorskip("orbax.checkpoint", reason="needs the package orbax-checkpoint")
    said = export_folder(golden, tmp_path / "fp8", "fp8")
    assert " tensors, " in said
    export_folder(tmp_path / "fp8", tmp_path / "back", "float32", max_shard_size=100_000)
    first, back = open_folder(golden), open_folder(tmp_path / "back")
    assert first.keys() == back.keys()
    for name in first:
        wanted = first[name].rows()
        np.testing.assert_allclose(back[name].rows(), wanted, atol=np.abs(wanted).max() / 16, err_msg=name)
    assert (tmp_path / "back" / "generation_config.json").exists()
    with pytest.raises(ValueError, match="is there already"):
        export_folder(golden, tmp_path / "fp8")


def test_configs_are_names_files_or_folders(golden, tmp_path):
    def sized(*arguments):
        return flags.sized_config(flags.train_parser().parse_args(list(arguments)), 1)

    assert sized().vocab == 256
    for source in (golden, golden / "config.json"):
        config = sized("--config", str(source), "--sequence", "32", "--slots", "10")
        assert (config.vocab, config.sequence, config.redundant, config.mtp) == (128, 32, 2, True)
    config = sized("--from", str(golden), "--slots", "12")
    assert (config.redundant, config.mtp, config.sequence) == (4, False, 256)
    with pytest.raises(ValueError, match=r"no model 'mine\.json'"):
        sized("--config", "mine.json")
    (tmp_path / "mine.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type='llama'"):
        sized("--config", str(tmp_path / "mine.json"))
    with pytest.raises(ValueError, match="no folder"):
        sized("--from", str(tmp_path / "none"), "--config", "tiny")


def test_amounts_are_shown_in_lines(capsys):
    show = progress.amount("reading", every=0.0)
    show(500_000_000, 1_000_000_000)
    show(1_000_000_000, 1_000_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" GB,")[0] for line in lines] == ["reading: 0.5 of 1.0", "reading: 1.0 of 1.0"]
