"""`plan --search`: what it says of each candidate is what a plan of it says, and nothing faster is left out."""

import contextlib
import dataclasses

import pytest

import tests.examples.sizes  # noqa: F401  # first: it makes the example importable

from pretraining import plan as planning  # isort: skip
from pretraining import plan_search, probes
from pretraining.flags import ENDS

from jaxpipe.deepseek.config import model_config
from jaxpipe.planning.chips import CHIPS, Achieved

CONFIG = dataclasses.replace(model_config("moe-1b"), layers=12, dense_layers=2, mtp=True)
SPACE = plan_search.Space(
    8, pp=(2, 4), ep=(2,), schedules=("1f1b", "dualpipev", "dualpipe"), microbatches=(2, 4), precisions=("bf16",),
    remats=("none", "layer"),
)  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return plan_search.search(CONFIG, SPACE, CHIPS["H800"], memory=1e12, workers=0)


@pytest.mark.slow
def test_figures_are_those_of_plans(found):
    """Time within 8% and memory within 6% of `plan`, of the best candidate of each schedule."""
    for name in SPACE.schedules:
        best = next(one for one in found.best if one.schedule == name)
        config = dataclasses.replace(CONFIG, remat=best.remat, shared_ends=ENDS[best.ends])
        sizes = dict(zip(("pp", "dp", "ep"), best.mesh, strict=True))
        (row,) = planning.plan(config, sizes, schedules=[name], microbatches=best.microbatches).rows
        print(name, best, row.memory, row.seconds)
        assert best.seconds == pytest.approx(row.seconds, rel=0.08), name
        assert best.tokens == pytest.approx(row.tokens / 8, rel=0.08), name
        assert best.nbytes == pytest.approx(row.memory.total, rel=0.06), name


@pytest.mark.slow
def test_the_ten_best_are_ranked_and_fewer_are_simulated_than_there_are(found):
    tokens = [one.tokens for one in found.best]
    assert len(tokens) == plan_search.BEST and tokens == sorted(tokens, reverse=True)
    assert found.tried == 2 * 3 * 2 * 2 * 2 and found.simulated < found.tried and found.beyond is None
    assert {one.mesh for one in found.best} <= {(2, 2, 2), (4, 1, 2)}
    assert str(found).count("pp=") == plan_search.BEST


@pytest.mark.slow
def test_what_does_not_fit_is_told_apart(found, monkeypatch):
    """With less memory than the fastest takes, that one is named beside the best that fit."""
    sizes = sorted(one.nbytes for one in found.best)
    known = {}

    def probe_once(config, *rest):
        return known.setdefault((config.remat, config.shared_ends), probes.probe(config, *rest))

    monkeypatch.setattr(plan_search, "probe", probe_once)
    limit = (sizes[0] + sizes[-1]) / 2
    fits = plan_search.search(CONFIG, SPACE, CHIPS["H800"], memory=limit, workers=0)
    assert fits.best and all(one.nbytes <= limit for one in fits.best)
    fastest = max(found.best, key=lambda one: one.tokens)
    assert (fits.beyond is None) == (fastest.nbytes <= limit)
    if fits.beyond is not None:
        assert fits.beyond == fastest and "faster, and too large" in str(fits)
    none = plan_search.search(CONFIG, SPACE, CHIPS["H800"], memory=1.0, workers=0)
    assert not none.best and "none fits" in str(none) and none.beyond == fastest


def test_stages_of_one_more_layer_cost_what_the_second_adds():
    """Times and slots by arithmetic: two layers of one kind, and of two."""
    seconds = {("moe",): 3.0, ("moe", "moe"): 5.0, ("dense",): 2.0}
    times = {row: dict.fromkeys("FBIW", probes.Seconds(value, value / 2, 0.25)) for row, value in seconds.items()}

    def held(**counts):
        arrays = {((size,), "float32"): (count, 4 * size) for size, count in counts.values()}
        return probes.Held({}, {}, arrays)

    kept = {
        ("moe",): held(x=(1, 1), y=(2, 3)),
        ("moe", "moe"): held(x=(1, 1), y=(2, 6)),
        ("dense",): held(x=(1, 1), z=(8, 1)),
    }
    one = probes.Probe(times, kept, {("moe",): 7, ("dense",): 1}, 0, 0, {}, ())
    assert one.seconds(("moe",) * 4, "F") == (9.0, 4.5, 1.0)
    assert one.seconds(("dense", "moe"), "I") == (4.0, 2.0, 0.5)
    costs = one.costs(("moe", "moe"), Achieved(occupied=0.5), sums=10.0)
    assert (costs.forward, costs.backward_input, costs.weight, costs.backward) == (7.5, 7.5, 18.0, 18.0)
    assert costs.overlapped == (5 + 15.5) + 0.5 * 5
    three = one.kept(("dense", "moe", "moe"))
    assert three.cross == {((1,), "float32"): (1, 4), ((8,), "float32"): (1, 32), ((2,), "float32"): (6, 8)}
    assert probes.slot_bytes([three.cross, kept["moe",].cross]) == 4 + 32 + 48
    assert one.copies(("dense", "moe", "moe")) == 15
    empty = one.costs((), Achieved(occupied=0.5), sums=10.0)  # of a stage with the head alone
    assert (empty.forward, empty.backward_input, empty.weight, empty.backward, empty.overlapped) == (0.0,) * 5
    assert one.kept(()) == probes.Held({}, {}, {}) and one.copies(()) == 0


ARGUMENTS = "--config moe-1b --search --gpus 4 --search-pp 2 --search-ep 2 --precision bf16 --remat none"


def test_refusals():
    """Before anything is traced."""
    with pytest.raises(ValueError, match="--gpus 3 is no multiple of pp times ep for any of pp"):
        planning.main(ARGUMENTS.replace("--gpus 4", "--gpus 3").split())
    with pytest.raises(ValueError, match="say on how many devices"):
        planning.main(["--search"])
    alike = dataclasses.replace(CONFIG, dense_layers=0, mtp=False)
    with pytest.raises(ValueError, match="all 12 layers of the model are of one kind"):
        probes.probe(alike, 2, 1, CHIPS["H800"], plan_search.PROGRAMS, 8)


@pytest.mark.slow
def test_command(capsys, monkeypatch):
    monkeypatch.setattr(plan_search, "_mapper", lambda workers: contextlib.nullcontext(map))
    arguments = ARGUMENTS
    planning.main([*arguments.split(), "--schedules", "1f1b", "--microbatches", "4"])
    text = capsys.readouterr().out
    assert "2 candidates, 2 simulated" in text
    for ends in ENDS:
        assert any(
            f"| none | {ends} |" in line and "| 1f1b | pp=2,dp=1,ep=2 | 4 | bf16" in line for line in text.split("\n")
        )
