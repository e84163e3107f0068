"""Running sums over images of what each attention head does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from vitscope.core.running_mean import RunningMean
from vitscope.diagnostics.attention._geometry import Geometry, geometry, geometry_of_tokens
from vitscope.models.structure.attention_units import AttentionUnit
from vitscope.models.structure.residual_units import Unit
from vitscope.runtime import distributed


class Sums:
    """Distance, entropy and share off the map of each unit's heads, and the geometry of its attention.

    Args:
        units: The units that are read.
        shifts: Rows and columns by which the windows of each are shifted.
        traced_units: Units whose tokens' positions a forward pass has shown, by name.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        shifts: Sequence[tuple[int, int]],
        traced_units: Mapping[str, AttentionUnit] = MappingProxyType({}),
    ) -> None:
        self._traced_units = traced_units
        #: means of each unit: distance, entropy, and share off the map
        self.means = tuple([RunningMean() for _ in units] for _ in range(3))
        self._shifts = shifts  # of the windows of each unit
        self._places: dict[int, Geometry] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        self._image = (0, 0)
        self._n = 0
        self._called: set[int] = set()
        #: units whose attention module computed more than one map for an image
        self.repeated: set[int] = set()

    def begin(self, x: Tensor) -> None:
        """Note the batch ``(B, C, H, W)`` that the model is about to see."""
        self._n, self._image = len(x), (x.shape[2], x.shape[3])
        self._called.clear()

    def note_size(self, index: int, unit: Unit, side: str, features: Tensor) -> None:
        """Note the size of the map ``(B, C, h, w)`` that a unit's attention reads."""
        if side == "input":
            self._sizes[index] = (features.shape[2], features.shape[3])

    def add(self, index: int, unit: Unit, weights: Tensor) -> None:
        """Add a batch's attention weights ``(B * n_windows, heads, queries, keys)``; those of one call, the batch's first."""
        if index in self._called:
            self.repeated.add(index)
            return
        self._called.add(index)
        weights = weights.unflatten(0, (self._n, -1)).double()  # (B, n_windows, heads, Q, K)
        place = self._places[index] = self._geometry(index, unit, *weights.shape[1:])
        for means, value in zip(self.means, _looked(weights, place)):
            means[index].add(value)

    def _geometry(self, index: int, unit: Unit, n_windows: int, n_heads: int, n_queries: int, n_keys: int) -> Geometry:
        """Return the places of tokens; of global attention those of the traced unit, where images are as large as its own."""
        traced_unit = self._traced_units.get(unit.name)
        if traced_unit is not None:
            n_tokens = traced_unit.queries.shape[1], traced_unit.keys.shape[1]
            traced_sizes = (*traced_unit.image_size, traced_unit.n_windows, *n_tokens)
            if n_windows == 1 and traced_sizes == (*self._image, n_windows, n_queries, n_keys):
                return geometry_of_tokens(traced_unit)
        return geometry(
            n_queries,
            n_keys,
            n_windows,
            grid=self._sizes[index],
            window=unit.window,
            n_prefix=unit.n_prefix,
            image=self._image,
            shift=self._shifts[index],
        )

    def keys_and_uniform(self) -> dict[int, tuple[int, float]]:
        """Return each unit's number of keys and the distance of equal weights, by index, from whichever rank saw it."""
        local_places = {index: (place.keys.shape[1], place.uniform) for index, place in self._places.items()}
        return {index: value for share in distributed.gather_objects(local_places) for index, value in share.items()}


def _looked(weights: Tensor, place: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Return distance, entropy and share off the map of each image's heads, ``(B, heads)`` each."""
    queries, keys = (mask.to(weights.device) for mask in (place.queries, place.keys))
    distance = place.distance.to(weights)
    on_map = weights * keys[None, :, None, None, :]
    mass = on_map.sum(dim=-1)  # (B, n_windows, heads, Q)
    far = (on_map * distance).sum(dim=-1) / mass.clamp_min(torch.finfo(mass.dtype).tiny)
    entropy = torch.special.entr(weights).sum(dim=-1)

    def over_queries(value: Tensor) -> Tensor:
        # padding queries may attend to nothing and be NaN: they are chosen away, not multiplied by zero
        on_map = torch.where(queries[None, :, None, :], value, 0.0)
        return on_map.sum(dim=(1, 3)) / queries.sum()

    return over_queries(far), over_queries(entropy), over_queries(1 - mass)
