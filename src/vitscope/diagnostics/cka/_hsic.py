"""Unbiased independence statistics of many representations of the same images at once."""

from __future__ import annotations

import torch
from torch import Tensor

#: the unbiased estimator divides by n (n - 3)
MIN_IMAGES = 4


#: numbers that are worked on at once on a CPU: they stay in its cache, and float32 sums over so few are exact to about 1e-6
_CHUNK = 1 << 15


def gram(features: Tensor) -> Tensor:
    """Return the Gram matrix ``(n, n)`` of features ``(n, ...)``, float64, centered over the images.

    The estimator does not depend on a common shift, but its rounding does. Features that agree in every image up to the
    rounding of their own dtype have a Gram matrix of exact zeros. Products of a few features at a time are added up in float64
    (float32 sums over a map of 800,000 features were off by 5e-5), so no double-precision copy of a map is ever made on a CPU.
    """
    x = _rows(features)
    n = len(x)
    exact = x.is_cuda or x.dtype == torch.float64
    product = torch.zeros(n, n, dtype=torch.float64, device=x.device)
    common = torch.zeros((), dtype=torch.float64, device=x.device)  # squared norm of what is common to all images
    for part in x.split(x.shape[1] if x.is_cuda else max(1, _CHUNK // n), dim=1):
        part = part.double() if exact else part.float()
        mean = part.mean(dim=0)
        centered = part - mean
        product += centered @ centered.T
        common += n * mean.dot(mean)
    spread = product.diagonal().sum()
    rounding = torch.finfo(features.dtype).eps ** 2 * (spread + common)
    return torch.zeros_like(product) if bool(spread <= rounding) else product


def _rows(features: Tensor) -> Tensor:
    """Return ``(n, D)``, an image's features in the order of memory (a Gram matrix does not depend on it): seldom a copy."""
    axes = sorted(range(1, features.ndim), key=features.stride, reverse=True)
    return features.permute(0, *axes).flatten(1)


def hsic(grams: Tensor, others: Tensor) -> Tensor:
    """Return the unbiased HSIC of every pair, ``(S, T)``, from Gram matrices ``(S, n, n)`` and ``(T, n, n)``.

    HSIC_1 of Song et al. (2012, eq. 5): with zero diagonals,
    ``[tr(KL) + sum(K) sum(L) / ((n-1)(n-2)) - 2/(n-2) 1'KL1] / (n (n-3))``.

    Raises:
        ValueError: Fewer than four images.
    """
    n = grams.shape[-1]
    if n < MIN_IMAGES:
        raise ValueError(f"Expected at least {MIN_IMAGES} images in a batch, received {n}.")
    k, l = (g - torch.diag_embed(g.diagonal(dim1=-2, dim2=-1)) for g in (grams, others))
    trace = k.flatten(1) @ l.flatten(1).T  # (S, T), tr(KL) of symmetric matrices
    rows_k, rows_l = k.sum(dim=2), l.sum(dim=2)  # (S, n), (T, n)
    sums = torch.outer(rows_k.sum(dim=1), rows_l.sum(dim=1)) / ((n - 1) * (n - 2))
    return (trace + sums - rows_k @ rows_l.T * (2 / (n - 2))) / (n * (n - 3))
