"""Sums over the gradients of images, by groups of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitscope.core.batches.batch_inputs import Inputs, selected_images
from vitscope.core.losses.targets import labeled
from vitscope.diagnostics.gradient_noise._noise_statistics import NoiseStatistics, noise_statistics
from vitscope.linalg.curvature.operator_factory import Curvatures
from vitscope.linalg.per_example_gradients import PerExampleGradients
from vitscope.runtime import distributed
from vitscope.runtime.progress import track
from vitscope.stats.intervals import LEAST_IMAGES

#: root mean square of an entry, over that of all entries and in units of the rounding, below which it is taken for rounding alone
_LEAST_ENTRY = 10


class FirstSums(NamedTuple):
    """Sums of the first pass over the images.

    Attributes:
        squares: (size,) of the squared gradients.
        units: (size,) of the gradients divided by their length.
        kind_units: (size,) of the gradients of each kind of parameter divided by their own length.
        square_norms: Squared norms (b, n_groups) of images, by the number of their batch.
    """

    squares: Tensor
    units: Tensor
    kind_units: Tensor
    square_norms: dict[int, list[Tensor]]


class GradientSums:
    """Sums over the gradients of images, in two passes: the second, for intervals, needs the first one's mean."""

    def __init__(self, operators: Curvatures, gradients: PerExampleGradients, groups: dict[str, list[int]]) -> None:
        self.operators, self.gradients, self.groups = operators, gradients, groups
        self.sizes = [p.numel() for p in operators.parameters.values()]
        like = next(iter(operators.parameters.values()))
        membership = torch.zeros(len(self.sizes), len(groups), dtype=torch.float64, device=like.device)
        for column, places in enumerate(groups.values()):
            membership[places, column] = 1.0
        self._membership = membership
        self._columns = membership[:, 1:].argmax(1) + 1 if len(groups) > 1 else None  # the kind of each parameter
        self.mean = torch.zeros(gradients.size, dtype=torch.float64, device=like.device)

    def statistics(self, n: int) -> tuple[NoiseStatistics, np.ndarray, np.ndarray]:
        """Return the estimates, the squared norms ``(n, n_groups)`` and the signal-to-noise ratios ``(n_groups,)``."""
        sums = self.first_pass()
        for total in (self.mean, sums.squares, sums.units, sums.kind_units):
            distributed.all_reduce_sum(total)
        self.mean /= n
        square_norms = _gathered(sums.square_norms)
        gsnr = self._gsnr(sums.squares, n)
        mean_square = self._by_group(self.mean[None].square())[0]
        unit_square = self._by_group(sums.kind_units[None].square())[0]
        unit_square[0] = sums.units.square().sum()
        products = unit_products = np.full_like(square_norms, np.nan)
        if n >= LEAST_IMAGES:
            products, unit_products = self.products(sums)
        statistics = noise_statistics(
            square_norms, mean_square.cpu().numpy(), products, unit_square.cpu().numpy(), unit_products
        )
        return statistics, square_norms, gsnr

    def first_pass(self) -> FirstSums:
        """Return the sums of this rank's images, and add up their gradients in ``mean``."""
        squares, units, kind_units = (torch.zeros_like(self.mean) for _ in range(3))
        norms: dict[int, list[Tensor]] = {}
        with distributed.failing_together():
            for index, rows in self._rows("gradients of images"):
                self.mean += rows.double().sum(0)
                squares += rows.double().square().sum(0)
                square_norms = self._by_group(rows * rows)
                norms.setdefault(index, []).append(square_norms)
                units += self._unit(rows, square_norms, False).double().sum(0)
                if self._columns is not None:
                    kind_units += self._unit(rows, square_norms, True).double().sum(0)
        return FirstSums(squares, units, kind_units, norms)

    def products(self, sums: FirstSums) -> tuple[np.ndarray, np.ndarray]:
        """Return the products of each image's gradient with the mean, and of its unit gradient with the sum of these."""
        mean, unit, kind_unit = (t.to(self.gradients_dtype) for t in (self.mean, sums.units, sums.kind_units))
        products: dict[int, list[Tensor]] = {}
        unit_products: dict[int, list[Tensor]] = {}
        with distributed.failing_together():
            for index, rows in self._rows("gradients of images, intervals"):
                products.setdefault(index, []).append(self._by_group(rows * mean))
                square_norms = self._by_group(rows * rows)
                of_units = self._by_group(rows * kind_unit)
                of_units[:, 0] = self._by_group(rows * unit)[:, 0]
                roots = square_norms.sqrt()
                unit_products.setdefault(index, []).append(torch.where(roots > 0, of_units / roots, 0.0))
        return _gathered(products), _gathered(unit_products)

    @property
    def gradients_dtype(self) -> torch.dtype:
        """The type of the gradients."""
        return next(iter(self.operators.parameters.values())).dtype

    def _rows(self, description: str) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of a batch and gradients of some of its images with a label."""
        for index, (x, y) in track(self.operators.probe.local_batches(), description, self.operators.probe.n_batches):
            x, y = with_label(x, y)
            if len(y):
                for rows in self.gradients(x, y):
                    yield index, rows

    def _by_group(self, entries: Tensor) -> Tensor:
        """Return the sums of ``entries (b, size)`` over each group's parameters ``(b, n_groups)``, float64."""
        parts = torch.stack([part.sum(1) for part in entries.split(self.sizes, 1)], 1)  # (b, n_parameters)
        return parts.double() @ self._membership

    def _unit(self, rows: Tensor, square_norms: Tensor, by_kind: bool) -> Tensor:
        """Return the gradients divided by their length, on each kind's parameters alone with ``by_kind``; 0 stays 0."""
        roots = square_norms.sqrt()
        scales = torch.where(roots > 0, 1 / roots, 0.0).to(rows.dtype)
        if not by_kind or self._columns is None:
            return rows * scales[:, :1]
        parts = [part * scales[:, c, None] for part, c in zip(rows.split(self.sizes, 1), self._columns.tolist())]
        return torch.cat(parts, 1)

    def _gsnr(self, squares: Tensor, n: int) -> np.ndarray:
        variance = (squares - n * self.mean.square()) / (n - 1)
        # an entry that is zero but for rounding, as that of a key's bias, and one that does not vary but for rounding
        eps = torch.finfo(self.gradients_dtype).eps
        is_noisy = (variance > 4 * eps * squares / n) & (squares > (_LEAST_ENTRY * eps) ** 2 * squares.mean())
        ratio = torch.where(is_noisy, self.mean.square() / variance.clamp(min=1e-300) - 1 / n, 0.0)
        counts = self._by_group(is_noisy[None].double())[0]
        return (self._by_group(ratio[None])[0] / counts.where(counts > 0, torch.nan)).cpu().numpy()


def with_label(x: Inputs, y: Tensor) -> tuple[Inputs, Tensor]:
    """Return the images of a batch that have a label."""
    counts = labeled(y)
    if bool(counts.all()):
        return x, y
    images = counts.nonzero()[:, 0].tolist()
    return (selected_images(x, images), y[counts]) if images else (x[:0], y[:0])


def _gathered(parts: dict[int, list[Tensor]]) -> np.ndarray:
    """Return the rows of all ranks' batches in the order of the batches ``(n, n_groups)``."""
    own_rows = {index: torch.cat(rows).cpu().numpy() for index, rows in parts.items()}
    merged = {index: rows for each in distributed.gather_objects(own_rows) for index, rows in each.items()}
    return np.concatenate([merged[index] for index in sorted(merged)])
