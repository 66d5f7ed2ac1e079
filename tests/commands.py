"""Commands of this project in documents: found in shell text, and parsed by the real parser without being run."""

import argparse
import contextlib
import importlib
import os
import pathlib
import re
import runpy
import shlex
import sys
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONSOLE = {"jaxpipe": "jaxpipe", "eplb-jax": "eplb_jax", "jaxpipe-profiling": "profiling"}
"""Console commands and their packages."""
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
_PARSE = argparse.ArgumentParser.parse_args


class _Parsed(BaseException):
    """The arguments are good."""


def commands(text):
    """The commands of this project in shell text, as lists of words; variables are taken as "0".

    >>> commands("JAX_PLATFORMS=cpu .venv/bin/python -m jaxpipe show zbv \\\\\\n  --ranks 2  # text\\npip install .")
    [['-m', 'jaxpipe', 'show', 'zbv', '--ranks', '2']]
    """
    found = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        try:
            words = [re.sub(r"\$\w+", "0", word) for word in shlex.split(line, comments=True)]
        except ValueError:  # no shell
            continue
        if words and (words[0] == "make" or words[0] in CONSOLE):
            found.append(words)
        for i, word in enumerate(words):
            if pathlib.PurePath(word).name == "python" and is_ours(words[i + 1 :]):
                found.append(words[i + 1 :])
                break
    return found


def is_ours(words):
    """Whether Python's arguments begin with a package or script of this project."""
    if words[:1] == ["-m"]:
        return words[1:2] and words[1].partition(".")[0] in {*CONSOLE.values(), "tests"}
    return words[:1] and words[0].startswith("examples/")


def check(words):
    """Parses a command.

    Raises:
      AssertionError: no such target of make, package or script, or arguments that it does not take.
    """
    if words[0] == "make":
        assert set(words[1:]) <= TARGETS, words
    elif words[0] in CONSOLE:
        check(["-m", CONSOLE[words[0]], *words[1:]])
    elif words[0] == "-m":
        _parse(words, lambda: importlib.import_module(f"{words[1]}.__main__").main(words[2:]))
    else:
        assert (ROOT / words[0]).exists(), words
        _parse(words, lambda: runpy.run_path(str(ROOT / words[0]), run_name="__main__"))
        if "--" in words:  # a launcher's script
            check(words[words.index("--") + 1 :])


def _parse(words, call):
    def parse(parser, *arguments):
        _PARSE(parser, *arguments)
        raise _Parsed

    script = words[:1] if words[0] != "-m" else words[1:2]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(argparse.ArgumentParser, "parse_args", parse))
        stack.enter_context(mock.patch.object(sys, "argv", [str(ROOT / script[0]), *words[len(script) :]]))
        stack.enter_context(mock.patch.object(sys, "path", [str((ROOT / script[0]).parent), *sys.path]))
        stack.enter_context(mock.patch.dict(os.environ))
        try:
            call()
        except _Parsed:
            return
        except SystemExit as end:
            raise AssertionError(f"{shlex.join(words)}: its parser ends with {end.code}") from None
    raise AssertionError(f"{shlex.join(words)}: has no parser")
