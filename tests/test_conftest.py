"""How the tests themselves run: with warnings as errors, beside whatever plugins of pytest are installed."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

PLUGIN = """
import warnings
import pytest

class LoudWarning(pytest.PytestWarning):
    pass

warnings.warn("imported", LoudWarning)
warnings.warn("imported", DeprecationWarning)

def pytest_configure(config):
    warnings.warn("configured", LoudWarning)
    warnings.warn("configured by another module", UserWarning, stacklevel=2)

def pytest_collection_finish(session):
    warnings.warn("collected", LoudWarning)

@pytest.fixture
def loud():
    warnings.warn("in a test", LoudWarning)
"""

TESTS = """
import warnings
import pytest

def test_beside_a_plugin(loud):
    pass

def test_that_warns():
    warnings.warn("of this project", UserWarning)

@pytest.mark.filterwarnings("ignore:of this")
def test_that_says_so():
    warnings.warn("of this project", UserWarning)
"""


@pytest.mark.parametrize("workers", [[], pytest.param(["-n", "1"], marks=pytest.mark.slow)])
def test_plugins_that_warn_end_no_run_and_tests_that_warn_fail(tmp_path, workers):
    (tmp_path / "pytest_loud.py").write_text(PLUGIN)
    (tmp_path / "test_it.py").write_text(TESTS)
    facts = tmp_path / "pytest_loud-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: pytest-loud\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[pytest11]\nloud = pytest_loud\n")
    paths = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "tests.conftest"]
    found = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-rA", *workers, str(tmp_path / "test_it.py")],
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 1, found.stdout + found.stderr
    outcomes = {
        line.split("::")[1].split()[0]: line.split()[0] for line in found.stdout.splitlines() if "::test_" in line
    }
    assert outcomes == {
        "test_beside_a_plugin": "PASSED",
        "test_that_warns": "FAILED",
        "test_that_says_so": "PASSED",
    }, found.stdout
