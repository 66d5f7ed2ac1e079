"""Packages that only parts of a run need."""

from __future__ import annotations

import importlib
from typing import Any


class MissingPackage(ImportError):
    """What was asked for needs a package that is not installed."""


def need(module: str, what: str, package: str, extra: str = "examples") -> Any:
    """The module.

    Args:
      module: to import.
      what: needs it, in the plural.
      package: that it is in, as pip calls it.
      extra: of jaxpipe, which brings it.

    Raises:
      MissingPackage: it is not installed.

    >>> need("json", "metrics", "json").dumps([1])
    '[1]'
    >>> need("no.such", "pictures", "no-such")
    Traceback (most recent call last):
    pretraining.optional.MissingPackage: pictures need the package no-such: pip install 'jaxpipe[examples]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(f"{what} need the package {package}: pip install 'jaxpipe[{extra}]'") from error
