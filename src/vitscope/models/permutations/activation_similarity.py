"""Correlation of the activations of two networks' units over images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitscope.models.permutations.channel_labels import Label
from vitscope.models.permutations.unit_symmetry import Occurrence, UnitGroup, UnitSymmetry, places, run_recorded
from vitscope.runtime import stop_flag
from vitscope.runtime.errors import StructureError
from vitscope.runtime.torch_internals import UnobservedFunctions


@dataclass
class _PairSums:
    """Sums over images and positions of two networks' units at one place of the forward pass, float64.

    Attributes:
        count: Images times positions.
        sums: Sums of the units of both networks, (2, n).
        squares: Sums of their squares, (2, n).
        products: (n, n) of the first network's units and the second's.
    """

    count: int
    sums: Tensor
    squares: Tensor
    products: Tensor

    def add(self, first: Tensor, second: Tensor) -> None:
        """Add activations (n_positions, n) of both networks."""
        both = torch.stack([first, second]).double()
        self.count += len(first)
        self.sums += both.sum(dim=1)
        self.squares += both.square().sum(dim=1)
        self.products += both[0].T @ both[1]

    def correlation(self) -> Tensor:
        """Return Pearson's correlation (n, n) of all pairs of units; 0 for units that are constant."""
        means, squares = self.sums / self.count, self.squares / self.count
        variance = squares - means.square()
        # the difference of two sums of a constant unit keeps about eps times the square
        scale = torch.where(variance <= 1e-12 * squares, torch.inf, variance.clamp(min=0)).sqrt()
        return (self.products / self.count - torch.outer(means[0], means[1])) / torch.outer(scale[0], scale[1])


class ActivationSimilarity:
    """Correlations of units at the inputs and outputs of all layers, and at queries and keys.

    Args:
        symmetry: Groups of units of the networks.
        model: The network, in which ``load`` replaces weights.
        load: Writes a state dict into it.
        states: State dicts of the network that stays and of the one that is permuted.
        images: Batches (B, C, H, W) that both are run on.

    Raises:
        StructureError: Activations that are not finite, or no image.
    """

    def __init__(
        self,
        symmetry: UnitSymmetry,
        model: nn.Module,
        load: Callable[[Mapping[str, Tensor]], None],
        states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
        images: Iterable[Tensor],
    ) -> None:
        sums: list[_PairSums] = []
        for x in images:
            activations = []
            for state in states:
                stop_flag.check()
                load(state)
                activations.append(_activations(model, x))
            for k, (a, b) in enumerate(zip(*activations, strict=True)):
                if k == len(sums):
                    zeros = a.new_zeros(2, a.shape[1], dtype=torch.float64)
                    sums.append(_PairSums(0, zeros, zeros.clone(), zeros.new_zeros(a.shape[1], a.shape[1])))
                sums[k].add(a, b)
        name = type(model).__name__
        if not sums:
            raise StructureError(
                name, "there are no images to match activations on", "pass images, or use alignment=weights"
            )
        self._correlations = [one.correlation() for one in sums]
        if not all(bool(c.isfinite().all()) for c in self._correlations):
            raise StructureError(
                name, "its activations are not finite", "use alignment=weights, or weights that are finite"
            )
        self._places: dict[Label, list[Occurrence]] = {}
        for k, label in enumerate(symmetry.observed):
            for one in places(str(k), 0, label):
                self._places.setdefault((one.heads or one.label).root, []).append(one)

    def occurrences(self, group: UnitGroup) -> list[Occurrence]:
        """Return the places of the forward pass at which a group's units were observed; their names are numbers."""
        return self._places.get(group.label.root, [])

    def at(self, occurrence: Occurrence) -> Tensor:
        """Return the correlations of the units at one place, (n, n)."""
        part = slice(occurrence.start, occurrence.start + occurrence.size)
        return self._correlations[int(occurrence.name)][part, part]


def _activations(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the observed activations as (images and positions, units)."""
    observed_tensors: list[Tensor] = []

    def observe(tensor: Tensor, axis: int, label: Label) -> None:
        with torch.no_grad(), UnobservedFunctions():
            # (..., n) to (n_positions, n)
            observed_tensors.append(tensor.detach().movedim(axis, -1).flatten(0, -2).clone())

    run_recorded(model, x, observe, len(x))
    return observed_tensors
