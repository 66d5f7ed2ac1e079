"""Checkpoints of the pretraining example: what is damaged is seen, said and not used."""

import json
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import jaxpipe
from jaxpipe.deepseek import build_model, model_config
from tests.examples.fake_run import Fake

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

from pretraining.checkpoint import Checkpoints, DamagedError
from pretraining.layout import Layout, describe, divided_evenly, fingerprint

from tests.cases import cases

pytest.importorskip("orbax.checkpoint", reason="needs the package orbax-checkpoint")
if jax.device_count() < 4:
    pytest.skip("needs 4 devices", allow_module_level=True)

# A read that fails leaves orbax's other reads without their event loop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("collected"),
]


@pytest.fixture(scope="module")
def fake():
    return Fake()


def save(fake, folder, steps=(1, 2)):
    """A folder with checkpoints whose states differ; and the states."""
    checkpoints, state, states = Checkpoints(folder, fake.layout), fake.init(), {}
    batch = fake.program().batch
    for step in steps:
        state, _ = fake.step(state, batch(step), fake.rng)
        checkpoints.save(step, state, {"mark": step, "array": np.arange(step), "list": [1, {"deep": None}]})
        states[step] = state
    checkpoints.close()
    return states


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_the_newest_is_restored_with_its_facts(fake, tmp_path):
    states = save(fake, tmp_path, (1, 2, 3, 4))
    checkpoints = Checkpoints(tmp_path, fake.layout)
    assert checkpoints.steps() == [2, 3, 4]
    found = checkpoints.restore()
    assert found.step == 4 and equal(found.state, states[4])
    assert found.facts["mark"] == 4 and found.facts["list"] == [1, {"deep": None}]
    np.testing.assert_array_equal(found.facts["array"], np.arange(4))
    assert found.state.params.stages["w"].sharding == states[4].params.stages["w"].sharding
    checkpoints.close()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@cases("damage", [cut, flip, empty, pathlib.Path.unlink], quick=[flip, pathlib.Path.unlink])
def test_damaged_arrays_are_not_used(fake, tmp_path, damage):
    folder = tmp_path / "checkpoints"
    states = save(fake, folder)
    damage(largest(folder / "2"))
    checkpoints = Checkpoints(folder, fake.layout)
    with pytest.warns(UserWarning, match=r"step 2 in .* is damaged .* is moved to .*2; falling back to step 1"):
        found = checkpoints.restore()
    assert found.step == 1 and equal(found.state, states[1])
    assert (tmp_path / "checkpoints.damaged" / "2").is_dir()
    checkpoints.save(2, states[2], {})
    checkpoints.wait()
    assert equal(checkpoints.restore().state, states[2])
    checkpoints.close()


def test_no_file_of_a_checkpoint_can_be_cut_unseen(fake, tmp_path):
    """What is read after a file was cut is the state, or another checkpoint and a warning."""
    states = save(fake, tmp_path / "whole")
    files = [path for path in (tmp_path / "whole" / "2").rglob("*") if path.is_file()]
    fell_back = 0
    for index, file in enumerate(files):
        copy = tmp_path / str(index)
        copy_tree(tmp_path / "whole", copy)
        cut(copy / file.relative_to(tmp_path / "whole"))
        checkpoints = Checkpoints(copy, fake.layout)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = checkpoints.restore()
        checkpoints.close()
        assert found is not None and equal(found.state, states[found.step])
        said = [str(warning.message) for warning in seen if "falling back" in str(warning.message)]
        assert len(said) == (found.step == 1)
        fell_back += found.step == 1
    assert fell_back >= 4


def copy_tree(source, target):
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


def test_changed_metadata_are_seen(fake, tmp_path):
    save(fake, tmp_path / "c")
    path = tmp_path / "c" / "2" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["body"]["facts"]["mark"] = 7
    path.write_text(json.dumps(meta))
    with pytest.warns(UserWarning, match="metadata do not match their checksum"):
        assert Checkpoints(tmp_path / "c", fake.layout).restore().facts["mark"] == 1


def test_when_all_are_damaged_nothing_is_made_up(fake, tmp_path):
    folder = tmp_path / "c"
    save(fake, folder)
    for step in "12":
        empty(largest(folder / step))
    with pytest.warns(UserWarning), pytest.raises(DamagedError, match=r"all 2 checkpoints in .* are damaged: restore"):
        Checkpoints(folder, fake.layout, read_only=True).restore()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_another_model_is_an_error_and_no_damage(fake, tmp_path):
    save(fake, tmp_path)
    state = {"params": jnp.zeros(3), "step": jnp.int32(0)}
    other = Layout(lambda p: p, lambda p: p, fake.mesh, describe(state))
    with pytest.raises(ValueError, match=r"of another model or optimizer: \d+ arrays differ, the first is opt_state"):
        Checkpoints(tmp_path, other).restore()
    assert Checkpoints(tmp_path, fake.layout).steps() == [1, 2]


def test_nothing_to_restore(fake, tmp_path):
    assert Checkpoints(tmp_path / "new", fake.layout).restore() is None
    with pytest.raises(ValueError, match=r"no folder .*: name the --out folder"):
        Checkpoints(tmp_path / "none", fake.layout, read_only=True)
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, fake.layout, keep=0)


@cases("dtype", ["float32", "bfloat16", "int32", "uint8", "bool", "int16"], quick=["float32", "bfloat16"])
def test_fingerprints_see_every_change_and_no_mesh(fake, dtype):
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.integers(0, 2, (8, 6, 4)), dtype)
    expected = int(fingerprint(values))
    placed = jax.device_put(values, divided_evenly(values.shape, fake.mesh))
    assert int(jax.jit(fingerprint)(placed)) == expected
    for _ in range(20):
        place = tuple(rng.integers(values.shape))
        changed = values.at[place].set(~values[place] if dtype == "bool" else values[place] + jnp.ones((), dtype))
        assert int(fingerprint(changed)) != expected
    assert int(fingerprint(values[::-1])) != expected


@pytest.mark.parametrize("way", ["pack", "unpack"])
def test_no_device_holds_what_others_have(way):
    """A state becomes its canonical form, and comes back, without whole arrays on a device."""
    mesh, schedule = jaxpipe.make_mesh(pp=4, ep=2), jaxpipe.schedule.build("dualpipev", 4, 8)
    model = build_model(model_config("tiny"), schedule, 0, axis="ep", abstract=True)
    state = {
        "params": jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
            model.params, model.specs,
        )
    }  # fmt: skip
    layout = Layout(model.to_layers, model.from_layers, mesh, state)
    lowered = layout._pack.lower(state) if way == "pack" else layout._unpack.lower(layout.canonical)
    found = lowered.compile().memory_analysis()
    part = max(found.argument_size_in_bytes, found.output_size_in_bytes)
    assert part * 8 < 1.5 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert found.temp_size_in_bytes < 2 * part
