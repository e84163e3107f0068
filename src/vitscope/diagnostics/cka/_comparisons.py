"""Similarities of representations of the same images: Procrustes, mutual nearest neighbors, RSA and linear regression.

Each class prepares the representations once for all orders of the second model's images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

from vitscope.diagnostics.cka._representations import Representation
from vitscope.runtime import stop_flag

#: ridge penalties of `LinearRegression`, relative to the mean squared singular value of the centered features
PENALTIES = tuple(10.0**power for power in range(-4, 3))

#: cosine similarities that differ by less are equal; they are rounded by some 1e-16
_EQUAL = 1e-12

#: decimals to which dissimilarities are ranked, likewise
_DIGITS = 10


class Comparison(Protocol):
    """A way to compare the representations of n images pair by pair."""

    def similarities(self, pair: Pair, orders: Sequence[Tensor]) -> np.ndarray:
        """Return the similarity of every pair with the second model's images in each of the orders ``(n,)``, ``(P, S, T)``."""
        ...

    def without_groups(self, pair: Pair, groups: np.ndarray) -> np.ndarray:
        """Return the similarity of every pair without the images of each group, ``(G, S, T)``.

        Args:
            pair: The representations.
            groups: (n,) the group of each image, from 0 to G - 1.
        """
        ...


@dataclass(frozen=True)
class Pair:
    """Representations of the same n images in two models, or twice those of one.

    Attributes:
        first: (S) of the first model.
        second: (T) of the second model.
        within: Whether both are the same, so that (i, j) and (j, i) have the same distribution.
    """

    first: Sequence[Representation]
    second: Sequence[Representation]
    within: bool

    @property
    def shape(self) -> tuple[int, int]:
        """S and T."""
        return len(self.first), len(self.second)

    def rows(self, index: Tensor) -> Pair:
        """Return the representations of some of the images."""
        first = [x.rows(index) for x in self.first]
        return Pair(first, first if self.within else [y.rows(index) for y in self.second], self.within)


class Procrustes:
    """Nuclear norm of X'Y for centered features of unit Frobenius norm: 1 - d^2 / 2 of the Procrustes distance d."""

    def similarities(self, pair: Pair, orders: Sequence[Tensor]) -> np.ndarray:
        """Return the nuclear norms; within a model, those above the diagonal stand for those below."""
        first, second = self._normalized(pair)
        values = np.zeros((len(orders), *pair.shape))
        for number, order in enumerate(orders):
            stop_flag.check()
            norm = _nuclear_norm if torch.equal(order, torch.arange(len(order))) else _rounded_nuclear_norm
            reordered = [y[order] for y in second]
            for i, j in _distinct(pair):
                values[number, i, j] = norm(first[i].T @ reordered[j])
            if pair.within:
                values[number] = np.triu(values[number]) + np.triu(values[number], 1).T
        return values

    def without_groups(self, pair: Pair, groups: np.ndarray) -> np.ndarray:
        """Return the similarities without groups, with the rotation of all images.

        The best rotation is a maximum, so that its own change is of second order; ``x_i R y_i`` adds up to the nuclear norm.
        """
        first, second = self._normalized(pair)
        n_groups = int(groups.max()) + 1
        marks = torch.from_numpy(np.eye(n_groups)[groups].T)  # (G, n)
        sizes = [[1 - marks @ x.square().sum(dim=1) for x in side] for side in (first, second)]  # (G,) each
        values = np.zeros((n_groups, *pair.shape))
        for i, j in _distinct(pair):
            u, s, v = torch.linalg.svd(first[i].T @ second[j], full_matrices=False)
            parts = ((first[i] @ u) * (second[j] @ v.T)).sum(dim=1)  # (n,) which add up to sum(s)
            rest = (s.sum() - marks @ parts) / (sizes[0][i] * sizes[1][j]).sqrt()
            values[:, i, j] = rest.numpy()
            if pair.within:
                values[:, j, i] = values[:, i, j]
        return values

    def _normalized(self, pair: Pair) -> tuple[list[Tensor], list[Tensor]]:
        first = [_unit_rows(x) for x in pair.first]
        return first, first if pair.within else [_unit_rows(y) for y in pair.second]


