"""The Python in README.md runs, and its comparison of schedules is what the command prints."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from jaxpipe.__main__ import main

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMPARISONS = re.findall(r"`python -m jaxpipe (compare [^`]*)` prints\n\n(.*?\n\n.*?)\n\n", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(block):
    environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=8")
    subprocess.run([sys.executable, "-W", "error", "-c", block], check=True, env=environment, cwd=ROOT)


def test_one_comparison_is_shown():
    assert len(COMPARISONS) == 1


@pytest.mark.parametrize(("command", "printed"), COMPARISONS)
def test_comparison_is_what_the_command_prints(command, printed, capsys):
    assert main(command.split()) == 0
    assert capsys.readouterr().out.strip() == printed


def test_the_first_example_is_short():
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 15
