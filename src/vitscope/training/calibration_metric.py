"""Expected calibration error as a torchmetrics metric, by the definition of `vitscope.core.evaluation`."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from vitscope.core.evaluation import ECE_BINS, bin_sums, calibration_error


class ExpectedCalibrationError(Metric):
    """Expected calibration error of ten equal-width bins (a, b] of confidence, averaged over images.

    Confidence 0 is in the first bin and 1 in the last. torchmetrics' own bins are [a, b) and a confidence of exactly 1 has a bin
    of its own, so that its number differs from that of the diagnostics where predictions are saturated.
    """

    full_state_update = False
    higher_is_better = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(3, ECE_BINS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of probabilities ``preds`` (B, K) and class indices ``target`` (B,)."""
        confidence, predicted = preds.detach().double().max(dim=1)
        self.sums = self.sums + bin_sums(confidence, (predicted == target).double())

    def compute(self) -> Tensor:
        """Return the error over all images so far; NaN without any."""
        return calibration_error(self.sums).float()
