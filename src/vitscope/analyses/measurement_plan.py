"""Count how often the analyses of a training measure, before it starts, and name the steps that it will not reach."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vitscope.analyses.prediction import time_prediction
from vitscope.analyses.spec import Analysis
from vitscope.runtime.text_layout import duration_text

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingLength:
    """Optimizer steps and epochs of a training that neither a signal nor a callback ends before its limits.

    Attributes:
        n_steps: Number of optimizer steps.
        n_epochs: Number of epochs begun.
    """

    n_steps: int
    n_epochs: int


def training_length(trainer: Mapping[str, Any], data: Any) -> TrainingLength | None:
    """Return the length of a training; None where it does not follow from the configuration of one process.

    Args:
        trainer: Configuration of the trainer.
        data: Data module, set up for training.
    """
    if trainer.get("overfit_batches") or trainer.get("devices") not in (1, None, "1"):
        return None
    n_available, limit = len(data.train_dataloader()), trainer.get("limit_train_batches")
    n_batches = int(n_available * limit) if isinstance(limit, float) else min(n_available, limit or n_available)
    per_epoch = math.ceil(n_batches / (trainer.get("accumulate_grad_batches") or 1))
    max_epochs, max_steps = trainer.get("max_epochs"), trainer.get("max_steps")
    bounds = [] if max_epochs in (None, -1) else [int(max_epochs) * per_epoch]
    bounds += [] if max_steps in (None, -1) else [int(max_steps)]
    if not bounds or not per_epoch:
        return None
    return TrainingLength(min(bounds), math.ceil(min(bounds) / per_epoch))


def n_measurements(analysis: Analysis, length: TrainingLength) -> int:
    """Return how often an analysis measures in a training of that length."""
    n_at_steps = sum(analysis.due_at_step(step) for step in range(1, length.n_steps + 1))
    n_after_epochs = sum(analysis.due_after(epoch) for epoch in range(length.n_epochs))
    return analysis.due_at_start + n_at_steps + n_after_epochs + analysis.due_at_end


def unreached(analysis: Analysis, length: TrainingLength) -> str:
    """Return the steps of an analysis beyond the last one, in words; an empty text where there are none."""
    late_steps = [step for step in analysis.when.get("at_steps") or () if step > length.n_steps]
    every = int(analysis.when.get("every_n_steps") or 0)
    parts = [f"steps {', '.join(map(str, late_steps))}"] if late_steps else []
    parts += [f"every_n_steps={every}"] if every > length.n_steps else []
    return " and ".join(parts)


def announce_measurements(
    analyses: Sequence[Analysis], trainer: Mapping[str, Any], network: nn.Module, data: Any
) -> None:
    """Log how often analyses with steps measure and, where it can be predicted, how long that takes; name steps never reached.

    Args:
        analyses: Analyses of the training.
        trainer: Configuration of the trainer.
        network: The network, where it is built.
        data: Data module, set up for training.
    """
    stepwise = [a for a in analyses if a.when.get("every_n_steps") or a.when.get("at_steps")]
    length = training_length(trainer, data) if stepwise else None
    if length is None:
        return
    for analysis in stepwise:
        if late := unreached(analysis, length):
            _logger.warning(f"analysis.{analysis.name}.when: {late} are beyond the last step, {length.n_steps}")
    counts = {analysis.name: n_measurements(analysis, length) for analysis in stepwise}
    seconds: Mapping[str, float] = {}
    if trainer.get("accelerator") == "cpu":  # elsewhere the network is not yet where it will be measured
        seconds = time_prediction.predict(stepwise, network, data).seconds
    parts = [
        f"{name} {count} times" + (f" (predicted: {duration_text(count * seconds[name])})" if name in seconds else "")
        for name, count in counts.items()
    ]
    _logger.info(f"measurements in {length.n_steps} steps: {', '.join(parts)}")
