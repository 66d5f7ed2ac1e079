"""Parameters of a run as plain arrays by layer."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from tests.examples.fake_run import LAYERS, Fake

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

import pretrain
from pretraining.checkpoint import Checkpoints, DamagedError
from pretraining.export import export_run, newest_checkpoint
from pretraining.export_folder import export_folder

load_file = pytest.importorskip("safetensors.numpy", reason="needs the package safetensors").load_file
pytest.importorskip("orbax.checkpoint", reason="needs the package orbax-checkpoint")
if jax.device_count() < 4:
    pytest.skip("needs 4 devices", allow_module_level=True)

# As in the tests of checkpoints.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("collected"),
]

ORDER = (0, 7, 1, 6, 2, 5, 3, 4)


@pytest.fixture
def run_folder(tmp_path):
    """Checkpoints of steps 1 and 2, rows in the order of a schedule; and the weights of each, by layer."""
    fake = Fake(order=ORDER)
    checkpoints, state, weights = Checkpoints(tmp_path / "checkpoints", fake.layout), fake.init(), {}
    for step in (1, 2):
        state, _ = fake.step(state, fake.program().batch(step), fake.rng)
        checkpoints.save(step, state, {"dense_layers": 2})
        weights[step] = np.asarray(state.params.stages["w"])[np.argsort(ORDER)]
    checkpoints.close()
    return tmp_path, weights


def test_layers_are_exported_in_the_models_order(run_folder, tmp_path):
    folder, weights = run_folder
    said = export_run(folder, tmp_path / "a.safetensors")
    arrays = load_file(tmp_path / "a.safetensors")
    assert said.startswith(f"step 2: {LAYERS + 1} arrays")
    assert sorted(arrays) == sorted([*(f"layers.{layer + 2}.w" for layer in range(LAYERS)), "b"])
    for layer in range(LAYERS):
        np.testing.assert_array_equal(arrays[f"layers.{layer + 2}.w"], weights[2][layer])


def test_large_models_become_several_files(run_folder, tmp_path):
    folder, _ = run_folder
    export_run(folder / "checkpoints", tmp_path / "a.safetensors", "bfloat16", largest=100)
    index = json.loads((tmp_path / "a.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [f"a-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert index["metadata"]["total_size"] == 2 * (LAYERS * 16 * 16 + 16)
    assert {path.name for path in tmp_path.glob("a-*")} == set(index["weight_map"].values())


def test_damaged_checkpoints_are_not_exported(run_folder, tmp_path):
    folder, weights = run_folder
    for step, expected in ((2, 1), (1, None)):
        files = [path for path in (folder / "checkpoints" / str(step)).rglob("*") if path.is_file()]
        file = max(files, key=lambda path: path.stat().st_size)
        file.write_bytes(b"")
        with pytest.warns(UserWarning, match=r"step \d in .* is damaged"):
            if expected is None:
                with pytest.raises(DamagedError, match="all 2 checkpoints"):
                    export_run(folder, tmp_path / "a.safetensors")
            else:
                export_run(folder, tmp_path / "a.safetensors")
                arrays = load_file(tmp_path / "a.safetensors")
                np.testing.assert_array_equal(arrays["layers.2.w"], weights[expected][0])
                (tmp_path / "a.safetensors").unlink()


def test_what_is_wrong_with_the_export_is_no_damage(run_folder, tmp_path, monkeypatch, capsys):
    """Not an older step instead, nor "damaged"; and no half of a file is left."""
    folder, _ = run_folder
    with pytest.raises(ValueError, match="FP8 cannot"):
        newest_checkpoint(folder, lambda manager, step: refuse("FP8 cannot"))
    with pytest.raises(ValueError, match="does not describe the model"):
        export_folder(folder, tmp_path / "new")
    to = tmp_path / "a.safetensors"
    monkeypatch.setattr("safetensors.flax.save_file", lambda arrays, file, about: refuse(file.write_text("half")))
    with pytest.raises(OSError, match=r"a\.safetensors cannot be written"):
        export_run(folder, to)
    assert not list(tmp_path.glob("a*"))
    to.write_text("mine")
    for name in ("a", "b"):
        (tmp_path / f"{name}-00001-of-00002.safetensors").write_text("mine")
    with pytest.raises(ValueError, match=r"a\.safetensors is there already"):
        export_run(folder, to)
    with pytest.raises(ValueError, match=r"b-00001-of-00002\.safetensors is there already"):
        export_run(folder, tmp_path / "b.safetensors", "bfloat16", largest=100)
    assert to.read_text() == "mine"
    command = ["export", str(folder), "--to", str(tmp_path / "c.safetensors")]
    for more, message in (
        (["--like", "F"], "--like with --to"),
        (["--max-file", "1", "--like", "F"], "--like and --max-file with --to"),
        (["--max-file", "nan"], "--max-file nan: GB of a file, above 0"),
    ):
        assert pretrain.main([*command, *more]) == 2 and message in capsys.readouterr().err


def refuse(why):
    raise ValueError(why)


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(ValueError, match=r"the name must end in .safetensors"):
        export_run(tmp_path, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"there is no checkpoint in"):
        export_run(tmp_path, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"no folder .*none"):
        export_run(tmp_path / "none", tmp_path / "a.safetensors")
