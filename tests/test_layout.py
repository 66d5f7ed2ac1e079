"""The rooms of the library: imports in one direction, short files, plain Python where it is promised."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAYERS = [
    "jaxpipe.schedule.action",
    "jaxpipe.schedule.schedule",
    "jaxpipe.schedule",
    "jaxpipe.stage",
    "jaxpipe.runtime",
    "jaxpipe.api",
    "jaxpipe.flax",
]
FILES = sorted(path for folder in ("jaxpipe", "examples", "tests") for path in (ROOT / folder).rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """The modules of this project that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.split(".")[0] == "jaxpipe"}


def layer(module):
    return max(
        (i for i, prefix in enumerate(LAYERS) if module == prefix or module.startswith(prefix + ".")), default=None
    )


MODULES = {
    module_name(path): imports(path)
    for path in FILES
    if path.parts[len(ROOT.parts)] == "jaxpipe" and path.name not in ("__init__.py", "__main__.py")
}


def test_imports_point_down_the_layers():
    for module, imported in MODULES.items():
        for other in imported:
            if layer(module) == LAYERS.index("jaxpipe.schedule"):
                assert other.startswith("jaxpipe.schedule"), (module, other)
            assert layer(other) is not None and layer(other) <= layer(module), (module, other)


def test_imports_have_no_cycle():
    order = []
    remaining = {name: {other for other in used if other in MODULES} for name, used in MODULES.items()}
    while remaining:
        free = [name for name, used in remaining.items() if used <= set(order)]
        assert free, f"import cycle among {sorted(remaining)}"
        order += free
        for name in free:
            del remaining[name]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_finished(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 420
    assert "TO" + "DO" not in text and "FIX" + "ME" not in text


def test_schedules_are_plain_python():
    """No file of jaxpipe.schedule imports jax."""
    for path in (ROOT / "jaxpipe" / "schedule").glob("*.py"):
        assert "jax" not in {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            + ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
        }


def test_importing_the_library_starts_no_backend():
    code = "import jaxpipe, jax; assert not jax._src.xla_bridge._backends"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
