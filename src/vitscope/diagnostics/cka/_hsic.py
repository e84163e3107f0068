"""Unbiased independence statistics of many representations of the same images at once."""

from __future__ import annotations

import torch
from torch import Tensor

#: the unbiased estimator divides by n (n - 3)
MIN_IMAGES = 4


def gram(features: Tensor) -> Tensor:
    """Return the Gram matrix ``(n, n)`` of features ``(n, ...)``, float64, centred over the images.

    The estimator does not depend on a common shift, but its rounding does. Features that agree in every image up to the
    rounding of their own dtype have a Gram matrix of exact zeros.
    """
    x = features.flatten(1).double()
    size = torch.finfo(features.dtype).eps * x.norm()
    x = x - x.mean(dim=0)
    product = x @ x.T
    return torch.zeros_like(product) if bool(product.diagonal().sum() <= size**2) else product


def hsic(grams: Tensor, others: Tensor) -> Tensor:
    """Return the unbiased HSIC of every pair, ``(S, T)``, from Gram matrices ``(S, n, n)`` and ``(T, n, n)``.

    HSIC_1 of Song et al. (2012, eq. 5): with zero diagonals,
    ``[tr(KL) + sum(K) sum(L) / ((n-1)(n-2)) - 2/(n-2) 1'KL1] / (n (n-3))``.

    Raises:
        ValueError: fewer than four images.
    """
    n = grams.shape[-1]
    if n < MIN_IMAGES:
        raise ValueError(f"Expected at least {MIN_IMAGES} images in a batch, received {n}.")
    k, l = (g - torch.diag_embed(g.diagonal(dim1=-2, dim2=-1)) for g in (grams, others))
    trace = k.flatten(1) @ l.flatten(1).T  # (S, T), tr(KL) of symmetric matrices
    rows_k, rows_l = k.sum(dim=2), l.sum(dim=2)  # (S, n), (T, n)
    sums = torch.outer(rows_k.sum(dim=1), rows_l.sum(dim=1)) / ((n - 1) * (n - 2))
    return (trace + sums - rows_k @ rows_l.T * (2 / (n - 2))) / (n * (n - 3))