def _distinct(pair: Pair) -> list[tuple[int, int]]:
    rows, columns = pair.shape
    return [(i, j) for i in range(rows) for j in range(i if pair.within else 0, columns)]


def _unit_rows(representation: Representation) -> Tensor:
    """Return centered features of unit norm ``(n, r)``, r at most n."""
    x = representation.features - representation.features.mean(dim=0)
    if x.shape[1] > len(x):
        x = torch.linalg.qr(x.T, mode="r")[1].T  # the same inner products of rows
    return x / torch.linalg.norm(x)


def _nuclear_norm(product: Tensor) -> float:
    return float(torch.linalg.svdvals(product).sum())


def _rounded_nuclear_norm(product: Tensor) -> float:
    """Return the nuclear norm up to 1e-8 for each singular value, in two thirds of the time."""
    square = product.T @ product if product.shape[1] <= product.shape[0] else product @ product.T
    return float(torch.linalg.eigvalsh(square).clamp_min(0).sqrt().sum())


class _InnerProducts:
    """Comparisons that are inner products of one symmetric matrix ``(n, n)`` of each representation."""

    def similarities(self, pair: Pair, orders: Sequence[Tensor]) -> np.ndarray:
        """Return the inner products of all pairs of matrices."""
        first = torch.stack([self._matrix(x) for x in pair.first])
        second = first if pair.within else torch.stack([self._matrix(y) for y in pair.second])
        values = [first.flatten(1) @ second[:, order][:, :, order].flatten(1).T for order in orders]
        return torch.stack(values).numpy() if values else np.zeros((0, *pair.shape))

    def without_groups(self, pair: Pair, groups: np.ndarray) -> np.ndarray:
        """Return the similarities of the images of all groups but one."""
        left_out = []
        for group in range(int(groups.max()) + 1):
            stop_flag.check()
            rest = pair.rows(torch.from_numpy(np.flatnonzero(groups != group)))
            left_out.append(self.similarities(rest, [torch.arange(len(rest.first[0].features))])[0])
        return np.stack(left_out)

    def _matrix(self, representation: Representation) -> Tensor:
        raise NotImplementedError


class MutualKNN(_InnerProducts):
    """Mean share of an image's k nearest neighbors, by cosine similarity, that both representations have in common.

    Of images that are equally near, as many as are missing are drawn at random: the share is its mean over these draws. By their
    numbers alone, images without any activation would have the same neighbors in every representation.
    """

    def __init__(self, n_neighbors: int) -> None:
        self.n_neighbors = n_neighbors

    def _matrix(self, representation: Representation) -> Tensor:
        """Return the matrix whose rows mark the neighbors of an image, the equally near ones by their probability."""
        x = representation.features
        rows = F.normalize(x, dim=1)
        cosines = (rows @ rows.T).fill_diagonal_(-torch.inf)  # (n, n)
        farthest = cosines.topk(self.n_neighbors, dim=1).values[:, -1:]
        nearer, equal = cosines > farthest + _EQUAL, (cosines - farthest).abs() <= _EQUAL
        probability = (self.n_neighbors - nearer.sum(dim=1, keepdim=True)) / equal.sum(dim=1, keepdim=True)
        return (nearer.double() + probability * equal) * (len(x) * self.n_neighbors) ** -0.5


class RSA(_InnerProducts):
    """Spearman's correlation of the dissimilarities of all pairs of images, 1 minus Pearson's correlation over features."""

    def _matrix(self, representation: Representation) -> Tensor:
        """Return the matrix of the centered ranks of dissimilarities, zero on the diagonal, of unit norm."""
        patterns = representation.patterns
        n = len(patterns)
        length = torch.linalg.norm(patterns, dim=1, keepdim=True)
        rows = patterns / length
        upper = np.triu_indices(n, 1)
        # no order of dissimilarities by their rounding: of two features all are 0 or 2
        ranks = rankdata(np.round(1 - (rows @ rows.T).numpy()[upper], _DIGITS))
        ranks = ranks - ranks.mean()
        matrix = np.zeros((n, n))
        with np.errstate(invalid="ignore", divide="ignore"):  # all alike: undefined
            matrix[upper] = ranks / np.sqrt(2 * np.square(ranks).sum())
        return torch.from_numpy(matrix + matrix.T)


