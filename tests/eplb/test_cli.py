"""Files, the picture and the command line."""

import numpy as np
import pytest

import eplb_jax
from eplb_jax.__main__ import main
from eplb_jax.plot import draw_loads

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


@pytest.mark.parametrize(
    ("policy", "plan"),
    [
        ("deepseek", eplb_jax.rebalance_experts),
        ("balanced", eplb_jax.policies.balanced),
        ("no-duplicate", eplb_jax.policies.no_duplicate),
    ],
)
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
