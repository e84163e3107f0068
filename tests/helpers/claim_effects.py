"""Scalars of results and effects of spectra for the tests of claims."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from tests.helpers.report_runs import CARD
from vitscope.reports.claims import claim_statistics
from vitscope.reports.claims.effect_sizes import Effect, ReportRuns
from vitscope.reports.claims.matched_controls import flattening
from vitscope.runs import run_dir

SPECTRUM = claim_statistics.SPECTRUM


def write_scalars(run: run_dir.Run, measure: str, scalars: Mapping[str, float], **card: Any) -> None:
    """Write what a measure's result looks like from outside."""
    folder = run.results / measure
    folder.mkdir(parents=True)
    record = {"measure": measure, "scalars": scalars, "card": dataclasses.replace(CARD, **card).to_dict()}
    (folder / "end-0badcafe.json").write_text(json.dumps(record))


def ape(control: str = "cost", matched: str = "epoch") -> Callable[[ReportRuns], Effect]:
    return lambda b: flattening(b, SPECTRUM, "average_positive_eigenvalue", control=control, matched=matched, log=True)
