"""The curvature of the cross entropy in the logits: the inner factor of the GGN and of the Fisher matrices.

With J the Jacobian of an image's logits in the parameters and M a small matrix in the logits, all three operators are
the mean over images of J^T M J. GGN: M = s (diag(p) - p p^T), p the softmax and s the sum of the targets (1).
Empirical Fisher: M = r r^T with the residual r = s p - y, so that J^T r is the image's gradient. Monte Carlo Fisher: the
same with labels drawn from p (Kunstner et al., NeurIPS 2019, on why the last two differ).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitscope.core.objective import Objective, labeled

OutputCurvature = Callable[[Tensor], Tensor]


def output_curvature(
    kind: str, logits: Tensor, y: Tensor, objective: Objective, *, first_image: int, n_samples: int, seed: int
) -> OutputCurvature:
    """Return ``z (B, C) -> M z (B, C)``, image by image, for the operator ``kind`` (not yet divided by the images).

    Args:
        kind: ``ggn``, ``fisher_empirical`` or ``fisher_mc``.
        logits: ``(B, C)``, without a graph.
        y: class indices ``(B,)`` or soft targets ``(B, C)``; M is 0 for an image without a label.
        objective: gives the label smoothing.
        first_image: the number of the first image in the whole sequence; draws depend on it and on ``seed`` only, not on
            how the images are split into batches.
        n_samples: labels drawn for each image (``fisher_mc``).
        seed: of those draws.
    """
    targets = _dense_targets(y, logits, objective.label_smoothing)  # (B, C)
    mass = targets.sum(1, keepdim=True)  # (B, 1)
    p = logits.softmax(1)
    if kind == "ggn":
        return lambda z: mass * p * (z - (p * z).sum(1, keepdim=True))
    if kind == "fisher_empirical":
        residuals = (mass * p - targets)[:, None]  # (B, 1, C)
    else:
        labels = _drawn_labels(p, first_image, n_samples, seed)  # (B, S)
        residuals = (p[:, None] - F.one_hot(labels, p.shape[1])) / n_samples**0.5  # (B, S, C)
        residuals = residuals * labeled(y)[:, None, None]
    return lambda z: torch.einsum("bsc,bs->bc", residuals, torch.einsum("bsc,bc->bs", residuals, z))


def _dense_targets(y: Tensor, logits: Tensor, smoothing: float) -> Tensor:
    if y.ndim == 2:
        return y.to(logits.dtype)
    n_classes, counts = logits.shape[1], labeled(y)
    dense = F.one_hot(y.where(counts, 0), n_classes).to(logits.dtype) * (1 - smoothing) + smoothing / n_classes
    return dense * counts[:, None]  # without a label: no mass at all


def _drawn_labels(p: Tensor, first_image: int, n_samples: int, seed: int) -> Tensor:
    images = range(first_image, first_image + len(p))
    uniform = np.stack([np.random.default_rng((seed, image)).random(n_samples) for image in images])  # (B, S)
    below = p.double().cumsum(1)[:, None] <= torch.from_numpy(uniform).to(p.device)[:, :, None]  # (B, S, C)
    return below.sum(2).clamp_(max=p.shape[1] - 1)
