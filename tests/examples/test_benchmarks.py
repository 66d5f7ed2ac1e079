"""Benchmarks: each explains itself, and what it records are the keys that the pages quote."""

import ast
import json
import pathlib
import runpy
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))

import fp8_loss
import record
import steps_beside_plans

FOLDER = record.ROOT / "examples" / "benchmarks"
BENCHMARKS = sorted(path.stem for path in FOLDER.glob("*.py") if "Recorder.begin(" in path.read_text(encoding="utf-8"))
LONG = ("fine_tuning", "frozen", "generate", "hf_load", "llama", "lowering", "one_rank", "shared_ends", "fp8_gemm")
RECORDED = {
    # Arguments, and how many figures come of them at least.
    "lockstep": ("--schedule dualpipev --quick", 20),
    "clusters": ("--ranks 8 --microbatches 20", 40),
    "improved_orders": ("--sizes 4x8 --costs DeepSeek-V3 --moves 100", 20),
    "deferred": ("--sizes 4x8 --costs DeepSeek-V3", 40),
    "one_rank": ("--tiny --repeats 1", 10),
    "lowering": ("--ranks 2 --microbatches 8 --schedule zbv", 8),
    "permute_rows": ("--tiny --repeats 1", 4),
    "fp8_gemm": ("--tiny --repeats 1", 24),
    "swiglu": ("--tiny --repeats 1", 3),
    "latent_attention": ("--tiny --repeats 1 --uneven", 8),
    "embedding_grad": ("--tiny --repeats 1", 24),
    "added_gradients": ("--tiny --repeats 1 --only uneven", 6),
    "fp8_quantise": ("--tiny --repeats 1 --only quantise,gate", 12),
    "shared_ends": ("--tiny --repeats 1", 6),
    "generate": ("--tiny --repeats 1 --batches 1,2", 10),
    "readers": ("--tiny", 5),
    "fine_tuning": ("--tiny --repeats 1", 12),
    "hf_load": ("--tiny --holes --formats fp8", 7),
    "frozen": ("--tiny --repeats 1 --microbatches 2", 15),
    "offload": ("--tiny --repeats 1 --dispatches loops", 24),
    "layer_room": ("--tiny --microbatches 20 --tokens 64", 6),
    "llama": ("--tiny --memory --devices 2 --sequences 4 --microbatch-size 1 --programs zb1p,pp=1,FSDP", 2),
}


def run(name, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(FOLDER / f"{name}.py"), *arguments])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


def test_every_script_is_a_benchmark_or_serves_them():
    others = {"chunks", "overlap_programs", "pages", "peers_model", "peers_torch", "record", "spectrax_stage"}
    assert {*BENCHMARKS, *others} == {path.stem for path in FOLDER.glob("*.py")}
    assert not others & {*BENCHMARKS}


def lines_of_a_run(seed, slowdown=None, steps=70):
    """metrics.jsonl of steps of about a second; a plan runs beside step 13, 23 and so on, and step 16, 26 has it."""
    rng, lines = np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        line = {"step": step, "step_seconds": (100 if step < 3 else 1) * rng.lognormal(sigma=0.05)}
        if slowdown and step % 10 == 3 and step > 10:
            line |= {"planning_seconds": 0.5, "planning_cpu_seconds": 0.002 * (step == 13) + 0.001}
            line["step_seconds"] *= slowdown
        if slowdown and step % 10 == 6 and step > 10:
            line |= {"plan_of_step": step - 6, "rebalance_seconds": 0.004}
        lines += [line, {"step": step, "held_out_loss": 1.0}]
    lines[60 % len(lines)].pop("step_seconds", None)
    return lines


