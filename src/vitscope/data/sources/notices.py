"""Print the assumptions that are made about a data set, each as one line on stderr and once per process."""

from __future__ import annotations

import sys

from vitscope.runtime.distributed import rank

_printed: set[str] = set()


def report_once(text: str) -> None:
    """Print `note: <text>` on stderr, on rank 0 and at the first call with this text only."""
    line = " ".join(f"note: {text}".split())
    if line not in _printed and rank() == 0:
        _printed.add(line)
        print(line, file=sys.stderr, flush=True)
