"""Losses that attacks raise, on logits ``(B, K)`` in float64: none of them underflows however large the margin is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

#: logits ``(B, K)`` and labels ``(B,)`` to a loss ``(B,)``
Loss = Callable[[Tensor, Tensor], Tensor]


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log((1 - p_y) / p_y) = logsumexp of the other logits minus the label's ``(B,)``.

    The cross entropy is its softplus, so both rise together and their gradients have one direction. The gradient of the cross
    entropy has the factor 1 - p_y besides, which is exactly zero in floating point for a large margin.
    """
    return _others(logits, labels).logsumexp(dim=1) - _of(logits, labels)


def carlini_wagner(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the largest other logit minus the label's (Carlini and Wagner 2017, f_6 without the clipping) ``(B,)``."""
    return _others(logits, labels).amax(dim=1) - _of(logits, labels)


def difference_of_logits_ratio(logits: Tensor, labels: Tensor) -> Tensor:
    """Return DLR = -(z_y - max_{k != y} z_k) / (z_(1) - z_(3)) with logits in descending order (Croce and Hein 2020, eq. 6).

    With two classes there is no third logit: the difference of logits alone.
    """
    return carlini_wagner(logits, labels) / _spread(logits, targeted=False)


def targeted_ratio(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Return -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2) (Croce and Hein 2020, eq. 7); with three classes z_(4) is z_(3)."""
    return (_of(logits, targets) - _of(logits, labels)) / _spread(logits, targeted=True)


def towards(targets: Tensor) -> Loss:
    """Return the targeted ratio for target classes ``(B,)``."""
    return partial(targeted_ratio, targets=targets)


def _spread(logits: Tensor, targeted: bool) -> Tensor:
    ordered = logits.sort(dim=1, descending=True).values
    if logits.shape[1] < 3:
        return torch.ones_like(ordered[:, 0])
    low = (ordered[:, 2] + ordered[:, min(3, logits.shape[1] - 1)]) / 2 if targeted else ordered[:, 2]
    return ordered[:, 0] - low + 1e-12


def _of(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)  # (B, K) at (B, 1) to (B,)


def _others(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.scatter(1, labels[:, None], -torch.inf)  # (B, K), written at (B, 1)


LOSSES: dict[str, Loss] = {"ce": log_odds, "dlr": difference_of_logits_ratio, "cw": carlini_wagner}
