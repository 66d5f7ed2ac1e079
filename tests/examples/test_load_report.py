"""Loads of each microbatch: ratios against a plain loop, the lines and the page of a run."""

import pathlib
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from eplb_jax import Placement

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

from pretraining import flags
from pretraining.load_report import LOADS, PAGE, Evenness, percentiles_of, record_of
from pretraining.observe import METRICS, Observer, Throughput, read_metrics
from pretraining.run import with_fetched

RNG = np.random.default_rng(0)


def test_the_heaviest_device_of_each_microbatch():
    slots = np.array([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]])
    loads = RNG.integers(0, 100, (5, 2, 4))
    loads[2, 1] = 0
    expected = np.ones((5, 2))
    for m, layer in np.ndindex(5, 2):
        devices = [0.0, 0.0]
        for slot, expert in enumerate(slots[layer]):
            devices[slot // 3] += loads[m, layer, expert] / np.sum(slots[layer] == expert)
        if sum(devices):
            expected[m, layer] = max(devices) / (sum(devices) / 2)
    found = Evenness(Placement.from_phy2log(slots, 4), 2).heaviest(loads)
    np.testing.assert_allclose(found, expected)

    line, metrics = record_of(7, found), percentiles_of(found)
    assert sum(line["histogram"]) == 10 and line["step"] == 7
    np.testing.assert_allclose(np.array(line["layers"])[:, 3], expected.max(0), atol=1e-4)
    assert metrics["heaviest_over_mean_p100"] == pytest.approx(expected.max())
    assert metrics["heaviest_over_mean_p50"] == pytest.approx(np.median(expected))


def test_a_run_leaves_a_page_of_its_loads(tmp_path):
    ratios = 1 + RNG.random((4, 3))
    for start in (0, 2):  # the second run continues after step 2, and step 3 is done again
        with Observer(tmp_path, 5, start, Throughput(1, 1.0, None)) as observer:
            for step in range(start + 1, start + 4):
                observer.step(step, {"loss": 1.0, "layers_moved": float(step == 3)})
                observer.loads(step, ratios)
    assert [line["step"] for line in read_metrics(tmp_path / LOADS)] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in read_metrics(tmp_path / METRICS)] == [1, 2, 3, 4, 5]
    page = (tmp_path / PAGE).read_text()
    pictures = [ElementTree.fromstring(part.partition("</svg>")[0] + "</svg>") for part in page.split("<h2>")[1:]
                for part in [part[part.index("<svg") :]]]  # fmt: skip
    curves, cells, bars = pictures
    assert len(curves.findall("polyline")) == 4 and len(curves.findall("line")) == 1
    assert len(cells.findall("rect")) == 5 * 3
    assert len(bars.findall("rect")) == 10


@pytest.mark.parametrize(
    ("more", "fetched"),
    [
        ("--slots 12", None),  # of 4 masters a device, the first placement needs 2
        ("--slots 12 --fetched 3", 3),
        ("--slots 12 --fetched all", None),
        ("--config moe-16b --slots 72 --mesh pp=1,ep=8", 2),  # 8 masters; one spare slot each: twice one
        ("--config moe-16b --slots 72 --mesh pp=1,ep=8 --rebalance-every 0", None),
    ],
)
def test_as_many_experts_are_fetched_as_pay(more, fetched):
    args = flags.train_parser().parse_args(more.split())
    config = flags.sized_config(args, args.mesh["ep"])
    assert with_fetched(config, args).moe.fetched == fetched
