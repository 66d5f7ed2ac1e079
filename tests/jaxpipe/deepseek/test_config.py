"""Sizes of the models: parameters as published, and what is refused."""

import dataclasses

import pytest

from jaxpipe.deepseek import MODELS, ModelConfig, model_config
from tests.jaxpipe.deepseek.models import small


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("dsv3-671b", (671.0, 671.1), (37, 38)),
        ("moe-16b", (15.65, 15.75), (2.4, 2.7)),
        ("moe-1b", (1, 1.2), (0.4, 0.6)),
    ],
)
def test_published_sizes(name, total, active):
    config = model_config(name)
    assert total[0] <= config.total / 1e9 <= total[1]
    assert active[0] <= config.active / 1e9 <= active[1]


def test_unknown_model_and_bad_sizes():
    with pytest.raises(ValueError, match=r"no model 'huge': known are tiny"):
        model_config("huge")
    for changes, message in (
        ({"rotary": 3}, "rotary is even"),
        ({"dense_layers": 5}, r"dense_layers=5 of layers=5"),
        ({"query_rank": 0}, r"query_rank=0: at least 1, or None"),
        ({"redundant": -1}, r"redundant=-1"),
        ({"remat": "some"}, r"remat='some' is one of"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**changes)
    assert isinstance(MODELS["tiny"], ModelConfig)


def test_slots_divide_over_the_devices_or_say_which_would():
    """`tiny` as it is on one to four devices, the flag for others."""
    tiny = MODELS["tiny"]
    assert [tiny.over_devices(devices).redundant for devices in (1, 2, 4)] == [tiny.redundant] * 3
    assert tiny.over_devices(8, 16).redundant == 8 and tiny.over_devices(4, 8).redundant == 0
    for devices, slots, message in (
        (8, None, r"8 experts in 12 slots on the 8 devices of axis ep: .* take --slots 16"),
        (4, 6, r"8 experts in 6 slots .* take --slots 8"),
        (4, 10, r"8 experts in 10 slots .* take --slots 12"),
        (3, 9, r"8 experts do not divide over the 3 devices of axis ep: take a divisor of 8"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.over_devices(devices, slots)
    spread = dataclasses.replace(tiny, dense_layers=0, moe=dataclasses.replace(tiny.moe, masters=9))
    assert spread.over_devices(3, 12).redundant == 4
    with pytest.raises(
        ValueError, match=r"\{'width': 64, 'dense_hidden': 192\}, do not divide .* take a divisor of 64"
    ):
        dataclasses.replace(spread, dense_layers=1).over_devices(3, 12)
    with pytest.raises(ValueError, match=r"\{'width': 64\}, do not divide over the 3 devices"):
        dataclasses.replace(spread, mtp=True).over_devices(3, 12)
    apart = dataclasses.replace(tiny, shard_outer=True, shared_ends=False, vocab=258)
    with pytest.raises(ValueError, match=r"'vocab': 258\}, do not divide over the 4 devices .* take a divisor of 2"):
        apart.over_devices(4)
    assert dataclasses.replace(apart, shared_ends=True).over_devices(4).redundant == 4
    assert dataclasses.replace(spread, shard_outer=True, shared_ends=True).over_devices(3, 12).redundant == 4


def test_multi_token_prediction_is_as_large_as_published():
    """11.5 billion parameters, embedding and output matrix not counted: DeepSeek-V3's README_WEIGHTS."""
    assert 11.5 <= model_config("dsv3-671b").mtp_parameters / 1e9 < 11.7
