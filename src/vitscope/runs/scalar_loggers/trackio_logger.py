"""Logger of Lightning's interface for Trackio, whose own interface is that of W&B."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from pytorch_lightning.loggers.logger import Logger


class TrackioLogger(Logger):
    """Sends scalars to a run of Trackio; a resumed run continues the same one.

    Args:
        project: Name of the project.
        run_name: Name of the run, by which it is found again.
        group: Group of runs; None for none.
    """

    def __init__(self, project: str, run_name: str, group: str | None = None) -> None:
        super().__init__()
        self._project, self._run_name, self._group = project, run_name, group
        self._run: Any = None

    @property
    def name(self) -> str:
        """Return the name of the project."""
        return self._project

    @property
    def version(self) -> str:
        """Return the name of the run."""
        return self._run_name

    def log_hyperparams(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Start the run with its configuration."""
        trackio: Any = importlib.import_module("trackio")  # an optional package
        self._run = trackio.init(project=self._project, name=self._run_name, group=self._group, config=dict(params),
                                 resume="allow", embed=False)  # fmt: skip

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log one row."""
        self._run.log(dict(metrics), step=step)

    def finalize(self, status: str) -> None:
        """Send what is left and end the run."""
        if self._run is not None:
            self._run.finish()
        self._run = None
