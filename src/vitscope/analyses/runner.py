"""One analysis of a configuration: find its result or measure it, save it, draw it, log it.

Training and ``analyze.py`` come through here, so that both give the same numbers under the same names.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from vitscope.analyses import arguments, outputs, previous_result
from vitscope.analyses.context import AnalysisContext
from vitscope.analyses.spec import Analysis, probe_request
from vitscope.config import factories, loading
from vitscope.core import feature_pass
from vitscope.core.probe import Probe
from vitscope.runs import partial_results, result_store, run_lock
from vitscope.runs.checkpoints import checkpoint_manifest, checkpoint_weights
from vitscope.runtime import stop_flag
from vitscope.runtime.distributed import agree_on_failure, failing_together, gather_objects, rank
from vitscope.runtime.errors import ConfigError, StorageError, VitscopeError
from vitscope.runtime.stop_flag import Interrupted


def perform(analysis: Analysis, place: AnalysisContext, *, reuse: bool = True) -> Any | None:
    """Return the analysis's result, from disk where it was made before for the same weights and settings.

    Args:
        analysis: The measure, its options and its images.
        place: Run, network and data that are measured.
        reuse: Whether an earlier result counts.

    Returns:
        The result; None where it failed and ``on_error`` is ``warn``.

    Raises:
        Interrupted: A stop was asked for; rows finished so far are kept.
        VitscopeError: It failed and ``on_error`` is ``raise``.
        DistributedError: It failed on this rank and not on the others.
    """
    folder, stem, weights = (
        place.run.results / analysis.name,
        _stem(analysis, place),
        checkpoint_weights.weights_hash(place.network),
    )
    # what lies ahead is not looked for: another rank may have saved it already and wait for this one
    is_reusable = reuse and analysis.name not in place.ahead
    earlier_result = _earlier(folder / f"{stem}.npz", weights) if is_reusable else None
    # none takes a result that another one does not see, or that rank 0 saves before a slower one looks
    if is_reusable and all(gather_objects(earlier_result is not None)):
        if rank() == 0:
            outputs.complete(analysis, place, folder, stem, earlier_result)
            shutil.rmtree(folder / f".partial-{stem}-{weights}", ignore_errors=True)
        return earlier_result
    rows = partial_results.PartialRows(folder / f".partial-{stem}-{weights}", rank())
    if analysis.name not in place.ahead:  # what lies ahead needs no rows, and a slower rank may not have come here
        rows.share()
    try:
        result = _measured(analysis, place, weights, rows, reuse)
    except (Interrupted, KeyboardInterrupt, StorageError):
        raise
    except Exception as error:
        if analysis.on_error == "raise":
            raise _as_ours(analysis, error) from error
        agree_on_failure(error)
        outputs.failure(analysis, place, folder, stem, error)
        return None
    if rank() == 0:
        run_lock.check(place.run.path)  # a folder that was deleted is not made anew
        outputs.store(analysis, place, folder, stem, previous_result.set_vectors_aside(folder, stem, result))
        previous_result.delete_earlier_vectors(folder, stem, result)
    gather_objects(None)  # nobody discards rows before rank 0 has saved
    if rank() == 0:
        shutil.rmtree(folder / f".partial-{stem}-{weights}", ignore_errors=True)
    return result


def measured_before(analyses: Sequence[Analysis], place: AnalysisContext) -> list[str]:
    """Return the names of the analyses that have a result for the same weights and settings on disk."""
    weights = checkpoint_weights.weights_hash(place.network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `perform` warns of results that cannot be read
        return [
            analysis.name
            for analysis in analyses
            if _earlier(place.run.results / analysis.name / f"{_stem(analysis, place)}.npz", weights) is not None
        ]


def _stem(analysis: Analysis, place: AnalysisContext) -> str:
    return f"{place.tag}-{settings_hash(analysis, place)}"


def settings_hash(analysis: Analysis, place: AnalysisContext) -> str:
    """Return the 8 digits that name an analysis's settings: its options, its images, the objective and changes of the run."""
    return settings_hash_under(analysis, place.cfg, place.changes)


def settings_hash_under(analysis: Analysis, cfg: DictConfig, changes: Mapping[str, Any] | None = None) -> str:
    """Return `settings_hash` from a configuration alone, by default that of a run without changes.

    Files that options name count with their content, so that a result is not taken for that of other weights. What belongs to
    the run itself, its network and the folder of its images, counts where the command changed it: names of the run's own
    results do not depend on it.

    Args:
        analysis: The measure, its options and its images.
        cfg: The configuration.
        changes: Values that are not the run's, see `vitscope.analyses.run_changes.changed_values`.
    """
    data = {
        k: v for k, v in loading.plain(cfg.data).items() if k not in ("root", "num_workers", "batch_size", "recipe")
    }
    measure = f"{analysis.measure.__module__}.{analysis.measure.__qualname__}"
    objective = loading.without_default_loss(loading.plain(cfg.objective))
    facts = [measure, analysis.options, analysis.probe, objective, data, cfg.seed]
    if isinstance(recipe := analysis.probe.get("augment"), str):
        facts.append(loading.without_default_loss(factories.named_objective(recipe)))
    if changes:
        facts.append(dict(changes))
    return loading.digest(facts + [checkpoint_manifest.sha256(path) for path in _files(analysis.options)])


