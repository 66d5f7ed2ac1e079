"""What is said where a GPU gets a slower form than it could."""

from __future__ import annotations

import functools
import logging


@functools.cache
def log_fallback(logger: logging.Logger, what: str, reason: str) -> None:
    """Warns once per reason of what is done instead.

    Args:
      logger: of the module that does it.
      what: is done instead; a sentence without its full stop.
      reason: why.
    """
    logger.warning("%s: %s", what, reason)
