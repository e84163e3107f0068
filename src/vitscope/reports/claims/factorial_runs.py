"""Find the runs of the 2x2x2 design: ConvNet and ViT, each trained weak and strong, measured on clean and augmented images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vitscope.config import loading
from vitscope.config.experiment_identity import identity, recipe
from vitscope.reports.claims.effect_sizes import Runs, by_setting, lowest_seed_run, plainest
from vitscope.reports.measured_results import Measured, differing
from vitscope.reports.run_entry import Entry
from vitscope.reports.tables.table import Problem
from vitscope.reports.value_lookup import FAILED, MISSING, Selection, seeds_of
from vitscope.runtime.errors import StorageError

#: the two models, by family: the difference is the second minus the first
MODELS = {"convnet": "ConvNet", "vit": "ViT"}
TRAININGS = ("weak", "strong")
#: images, and what their analyses' names end with
IMAGES = {"clean": "_clean", "augmented": ""}

#: results by family, training, analysis and seed
Results = Mapping[tuple[str, str, str, int], Any]


def find_experiments(selection: Selection) -> dict[tuple[str, str], Runs] | None:
    """Return the experiments by family and training: of the plainest models, in the setting with most seeds."""
    groups = list(selection.groups(lambda entry: entry.from_initial_weights and entry.kin in MODELS).values())
    objective = {
        key for runs in groups for key in identity(lowest_seed_run(runs).config) if key.startswith("objective.")
    }
    best: dict[tuple[str, str], Runs] | None = None
    n_best_seeds = 0
    for same_setting in by_setting(groups, tuple(objective)).values():
        experiments: dict[tuple[str, str], Runs] = {}
        for family in MODELS:
            of_family = [runs for runs in same_setting if lowest_seed_run(runs).kin == family]
            for training, runs in _pair(of_family, objective).items():
                experiments[family, training] = runs
        n_seeds = len(seeds_of(experiments.values()))
        if len(experiments) == 4 and n_seeds > n_best_seeds:
            best, n_best_seeds = experiments, n_seeds
    return best


def _pair(groups: Sequence[Runs], objective: set[str]) -> dict[str, Runs]:
    """Return the plainest model that was trained both ways, by training."""
    pairs: dict[str, dict[str, Runs]] = {}
    for runs in groups:
        identity_without_objective = {
            k: v for k, v in identity(lowest_seed_run(runs).config).items() if k not in objective
        }
        pairs.setdefault(loading.digest(identity_without_objective), {})[recipe(lowest_seed_run(runs).config)] = runs
    complete_pairs = [pair for pair in pairs.values() if set(TRAININGS) <= set(pair)]
    plainest_weak = plainest([pair["weak"] for pair in complete_pairs])
    return next(({t: pair[t] for t in TRAININGS} for pair in complete_pairs if pair["weak"] is plainest_weak), {})


def load_results(
    experiments: Mapping[tuple[str, str], Runs], analyses: Sequence[str], seeds: Sequence[int], tag: str
) -> tuple[dict[tuple[str, str, str, int], Any], list[Problem]]:
    """Return results by family, training, analysis and seed; an analysis measured under several conditions is none."""
    loaded: dict[tuple[str, str, str, int], Any] = {}
    problems: list[Problem] = []
    for name in (analysis + end for analysis in analyses for end in IMAGES.values()):
        measured: dict[tuple[str, str, str, int], Measured] = {}
        for (family, training), runs in experiments.items():
            for seed in seeds:
                newest = _newest(runs[seed], name, tag)
                if isinstance(newest, Problem):
                    problems.append(newest)
                else:
                    measured[family, training, name, seed] = newest
        if keys := differing(m.conditions() for m in measured.values()):
            reason = f"objective cards differ in {', '.join(keys)}: the factors are not crossed"
            problems.append(Problem(MISSING, "landscape_objective", name, reason))
            continue
        for (family, training, _, seed), result in measured.items():
            try:
                loaded[family, training, name, seed] = result.load()
            except StorageError as error:
                run = experiments[family, training][seed].id
                problems.append(Problem(FAILED, f"run {run}", name, str(error)))
    return loaded, problems


def _newest(entry: Entry, analysis: str, tag: str) -> Measured | Problem:
    measurements = [m for m in entry.results if m.analysis == analysis and m.tag == tag]
    successes = [m for m in measurements if not m.error]
    if successes:
        return successes[-1]
    return Problem(
        FAILED if measurements else MISSING,
        f"run {entry.id}",
        analysis,
        measurements[-1].error if measurements else f"not measured at {tag}",
    )
