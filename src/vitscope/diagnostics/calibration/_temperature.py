"""Temperature scaling: one number that divides the logits, fitted on images that were not trained on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import cast

import torch
from scipy.optimize import brentq
from torch import Tensor

from vitscope.runtime import distributed

#: temperatures outside these bounds are not searched: the predictions are then uniform or one-hot in effect
LIMITS = (1e-3, 1e3)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T that minimizes the mean negative log-likelihood of ``logits / T`` (Guo et al. 2017, 4.2).

    The likelihood is convex in 1/T, so its slope ``E[sum_k p_k z_k] - E[z_y]`` crosses zero at most once; the crossing is
    bracketed and found by Brent's method. Under ``torch.distributed`` each rank passes its share.

    Args:
        logits: (n, classes), float64.
        labels: (n,) class indices.
    """
    slope = _slope(logits, labels)
    low, high = (math.log(1 / limit) for limit in reversed(LIMITS))
    if slope(low) >= 0:
        return _at_limit(LIMITS[1], "the logits do not separate the classes better than chance")
    if slope(high) <= 0:
        return _at_limit(LIMITS[0], "every image is classified rightly")
    return math.exp(-cast(float, brentq(slope, low, high, xtol=1e-10)))


def _slope(logits: Tensor, labels: Tensor) -> Callable[[float], float]:
    label_logits = logits.gather(1, labels[:, None]).squeeze(1)  # (N, K) at (N, 1) to (N,)

    def slope(log_scale: float) -> float:
        expected = (logits.mul(math.exp(log_scale)).softmax(dim=1) * logits).sum(dim=1)
        sums = torch.stack([(expected - label_logits).sum(), torch.full_like(label_logits.sum(), len(labels))])
        total, n = distributed.all_reduce_sum(sums).tolist()
        return total / n

    return slope


def _at_limit(temperature: float, reason: str) -> float:
    warnings.warn(
        f"The temperature has no finite optimum ({reason}): it is held at {temperature:g}.",
        RuntimeWarning,
        stacklevel=4,
    )
    return temperature
