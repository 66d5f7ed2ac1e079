"""The rooms of the library: imports in one direction, names that mean one thing, plain Python where it is promised."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAYERS = [
    "jaxpipe._jax",
    "jaxpipe.flops",
    "jaxpipe.schedule.action",
    "jaxpipe.schedule.schedule",
    "jaxpipe.schedule.dependencies",
    "jaxpipe.schedule",
    "jaxpipe.stage",
    "jaxpipe.params",
    "jaxpipe.runtime",
    "jaxpipe.trainable",
    "jaxpipe.arguments",
    "jaxpipe.inputs",
    "jaxpipe.not_differentiable",
    "jaxpipe.batches",
    "jaxpipe.api",
    "jaxpipe.planning",
    "jaxpipe.compiling",
    "jaxpipe.optimizer",
    "jaxpipe.vocabulary",
    "jaxpipe.jaxpr_equality",
    "jaxpipe.layer_choice",
    "jaxpipe.layer_split",
    "jaxpipe.layer_storage",
    "jaxpipe.layer_kinds",
    "jaxpipe.layers",
    "jaxpipe.stacking",
    "jaxpipe.optimizer_state",
    "jaxpipe.layer_optimizers",
    "jaxpipe.restacking",
    "jaxpipe.nnx_function",
    "jaxpipe.cutting",
    "jaxpipe.whole",
    "jaxpipe.nnx_model",
    "jaxpipe.linen_model",
    "jaxpipe.flax",
    "jaxpipe",
    "eplb_jax._jax",
    "eplb_jax.plan",
    "eplb_jax.kernels",
    "eplb_jax.moe",
    "eplb_jax",
    "jaxpipe.deepseek",
    "jaxpipe.live_experts",
    "profiling.event",
    "profiling.classify",
    "profiling.read",
    "profiling.metrics",
    "profiling.predict",
    "profiling.table",
    "profiling.hlo",
    "profiling.write",
    "profiling.reports",
    "profiling.recording",
    "profiling.workloads",
    "profiling",
]
"""From the bottom up; a module belongs to the longest of these names that its own begins with."""

PACKAGES = ("jaxpipe", "eplb_jax", "profiling")
FILES = sorted(path for folder in (*PACKAGES, "examples", "tests") for path in (ROOT / folder).rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = [path for path in FILES if path.relative_to(ROOT).parts[0] in PACKAGES]
NAMES = {module_name(path) for path in SOURCES}


def imports(text):
    """The modules that a file names in its imports: `from a import b` is a.b where that is a module, otherwise a."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            found |= {name if (name := f"{node.module}.{a.name}") in NAMES else node.module for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def layer(module):
    return max(
        (i for i, prefix in enumerate(LAYERS) if f"{module}.".startswith(prefix + ".")),
        key=lambda i: len(LAYERS[i]),
    )


def find_cycle(graph):
    """The modules that no order can place, [] when there is an order."""
    remaining = {name: used & set(graph) for name, used in graph.items()}
    while free := {name for name, used in remaining.items() if not used & set(remaining)}:
        remaining = {name: used for name, used in remaining.items() if name not in free}
    return sorted(remaining)


GRAPH = {
    module_name(path): {name for name in imports(path.read_text()) if name.split(".")[0] in PACKAGES}
    for path in SOURCES
}


def test_imports_point_down_the_layers():
    for module, imported in GRAPH.items():
        for other in imported:
            assert other in GRAPH, (module, other)
            assert layer(other) <= layer(module), (module, other)


def test_imports_have_no_cycle():
    assert find_cycle(GRAPH) == []


def test_pictures_and_comparison_are_beside_the_way():
    """What decides and runs a schedule imports nothing that only draws or compares one."""
    beside = {f"jaxpipe.schedule.{name}" for name in ("draw", "svg", "compare")}
    allowed = beside | {"jaxpipe.schedule", "jaxpipe.__main__"}
    assert not {module for module, imported in GRAPH.items() if imported & beside} - allowed


