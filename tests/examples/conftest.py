"""What several tests of the pretraining example need."""

import gc

import pytest


@pytest.fixture
def collected():
    """What a failed read leaves behind is found in its own test, rather than in one that follows."""
    yield
    gc.collect()
