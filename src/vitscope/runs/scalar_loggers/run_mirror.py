"""Copies of a run's rows for W&B and for the loggers beside it; ``metrics.jsonl`` stays the authoritative log."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning.loggers.logger import Logger

from vitscope.config.keys.logger_choice import chosen_loggers
from vitscope.runs import wandb_mirror
from vitscope.runs.run_dir import Run, redacted
from vitscope.runs.scalar_loggers.logger_factory import start_logger
from vitscope.runs.wandb_mirror import RunArtifacts, WandbMirror
from vitscope.runtime.distributed import rank
from vitscope.runtime.errors import StorageError
from vitscope.runtime.redaction import masked


class RunMirror(WandbMirror):
    """A W&B run and loggers of Lightning's interface, which get every scalar that W&B gets.

    A logger that fails costs a warning, like W&B, and gets no further rows.

    Args:
        wandb_run: Run of W&B; None where W&B is off.
        loggers: Started loggers by name.
        uploads: Files that become artifacts of W&B's run.
    """

    def __init__(self, wandb_run: Any, loggers: Mapping[str, Logger], uploads: RunArtifacts | None = None) -> None:
        super().__init__(wandb_run, uploads)
        self._loggers = dict(loggers)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log scalars; values that are no finite numbers go to W&B alone."""
        super().log(values, step)
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }
        if numbers:
            self._with_each(lambda logger: logger.log_metrics(numbers, step))

    def finish(self, exit_code: int) -> None:
        """End W&B's run and the loggers."""
        super().finish(exit_code)
        self._with_each(lambda logger: logger.finalize("success" if exit_code == 0 else "failed"))
        self._loggers.clear()

    def _with_each(self, action: Callable[[Logger], Any]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                action(logger)
            except Exception as error:  # whatever a logger raises, training goes on
                del self._loggers[name]
                _warn(name, error, "it gets no further rows; metrics.jsonl has every row")


def start(cfg: DictConfig, run: Run, job_type: str) -> WandbMirror:
    """Start the W&B run of a run folder and the other loggers that ``cfg.logger`` chooses, on rank 0.

    Raises:
        StorageError: A link stands where a logger would write.
    """
    mirror = wandb_mirror.start(cfg, run, job_type)
    if rank() != 0:
        return mirror
    loggers: dict[str, Logger] = {}
    for name, options in chosen_loggers(redacted(cfg).get("logger")).items():
        try:
            loggers[name] = start_logger(name, options, cfg, run)
        except StorageError:
            raise
        except Exception as error:  # no server, a package that does not work
            _warn(name, error, "not started; metrics.jsonl has every row")
    return RunMirror(mirror.run, loggers, mirror.uploads) if loggers else mirror


def _warn(name: str, error: Exception, consequence: str) -> None:
    text = masked(" ".join(str(error).split()))[:300]
    warnings.warn(f"logger {name}: {type(error).__name__}: {text}; {consequence}", stacklevel=4)
