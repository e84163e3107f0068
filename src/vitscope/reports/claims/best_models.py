"""The best AlterNet against the best ConvNet or ViT, each chosen by validation accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from vitscope.config import loading
from vitscope.config.experiment_identity import identity
from vitscope.reports.claims.effect_sizes import (
    Effect,
    Reader,
    ReportRuns,
    Runs,
    by_setting,
    lowest_seed_run,
    paired_difference,
)
from vitscope.reports.claims.matched_controls import PLAIN, has_attention, without_attention
from vitscope.reports.run_entry import Entry

#: families of rivals, as in the paper's figure 5; among ConvNets are AlterNets with convolutions in the place of attention, too
CNNS = PLAIN
VITS = ("vit", "pit", "swin")


def best_model_difference(report_runs: ReportRuns, families: Sequence[str], read: Reader, requirement: str) -> Effect:
    """Return the best AlterNet minus the best model of other families, of one data set and one length of training.

    A recipe is everything else of a training: objective, optimizer, batch size. Candidates are the models that were trained
    in two recipes or more, each in every recipe, among those that have what is compared. Where a side has no such model, it
    is not known to be at its best, and the effect is blocked; so it is where a rival of one recipe, or without what is compared,
    has a higher validation accuracy than these. See `_best_by_validation` for the choice.

    Args:
        report_runs: The runs.
        families: `CNNS` or `VITS`.
        read: Function that returns what is compared, None of a run that lacks it.
        requirement: Name of the analysis or metric that it needs.
    """

    def is_rival(entry: Entry) -> bool:
        return entry.kin in families or ("convnet" in families and without_attention(entry))

    def is_measured(runs: Runs) -> bool:
        return any(read(entry) is not None for entry in runs.values())

    groups = report_runs.groups(lambda entry: has_attention(entry) or is_rival(entry))
    of_recipes = {
        key for runs in groups for key in identity(lowest_seed_run(runs).config) if key.startswith("objective.")
    }
    effects = []
    for same_setting in by_setting(groups, (*of_recipes, "data.batch_size")).values():
        alternets = [g for g in same_setting if has_attention(lowest_seed_run(g)) and is_measured(g)]
        rivals = [g for g in same_setting if is_rival(lowest_seed_run(g))]
        measured_rivals = [g for g in rivals if is_measured(g)]
        if alternets and measured_rivals:
            others = [g for g in rivals if not is_measured(g)]
            effects.append(_difference_of_best(report_runs, alternets, measured_rivals, others, read, requirement))
    best = max(effects, key=lambda effect: (not effect.blocked, len(effect.values)), default=Effect())
    if best.values:
        return best
    return Effect(
        lacking=f"AlterNet and {' or '.join(families)} on one data set, trained equally long, with {requirement}"
    )


def _difference_of_best(
    report_runs: ReportRuns,
    alternets: Sequence[Runs],
    rivals: Sequence[Runs],
    unmeasured_rivals: Sequence[Runs],
    read: Reader,
    requirement: str,
) -> Effect:
    """Return the best AlterNet minus the best rival.

    Blocked where a side has no model that was tried in two recipes; where a rival of one recipe is better than those of two,
    since other recipes can only make it better still; and where a rival that lacks what is compared has a higher validation
    accuracy.
    """
    n_of_alternet, candidates = _most_tried(alternets)
    best_alternet, left_out = _best_by_validation(report_runs, candidates)
    n_of_rival, candidates = _most_tried(rivals)
    best_candidate, left_out_rivals = _best_by_validation(report_runs, candidates)
    of_one_recipe = [runs for runs in rivals if not any(runs is candidate for candidate in candidates)]
    better_rivals = _better(report_runs, of_one_recipe, best_candidate)
    if better_rivals:
        n_of_rival = 1
    best_rival = _best_by_validation(report_runs, better_rivals)[0] if better_rivals else best_candidate
    few_recipes = min(n_of_alternet, n_of_rival) < 2
    blocked = f"not each at its best recipe: {n_of_alternet} and {n_of_rival} tried" if few_recipes else ""
    if not blocked and (better := _better(report_runs, unmeasured_rivals, best_rival)):
        name = lowest_seed_run(_best_by_validation(report_runs, better)[0]).label
        blocked = f"{name} has a higher validation accuracy and lacks {requirement}"
    return Effect(
        paired_difference(best_alternet, best_rival, read),
        f"{report_runs.describe(best_alternet)} − {report_runs.describe(best_rival)}",
        blocked=blocked,
        refused="; ".join((*left_out, *left_out_rivals)),
        decides_nothing=few_recipes,
    )


def _better(report_runs: ReportRuns, groups: Sequence[Runs], best: Runs) -> list[Runs]:
    """Return the experiments with a higher validation accuracy than another one, over the seeds that both have."""
    read = report_runs.metric("val/accuracy")
    return [runs for runs in groups if sum(paired_difference(runs, best, read).values()) > 0]


def _most_tried(groups: Sequence[Runs]) -> tuple[int, list[Runs]]:
    """Return the experiments of the models that were trained in two recipes or more, and the least number of their recipes.

    All experiments, and 1, if no model was.
    """
    by_model: dict[str, list[Runs]] = {}
    for runs in groups:
        model = {k: v for k, v in identity(lowest_seed_run(runs).config).items() if k.startswith("model.")}
        by_model.setdefault(loading.digest(model), []).append(runs)
    tried = [recipes for recipes in by_model.values() if len(recipes) > 1]
    if not tried:
        return 1, list(groups)
    return min(map(len, tried)), [runs for recipes in tried for runs in recipes]


def _best_by_validation(report_runs: ReportRuns, groups: Sequence[Runs]) -> tuple[Runs, list[str]]:
    """Return the experiment with the highest validation accuracy, and the names of those that share no seed with it.

    Two experiments are compared by the mean difference over the seeds that both have, for a mean over other seeds can differ
    by the seeds alone. They are taken in the order of their numbers of seeds, the most first, each against the best so far.
    """
    read = report_runs.metric("val/accuracy")
    best, *others = sorted(groups, key=lambda runs: (-len(runs), lowest_seed_run(runs).label))
    without_shared_seeds = []
    for runs in others:
        differences = paired_difference(runs, best, read)
        if not differences:
            name = lowest_seed_run(runs).label
            without_shared_seeds.append(f"{name} left out: no validation accuracy at a seed of the best model")
        elif sum(differences.values()) > 0:
            best = runs
    return best, without_shared_seeds
