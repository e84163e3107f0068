"""Compare the trials of a reproduction with the run folders: what exists, what is left to train and to measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vitscope.config import experiment_identity, hydra_internals, loading
from vitscope.config.validation import validate
from vitscope.reproduce.plan import Trial
from vitscope.reproduce.trial_config import Composer
from vitscope.runs import run_search
from vitscope.runs.run_dir import Run
from vitscope.runtime import progress
from vitscope.runtime.errors import StorageError, VitscopeError

#: states of a trial: all is there; some results are missing; a training is unfinished; nothing is there
EXISTS, MEASURE, RESUME, TRAIN = "exists", "measure", "resume", "train"


@dataclass(frozen=True)
class Measurement:
    """A result that a trial asks for.

    Attributes:
        analysis: Name of the analysis.
        tag: Moment: ``end``, ``init``, ``epoch-0004``.
        node: Resolved configuration of the analysis.
    """

    analysis: str
    tag: str
    node: Mapping[str, Any]

    @property
    def key(self) -> str:
        """A name that equal measurements of one run share."""
        return f"{self.analysis}/{self.tag}-{loading.digest(self.node)}"


@dataclass(frozen=True)
class PlannedTrial:
    """A trial and what exists of it.

    Attributes:
        trial: The trial.
        settings: The trial's configuration, resolved.
        identity: Hash of its training; trials that share it are trained once.
        state: One of `EXISTS`, `MEASURE`, `RESUME`, `TRAIN`.
        missing: Results that do not exist.
        run: The finished or unfinished run; None where there is none.
    """

    trial: Trial
    settings: Mapping[str, Any]
    identity: str
    state: str
    missing: tuple[Measurement, ...]
    run: Run | None = None


class StoredRuns:
    """The newest finished and the newest unfinished run of each training below a folder.

    Args:
        root: The folder of runs.
    """

    def __init__(self, root: Path) -> None:
        self.finished: dict[str, Run] = {}
        self.unfinished: dict[str, Run] = {}
        self._configs: dict[Path, DictConfig] = {}
        for run in run_search.oldest_first(run_search.every(root)):
            try:
                facts = run.provenance()
            except StorageError:  # a damaged folder is no run to go on with
                continue
            is_finished = facts.get("status") == "finished"
            if is_finished and not run_search.is_finished_training(run):
                continue  # a training from other weights or of another length at first, of the same configuration
            runs = self.finished if is_finished else self.unfinished
            if isinstance(identity := facts.get("config_hash"), str):
                runs[identity] = run

    def config(self, run: Run) -> DictConfig:
        """Return a run's configuration, read once."""
        if run.path not in self._configs:
            self._configs[run.path] = run.config()
        return self._configs[run.path]


def plan_trials(trials: Sequence[Trial], root: Path, *, checks: bool = False) -> list[PlannedTrial]:
    """Return each trial with what exists of it.

    Args:
        trials: Trials; those that differ in their seed alone are composed once.
        root: The folder of runs.
        checks: Validate one configuration of each experiment and model, and build the model without weights, so that a setting
            that does not fit is refused before anything is trained.

    Raises:
        ConfigError: A trial that does not compose or validate.
    """
    stored, composer = StoredRuns(root), Composer(root)
    planned: list[PlannedTrial] = []
    validated: set[str] = set()
    with hydra_internals.sharing_compositions(str(loading.folder())):
        for trial in progress.track(trials, "composing the runs' configurations"):
            cfg = composer.composed(trial)
            settings: Mapping[str, Any] = loading.plain(cfg)
            kind = f"{trial.overrides[0]} {loading.digest(settings['model'])}"
            if checks and kind not in validated:
                validated.add(kind)
                validate(cfg.copy())
                _build(cfg)
            planned.append(_planned(trial, settings, stored))
    return planned


def _build(cfg: DictConfig) -> None:
    """Build the model of a configuration without weights.

    Raises:
        ConfigError: The arguments of the model do not fit.
    """
    import torch  # a plan without checks does not need it

    from vitscope.config import factories

    try:
        with torch.device("meta"):
            factories.model(cfg)
    except NotImplementedError:  # it computes with its initial values: its own training says whether it works
        return


def _planned(trial: Trial, settings: Mapping[str, Any], stored: StoredRuns) -> PlannedTrial:
    nodes: Mapping[str, Any] = settings["analysis"]
    measurements = tuple(Measurement(name, tag, node) for tag in trial.tags for name, node in nodes.items())
    identity = experiment_identity.config_hash(settings)
    if (run := stored.finished.get(identity)) is not None:
        try:
            missing = tuple(m for m in measurements if not _is_measured(m, run, stored))
        except VitscopeError:  # a damaged folder: the trial's own error says so
            missing = measurements
        return PlannedTrial(trial, settings, identity, MEASURE if missing else EXISTS, missing, run)
    if (run := stored.unfinished.get(identity)) is not None and (run.checkpoints / "last.ckpt").exists():
        return PlannedTrial(trial, settings, identity, RESUME, measurements, run)
    return PlannedTrial(trial, settings, identity, TRAIN, measurements)


def _is_measured(measurement: Measurement, run: Run, stored: StoredRuns) -> bool:
    from vitscope.analyses import runner, spec  # imports torch, which a plan of new runs does not need

    settings = stored.config(run).copy()
    nodes = {measurement.analysis: OmegaConf.create(dict(measurement.node))}
    OmegaConf.update(settings, "analysis", nodes, force_add=True, merge=False)
    (analysis,) = spec.parse(settings.analysis)
    name = f"{measurement.tag}-{runner.settings_hash_under(analysis, settings)}"
    return (run.results / measurement.analysis / f"{name}.npz").is_file()
