"""Run folders written by hand: what training and analyses leave behind, in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.runs.report_runs import write_run
from vitscope.runs.run_dir import Run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """Return `write_run` into a fresh folder of runs."""

    def make(model: str, seed: int = 0, **options: Any) -> Run:
        return write_run(tmp_path / "runs", model, seed, **options)

    return make
