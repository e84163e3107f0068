"""Content of a W&B report: which runs, settings, metrics, claims and figures it shows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscope.config.experiment_identity import identity
from vitscope.reports.claims import claim_verdicts
from vitscope.reports.claims.effect_sizes import ReportRuns
from vitscope.reports.exports import study_export
from vitscope.reports.model_costs import Costs
from vitscope.reports.run_entry import Entry
from vitscope.reports.tables.table import Table
from vitscope.reports.value_lookup import Selection

#: axes of the parallel coordinates for settings, beside those for outcomes
MOST_SETTINGS = 10
#: last values of runs that are axes of the parallel coordinates, where runs have them
OUTCOMES = ("train/loss", "val/accuracy", "val/nll", "test/accuracy", "test/nll", "test/ece")
#: metrics over steps that come first
CURVES = ("train/loss", "val/loss", "val/nll", "val/accuracy", "val/accuracy_top5", "val/ece", "val/brier")
#: the configuration's key by which curves are grouped, where runs differ in it; else the next
MODEL_KEYS = ("model._target_", "model.name", "model.size", "model.depth")
_PLACE = re.compile(r"//[^/]+/(?P<entity>[^/]+)/(?P<project>[^/]+)/runs/")


@dataclass(frozen=True)
class ReportContent:
    """Content of a report.

    Attributes:
        title: Title of the report, and name of the run that holds its figures.
        run_ids: W&B's ids of the runs.
        settings: Dotted keys of the configuration in which the runs differ.
        outcomes: Metrics whose last values are compared.
        curves: Metrics over steps.
        model_key: Dotted key of the configuration by which runs are grouped.
        claims: Table of the paper's claims; None where no claim was measured.
        figures: PNG files by the name under which they are logged.
    """

    title: str
    run_ids: tuple[str, ...]
    settings: tuple[str, ...]
    outcomes: tuple[str, ...]
    curves: tuple[str, ...]
    model_key: str
    claims: Table | None
    figures: Mapping[str, Path]


def collect(entries: Sequence[Entry], figures: Path, title: str) -> ReportContent:
    """Return the content of a report on runs.

    Args:
        entries: The runs; those that were not logged to W&B are left out of panels, and count for the claims.
        figures: Folder with figures that ``vitscope report`` or ``vitscope reproduce`` has drawn, PNG files at any depth.
        title: Title of the report.
    """
    trained = [entry for entry in entries if entry.trained and not entry.superseded]
    logged = [entry for entry in trained if entry.facts.get("wandb_id")]
    configs = [{**identity(entry.config), "seed": entry.seed} for entry in logged]
    metrics = {name for entry in logged for name in entry.metrics}
    curves = {name for entry in logged for name in entry.curves}
    return ReportContent(
        title=title,
        run_ids=tuple(dict.fromkeys(str(entry.facts["wandb_id"]) for entry in logged)),
        settings=tuple(differing_settings(configs)),
        outcomes=tuple(name for name in OUTCOMES if name in metrics),
        curves=tuple(name for name in CURVES if name in curves),
        model_key=next((key for key in MODEL_KEYS if len(_values(configs, key)) > 1), MODEL_KEYS[0]),
        claims=_claims(trained),
        figures={f"figures/{_figure_name(file, figures)}": file for file in sorted(figures.rglob("*.png"))},
    )


def place_of(entries: Sequence[Entry]) -> tuple[str, str]:
    """Return W&B's entity and project of the runs: those of the newest run's page; empty texts where they are unknown."""
    for entry in sorted(entries, key=lambda e: str(e.facts.get("created", "")), reverse=True):
        if page := _PLACE.search(str(entry.facts.get("wandb_url") or "")):
            return page["entity"], page["project"]
    options = [entry.config.get("logger") or {} for entry in entries]
    return _first(options, "entity"), _first(options, "project")


def differing_settings(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the dotted keys with texts, numbers or truth values that differ among configurations, the seed last."""
    keys = dict.fromkeys(key for config in configs for key in config)
    differing = [key for key in keys if len(_values(configs, key)) > 1]
    ordered = [key for key in differing if key != "seed"][:MOST_SETTINGS]
    return [*ordered, "seed"] if "seed" in differing else ordered


def _values(configs: Sequence[Mapping[str, Any]], key: str) -> set[Any]:
    """Return the values of a key, None for a configuration without it; {} where one is a list or a mapping."""
    values = [config.get(key) for config in configs]
    return set(values) if all(isinstance(value, str | int | float | bool | None) for value in values) else set()


def _first(options: Sequence[Mapping[str, Any]], key: str) -> str:
    return next((str(node[key]) for node in options if node.get(key)), "")


def _claims(entries: Sequence[Entry]) -> Table | None:
    judged = claim_verdicts.judge(ReportRuns(Selection(entries), Costs())) if entries else []
    if all(verdict.verdict == claim_verdicts.NOT_MEASURED for verdict in judged):
        return None
    return claim_verdicts.table(judged, study_export.data_names(entries))


def _figure_name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).with_suffix("").as_posix()