def _files(options: Mapping[str, Any]) -> list[Path]:
    """Return the files that options name: of saved results, of checkpoints and of other runs."""
    named = [options.get(name) for name in ("eigenvectors", "reference", "other")]
    named += options.get("checkpoints") or []
    paths = [Path(path) for path in named if isinstance(path, str)]
    paths = [path / "checkpoints" / "last.ckpt" if path.is_dir() else path for path in paths]
    return [path for path in paths if path.is_file()]


def _measured(
    analysis: Analysis, place: AnalysisContext, weights: str, rows: partial_results.PartialRows, reuse: bool
) -> Any:
    result = place.ahead.pop(analysis.name, None)
    if result is None:
        stop_flag.check()
        with failing_together():  # a split or a file that one rank alone cannot read
            probe, options = _inputs(analysis, place, weights)
        result = _with_others(analysis, _sharing(analysis, place, weights, reuse), probe, options, place)
        if result is None:
            with failing_together():
                options |= arguments.options(analysis, place, rows, lambda: settings_hash(analysis, place))
            result = analysis.measure(probe, **options)
    bad = [name for name, value in result.scalars().items() if not np.isfinite(value)]
    if bad:
        warnings.warn(f"analysis.{analysis.name}: {', '.join(bad)} not finite; recorded as null", stacklevel=3)
    return result


def _inputs(analysis: Analysis, place: AnalysisContext, weights: str) -> tuple[Probe, dict[str, Any]]:
    """Return the analysis's probe, and its options with what they name loaded."""
    request = probe_request(analysis, place.datamodule)
    facts: dict[str, Any] = {"checkpoint": weights, "epoch": place.epoch, "step": place.step}
    facts["changes"] = dict(place.changes)
    root = place.changes.get("data.root")
    if root is not None:  # the name of the data does not tell these images from the run's
        described = place.datamodule.describe(request["split"], bool(request["augment"]))
        facts["data"] = f"{described['data']}, data.root={root}"
    probe = factories.probe(place.cfg, place.network, place.datamodule, request, facts, place.content)
    return probe, {key: arguments.loaded(key, value, probe, request, place) for key, value in analysis.options.items()}


def _sharing(analysis: Analysis, place: AnalysisContext, weights: str, reuse: bool) -> list[Analysis]:
    """Return the analyses whose turn is still to come and that can share this one's forward pass."""
    if feature_pass.accumulator_of(analysis.measure, analysis.options) is None or analysis.name in place.alone:
        return []
    request = probe_request(analysis, place.datamodule)
    names = [other.name for other in place.due]
    later = place.due[names.index(analysis.name) + 1 :] if analysis.name in names else ()

    def can_share(other: Analysis) -> bool:
        if feature_pass.accumulator_of(other.measure, other.options) is None or other.name in place.alone:
            return False
        if probe_request(other, place.datamodule) != request:
            return False
        file = place.run.results / other.name / f"{_stem(other, place)}.npz"
        return not (reuse and _earlier(file, weights))

    sharing = [other for other in later if can_share(other)]
    of_ranks = gather_objects({other.name for other in sharing})  # a rank may not see yet what another one has saved
    return [other for other in sharing if all(other.name in names for names in of_ranks)]


def _with_others(
    analysis: Analysis, others: Sequence[Analysis], probe: Probe, options: Mapping[str, Any], place: AnalysisContext
) -> Any | None:
    """Return the result of a forward pass shared with ``others``, whose own wait in ``ahead``; None without or on failure."""
    if not others:
        return None
    try:
        shared_results = feature_pass.collect(
            probe, [(analysis.measure, options), *((other.measure, other.options) for other in others)]
        )
    except (Interrupted, KeyboardInterrupt):
        raise
    except Exception as error:  # each is measured alone, where the one that fails says why
        agree_on_failure(error)
        place.alone.update({analysis.name, *(other.name for other in others)})
        return None
    place.ahead.update(zip((other.name for other in others), shared_results[1:]))
    return shared_results[0]


def _earlier(path: Path, weights: str) -> Any | None:
    if not path.is_file():
        return None
    try:
        result = result_store.load(path)
    except StorageError as error:
        warnings.warn(f"{error}: measuring again", stacklevel=3)
        return None
    card = getattr(result, "card", None)
    if card is None or card.checkpoint != weights:
        return None
    if card.options is None:
        warnings.warn(f"{path}: saved by a version that did not record options; measured again", stacklevel=3)
        return None
    return result


def _as_ours(analysis: Analysis, error: Exception) -> Exception:
    if isinstance(error, VitscopeError):
        return error
    if isinstance(error, ValueError):
        reason = str(error).strip().rstrip(".") or type(error).__name__
        return ConfigError(f"analysis.{analysis.name}", None, reason, "change its options")
    return error
