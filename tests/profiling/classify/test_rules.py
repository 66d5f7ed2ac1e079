"""A user's own rules: read from a file, tried first, and refused in a sentence that names the entry."""

import json

import pytest

from profiling.__main__ import main
from profiling.classify.rules import Rule, load_rules
from profiling.read.kineto import read_kineto


def kernel(name, start, duration, stream=7):
    return {
        "ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": stream, "ts": start, "dur": duration,
        "args": {"device": 0, "stream": stream},
    }  # fmt: skip


@pytest.fixture
def trace(tmp_path):
    """By hand: a product from 0 to 80, a kernel of the user's own from 40 to 100 beside it."""
    path = tmp_path / "rank0.json"
    events = [kernel("ampere_sgemm_128x64_tn", 0, 80), kernel("void my::frobnicate<float>(int)", 40, 60, 9)]
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def written(tmp_path, content):
    path = tmp_path / "rules.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_rules_of_a_file(tmp_path):
    entries = [
        {"pattern": "^my_", "kind": "mine", "group": "wait"},
        {"pattern": "x", "kind": "y", "group": "compute", "field": "function"},
    ]
    assert load_rules(written(tmp_path, entries)) == (
        Rule("^my_", "mine", "wait"),
        Rule("x", "y", "compute", "function"),
    )
    assert load_rules(written(tmp_path, [])) == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "no JSON"),
        ("\x00", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ({"pattern": "a"}, "holds an object and not a list of rules"),
        ([{"pattern": "a", "kind": "b", "group": "wait"}, 7], "entry 2: holds a number and not a rule"),
        ([{"kind": "b"}], "entry 1: pattern and group missing"),
        ([{"pattern": "a", "kind": "b", "group": "wait", "kinds": "c"}], "entry 1: 'kinds' is unknown"),
        ([{"pattern": "a", "kind": None, "group": "wait"}], "entry 1: kind is null and not a text"),
        ([{"pattern": "", "kind": "b", "group": "wait"}], "entry 1: pattern is empty"),
        ([{"pattern": "(", "kind": "b", "group": "wait"}], "entry 1: .*no regular expression"),
        ([{"pattern": "a", "kind": "b", "group": "comm"}], "entry 1: .*choose one of compute, transfer"),
        ([{"pattern": "a", "kind": "b", "group": "wait", "field": "stream"}], "entry 1: .*choose one of name"),
    ],
)
def test_files_that_hold_no_rules(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=message) as error:
        load_rules(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"missing.json: the file of rules cannot be read: No such file"):
        load_rules(tmp_path / "missing.json")


def test_own_rules_precede_the_tables(trace):
    own = (Rule("sgemm", "my product", "wait"), Rule("frobnicate$", "my exchange", "transfer", "function"))
    assert [(event.kind, event.group) for event in read_kineto(trace).events] == [
        ("GEMM", "compute"),
        ("other kernel", "compute"),
    ]
    assert [(event.kind, event.group) for event in read_kineto(trace, rules=own[1:]).events] == [
        ("GEMM", "compute"),
        ("my exchange", "transfer"),
    ]
    assert [event.kind for event in read_kineto(trace, own).events] == ["my product", "my exchange"]


def test_command_line(trace, tmp_path, capsys):
    rules = written(tmp_path, [{"pattern": "frobnicate", "kind": "my exchange", "group": "transfer"}])
    assert main(["report", str(trace)]) == 0
    unknown = capsys.readouterr().out
    assert "42.9% of the time is in kernels that no rule knows" in unknown and "--rules FILE" in unknown
    assert main(["report", str(trace), "--rules", str(rules)]) == 0
    known = capsys.readouterr().out
    assert "my exchange" in known and "kernels that no rule knows" not in known
    assert ["overlap", "ratio", "66.67%"] in [line.split()[:3] for line in known.splitlines()]
    assert main(["compare", str(trace), str(trace), "--rules", str(rules)]) == 0
    assert "my exchange" in capsys.readouterr().out
    assert main(["report", str(trace), "--rules", str(written(tmp_path, "[7]"))]) == 2
    assert "entry 1: holds a number and not a rule" in capsys.readouterr().err
