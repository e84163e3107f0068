"""Propose the next trial of a sweep: from a list, or by Optuna's TPE for ``method: bayes``."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vitscope.runs import run_lock
from vitscope.runtime.errors import ConfigError, StorageError
from vitscope.sweep import distributions, sweep_file
from vitscope.sweep.sweep_file import Sweep

#: first release of Optuna that is supported
OLDEST_OPTUNA = 4

#: file of Optuna's study in the folder of a sweep
STUDY = "study.log"

_SPACES = ("categorical", "int_uniform", "uniform", "q_uniform", "log_uniform_values")


class Search(Protocol):
    """Proposes trials by their number and may learn from their values."""

    @property
    def n_trials(self) -> int:
        """The number of trials that it proposes in all."""
        ...

    def ask(self, index: int) -> dict[str, Any] | None:
        """Return the parameters of trial ``index``, None where there is no such trial."""
        ...

    def tell(self, index: int, params: Mapping[str, Any], value: float | None) -> None:
        """Take note of how a trial ended; None: without a value."""
        ...


def start(sweep: Sweep, limit: int | None, earlier_trials: Mapping[int, dict[str, Any]], folder: Path) -> Search:
    """Return the search of a sweep's method.

    Args:
        sweep: The sweep.
        limit: Largest number of trials.
        earlier_trials: Trials that an earlier invocation proposed, by number; a search that learns must propose them again.
        folder: Folder of the sweep, which all invocations share; a search that learns keeps its study there.

    Raises:
        ConfigError: A search that has no end, or Optuna is not installed.
    """
    if sweep.method == "bayes":
        n = sweep_file.count(sweep, limit)
        if n is None:
            raise ConfigError(
                "run_cap", None, "a bayes sweep has no end without it", "set run_cap in the file, or LIMIT=n"
            )
        return Bayes(sweep, n, earlier_trials, folder)
    return Listed(sweep_file.planned(sweep, limit))


class Listed:
    """Grid and random: every trial is known beforehand."""

    def __init__(self, trials: list[dict[str, Any]]) -> None:
        self.trials = trials

    @property
    def n_trials(self) -> int:
        """The length of the list."""
        return len(self.trials)

    def ask(self, index: int) -> dict[str, Any] | None:
        """Return trial ``index``."""
        return self.trials[index] if index < len(self.trials) else None

    def tell(self, index: int, params: Mapping[str, Any], value: float | None) -> None:
        """Do nothing: the list is fixed."""


class Bayes:
    """Optuna's tree-structured Parzen estimator on a study that several invocations share, also on several machines.

    The study is Optuna's journal file in the sweep's folder. Trial ``index`` is the study's trial of that number: the first
    invocation that asks for it proposes it, from all values that were told until then, and the others receive the same. The
    draws are a function of the sweep and the number. Trials that run count as bad ones until they end.

    Args:
        sweep: The sweep.
        n: Number of trials.
        earlier_trials: Trials that a sweep without a study has proposed, by number.
        folder: Folder of the sweep.
    """

    def __init__(self, sweep: Sweep, n: int, earlier_trials: Mapping[int, dict[str, Any]], folder: Path) -> None:
        optuna = _optuna()
        optuna.logging.set_verbosity(logging.WARNING)
        self._optuna, self._n, self._known, self._folder = optuna, n, dict(earlier_trials), folder
        self._parameters = sweep.parameters
        self._space = {key: node for key, node in sweep.parameters.items() if "value" not in node}
        for key, node in self._space.items():
            if (name := distributions.distribution(key, node)) not in _SPACES:
                reason = "has no counterpart in Optuna"
                raise ConfigError(f"parameters.{key}", name, reason, f"use {', '.join(_SPACES)} (categorical: values)")
        self._seed = int(sweep.name.rpartition("-")[2], 16) % 2**31
        direction = "maximize" if sweep.metric[1] else "minimize"
        with self._alone():
            backend = optuna.storages.journal.JournalFileBackend(str(folder / STUDY))
            storage = optuna.storages.JournalStorage(backend)
            self._study = optuna.create_study(
                storage=storage, study_name=sweep.name, direction=direction, load_if_exists=True
            )

    @property
    def n_trials(self) -> int:
        """The sweep's ``run_cap``, or the limit where it is lower."""
        return self._n

    def ask(self, index: int) -> dict[str, Any] | None:
        """Return trial ``index``: what was proposed before, here or by another invocation, else a new proposal."""
        if index >= self._n:
            return None
        with self._alone():
            while (n_proposed := len(self._study.get_trials(deepcopy=False))) <= index:
                self._propose(n_proposed)
            drawn = self._study.get_trials(deepcopy=False)[index].params
        single = {key: node["value"] for key, node in self._parameters.items() if "value" in node}
        values = {**single, **drawn}
        return {key: values[key] for key in self._parameters}

    def _propose(self, number: int) -> None:
        """Add the trial of a number to the study."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls constant_liar and enqueue_trial experimental
            # invocations with one stream of draws each would propose the same trials
            seed = int(np.random.SeedSequence((self._seed, number)).generate_state(1)[0])
            self._study.sampler = self._optuna.samplers.TPESampler(
                seed=seed, constant_liar=True, n_startup_trials=min(10, max(2, self._n // 3))
            )
            if number in self._known:
                self._study.enqueue_trial({key: self._known[number][key] for key in self._space})
        trial = self._study.ask()
        for key, node in self._space.items():
            _suggest(trial, key, node)

    def tell(self, index: int, params: Mapping[str, Any], value: float | None) -> None:
        """Report the value of a complete trial, once; without a finite one it counts as failed and teaches nothing."""
        with self._alone():
            if value is None or not math.isfinite(value):
                self._study.tell(index, state=self._optuna.trial.TrialState.FAIL, skip_if_finished=True)
            else:
                self._study.tell(index, value, skip_if_finished=True)

    def _alone(self) -> AbstractContextManager[None]:
        """Return a context in which no other invocation reads or changes the study.

        Raises:
            StorageError: The folder cannot be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fix = "make the folder writable, or set paths.runs= to another one"
            raise StorageError("paths.runs", self._folder, f"not writable ({error.strerror})", fix) from None
        return run_lock.exclusive(self._folder)


def _optuna() -> Any:
    """Return the module ``optuna``.

    Raises:
        ConfigError: It is not installed, or older than 4.
    """
    try:
        import optuna  # pyright: ignore[reportMissingImports]  an optional dependency
    except ImportError:
        reason, fix = "needs optuna, which is not installed", "pip install optuna, or use method: random"
        raise ConfigError("method", "bayes", reason, fix) from None
    version = str(optuna.__version__)
    if int(version.partition(".")[0]) < OLDEST_OPTUNA:
        reason = f"needs Optuna >= {OLDEST_OPTUNA}, received {version} (the one of hydra-optuna-sweeper?)"
        fix = "pip install 'vitscope[optuna]' in an environment without hydra-optuna-sweeper, or use method: random"
        raise ConfigError("method", "bayes", reason, fix)
    return optuna


def _suggest(trial: Any, key: str, node: Mapping[str, Any]) -> None:
    name = distributions.distribution(key, node)
    if name == "categorical":
        trial.suggest_categorical(key, list(node["values"]))
    elif name == "int_uniform":
        trial.suggest_int(key, int(node["min"]), int(node["max"]))
    else:
        step = node.get("q", 1) if name == "q_uniform" else None
        trial.suggest_float(key, node["min"], node["max"], step=step, log=name == "log_uniform_values")
