"""Stages by what layers cost: one flag gives every command the same stages, and plan works it out of what it plans."""

import dataclasses
import re

import pytest

from tests.examples.sizes import small  # first: it makes the example importable

from pretraining import flags, layer_costs, probes, run  # isort: skip
from pretraining import plan as planning
from pretraining.layer_costs import PlannedCosts

import jaxpipe
from jaxpipe.deepseek import LayerCosts, build_model
from jaxpipe.deepseek.config import model_config
from jaxpipe.planning.chips import CHIPS, Achieved
from jaxpipe.planning.work import DeviceWork, Kernel

MESH, CHIP = {"pp": 2, "ep": 2}, CHIPS["H800"]
SIZES = ["--mesh", "pp=2,ep=2", "--microbatches", "4", "--microbatch-size", "2", "--schedule", "dualpipev"]


@pytest.fixture
def probed(monkeypatch):
    """A layer with experts takes 1.5 s and a dense one 1, half of it exchanges, of F and B each; a stage 0.25 more."""
    seconds = {("moe",): 1.75, ("moe", "moe"): 3.25, ("dense",): 1.25}
    times = {row: dict.fromkeys("FBIW", probes.Seconds(each / 2, each / 2)) for row, each in seconds.items()}
    seconds_of_end = {"E": 0.125, "G": 0.5, "H": 4.0}
    ends = {
        letter: DeviceWork((Kernel("copy", "", 0.0, each * CHIP.hbm, 1.0),)) for letter, each in seconds_of_end.items()
    }
    monkeypatch.setattr(layer_costs, "probe", lambda *_: probes.Probe(times, {}, {}, 0, 0, ends, ()))
    return Achieved(memory=1.0, kernel_us=0.0, occupied=0.0)


def test_costs_are_those_of_one_more_layer(probed):
    """Pairs hide the exchanges of one direction behind the kernels of the other; without pairs both are waited for."""
    config = model_config("tiny").over_devices(2)
    of = lambda name: PlannedCosts(config, MESH, 1, CHIP, probed).of(jaxpipe.schedule.build(name, 2, 4))  # noqa: E731
    assert of("1f1b") == LayerCosts(dense=2000.0, moe=3000.0, head=4000.0, embedding=625.0)
    assert of("dualpipev") == LayerCosts(dense=1000.0, moe=1500.0, head=4000.0, embedding=625.0)
    config = dataclasses.replace(config, shared_ends=True)
    assert of("1f1b") == LayerCosts(dense=2000.0, moe=3000.0)


def test_a_run_gets_the_stages_of_the_costs_that_plan_prints(probed, tmp_path):
    schedule = jaxpipe.schedule.build("dualpipev", 2, 4)
    config = PlannedCosts(model_config("tiny").over_devices(2), MESH, 1, CHIP, probed).applied(schedule)
    planned = build_model(config, schedule, 0, axis="ep", abstract=True)
    (_, flag, text) = planning._by(config.layer_costs).rpartition("--layer-costs ")
    args = flags.train_parser().parse_args([*SIZES, flag.strip(), text, "--out", str(tmp_path)])
    setup = run.set_up(args)
    assert setup.model.arrangement == planned.arrangement and setup.config.layer_costs == config.layer_costs
    by_operations = run.set_up(flags.train_parser().parse_args([*SIZES, "--out", str(tmp_path)]))
    assert by_operations.model.arrangement != planned.arrangement
    facts = run._facts(args, setup)
    assert facts["layer_costs"] == text and facts["stages"] == list(planned.arrangement.counts)


@pytest.mark.slow
def test_a_layer_costs_what_it_adds_to_a_planned_stage(monkeypatch):
    """Of a forward that overlaps a backward: where stages differ by a layer, they differ by its cost."""
    config = dataclasses.replace(model_config("tiny").over_devices(2), shared_ends=False)
    found = planning.plan(config, MESH, schedules=["dualpipev"], microbatches=4, chip=CHIP, by_time=True)
    (row,) = found.rows
    assert re.search(rf"^stages of dualpipev: .*; by --layer-costs {row.costs}$", str(found), re.M)
    config = dataclasses.replace(config, layer_costs=row.costs)
    model = build_model(config, jaxpipe.schedule.build("dualpipev", 2, 4), 0, axis="ep", abstract=True)
    costs = [sum(row.costs.layers[kind] for kind in kinds) for kinds in model.arrangement.rows]
    planned, ends = [1e3 * stage.overlapped for stage in row.plan.stage_costs.stages], row.plan.stage_costs
    assert len(set(costs)) > 1
    for cost, milliseconds in zip(costs[1:], planned[1:], strict=True):
        assert cost - costs[0] == pytest.approx(milliseconds - planned[0], abs=0.05 * max(costs))
    planned_ends = 1e3 * ends.head, 1e3 * (ends.embed + ends.embed_grad)
    assert (row.costs.head, row.costs.embedding) == pytest.approx(planned_ends, rel=0.02)
    by_operations = dataclasses.replace(found, rows=(dataclasses.replace(row, costs=None),))
    for busiest, run_of, hinted in ((1.06, by_operations, True), (1.04, by_operations, False), (1.06, found, False)):
        monkeypatch.setattr(planning, "imbalance", lambda plan, value=busiest: value)
        assert ("--layer-costs auto" in str(run_of)) == hinted


def test_costs_that_nobody_knows_are_refused(tmp_path):
    args = flags.train_parser().parse_args([*SIZES, "--layer-costs", "auto", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match=r"--layer-costs auto: what .* can do is not known here; give the costs"):
        run.set_up(args)
    with pytest.raises(ValueError, match="--layer-costs auto is not known here: give the costs that plan prints"):
        flags.sized_config(args, 2)
    with pytest.raises(SystemExit):
        flags.train_parser().parse_args(["--layer-costs", "moe"])
    alike = PlannedCosts(small(dense_layers=0, layers=3), MESH, 1, CHIP)
    with pytest.raises(ValueError, match="all 3 layers are alike"):
        alike.of(jaxpipe.schedule.build("1f1b", 2, 4))