class LinearRegression:
    """Cross-validated R^2 of the second representation, predicted linearly from the first.

    Each image is predicted by the ridge regression on all others, with intercept; the penalty is that of `PENALTIES` with the
    largest R^2. 0 is what the mean of the other images predicts.
    """

    def similarities(self, pair: Pair, orders: Sequence[Tensor]) -> np.ndarray:
        """Return R^2 of every second representation from every first one."""
        grams = self._grams(pair)
        values = np.zeros((len(orders), *pair.shape))
        for i, x in enumerate(pair.first):
            stop_flag.check()
            operators = torch.stack([scaled.T @ scaled for scaled in _left_out_residuals(x)])  # (penalties, n, n)
            for number, order in enumerate(orders):
                inverse = torch.argsort(order)  # the images of the operators in the place of those of the Gram matrices
                errors = operators[:, inverse][:, :, inverse].flatten(1) @ grams  # (penalties, T)
                values[number, i] = 1 - errors.amin(dim=0).numpy() * _share_of_others(len(order))
        return values

    def without_groups(self, pair: Pair, groups: np.ndarray) -> np.ndarray:
        """Return R^2 without the errors of each group, with the regressions and penalties of all images."""
        grams, n, n_groups = self._grams(pair), len(groups), int(groups.max()) + 1
        marks = torch.from_numpy(np.eye(n_groups)[groups].T)
        spread = 1 - marks @ grams[:: n + 1]  # (G, T): the diagonals of the Gram matrices, whose sum is 1
        values = np.zeros((n_groups, *pair.shape))
        for i, x in enumerate(pair.first):
            stop_flag.check()
            parts = []
            for scaled in _left_out_residuals(x):
                rows = [scaled[groups == group] for group in range(n_groups)]
                parts.append(torch.stack([(part.T @ part).flatten() @ grams for part in rows]))  # (G, T)
            errors = torch.stack(parts)  # (penalties, G, T)
            best = errors.sum(dim=1).argmin(dim=0)  # (T,)
            of_best = errors[best, :, torch.arange(len(best))].T  # (G, T)
            values[:, i] = (1 - (of_best.sum(dim=0) - of_best) / spread * _share_of_others(n)).numpy()
        return values

    def _grams(self, pair: Pair) -> Tensor:
        """Return the second's centered Gram matrices of unit trace, ``(n n, T)``."""
        centered = [y.features - y.features.mean(dim=0) for y in pair.second]
        return torch.stack([(y @ y.T / y.square().sum()).flatten() for y in centered], dim=1)


def _share_of_others(n: int) -> float:
    """Return the spread about the mean of all images over that of each image about the mean of the others."""
    return ((n - 1) / n) ** 2


def _left_out_residuals(representation: Representation) -> Iterator[Tensor]:
    """Yield, for each penalty, the matrix ``(n, n)`` that maps Y to the residuals of its images, each left out of the regression.

    With the hat matrix H of ridge regression with intercept, the residual of image i is ``((I - H) Y)_i / (1 - H_ii)``.
    """
    x = representation.features - representation.features.mean(dim=0)
    n = len(x)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    for penalty in PENALTIES:
        shrunk = s.square() / (s.square() + penalty * s.square().mean())
        residual = torch.eye(n, dtype=x.dtype) - 1 / n - (u * shrunk) @ u.T
        yield residual / residual.diagonal()[:, None]


#: the comparison of each measure; takes the number of neighbors
COMPARISONS: dict[str, Callable[[int], Comparison]] = {
    "procrustes": lambda n_neighbors: Procrustes(),
    "mutual_knn": MutualKNN,
    "rsa": lambda n_neighbors: RSA(),
    "linear_regression": lambda n_neighbors: LinearRegression(),
}
