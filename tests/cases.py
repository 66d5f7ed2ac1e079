"""Parameters of tests of which some run by default and the others are marked slow."""

from collections.abc import Collection, Iterable

import pytest

Marked = type(pytest.param())


def cases(names: str | tuple[str, ...], values: Iterable, quick: Collection, **options) -> pytest.MarkDecorator:
    """As pytest.mark.parametrize, but the cases that are not among `quick` are marked slow too."""
    several = "," in names if isinstance(names, str) else len(names) > 1
    marked, found = [], 0
    for value in values:
        given = value if isinstance(value, Marked) else pytest.param(*value) if several else pytest.param(value)
        if (given.values if several else given.values[0]) in quick:
            found += 1
        else:
            given = pytest.param(*given.values, id=given.id, marks=[*given.marks, pytest.mark.slow])
        marked.append(given)
    assert found == len(quick), f"{found} cases are quick, not {len(quick)}"
    return pytest.mark.parametrize(names, marked, **options)
