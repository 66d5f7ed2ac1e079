"""Traces that several tests read."""

import gzip
import json
import os
import pathlib

import pytest

from profiling.read.kineto import read_kineto

ROOT = pathlib.Path(__file__).resolve().parents[2]
THREE_LAYERS = pathlib.Path(__file__).parent / "data" / "three_layers.json"


@pytest.fixture
def write_trace(tmp_path):
    """Writes a document as a file, packed if its name ends in .gz, and gives its path."""

    def write(document, name="trace.json"):
        text = json.dumps(document).encode()
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        return path

    return write


@pytest.fixture(scope="session")
def deepseek():
    """DeepSeek's published training trace; JAXPIPE_DEEPSEEK_TRACE names the file."""
    places = [
        ROOT / "tests" / "data" / "profile_train.json.gz",
        ROOT.parent / "shared" / "data" / "deepseek_profile_train.json.gz",
    ]
    named = os.environ.get("JAXPIPE_DEEPSEEK_TRACE")
    found = pathlib.Path(named) if named else next((path for path in places if path.exists()), None)
    if found is None:
        pytest.skip("DeepSeek's training trace is not here: set JAXPIPE_DEEPSEEK_TRACE to its .json or .json.gz")
    return read_kineto(found)


@pytest.fixture(scope="session")
def three_layers():
    """A trace in the same format, written by hand: three layers that take 400 us each.

    In each layer, from its start: attn(F) on stream 7 from 0 to 80; dispatch(F) on stream 27: layout 90 to 100,
    barrier to 120, transfer to 200; mlp(W) on stream 23 from 150 to 250; mlp(F) on stream 7 from 202 to 300;
    combine(F) on stream 27: barrier 300 to 310, transfer to 400.
    """
    return read_kineto(THREE_LAYERS)
