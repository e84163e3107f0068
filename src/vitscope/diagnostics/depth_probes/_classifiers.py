"""Classifiers on frozen features in closed form: ridge regression, nearest neighbors and nearest class centers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: ridge penalties that are tried, relative to the mean squared singular value of the centered features
PENALTIES = tuple(10.0**power for power in range(-4, 4))

#: temperature of the votes of nearest neighbors (Wu et al. 2018)
TEMPERATURE = 0.07

#: images that are compared with all training images at once
_CHUNK = 1024

#: predicted classes ``(m,)`` of features ``(m, C)``, from training features ``(n, C)`` and their classes ``(n,)``
Classifier = Callable[[Tensor, Tensor, Tensor], Tensor]


def ridge(train: Tensor, labels: Tensor, x: Tensor) -> Tensor:
    """Return the class with the largest value of the ridge regression of one-hot classes, with intercept.

    The penalty is the one of `PENALTIES` whose predictions of left-out training images have the smallest squared error.
    """
    coefficients, intercept, _ = ridge_regression(train, labels)
    return (x @ coefficients + intercept).argmax(dim=1)


def ridge_regression(train: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return coefficients ``(C, K)``, intercept ``(K,)`` and penalty of `ridge`.

    With the thin singular value decomposition U S V' of the centered features, the residual of image i left out is that of the
    fit over ``1 - H_ii``, ``H = 11'/n + U diag(s^2 / (s^2 + penalty)) U'``.
    """
    n, mean = len(train), train.mean(dim=0)
    x = train - mean
    targets = F.one_hot(labels).to(x.dtype)
    y = targets - targets.mean(dim=0)
    u, squares = _left_singular(x)
    projected = u.T @ y  # (r, K)
    best = (torch.inf, 0.0)
    for relative in PENALTIES:
        penalty = relative * float(squares.sum()) / min(x.shape)
        shrunk = squares / (squares + penalty)
        leverage = 1 / n + u.square() @ shrunk
        error = float(((y - u @ (shrunk[:, None] * projected)) / (1 - leverage)[:, None]).square().mean())
        best = min(best, (error, penalty))
    # X' U diag(1 / (s^2 + penalty)) U' y
    coefficients = x.T @ (u @ (projected / (squares + best[1])[:, None]))
    return coefficients, targets.mean(dim=0) - mean @ coefficients, best[1]


def _left_singular(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return left singular vectors ``(n, r)`` and squared singular values ``(r,)`` above rounding."""
    n, width = x.shape
    values, vectors = torch.linalg.eigh(x @ x.T if n <= width else x.T @ x)
    above = values > values.amax() * max(n, width) * torch.finfo(x.dtype).eps
    values, vectors = values[above], vectors[:, above]
    return (vectors if n <= width else x @ vectors / values.sqrt()), values


def nearest_neighbors(n_neighbors: int) -> Classifier:
    """Return the classifier by the weighted votes of the nearest training images.

    Similarities s are cosines, votes ``exp(s / 0.07)``. Source: Wu et al. (2018); Caron et al. (2021).
    """

    def classify(train: Tensor, labels: Tensor, x: Tensor) -> Tensor:
        rows, n_classes = F.normalize(train, dim=1), int(labels.max()) + 1
        predicted = []
        for part in F.normalize(x, dim=1).split(_CHUNK):
            similarity, index = (part @ rows.T).topk(n_neighbors, dim=1)
            votes = torch.zeros(len(part), n_classes, dtype=x.dtype)
            votes.scatter_add_(1, labels[index], (similarity / TEMPERATURE).exp())
            predicted.append(votes.argmax(dim=1))
        return torch.cat(predicted)

    return classify


def nearest_center(train: Tensor, labels: Tensor, x: Tensor) -> Tensor:
    """Return the class whose mean over the training images is nearest."""
    classes, centers = class_means(train, labels)
    return classes[torch.cdist(x, centers).argmin(dim=1)]


def class_means(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the classes that occur, ``(K,)``, and the means of their features, ``(K, C)``."""
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(classes), x.shape[1], dtype=x.dtype).index_add_(0, index, x)
    return classes, sums / counts[:, None]
