"""The example of ``docs/losses.md`` runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

PAGE = Path(__file__).parents[3] / "docs" / "losses.md"


def test_the_example_runs() -> None:
    section = PAGE.read_text()
    match = re.search(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert match is not None
    *lines, measure = match[1].strip().splitlines()
    names: dict[str, object] = {}
    exec("\n".join(lines), names)
    assert np.isfinite(eval(measure, names)).all()
