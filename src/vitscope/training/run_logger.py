"""Lightning's logger of a run: the metrics log first, then W&B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytorch_lightning.loggers.logger import Logger

from vitscope.runs.metrics_log import Journal
from vitscope.runs.run_dir import Run
from vitscope.runs.wandb_mirror import Mirror
from vitscope.runtime.distributed import rank


class RunLogger(Logger):
    """Lightning's logger: the journal first, then the mirror."""

    def __init__(self, run: Run, journal: Journal, mirror: Mirror) -> None:
        super().__init__()
        self._run, self.journal, self.mirror = run, journal, mirror

    @property
    def name(self) -> str:
        """The project's folder name is ours to choose: the run's."""
        return self._run.id

    @property
    def version(self) -> str:
        """There is one version of a run."""
        return ""

    @property
    def save_dir(self) -> str:
        """Where Lightning may put files."""
        return str(self._run.path)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration is in ``config.yaml`` and in the mirror already."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write one row."""
        if rank() != 0:
            return
        values = dict(metrics)
        epoch = values.pop("epoch", None)
        self.journal.append(int(step or 0), None if epoch is None else int(epoch), values)
        self.mirror.log({**values, "epoch": epoch} if epoch is not None else values, int(step or 0))
