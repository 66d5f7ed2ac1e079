"""Files, the picture and the command line."""

import re
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

import eplb_jax
from eplb_jax import draw_loads
from eplb_jax.__main__ import main
from eplb_jax.plan.policies.registry import POLICIES
from tests.cases import cases

LOADS = np.random.default_rng(0).lognormal(size=(3, 32)) * 1000
SIZES = ["--replicas", "40", "--nodes", "2", "--gpus", "8", "--groups", "4"]


@pytest.fixture
def loads(tmp_path):
    eplb_jax.save_loads(tmp_path / "loads.npz", LOADS)
    return tmp_path / "loads.npz"


def test_files_come_back(tmp_path):
    plan = eplb_jax.rebalance_experts(LOADS, 40, 4, 2, 8)
    eplb_jax.save_placement(tmp_path / "plan", plan)
    assert all(np.array_equal(a, b) for a, b in zip(plan, eplb_jax.read_placement(tmp_path / "plan"), strict=True))
    eplb_jax.save_loads(tmp_path / "loads", LOADS)
    assert np.array_equal(eplb_jax.read_loads(tmp_path / "loads"), LOADS)
    np.savez(tmp_path / "steps.npz", anything=np.stack([LOADS, LOADS]))
    assert np.array_equal(eplb_jax.read_loads(tmp_path / "steps.npz"), 2 * LOADS)
    np.save(tmp_path / "alone.npy", LOADS)
    assert np.array_equal(eplb_jax.read_loads(tmp_path / "alone.npy"), LOADS)


def test_files_that_hold_something_else(tmp_path):
    (tmp_path / "text").write_text("no array")
    np.savez(tmp_path / "two.npz", a=LOADS, b=LOADS)
    np.savez(tmp_path / "negative.npz", loads=-LOADS)
    for name, message in [("text", "is not a file"), ("two.npz", r"\['a', 'b'\]"), ("negative.npz", "96 values")]:
        with pytest.raises(ValueError, match=message):
            eplb_jax.read_loads(tmp_path / name)
    with pytest.raises(ValueError, match="a placement has phy2log, log2phy, logcnt"):
        eplb_jax.read_placement(tmp_path / "two.npz")


