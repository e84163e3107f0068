"""Sums over images of the transfer of each residual unit, and of its bootstrap replicates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscope.core.running_mean import RunningMean
from vitscope.diagnostics.fourier._spectrum import spectrum, varies
from vitscope.runtime.distributed import gather_objects


@dataclass(frozen=True)
class TransferSettings:
    """Options that a trained model and an untrained one have in common; `branch_transfer` says what they are."""

    path: str
    n_resamples: int
    seed: int
    eps: float
    level: float = 0.95

    def solver(self) -> dict[str, Any]:
        """Return what the card says of the measurement."""
        return {"path": self.path, "eps": self.eps, "n_resamples": self.n_resamples, "seed": self.seed}


class BranchSums:
    """Sums that are kept between batches: those of curves, of contrasts, and of contrasts weighted for each replicate."""

    def __init__(self, n_units: int, settings: TransferSettings) -> None:
        self.settings = settings
        self.curves = [RunningMean() for _ in range(n_units)]
        self.contrasts = RunningMean()
        self.sizes: dict[int, tuple[int, int]] = {}
        self.varying: set[tuple[int, str]] = set()
        self._weighted: Tensor | None = None
        self._inputs: dict[int, tuple[tuple[int, int], Tensor]] = {}
        self._batch: dict[int, Tensor] = {}
        self._n_images = 0

    def read(self, index: int, unit: Any, side: str, x: Tensor) -> None:
        """Take one branch's input or output ``(B, C, h, w)``."""
        size = (int(x.shape[-2]), int(x.shape[-1]))
        try:
            amplitudes = spectrum(x, self.settings.path, self.settings.eps)
        except ValueError as error:
            raise ValueError(f"At unit {unit.name}: {error}") from None
        logs = amplitudes.log_amplitude  # (B, n_bins)
        if (index, side) not in self.varying and varies(x, amplitudes.power):
            self.varying.add((index, side))
        self._n_images = len(x)
        if side == "input":
            self._inputs[index] = size, logs
            return
        before = self._inputs.pop(index, None)
        if before is not None and before[0] == size:
            self.sizes[index] = size
            self._batch[index] = logs - before[1]

    def close_batch(self, batch: int) -> None:
        """Add one batch's transfers to the sums."""
        columns = []
        for index in range(len(self.curves)):
            transfer = self._batch.get(index)
            if transfer is not None:
                self.curves[index].add(transfer)
            columns.append(_contrast(transfer, self._n_images))
        device = next((c.device for c in columns), torch.device("cpu"))
        contrast = torch.stack([c.to(device) for c in columns], dim=1)  # (B, n_units)
        self.contrasts.add(contrast)
        # a function of (seed, batch) alone, so that a trained and an initial model resample the same images
        generator = np.random.default_rng([self.settings.seed, batch])
        draws = generator.poisson(1.0, (self.settings.n_resamples, len(contrast)))
        weights = torch.from_numpy(draws).to(contrast)  # (n_resamples, B)
        sums = torch.cat([weights @ contrast, weights.sum(1, keepdim=True)], dim=1)
        self._weighted = sums if self._weighted is None else self._weighted + sums
        self._batch.clear()

    def replicates(self) -> np.ndarray:
        """Return the contrast of each replicate and unit over all ranks, ``(n_resamples, n_units)``."""
        shares = gather_objects(None if self._weighted is None else self._weighted.cpu().numpy())
        total = np.sum([share for share in shares if share is not None], axis=0)
        weight = total[:, -1:]
        return np.where(weight > 0, total[:, :-1], np.nan) / np.where(weight > 0, weight, 1.0)


def _contrast(transfer: Tensor | None, n_images: int) -> Tensor:
    """Return each image's mean over the highest third of the bins above 0 minus that over the lowest third."""
    n_ac = 0 if transfer is None else transfer.shape[1] - 1
    if transfer is None or n_ac < 2:
        return torch.full((n_images,), float("nan"), dtype=torch.float64)
    third = max(1, n_ac // 3)
    return transfer[:, -third:].mean(1) - transfer[:, 1 : 1 + third].mean(1)
