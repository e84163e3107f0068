"""The expected calibration error as a metric of training, by the definition of `vitscope.core.evaluation`."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from vitscope.core.evaluation import ECE_BINS, bin_sums, calibration_error


class ExpectedCalibrationError(Metric):
    """Ten equal-width bins (a, b] of confidence, 0 in the first and 1 in the last; the gap is averaged over images.

    torchmetrics' own bins are [a, b) with a confidence of exactly 1 in a bin of its own, so that its number differs from that of
    the diagnostics where predictions are saturated.
    """

    full_state_update = False
    higher_is_better = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(3, ECE_BINS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: probabilities ``(B, K)`` and class indices ``(B,)``."""
        confidence, predicted = preds.detach().double().max(dim=1)
        self.sums = self.sums + bin_sums(confidence, (predicted == target).double())

    def compute(self) -> Tensor:
        """Return the error of all images so far; NaN for none."""
        return calibration_error(self.sums).float()