@cases(("policy", "plan"), POLICIES.items(), quick=list(POLICIES.items())[:2], ids=POLICIES)
def test_plan_is_the_policys(loads, capsys, policy, plan):
    assert main(["plan", str(loads), *SIZES, "--policy", policy]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| in order", f"| {policy}"]
    written = eplb_jax.read_placement(loads.with_suffix(".plan.npz"))
    assert np.array_equal(written.phy2log, plan(LOADS, 40, 4, 2, 8).phy2log)


def test_sticky_and_elastic_start_from_the_previous(loads, tmp_path, capsys):
    previous, output = tmp_path / "previous.npz", tmp_path / "out.npz"
    eplb_jax.save_placement(previous, eplb_jax.rebalance_experts(LOADS[::-1], 40, 4, 2, 8))
    command = ["plan", str(loads), *SIZES, "--previous", str(previous), "--output", str(output), "--policy"]
    assert main([*command, "sticky"]) == 0
    assert "| previous | 40 |" in capsys.readouterr().out
    assert main([*command, "elastic", "--dead", "3"]) == 0
    assert (eplb_jax.read_placement(output).phy2log[:, 15:20] == -1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "sticky"], "needs --previous"),
        (["--dead", "1"], "--dead [1] is for --policy elastic"),
        (["--dead", "9", "--policy", "elastic"], "numbered from 0 to 7"),
        (["--replicas", "41"], "num_replicas=41 is not a multiple"),
        (["--previous", "nowhere.npz"], "nowhere.npz"),
    ],
)
def test_wrong_commands_say_why(loads, capsys, arguments, message):
    assert main(["plan", str(loads), *SIZES, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_picture(loads, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["plan", str(loads), *SIZES, "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    plan = eplb_jax.rebalance_experts(LOADS, 40, 4, 2, 8)
    figure = draw_loads(LOADS, {"one": plan, "two": plan}, 8)
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (3, 8) and np.allclose(shown.mean(1), 1)
    assert figure.axes[0].get_title().startswith("one\nheaviest GPU: ")
    with pytest.raises(ValueError, match="plans is empty"):
        draw_loads(LOADS, {}, 8)


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "int4", "uint8", "int64"]
)
def test_loads_of_every_dtype_come_back(tmp_path, capsys, dtype):
    loads = np.array([[3, 1, 4, 1]]).astype(jnp.dtype(dtype))
    eplb_jax.save_loads(tmp_path / "loads.npz", loads)
    assert eplb_jax.read_loads(tmp_path / "loads.npz").tolist() == [[3, 1, 4, 1]]
    assert main(["plan", str(tmp_path / "loads.npz"), "--replicas", "6", "--gpus", "2"]) == 0
    np.savez(tmp_path / "raw.npz", loads=np.stack([loads] * 3))  # NumPy makes raw bytes of what it does not know
    if dtype in ("float8_e4m3fn", "int4"):
        with pytest.raises(ValueError, match=r"dtype \|V1: loads are integers or floats"):
            eplb_jax.read_loads(tmp_path / "raw.npz")
    else:
        assert eplb_jax.read_loads(tmp_path / "raw.npz").tolist() == [[9, 3, 12, 3]]


@pytest.mark.parametrize(
    "steps",
    [
        np.full((5000, 1, 2), [1.0, 1.25], np.float16),
        np.full((200, 1, 2), 1000, np.float16),
        np.full((300, 1, 2), 200, np.uint8),
        np.full((3, 1, 2), 2**62),
        np.full((3, 1, 2), 2**63, np.uint64),
        np.full((3, 1, 2), 2**51 + 1),
        np.ones((7, 1, 2), bool),
        np.full((3, 1, 2), 2e38, np.float32),
    ],
    ids=lambda steps: f"{steps.dtype}-{len(steps)}",
)
def test_steps_are_added_without_loss(tmp_path, steps):
    np.savez(tmp_path / "steps.npz", loads=steps)
    found = eplb_jax.read_loads(tmp_path / "steps.npz")
    right = steps.astype(object).sum(0)
    assert np.allclose(found, right.astype(float), rtol=1e-12)
    if steps.dtype.kind in "iu" and right.max() < 2**53:
        assert found.dtype.kind in "iu" and found.tolist() == right.tolist()


def bad_files(folder):
    """Files by the sentence that is due; none is one of loads."""
    steps = np.ones((4, 2, 3), np.float16)
    arrays = {
        r"dtype <U1: loads are integers": np.array([["1", "2"]]),
        "arrays of Python objects are not read": np.array([[1, None]]),
        r"dtype complex128": np.ones((2, 3), complex),
        r"dtype \|V3": np.zeros((2, 3), "V3"),
        r"shape \(3,\): it must be": np.ones(3),
        r"shape \(1, 1, 2, 3\)": np.ones((1, 1, 2, 3)),
        r"shape \(\): it must be": np.array(3.0),
        "of no step": steps[:0],
        "step 2 of the loads .* first is nan": np.where(np.arange(4)[:, None, None] == 2, np.nan, steps),
        # The sum over steps would hide it.
        "step 1 of the loads .* first is -1": np.where(np.arange(4)[:, None, None] == 1, -1, 5 * steps.astype(int)),
    }
    for number, (message, array) in enumerate(arrays.items()):
        np.savez(folder / f"{number}.npz", loads=array)
        yield message, folder / f"{number}.npz"
    np.savez(folder / "whole.npz", loads=LOADS)
    whole = (folder / "whole.npz").read_bytes()
    np.save(folder / "objects.npy", np.array([[1, None]]))
    contents = {
        "it is empty": b"",
        r"it begins with b'1, 2": b"1, 2",
        "begins like JSON and is none": b"[[1, 2",
        "is not a file that NumPy's savez or save": whole[:-40],
        "savez or save writes: Bad": whole[:200] + bytes(100) + whole[300:],
        "is not a file that NumPy's savez": b"\x93NUMPY\x01\x00v\x00{",
    }
    for number, (message, content) in enumerate(contents.items()):
        (folder / f"bytes{number}").write_bytes(content)
        yield message, folder / f"bytes{number}"
    yield "Python objects", folder / "objects.npy"
    with zipfile.ZipFile(folder / "text.zip", "w") as archive:
        archive.writestr("readme.txt", "no array")
    yield "it holds", folder / "text.zip"
    yield "No such file", folder / "nowhere.npz"
    yield "directory", folder


def test_files_of_no_loads_are_a_sentence(tmp_path, capsys):
    for message, path in bad_files(tmp_path):
        assert main(["plan", str(path), "--replicas", "6", "--gpus", "2"]) == 2
        said = capsys.readouterr().err
        assert re.search(message, said) and said.count("\n") == 1, (path, said)
        with pytest.raises((ValueError, OSError)):
            eplb_jax.read_placement(path)


def test_placements_say_what_they_are_for(tmp_path):
    plan, path = eplb_jax.rebalance_experts(LOADS, 40, 4, 2, 8), tmp_path / "plan.npz"
    eplb_jax.save_placement(path, plan, num_gpus=8, num_nodes=2, num_groups=4)
    assert eplb_jax.read_sizes(path) == {"num_gpus": 8, "num_nodes": 2, "num_groups": 4}
    assert np.array_equal(eplb_jax.read_placement(path, num_gpus=8, num_nodes=2).phy2log, plan.phy2log)
    with pytest.raises(ValueError, match="a placement for num_gpus=8, not 4"):
        eplb_jax.read_placement(path, num_gpus=4)
    with pytest.raises(ValueError, match="a placement for num_nodes=2, not 4"):
        eplb_jax.read_placement(path, num_nodes=4)
    eplb_jax.save_placement(path, plan)  # as before there was a record
    assert eplb_jax.read_sizes(path) == {} and eplb_jax.read_placement(path, num_gpus=4).num_replicas == 40
    with pytest.raises(ValueError, match="40 replicas do not divide over 16 GPUs"):
        eplb_jax.read_placement(path, num_gpus=16)
    for sizes, message in [({"num_gpus": 16}, "40 replicas do not"), ({"num_gpus": 0}, "num_gpus=0"),
                           ({"num_gpus": 8, "num_nodes": 3}, "do not divide over num_nodes=3")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            eplb_jax.save_placement(path, plan, **sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phy2log": np.full((3, 40), 40)}, "phy2log holds 40 to 40: there are 32"),
        ({"phy2log": np.ones((3, 40))}, "phy2log has dtype float64"),
        ({"log2phy": np.zeros((3, 32), int)}, r"\(3, 32\) and \(3, 32\): they must be"),
        ({"logcnt": np.ones((2, 32), int)}, r"\(2, 32\): they must be"),
        ({"num_gpus": np.array(7)}, "40 replicas do not divide over 7 GPUs"),
        ({"num_gpus": np.array(-1)}, "records num_gpus=-1"),
    ],
)
def test_placements_are_checked_when_read(tmp_path, change, message):
    phy2log, log2phy, logcnt = eplb_jax.rebalance_experts(LOADS, 40, 4, 2, 8)
    np.savez(tmp_path / "plan.npz", **{"phy2log": phy2log, "log2phy": log2phy, "logcnt": logcnt, **change})
    with pytest.raises(ValueError, match=message):
        eplb_jax.read_placement(tmp_path / "plan.npz")


def test_files_that_are_read_are_never_written(loads, tmp_path, capsys, monkeypatch):
    assert main(["plan", str(loads), *SIZES]) == 0
    deployed, content, kept = (
        loads.with_suffix(".plan.npz"),
        loads.with_suffix(".plan.npz").read_bytes(),
        loads.read_bytes(),
    )
    (tmp_path / "link.npz").symlink_to(deployed)
    (tmp_path / "hard.npz").hardlink_to(deployed)
    (tmp_path / "loads_link.npz").symlink_to(loads)
    monkeypatch.chdir(tmp_path)
    for taken, option in [(deployed, "--output"), ("loads.plan.npz", "--output"), ("link.npz", "--output"),
                          ("hard.npz", "--output"), (loads, "--output"), ("loads_link.npz", "--output"),
                          ("./loads.plan.npz", "--plot")]:  # fmt: skip
        assert main(["plan", str(loads), *SIZES, "--previous", str(deployed), option, str(taken)]) == 2
        assert "would overwrite it: name another" in capsys.readouterr().err
    assert main(["plan", str(loads), *SIZES, "--output", "new.npz", "--plot", "./new.npz"]) == 2
    for number in (2, 3):  # without --output, a new name each time
        assert main(["plan", "loads_link.npz" if number == 2 else "loads.npz", *SIZES, "--previous", "link.npz"]) == 0
    assert deployed.read_bytes() == content and loads.read_bytes() == kept
    assert sorted(path.name for path in tmp_path.glob("loads*.plan*.npz")) == [
        "loads.plan.npz", "loads.plan2.npz", "loads_link.plan.npz"]  # fmt: skip


def test_a_link_as_output_stays_one_and_nothing_is_left_behind(loads, tmp_path, monkeypatch):
    (tmp_path / "plans").mkdir()
    (tmp_path / "current.npz").symlink_to(tmp_path / "plans" / "a.npz")
    assert main(["plan", str(loads), *SIZES, "--output", str(tmp_path / "current.npz")]) == 0
    before = (tmp_path / "plans" / "a.npz").read_bytes()
    assert (tmp_path / "current.npz").is_symlink()

    def interrupted(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    assert main(["plan", str(loads), *SIZES, "--output", str(tmp_path / "current.npz")]) == 2
    assert [path.name for path in (tmp_path / "plans").iterdir()] == ["a.npz"]
    assert (tmp_path / "plans" / "a.npz").read_bytes() == before


def test_a_previous_placement_of_other_gpus_is_what_it_is(loads, tmp_path, capsys):
    previous = tmp_path / "previous.npz"
    plan = eplb_jax.balanced(LOADS, 48, 1, 1, 8)
    eplb_jax.save_placement(previous, plan, num_gpus=8)
    command = ["plan", str(loads), "--replicas", "48", "--gpus", "16", "--previous", str(previous)]
    assert main(command) == 0
    share = eplb_jax.balancedness(plan, LOADS, 8)
    line = f"| previous (8 GPUs) | 48 | {share.mean():.4f} | {share.min():.4f} |  |  |"
    assert line in capsys.readouterr().out
    for policy in ("sticky", "elastic"):
        assert main([*command, "--policy", policy]) == 2
        assert "is a placement for 8 GPUs, --gpus is 16" in capsys.readouterr().err


def test_sizes_and_nodes_of_the_command(loads, capsys):
    assert main(["plan", str(loads), "--replicas", "40", "--gpus", "0", "--policy", "elastic"]) == 2
    assert "--gpus 0: all are at least 1" in capsys.readouterr().err
    assert main(["plan", str(loads), "--replicas", "40", "--nodes", "4", "--gpus", "8"]) == 0
    assert "--groups 1 do not divide over --nodes 4: nodes are ignored" in capsys.readouterr().err
