"""Every analysis's result has a tidy table, a file that reads back equal, a readable text and a figure with data."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import vitscope as vs
from tests.fixtures.oracles.result_checks import check_result
from tests.fixtures.runs.analysis_runs import NAMES
from vitscope.analyses import outputs, runner, spec
from vitscope.analyses.context import AnalysisContext

#: the ViT of the tests has no BatchNorm
WITHOUT = {"bn_policy"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT])
def test_a_result(made: AnalysisContext, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "store", lambda *_: None)
    (analysis,) = [a for a in spec.parse(made.cfg.analysis) if a.name == name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few images: no intervals, axes of one or two values
        result = runner.perform(spec.replaced(analysis, on_error="raise"), made, reuse=False)
        figure = vs.plot(check_result(result, tmp_path))
    assert figure.axes
    assert all(ax.has_data() for ax in figure.axes)
