"""Parts of one study: seeds of several machines, or further measurements of trainings that were repeated for them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitscope.config import experiment_identity, loading
from vitscope.core.objective_card import ObjectiveCard
from vitscope.reports.exports import study_files
from vitscope.reports.exports.study_files import Study
from vitscope.runtime.errors import ConfigError, StorageError

#: of the card of a result whose weights are of no run
UNKNOWN = ObjectiveCard().checkpoint


def read_parts(folders: Sequence[Path]) -> Study:
    """Return the study whose parts stand in some folders.

    A training that another part repeats, with the same weights, counts once: with the first part's numbers, and with the results
    that only the repetition has.

    Raises:
        ConfigError: The parts do not go together: profiles or data sets differ, a run has other numbers in another part, or two
            parts have trainings of one experiment with one seed that did not come to the same weights.
        DataError: There is no study.
        StorageError: A file is damaged.
    """
    joined, *parts = map(study_files.read, dict.fromkeys(folders))
    folder_of = dict.fromkeys(joined.runs, joined.folder)
    for named_part in parts:
        part = _with_own_names(named_part, joined)
        joined = study_files.join([joined, _as_further_results(part, joined, folder_of)])
        folder_of = {**dict.fromkeys(part.runs, part.folder), **folder_of}
    return joined


def experiment_of(study: Study, key: str, content: Mapping[str, Any]) -> tuple[str, int]:
    """Return the digest of a run's experiment, the seed left out, and its seed.

    Raises:
        StorageError: The content is not that of a run.
    """
    try:
        config, facts = content["config"], content["facts"]
        return loading.digest(experiment_identity.experiment(config, facts)), int(config.get("seed") or 0)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise not_a_run(study, key, error) from None


def not_a_run(study: Study, key: str, error: Exception) -> StorageError:
    """Return the error of a file of a study that does not hold a run."""
    reason = f"is no run of a study ({type(error).__name__}: {error})"
    return StorageError("from", study.folder / "runs" / f"{key}.json", reason, "restore it, or export it again")


def _with_own_names(part: Study, joined: Study) -> Study:
    """Return a part in which no run has the name of a run of another experiment or seed in the parts before it.

    Folders of runs that were named by hand can have one name on two machines.
    """
    names = {key: key for key in part.runs}
    for key in part.runs.keys() & joined.runs.keys():
        if experiment_of(part, key, part.runs[key]) != experiment_of(joined, key, joined.runs[key]):
            candidates = (f"{key}-{number}" for number in itertools.count(2))
            names[key] = next(name for name in candidates if name not in {*joined.runs, *part.runs})
    targets = {
        target: {names[key]: results for key, results in results_of_runs.items()}
        for target, results_of_runs in part.targets.items()
    }
    return replace(part, runs={names[key]: run for key, run in part.runs.items()}, targets=targets)


def _as_further_results(part: Study, joined: Study, folder_of: Mapping[str, Path]) -> Study:
    """Return a part in which repeated trainings are copies of those that they repeat, with their own further results.

    Args:
        part: The part.
        joined: The parts before it.
        folder_of: Folder of the part that each run of ``joined`` stands in.

    Raises:
        ConfigError: The weights of a repetition differ from those of the training that it repeats.
    """
    run_of = {experiment_of(joined, key, run): key for key, run in joined.runs.items() if key not in part.runs}
    experiments = {key: experiment_of(part, key, run) for key, run in part.runs.items() if key not in joined.runs}
    repeated = {key: run_of[experiment] for key, experiment in experiments.items() if experiment in run_of}
    runs: dict[str, Mapping[str, Any]] = {key: run for key, run in part.runs.items() if key not in repeated}
    names: dict[str, set[str]] = {}
    for key, original_key in repeated.items():
        original, repetition = joined.runs[original_key], part.runs[key]
        if reason := _difference_of_weights(original["results"], repetition["results"]):
            raise ConfigError(
                "from",
                part.folder,
                f"its run {key} repeats {original_key} of {folder_of[original_key]} "
                f"(the same experiment with seed {experiments[key][1]}), and {reason}",
                "keep each seed in one part; seeds=5-8 trains other seeds than seeds=5",
            )
        names[key] = repetition["results"].keys() - original["results"].keys()
        runs[original_key] = _with_results(runs.get(original_key, original), repetition, names[key])
    targets: dict[str, dict[str, list[str]]] = {}
    for target, results_of_runs in part.targets.items():
        of_target = targets.setdefault(target, {})
        for key, results in results_of_runs.items():
            new_results = set(results) & names.get(key, set(results))
            name = repeated.get(key, key)
            of_target[name] = sorted(new_results.union(of_target.get(name, ())))
    return replace(part, runs=runs, targets=targets)


def _with_results(run: Mapping[str, Any], other: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    """Return a run with the named results of another, and with the metrics of their analyses that it lacks."""
    analyses = {name.partition("/")[0] for name in names}
    metrics = {name: value for name, value in other["metrics"].items() if name.partition("/")[0] in analyses}
    return {
        **run,
        "metrics": {**metrics, **run["metrics"]},
        "results": {**{name: other["results"][name] for name in sorted(names)}, **run["results"]},
    }


def _difference_of_weights(results: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    """Return why two trainings are not known to have the same weights, in words; empty if they have.

    They have if their results state one hash of the weights at every moment that both were measured at, and there is one.
    """
    weights, other_weights = _weights_by_moment(results), _weights_by_moment(others)
    shared = sorted(weights.keys() & other_weights.keys())
    if not shared:
        return "no moment was measured in both, so that their weights cannot be compared"
    differing = [moment for moment in shared if weights[moment] != other_weights[moment]]
    return f"came to other weights (at {', '.join(differing)})" if differing else ""


def _weights_by_moment(results: Mapping[str, Any]) -> dict[str, set[str]]:
    """Return the hashes of the weights that a training's results were measured on, by the name of the moment."""
    weights: dict[str, set[str]] = {}
    for result in results.values():
        checkpoint = (result.get("card") or {}).get("checkpoint", UNKNOWN)
        if checkpoint != UNKNOWN:
            weights.setdefault(str(result["tag"]), set()).add(str(checkpoint))
    return weights
