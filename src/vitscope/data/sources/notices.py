"""Log the assumptions that are made about a data set, each once per process."""

from __future__ import annotations

import logging

_logger = logging.getLogger(__name__)

_logged: set[str] = set()


def report_once(text: str) -> None:
    """Log ``note: <text>`` as one line at level INFO, at the first call with this text only."""
    line = " ".join(f"note: {text}".split())
    if line not in _logged:
        _logged.add(line)
        _logger.info(line)
