"""A model's losses and answers on clean and on changed images, image by image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscope.core.evaluation import evaluate
from vitscope.core.probe import Probe
from vitscope.core.running_mean import RunningMean, check_any_image, estimates
from vitscope.runtime.distributed import gather_objects, world_size
from vitscope.runtime.progress import track
from vitscope.runtime.resumable_map import Partial, stored_row
from vitscope.stats.intervals import Estimate

#: takes the images ``(B, C, H, W)`` of a batch, the batch's number and the change's number; returns changed images
Change = Callable[[Tensor, int, int], Tensor]


def perturbed(
    probe: Probe, names: Sequence[str], change: Change, description: str, partial: Partial | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yield, for each batch of this rank, what the model does on the clean images and on those of each change.

    Args:
        probe: Model and images.
        names: Names of the changes, as keys of finished rows.
        change: Function that makes the changed images.
        description: The text beside the progress.
        partial: Finished rows, one for each batch and change.

    Yields:
        Losses in nats ``(1 + n_changes, B)``, correctness 0 or 1 of the same shape, and the number of classes; the clean
        images come first.
    """
    keys = ["clean", *names]
    total = -(-probe.n_batches // world_size()) * len(keys)
    with probe.guard() as model:
        todo = ((index, batch, v) for index, batch in probe.local_batches() for v in range(len(keys)))
        losses, correct, n_classes = [], [], 0
        for index, (x, y), v in track(todo, description, total):
            key = f"batch-{index}/{keys[v]}"
            images = x if v == 0 else functools.partial(change, x, index, v - 1)
            row = stored_row(partial, key, functools.partial(_row, model, images, y, probe))
            losses.append(np.asarray(row["losses"]))
            correct.append(np.asarray(row["correct"]))
            n_classes = int(row["n_classes"])
            if v == len(names):
                yield np.stack(losses), np.stack(correct), n_classes
                losses, correct = [], []


def _row(
    model: Callable[[Tensor], Tensor], images: Tensor | Callable[[], Tensor], y: Tensor, probe: Probe
) -> dict[str, Any]:
    """Return losses and correctness ``(B,)`` on ``images (B, C, H, W)``, or on what the function ``images`` returns."""
    x = images if isinstance(images, Tensor) else images()
    n_classes = 0

    def forward(images: Tensor) -> Tensor:
        nonlocal n_classes
        logits = model(images)
        n_classes = logits.shape[1]
        return logits

    if not probe.objective.n_examples(y):  # counts nowhere, but tells the number of classes
        forward(x)
        return {"losses": np.empty(0), "correct": np.empty(0), "n_classes": n_classes}
    evaluation = evaluate(forward, [(x, y)], probe.objective, per_image=True, reduce=False)
    return {"losses": evaluation.losses, "correct": evaluation.answers, "n_classes": n_classes}


class Means:
    """Running means over images, by name, and the number of classes; the same on every rank once `finish`ed.

    Args:
        names: Names of measurements.
        answers: Names of those that count right or wrong answers, or their changes.
    """

    def __init__(self, *names: str, answers: Sequence[str] = ()) -> None:
        self._means = {name: RunningMean(name in answers) for name in (*names, *answers)}
        self.n_classes = 0

    def add(self, **values: np.ndarray) -> None:
        """Add one batch: each array ``(B, ...)`` to the mean of its name."""
        for name, value in values.items():
            self._means[name].add(torch.from_numpy(np.ascontiguousarray(value, dtype=np.float64)))

    def finish(self, level: float) -> dict[str, Estimate]:
        """Return the estimates over all ranks' images by name.

        Raises:
            ValueError: No image that has a label.
        """
        check_any_image(next(iter(self._means.values())))
        self.n_classes = max(gather_objects(self.n_classes))
        return dict(zip(self._means, estimates(list(self._means.values()), level)))
