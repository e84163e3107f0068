"""Unbiased mini-batch CKA with a null: the HSIC of every pair of taps in each batch, as it is and with images permuted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vitscope.diagnostics.cka._hsic import MIN_IMAGES, hsic
from vitscope.runtime import distributed
from vitscope.stats.intervals import t_quantile


class BatchHsic:
    """The HSIC of batches: small matrices, whose number grows with the batches.

    Args:
        n_first: Taps of the first model, which come before those of a second one.
        between: Whether there is a second model.
        n_permutations: Number of permutations of each batch.
        seed: Seed of the permutations.
    """

    def __init__(self, n_first: int, between: bool, n_permutations: int, seed: int) -> None:
        self.n_first, self.between = n_first, between
        self.n_permutations, self.seed = n_permutations, seed
        self._parts: list[tuple[int, int, np.ndarray, np.ndarray]] = []

    def add(self, number: int, grams: Sequence[Tensor]) -> None:
        """Compare the centered Gram matrices ``(B, B)`` of one batch; fewer than four images are left out."""
        n = len(grams[0])
        if n < MIN_IMAGES:
            return
        stacked = torch.stack(list(grams))
        first, second = self._sides(stacked)
        permuted = []
        for draw in range(self.n_permutations):
            order = np.random.default_rng([self.seed, number, draw]).permutation(n)
            index = torch.from_numpy(order).to(second.device)
            permuted.append(hsic(first, second[:, index][:, :, index]).cpu().numpy())
        nulls = np.stack(permuted) if permuted else np.zeros((0, len(first), len(second)))
        self._parts.append((number, n, hsic(stacked, stacked).cpu().numpy(), nulls))

    def _sides(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return values[: self.n_first], values[self.n_first :] if self.between else values

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return similarity and half width ``(S, T)`` and the similarities of permuted images ``(n_permutations, S, T)``.

        The half width is the 95 % t-interval of the jackknife over batches; NaN with one batch.

        Raises:
            ValueError: No batch of four images.
        """
        parts = sorted(
            (part for share in distributed.gather_objects(self._parts) for part in share), key=lambda p: p[0]
        )
        if not parts:
            raise ValueError(
                f"Expected batches of at least {MIN_IMAGES} images for the unbiased estimator, received none."
            )
        weights = np.array([n for _, n, _, _ in parts], dtype=np.float64)
        values = np.stack([value for _, _, value, _ in parts])
        total = np.tensordot(weights, values, 1)  # (S + T, S + T)
        scale = self._scale(total)
        nulls = np.tensordot(weights, np.stack([null for *_, null in parts]), 1) / scale
        return self._rectangle(total) / scale, self._half_width(weights, values, total), nulls

    def _rectangle(self, total: np.ndarray) -> np.ndarray:
        return total[: self.n_first, self.n_first :] if self.between else total

    def _scale(self, total: np.ndarray) -> np.ndarray:
        diagonal = np.sqrt(np.where(np.diagonal(total) > 0, np.diagonal(total), np.nan))
        return np.outer(diagonal[: self.n_first], diagonal[self.n_first :] if self.between else diagonal)

    def _half_width(self, weights: np.ndarray, values: np.ndarray, total: np.ndarray) -> np.ndarray:
        n = len(values)
        if n < 2:
            return np.full(self._rectangle(total).shape, np.nan)
        rest = [total - weight * value for weight, value in zip(weights, values)]
        left_out = np.stack([self._rectangle(part) / self._scale(part) for part in rest])
        return t_quantile(n) * np.sqrt((n - 1) / n * np.square(left_out - left_out.mean(0)).sum(0))
