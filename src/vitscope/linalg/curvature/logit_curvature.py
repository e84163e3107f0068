"""The curvature of a loss in the network's outputs: the inner factor of the GGN and of the Fisher matrices.

With J the Jacobian of an image's outputs z in the parameters and M a small matrix in the outputs, all three operators are the
mean over examples of J^T M J. With p the softmax and s the sum of the targets (1), for the cross entropy:

- GGN: M is the loss's Hessian in the outputs, s (diag(p) - p p^T).
- Empirical Fisher: M = r r^T with the gradient of the image's loss in its outputs r = s p - y, so that J^T r is the gradient of
  the image's loss.
- Monte Carlo Fisher: the same with labels drawn from p (Kunstner et al., NeurIPS 2019, on why the last two differ).

The other losses, with K outputs an image and the mean over them as its loss:

- ``mse``: Hessian 2/K I; r = 2 (z - t) / K; the likelihood is a Gaussian of variance 1/2 around z for each output.
- ``bce``: Hessian diag(q (1 - q)) / K with q the sigmoid; r = (q - t) / K; the likelihood is a Bernoulli distribution of q for
  each output.
- ``dense_cross_entropy``: the cross entropy of each labeled pixel; r is the gradient of the mean over the image's labeled pixels,
  and the image weighs by their number.

The loss of an image is then 1/K of a negative log likelihood, for dense targets 1/n of it for n labeled pixels. The Monte Carlo
Fisher is the Fisher information of that likelihood times the same factor, so that its mean over draws is the GGN.

For a callable, only the empirical Fisher is defined: r is computed by automatic differentiation.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitscope.core.losses.targets import IGNORED_LABEL, distributions, labeled, values_for
from vitscope.core.objective import Objective

OutputCurvature = Callable[[Tensor], Tensor]


def check_output_curvature(kind: str, objective: Objective) -> None:
    """Check that a loss has the curvature in its outputs that an operator needs.

    Raises:
        ValueError: ``ggn`` or ``fisher_mc`` of a callable, whose Hessian in the outputs and likelihood are not known.
    """
    if kind in ("ggn", "fisher_mc") and callable(objective.loss):
        unknown = "Hessian in the outputs" if kind == "ggn" else "likelihood"
        raise ValueError(
            f"Expected operator='hessian' (or 'fisher_empirical' for one value per image) with a loss of your own, received "
            f"{kind!r}: its {unknown} is not known."
        )


def output_curvature(
    kind: str, outputs: Tensor, y: Tensor, objective: Objective, *, first_image: int, n_samples: int, seed: int
) -> OutputCurvature:
    """Return ``z -> M z`` for ``z`` of the outputs' shape, image by image, for an operator (not yet divided by the examples).

    Args:
        kind: ``ggn``, ``fisher_empirical`` or ``fisher_mc``.
        outputs: ``(B, ...)``, without a graph.
        y: Targets; M is 0 for an image or pixel without a label.
        objective: The loss and the label smoothing.
        first_image: The number of the first image in the whole sequence; draws depend on it and on ``seed`` only, not on
            how the images are split into batches.
        n_samples: Labels drawn for each image (``fisher_mc``).
        seed: Seed of the drawn labels.

    Raises:
        ValueError: A loss without this curvature, or ``fisher_empirical`` of a loss that gives a mean alone.
    """
    check_output_curvature(kind, objective)
    images = range(first_image, first_image + len(outputs))
    if objective.loss == "cross_entropy":
        return _of_cross_entropy(kind, outputs, y, objective.label_smoothing, images, n_samples, seed)
    if kind == "fisher_empirical":
        return _of_image_gradients(outputs, y, objective)
    if objective.loss == "dense_cross_entropy":
        return _of_pixels(kind, outputs, y, images, n_samples, seed)
    return _of_values(kind, outputs, y, objective, images, n_samples, seed)


def _of_cross_entropy(
    kind: str, logits: Tensor, y: Tensor, smoothing: float, images: range, n_samples: int, seed: int
) -> OutputCurvature:
    targets = distributions(y, logits.shape[1], logits.dtype, smoothing)  # (B, C)
    mass = targets.sum(1, keepdim=True)  # (B, 1)
    p = logits.softmax(1)
    if kind == "ggn":
        return lambda z: mass * p * (z - (p * z).sum(1, keepdim=True))
    if kind == "fisher_empirical":
        residuals = (mass * p - targets)[:, None]  # (B, 1, C)
    else:
        labels = _drawn_labels(p, images, n_samples, seed)  # (B, S)
        residuals = (p[:, None] - F.one_hot(labels, p.shape[1])) / n_samples**0.5  # (B, S, C)
        residuals = residuals * labeled(y)[:, None, None]
    return _outer(residuals)


def _of_image_gradients(outputs: Tensor, y: Tensor, objective: Objective) -> OutputCurvature:
    """Return M = w r r^T with the gradient r of each image's loss in its outputs, and the image's number w of examples."""
    counts = objective.example_counts(y).to(outputs.dtype)
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        losses = objective.data_loss(leaf, y, "none")
        (gradients,) = torch.autograd.grad(losses.sum(), leaf)  # an image's loss depends on its own outputs alone
    residuals = gradients.reshape(len(outputs), -1) * counts.sqrt()[:, None]  # (B, K)
    outer = _outer(residuals[:, None])
    return lambda z: outer(z.reshape(len(z), -1)).view_as(z)


def _of_values(
    kind: str, outputs: Tensor, y: Tensor, objective: Objective, images: range, n_samples: int, seed: int
) -> OutputCurvature:
    """Return M of ``mse`` and ``bce``, whose Hessians are diagonal."""
    values_for(outputs, y, objective.label_smoothing)  # refuses other shapes
    flat = outputs.reshape(len(outputs), -1)  # (B, K)
    n_outputs, counts = flat.shape[1], labeled(y).to(flat.dtype)[:, None]
    q = flat.sigmoid()
    if kind == "ggn":
        curvature = torch.full_like(flat, 2.0) if objective.loss == "mse" else q * (1 - q)
        diagonal = (curvature * counts / n_outputs).view_as(outputs)
        return lambda z: diagonal * z
    if objective.loss == "mse":
        noise = _drawn(images, seed, lambda generator: generator.standard_normal((n_samples, n_outputs)))
        gradients = 2**0.5 * noise.to(flat)  # 2 (z - t) with t - z of variance 1/2
    else:
        uniform = _drawn(images, seed, lambda generator: generator.random((n_samples, n_outputs)))
        gradients = q[:, None] - (uniform.to(q.device) < q.double()[:, None]).to(q.dtype)
    outer = _outer(gradients * counts[:, None] / (n_outputs * n_samples) ** 0.5)
    return lambda z: outer(z.reshape(len(z), -1)).view_as(z)


def _of_pixels(kind: str, logits: Tensor, y: Tensor, images: range, n_samples: int, seed: int) -> OutputCurvature:
    """Return M of the cross entropy of pixels ``(B, C, ...)``, which is block diagonal over pixels."""
    p, counts = logits.softmax(1), (y != IGNORED_LABEL)[:, None]
    if kind == "ggn":
        return lambda z: counts * p * (z - (p * z).sum(1, keepdim=True))
    uniform = _drawn(images, seed, lambda generator: generator.random((n_samples, *y.shape[1:])))  # (B, S, ...)
    below = p.double().cumsum(1)[:, None] <= uniform.to(p.device)[:, :, None]  # (B, S, C, ...)
    labels = below.sum(2).clamp_(max=p.shape[1] - 1)
    drawn = torch.zeros_like(below, dtype=p.dtype).scatter_(2, labels[:, :, None], 1.0)
    residuals = (p[:, None] - drawn) * counts[:, None] / n_samples**0.5

    def product(z: Tensor) -> Tensor:
        return (residuals * (residuals * z[:, None]).sum(2, keepdim=True)).sum(1)

    return product


def _outer(residuals: Tensor) -> OutputCurvature:
    """Return ``z (B, C) -> sum_s r_s r_s^T z`` for residuals ``(B, S, C)``."""
    return lambda z: torch.einsum("bsc,bs->bc", residuals, torch.einsum("bsc,bc->bs", residuals, z))


def _drawn(images: range, seed: int, draw: Callable[[np.random.Generator], np.ndarray]) -> Tensor:
    """Return the draws of each image, which depend on the seed and the image's number alone, along a first axis in float64."""
    return torch.from_numpy(np.stack([draw(np.random.default_rng((seed, image))) for image in images]))


def _drawn_labels(p: Tensor, images: range, n_samples: int, seed: int) -> Tensor:
    uniform = _drawn(images, seed, lambda generator: generator.random(n_samples))  # (B, S)
    below = p.double().cumsum(1)[:, None] <= uniform.to(p.device)[:, :, None]  # (B, S, C)
    return below.sum(2).clamp_(max=p.shape[1] - 1)
