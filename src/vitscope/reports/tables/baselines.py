"""Baselines of a trained model: the same model at initialization, and the same model trained on random labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vitscope.config import experiment_identity, loading
from vitscope.core.objective_card import RANDOM_LABELS
from vitscope.reports.figures.figure_plan import Panel, curve_of, slug
from vitscope.reports.measured_results import Conditions, Measured, differing
from vitscope.reports.run_entry import Entry
from vitscope.reports.tables.table import Problem
from vitscope.reports.value_lookup import MISSING

LabeledResults = list[tuple[Entry, Measured]]

TRAINED, INITIAL, RANDOM = "trained", "at initialization", "trained on random labels"

#: command or setting that produces each baseline
REMEDIES = {
    INITIAL: "python analyze.py run={run} ckpt=init 'analysis=[{analysis}]'",
    RANDOM: "train the same with data.random_labels=true",
}


def panels(
    entries: Sequence[Entry], analyses: Sequence[str] | None = None, allow_different: bool = False
) -> tuple[list[Panel], list[Problem]]:
    """Return a figure for each model and analysis: the trained model's result, and those of its baselines.

    A baseline that was not measured under the conditions of the trained model's result is left out and named. That the labels of
    the training images are random is what the second baseline differs in, so that it is no other condition.

    Args:
        entries: The runs.
        analyses: Analyses to draw; None for all of which at least one baseline was measured.
        allow_different: Take baselines whose objective cards differ.
    """
    planned: list[Panel] = []
    problems: list[Problem] = []
    for (_, analysis), results_by_role in _by_model(entries, analyses).items():
        curves = [curve_of(TRAINED, results_by_role[TRAINED])]
        first = curves[0]
        conditions = _conditions(first.measured)
        for role in (INITIAL, RANDOM):
            results = results_by_role.get(role, ())
            matching = [pair for pair in results if allow_different or _conditions(pair[1]) == conditions]
            if matching:
                curves.append(curve_of(role, matching))
                continue
            reason = f"to have it: {REMEDIES[role].format(run=first.entry.run.path, analysis=analysis)}"
            if results:
                keys = differing([conditions, *(_conditions(measured) for _, measured in results)])
                reason = f"measured under another objective card ({', '.join(keys)})"
            problems.append(Problem(MISSING, f"run {first.entry.id}", f"{analysis} {role}", reason))
        if len(curves) > 1:
            name = first.entry.label.replace(f", {experiment_identity.WORDS['data.random_labels'][False]}", "")
            planned.append(Panel(f"{analysis}-baselines-{slug(name)}", analysis, "baselines", tuple(curves), name))
    analyses_shown = {panel.analysis for panel in planned} if analyses is None else set(analyses)
    return planned, [p for p in problems if p.metric.partition(" ")[0] in analyses_shown]


def _conditions(measured: Measured) -> Conditions:
    """Return the compared conditions of a result, whatever the labels of the training images."""
    return tuple(
        (key, value.removesuffix(RANDOM_LABELS) if key == "data" else value) for key, value in measured.conditions()
    )


def _by_model(
    entries: Sequence[Entry], analyses: Sequence[str] | None
) -> Mapping[tuple[str, str], dict[str, LabeledResults]]:
    """Return the results of each (model, analysis) by role; models without a trained result are left out."""
    models: dict[tuple[str, str], dict[str, LabeledResults]] = {}
    for entry in entries:
        if entry.superseded:
            continue
        facts = experiment_identity.experiment(entry.config, entry.facts)
        has_random_labels = bool(facts.pop("data.random_labels", False))
        # the network before a training on random labels is that of the other training
        roles = {"end": RANDOM} if has_random_labels else {"init": INITIAL, "end": TRAINED}
        key = loading.digest(facts)
        for measured in entry.results:
            if measured.error or measured.tag not in roles:
                continue
            if analyses is None or measured.analysis in analyses:
                by_role = models.setdefault((key, measured.analysis), {})
                by_role.setdefault(roles[measured.tag], []).append((entry, measured))
    return {key: results_by_role for key, results_by_role in models.items() if TRAINED in results_by_role}
