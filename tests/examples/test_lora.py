"""The example of adapters learns with them alone."""

import pathlib
import sys

import jax
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

import lora


@pytest.mark.slow
def test_adapters_learn(capsys):
    """The example itself checks that nothing else has changed."""
    with jax.numpy_dtype_promotion("standard"):
        before, after = lora.main(["--tiny", "--steps", "30"])
    assert after < 0.9 * before
    assert "parameters trained" in capsys.readouterr().out
