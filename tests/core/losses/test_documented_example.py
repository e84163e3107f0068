"""The example of README's section on losses, outputs and batches runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

README = Path(__file__).parents[3] / "README.md"


def test_the_example_runs() -> None:
    section = README.read_text().partition("## Any loss, output and batch")[2]
    match = re.search(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert match is not None
    *lines, measure = match[1].strip().splitlines()
    names: dict[str, object] = {}
    exec("\n".join(lines), names)
    assert np.isfinite(eval(measure, names)).all()
