"""Stages by what layers cost: one flag gives every command the same stages, and what plan works out is what it plans."""

import re

import pytest

from tests.examples.sizes import small  # first: it makes the example importable

from pretraining import flags, run  # isort: skip
from pretraining import plan as planning
from pretraining.layer_costs import PlannedCosts

import jaxpipe
from jaxpipe.deepseek import build_model
from jaxpipe.planning.chips import CHIPS

MESH = {"pp": 2, "ep": 2}
SIZES = ["--mesh", "pp=2,ep=2", "--microbatches", "4", "--layers", "8"]


def test_every_command_gets_the_stages_that_plan_prints(capsys, tmp_path):
    """Plan works costs out; the flag that it prints, given to it or to a run, divides layers as it did."""
    planning.main(["--config", "tiny", *SIZES, "--schedules", "dualpipev", "1f1b", "--layer-costs", "auto"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stages of")]
    assert [line.split()[2] for line in lines] == ["dualpipev:", "1f1b:"]
    for name, line in zip(("dualpipev", "1f1b"), lines, strict=True):
        flag = re.search(r"--layer-costs (\S+)$", line)[0].split()
        planning.main(["--config", "tiny", *SIZES, "--schedules", name, *flag])
        assert line in capsys.readouterr().out
        args = flags.train_parser().parse_args(
            [*SIZES, *flag, "--schedule", name, "--out", str(tmp_path), "--microbatch-size", "4"]
        )
        model = run.set_up(args).model
        rows = planning._stages(model.arrangement)
        assert line == f"stages of {name}: {rows}; by {' '.join(flag)}"
        assert str(model.config.layer_costs) == flag[1]


def test_a_run_whose_devices_nobody_knows_says_so(tmp_path):
    given = [*SIZES, "--layer-costs", "auto", "--out", str(tmp_path), "--microbatch-size", "4"]
    args = flags.train_parser().parse_args(given)
    with pytest.raises(ValueError, match="--layer-costs auto: what .* can do is not known here; give the costs"):
        run.set_up(args)
    with pytest.raises(ValueError, match="--layer-costs auto is not known here"):
        flags.sized_config(args, 2)
    with pytest.raises(SystemExit):
        flags.train_parser().parse_args(["--layer-costs", "moe"])


def test_a_layer_costs_what_a_stage_of_one_more_is_planned_to_take_more():
    """The stages of a plan: one of a dense layer and three with experts, one of two and multi-token prediction."""
    config = small(dense_layers=1, layers=6, mtp=True, shared_ends=False, moe={"backend": "xla"})
    schedule, chip = jaxpipe.schedule.build("1f1b", 2, 4), CHIPS["H800"]
    costs = PlannedCosts(config, MESH, 1, chip).of(schedule)
    (row,) = planning.plan(config, MESH, schedules=["1f1b"], microbatches=4, chip=chip, by_time=True).rows
    assert row.costs == costs and row.plan is not None
    ((first, last), ends) = row.plan.stage_costs.stages, row.plan.stage_costs
    model = build_model(PlannedCosts(config, MESH, 1, chip).applied(schedule), schedule, 0, axis="ep", abstract=True)
    planned = 1e3 * (last.forward + last.backward - first.forward - first.backward)
    costs_of = [sum(costs.layers[kind] for kind in kinds) for kinds in model.arrangement.rows]
    assert planned == pytest.approx(costs_of[1] - costs_of[0], abs=0.02 * max(costs_of))
    assert (costs.head, costs.embedding) == pytest.approx(
        (1e3 * ends.head, 1e3 * (ends.embed + ends.embed_grad)), rel=0.02
    )
    with pytest.raises(ValueError, match="all 3 layers are alike"):
        PlannedCosts(small(dense_layers=0, layers=3), MESH, 1, chip).of(schedule)
