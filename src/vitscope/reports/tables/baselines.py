"""What a trained model is held against: the same model at initialisation, and the same model trained on random labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vitscope.config import experiment_identity, loading
from vitscope.reports.figures.figure_plan import Panel, curve_of, slug
from vitscope.reports.run_index import Entry, Measured, differing
from vitscope.reports.tables.table import Problem
from vitscope.reports.value_lookup import MISSING

Found = list[tuple[Entry, Measured]]

TRAINED, INITIAL, RANDOM = "trained", "at initialisation", "trained on random labels"

#: how each comes about
REMEDIES = {
    INITIAL: "python analyze.py run=runs/{run} ckpt=init 'analysis=[{analysis}]'",
    RANDOM: "train the same with data.random_labels=true",
}


def panels(
    entries: Sequence[Entry], analyses: Sequence[str] | None = None, allow_different: bool = False
) -> tuple[list[Panel], list[Problem]]:
    """Return a figure for each model and analysis: the trained model's result, and those of its baselines.

    A baseline that was not measured under the conditions of the trained model's result is left out and named.

    Args:
        entries: the runs.
        analyses: only these; None for all of which at least one baseline was measured.
        allow_different: take baselines whose objective cards differ.
    """
    made: list[Panel] = []
    problems: list[Problem] = []
    for (_, analysis), found in _by_model(entries, analyses).items():
        curves = [curve_of(TRAINED, found[TRAINED])]
        first = curves[0]
        for role in (INITIAL, RANDOM):
            like = [
                pair for pair in found.get(role, ())
                if allow_different or pair[1].conditions() == first.measured.conditions()
            ]  # fmt: skip
            if like:
                curves.append(curve_of(role, like))
            else:
                others = [pair[1].conditions() for pair in found.get(role, ())]
                keys = ", ".join(differing([first.measured.conditions(), *others]))
                why = f"measured under another objective card ({keys})" if others else ""
                remedy = REMEDIES[role].format(run=first.entry.id, analysis=analysis)
                problems.append(
                    Problem(MISSING, f"run {first.entry.id}", f"{analysis} {role}", why or f"to have it: {remedy}")
                )
        if len(curves) > 1:
            name = first.entry.label.replace(f", {experiment_identity.WORDS['data.random_labels'][False]}", "")
            made.append(Panel(f"{analysis}-baselines-{slug(name)}", analysis, "baselines", tuple(curves), name))
    asked = {panel.analysis for panel in made} if analyses is None else set(analyses)
    return made, [p for p in problems if p.metric.partition(" ")[0] in asked]


def _by_model(entries: Sequence[Entry], analyses: Sequence[str] | None) -> Mapping[tuple[str, str], dict[str, Found]]:
    """Return the results of each (model, analysis) by role; models without a trained result are left out."""
    models: dict[tuple[str, str], dict[str, Found]] = {}
    for entry in entries:
        if entry.superseded:
            continue
        facts = experiment_identity.identity(entry.config)
        random = bool(facts.pop("data.random_labels", False))
        weights = entry.config.get("ckpt_path") if not entry.trained else None
        key = loading.digest({**facts, "weights": weights})
        for m in entry.results:
            if m.error or (analyses is not None and m.analysis not in analyses) or m.tag not in ("init", "end"):
                continue
            if m.tag == "init" and random:  # the same network as without random labels
                continue
            role = RANDOM if random else {"init": INITIAL, "end": TRAINED}[m.tag]
            models.setdefault((key, m.analysis), {}).setdefault(role, []).append((entry, m))
    return {key: found for key, found in models.items() if TRAINED in found}
