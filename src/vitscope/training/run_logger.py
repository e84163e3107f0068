"""Lightning logger that writes the metrics log of a run and sends a copy to W&B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytorch_lightning.loggers.logger import Logger

from vitscope.runs.metrics_log import Journal
from vitscope.runs.run_dir import Run
from vitscope.runs.wandb_mirror import WandbMirror
from vitscope.runtime.distributed import rank


class RunLogger(Logger):
    """Writes each row to the metrics log, then to W&B, on rank 0.

    Args:
        run: Run folder.
        journal: Metrics log of the run.
        mirror: W&B run.
    """

    def __init__(self, run: Run, journal: Journal, mirror: WandbMirror) -> None:
        super().__init__()
        self._run, self.journal, self.mirror = run, journal, mirror

    @property
    def name(self) -> str:
        """Return the id of the run."""
        return self._run.id

    @property
    def version(self) -> str:
        """Return an empty text: runs are not versioned."""
        return ""

    @property
    def save_dir(self) -> str:
        """Return the run folder, in which Lightning may write files."""
        return str(self._run.path)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration is in ``config.yaml`` and in W&B already."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write one row of metrics."""
        if rank() != 0:
            return
        values = dict(metrics)
        epoch = values.pop("epoch", None)
        self.journal.append(int(step or 0), None if epoch is None else int(epoch), values)
        self.mirror.log({**values, "epoch": epoch} if epoch is not None else values, int(step or 0))