@pytest.mark.parametrize("slowdown", [1.0, 1.2])
def test_steps_beside_plans_are_told_from_others(slowdown, monkeypatch):
    """Against what the metrics were made with: how much slower they are, and that chance does not make them so."""
    monkeypatch.setattr(steps_beside_plans, "DRAWS", 500)
    runs = [lines_of_a_run(0), *(lines_of_a_run(seed, slowdown) for seed in (1, 2, 3)), lines_of_a_run(4)]
    rounds = [steps_beside_plans.steps_of(lines) for lines in runs]
    alone, apart, beside, first = steps_beside_plans.kinds(rounds)
    assert (alone["number"], apart["number"], beside["number"], first["number"]) == (2 * 63, 3 * 51, 3 * 6, 3 * 6)
    assert alone["50%"] == apart["50%"] == 1 and apart["worst"] < 1.3
    assert beside["50%"] == pytest.approx(slowdown, rel=0.05) and first["50%"] == pytest.approx(1, rel=0.05)
    assert beside["planning ms"] == pytest.approx(3) and first["placing ms"] == pytest.approx(4)
    assert beside["share %"] == pytest.approx(0.3, rel=0.1) and first["share %"] == pytest.approx(0.4, rel=0.1)
    cost = {row["steps"]: row for row in steps_beside_plans.slower(rounds)}
    found = cost["beside a plan"]
    assert found["from"] < slowdown < found["to"] and found["to"] - found["from"] < 0.1
    assert found["slower"] == pytest.approx(slowdown, rel=0.05)
    assert found["by chance"] < 0.01 if slowdown > 1 else found["by chance"] > 0.05
    assert cost["first with a placement"]["by chance"] > 0.05
    assert 1 - 0.05 < cost["either"]["slower"] < slowdown + 0.05
    with pytest.raises(ValueError, match="no step has a new placement"):
        list(steps_beside_plans.slower(rounds[:1]))
    with pytest.raises(ValueError, match="no step after the first 6 has its time"):
        steps_beside_plans.steps_of(lines_of_a_run(0, steps=5))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help(name, monkeypatch, capsys):
    """The first sentence says what is measured, and every option says what it does."""
    with pytest.raises(SystemExit) as end:
        run(name, ["--help"], monkeypatch)
    assert end.value.code == 0
    text = capsys.readouterr().out
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree).splitlines()[0] in text
    assert f"python examples/benchmarks/{name}.py" in text
    assert "--record" in text
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            assert "help" in {keyword.arg for keyword in call.keywords}, ast.unparse(call)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in RECORDED],
)
def test_record(name, monkeypatch, tmp_path, capsys):
    arguments, least = RECORDED[name]
    file = tmp_path / "measured.json"
    run(name, [*arguments.split(), "--record", str(file)], monkeypatch)
    found = json.loads(file.read_text(encoding="utf-8"))
    assert len(found) >= least
    for key, entry in found.items():
        assert key.startswith(f"{name}/")
        assert set(entry) == {"value", "unit", "command", "machine", "date"}
        assert f"python examples/benchmarks/{name}.py {arguments}" in entry["command"]
    if name in ("lockstep", "clusters"):  # simulated: they are the same on every machine
        quoted = {key: entry["value"] for key, entry in record.read_records().items() if key in found}
        assert len(quoted) >= 14
        for key, value in quoted.items():
            assert found[key]["value"] == pytest.approx(value, abs=0.5 if "%" in key else 5e-3), key


def test_a_rank_alone_is_lowered(monkeypatch, capsys):
    """What a GPU would be given, and the plan's part of its table."""
    run("one_rank", ["--tiny", "--dry", "--own"], monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0] == ["schedule", "products", "rank", "planned GB", "planned s"]
    assert [row[:3] for row in table[2:]] == [["1f1b", "bf16", "0"], ["1f1b", "bf16", "1"]]


def test_a_rank_that_is_not_there_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run("one_rank", ["--rank", "3,16"], monkeypatch)
    assert "--rank 16 of 16: they are numbered from 0 to 15" in capsys.readouterr().err


def test_gaps_of_losses_are_means_over_seeds():
    """One percent of the first seed and none of the second; a standard error is that of the mean of two numbers."""
    plain, scaled = np.array([[2.0, 2.0], [4.0, 4.0]]), np.array([[2.01, 2.03], [3.0, 5.0]])
    np.testing.assert_allclose(fp8_loss.gaps(scaled, plain), (0.5, 0.5))
    gap, error = fp8_loss.gaps(scaled[:1], plain[:1])
    assert gap == pytest.approx(1) and np.isnan(error)
    table = list(fp8_loss.rows({"bf16": plain, "fp8": scaled, "bf16 again": plain}))
    assert [row["steps"] for row in table] == ["1 to 1", "2 to 2"]
    assert [row["gap %"] for row in table] == pytest.approx([(0.5 - 25) / 2, (1.5 + 25) / 2])
    assert {row["bf16 again, gap %"] for row in table} == {0}