def test_cycles_and_layers_are_seen():
    """The checks above can fail."""
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert imports("from jaxpipe import api") == {"jaxpipe.api"}
    assert imports("from jaxpipe.runtime.execute import Axes") == {"jaxpipe.runtime.execute"}
    found = [layer(f"jaxpipe.{name}") for name in ("schedule.action", "schedule.zbv", "__main__")]
    assert found == [2, 5, LAYERS.index("jaxpipe")]
    with pytest.raises(AssertionError, match="relative import"):
        imports("from . import api")


def test_files_are_finished():
    unfinished = re.compile("TO" + "DO|FIX" + "ME|X" + "XX")
    assert not [path for path in FILES if unfinished.search(path.read_text(encoding="utf-8"))]


def test_no_name_is_both_a_module_and_something_else():
    """`import a.b` gives the module b, whatever the package a exports."""
    both = []
    for name in sorted(NAMES):
        package, _, last = name.rpartition(".")
        if package and last != "__main__":
            importlib.import_module(name)
            both += [name] * (getattr(sys.modules[package], last) is not sys.modules[name])
    assert both == []


SAME_NAMES: dict[str, str] = {}
"""Class names that may stand more than once, and why."""


def test_a_class_name_stands_once():
    """Whoever reads or searches for a name finds one class; tests may have classes of their own."""
    places = {}
    for path in FILES:
        if path.relative_to(ROOT).parts[0] != "tests":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert {name: where for name, where in places.items() if len(where) > 1 and name not in SAME_NAMES} == {}


def test_jax_beside_its_documented_interface_is_used_in_one_file_a_package():
    found = re.compile(r"\bjax\._src\b|\bjax\.extend\b|\bjax\.core\b|\bjax\.interpreters\b")
    users = {path.relative_to(ROOT) for path in FILES if found.search(path.read_text(encoding="utf-8"))}
    assert users == {pathlib.Path("jaxpipe/_jax.py"), pathlib.Path("eplb_jax/_jax.py")}


PUBLIC = (
    "eplb_jax",
    "jaxpipe",
    "jaxpipe.deepseek",
    "jaxpipe.flax",
    "jaxpipe.schedule",
    "jaxpipe.stage",
    "jaxpipe.vocabulary",
    "profiling",
)


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_exist_and_are_documented(package):
    """Each has a line of the API pages, or a page of its own; each function, class and module has a docstring."""
    module = importlib.import_module(package)
    values = {name: getattr(module, name) for name in module.__all__}
    tables = {name for name, value in values.items() if isinstance(value, Mapping)}  # documented below their names
    assert [name for name in values if name not in tables]
    assert not [name for name in values.keys() - tables if not values[name].__doc__]
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    found = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    assert {f"{package}.{name}" for name in module.__all__} - found - set(PUBLIC) == set()


@pytest.mark.parametrize("package", PUBLIC)
def test_public_packages_say_what_is_public(package):
    module = importlib.import_module(package)
    if hasattr(module, "__path__"):
        said = "What `__all__` names is public; all modules below are internal and may change without notice."
    else:
        said = "What `__all__` names is public; all else here is internal and may change without notice."
    assert said in str(module.__doc__)


def test_schedules_are_plain_python():
    """No file of jaxpipe.schedule imports anything but the standard library and its own room."""
    for path in (ROOT / "jaxpipe" / "schedule").glob("*.py"):
        for name in imports(path.read_text()):
            assert name.split(".")[0] in sys.stdlib_module_names or name.startswith("jaxpipe.schedule"), (path, name)


def test_importing_the_library_starts_no_backend_and_warns_of_nothing():
    code = "import jaxpipe, eplb_jax, profiling; from jaxpipe import _jax; assert not _jax.has_backends()"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)


def test_the_balancer_needs_no_pipeline():
    """eplb_jax can be used without jaxpipe."""
    assert not [
        (module, other)
        for module, imported in GRAPH.items()
        for other in imported
        if module.startswith("eplb_jax") and other.startswith("jaxpipe")
    ]
