"""README and the documentation: their Python runs, their commands exist, their links lead somewhere.

The blocks of a page share one process, in order, as a reader would run them. A fence with ``title="needs ..."`` is
skipped, with that reason.
"""

import ast
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from jaxpipe.__main__ import main
from tests import commands

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
README = PAGES["README.md"]
FENCE = re.compile(r'^```python(?: title="(?P<title>[^"\n]*)")?\n(?P<code>.*?)^```$', re.DOTALL | re.MULTILINE)
ANY_FENCE = re.compile(r"^ *```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^ *```$", re.DOTALL | re.MULTILINE)
COMPARISON = re.compile(r"`python -m jaxpipe (compare [^`]*)` prints\n\n(.*?\n\n.*?)\n\n", re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PICTURES = {".svg", ".png"}


def blocks(text, needing):
    """(place, what it needs, code padded to its place) of the blocks that need something, or of the others."""
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        if bool(match["title"]) is needing:
            yield line + 1, match["title"], "\n" * line + match["code"]


def code_of(page):
    """A program that runs the page's blocks, with the page's lines in its tracebacks."""
    made = [(code, page) for _, _, code in blocks(PAGES[page], needing=False)]
    checked = "from tests import shapes; shapes.install()\n" if importlib.util.find_spec("beartype") else ""
    return checked + "for code, page in " + repr(made) + ":\n    exec(compile(code, page, 'exec'), globals())\n"


WITH_CODE = [page for page, text in PAGES.items() if any(blocks(text, needing=False))]
NEEDING = [
    pytest.param(needs, code, id=f"{page}:{line}")
    for page, text in PAGES.items()
    for line, needs, code in blocks(text, needing=True)
]
COMPARISONS = [found for text in PAGES.values() for found in COMPARISON.findall(text)]


@pytest.mark.pages
@pytest.mark.parametrize("page", WITH_CODE)
def test_python_blocks_run(page):
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",  # what runs once is compiled fast
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
        PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code_of(page)], check=True, env=environment, cwd=ROOT)


@pytest.mark.parametrize(("needs", "code"), NEEDING)
def test_other_python_blocks_are_python(needs, code):
    assert needs.startswith("needs ")
    ast.parse(code)
    pytest.skip(needs)


def test_no_python_block_is_missed():
    for page, text in PAGES.items():
        assert len(re.findall(r"^ *(?:```|~~~) *\{?\.?py", text, re.MULTILINE)) == len(FENCE.findall(text)), page


def other_blocks(language):
    """(page, text) of the blocks in another language than Python; "" for shell and what has no name."""
    return [(p, m["text"]) for p, text in PAGES.items() for m in ANY_FENCE.finditer(text) if m["language"] == language]


def strings(value):
    """All texts of what YAML or JSON made."""
    if isinstance(value, dict | list):
        return [text for each in (value.values() if isinstance(value, dict) else value) for text in strings(each)]
    return [value] if isinstance(value, str) else []


SHELL = [(page, words) for page, text in other_blocks("") for words in commands.commands(text)]


@pytest.mark.parametrize(("page", "words"), SHELL, ids=lambda value: value if isinstance(value, str) else value[-1])
def test_commands_are_parsed(page, words):
    commands.check(words)


def test_no_command_is_missed():
    assert {language["language"] for text in PAGES.values() for language in ANY_FENCE.finditer(text)} == {
        "", "python", "json", "yaml",
    }  # fmt: skip
    for page, text in other_blocks(""):
        ours = re.findall(
            r"^(?!#).*(?:-m (?:jaxpipe|eplb_jax|profiling)|examples/\w+\.py|\bmake \w)", text, re.MULTILINE
        )
        assert len(ours) == len(commands.commands(text)), page


@pytest.mark.parametrize("words", [["-m", "jaxpipe", "shows"], ["make", "tests"], ["examples/pretrain.py", "--step"]])
def test_what_is_no_command_is_refused(words, capsys):
    with pytest.raises(AssertionError):
        commands.check([*words, "--unknown"])


def test_json_and_yaml_are_read():
    assert [json.loads(text) for _, text in other_blocks("json")]
    yaml = pytest.importorskip("yaml", reason="needs the package PyYAML")
    found = [words for _, text in other_blocks("yaml") for value in strings(yaml.safe_load(text))
             for words in commands.commands(value)]  # fmt: skip
    assert found
    for words in found:
        commands.check(words)


def test_one_comparison_is_shown():
    assert len(COMPARISONS) == 1


@pytest.mark.parametrize(("command", "printed"), COMPARISONS)
def test_comparison_is_what_the_command_prints(command, printed, capsys):
    assert main(command.split()) == 0
    assert capsys.readouterr().out.strip() == printed


def test_readme_quotes_the_comparison():
    """The short table of schedules has figures of the long one."""
    long = {row[0]: row for row in cells(COMPARISONS[0][1])[2:]}
    short = [row for row in cells(README) if row[0].strip("`") in long and len(row) == 5]
    assert len(short) == 5
    for name, bubble, stash, copies, _ in short:
        row = long[name.strip("`")]
        assert (bubble, stash, copies) == (f"{row[3]}%", row[4], row[5])


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_headlines_stand_on_the_pages_they_name():
    """Every figure of a headline table stands on the page that its row links to."""
    for page in ("README.md", "docs/measured/index.md"):
        rows = [row for row in cells(PAGES[page]) if len(row) == 3 and LINK.search(row[2])]
        assert len(rows) == 5
        for _, figures, link in rows:
            target = (ROOT / page).parent / LINK.search(link)[1].partition("#")[0]
            there = target.read_text(encoding="utf-8")
            for figure in re.findall(r"\d+\.\d+", figures):
                assert figure in there, f"{page} quotes {figure}, which {target.name} has not"


def slug(heading):
    """The anchor that GitHub and the site give a heading."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).lower())


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for link in LINK.findall(text):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_every_picture_is_shown():
    shown = {pathlib.Path(link).name for text in PAGES.values() for link in LINK.findall(text)}
    assert {path.name for path in (ROOT / "docs").rglob("*") if path.suffix in PICTURES} <= shown


def exports(module):
    """The public names of a package or module, without importing it: ``__all__``, or what is imported as itself."""
    base = ROOT.joinpath(*module.split("."))
    tree = ast.parse((base / "__init__.py" if base.is_dir() else base.with_suffix(".py")).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(name, "id", "") == "__all__" for name in node.targets):
            return set(ast.literal_eval(node.value))
    if base.is_dir():
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        return {alias.name for node in imports for alias in node.names if alias.asname == alias.name}
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name for node in functions if not node.name.startswith("_")}


INNER = ("jaxpipe.schedule", "jaxpipe.flax", "jaxpipe.vocabulary", "jaxpipe.stage")
MODULES = ("jaxpipe", *INNER, "eplb_jax", "profiling")


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_has_every_public_name(module):
    pages = "\n".join(text for page, text in PAGES.items() if page.startswith("docs/api/"))
    documented = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    public = {f"{module}.{name}" for name in exports(module)}
    assert len(public) > 2
    assert public - set(MODULES) <= documented
    assert {name for name in documented if name.rpartition(".")[0] == module} <= public


def test_every_page_is_in_the_contents():
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"^ +- (?:[^:\n]*: )?(\S+\.md)$", contents, re.MULTILINE))
    assert listed == {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
