"""Imports every name of the API pages: python .ci/import_names.py docs/api."""

import pathlib
import pkgutil
import re
import sys

import jaxpipe

names = [
    name
    for page in sorted(pathlib.Path(sys.argv[1]).glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]
assert len(names) > 100, f"{len(names)} names in {sys.argv[1]}"
for name in names:
    pkgutil.resolve_name(name)
print(f"jaxpipe {jaxpipe.__version__}: {len(names)} public names in {pathlib.Path(jaxpipe.__file__).parent}")
