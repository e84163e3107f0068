"""Running sums over images of what attention maps show, and the maps of the first images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscope.core.running_mean import RunningMean
from vitscope.core.shared_values.entropy_terms import entropy_terms, row_entropies
from vitscope.core.tap import Tap
from vitscope.diagnostics.attention._overlap import (
    covered,
    masks_of_layers,
    mean_of_pairs,
    overlaps,
    resized,
    where_finite,
)
from vitscope.diagnostics.attention._placement import Query, placed, selection
from vitscope.diagnostics.attention._rollout import Rollout, row_maps
from vitscope.models.structure.attention_units import AttentionUnit
from vitscope.runtime import distributed

#: number of a batch and arrays of its first images: maps and prefix attention of each layer, and the rollout
KeptBatch = tuple[int, list[np.ndarray], list[np.ndarray], "np.ndarray | None"]


class MapSums:
    """Sums over images for each chosen layer, and maps of the first ``n_shown`` images.

    Args:
        units: All units whose attention can be read, by depth.
        layers: Places of the chosen ones in ``units``.
        heads: Chosen heads of each of them.
        query: Query that `resolved_query` returned.
        mass: Share of a map's mass that its mask holds.
        n_shown: Images whose maps are kept.
        follows: Whether the rollout is followed through all units.
        masks: (n_images, H, W) masks of the objects in the order of the images, or None.
        batch_size: Images of each batch but the last, which tells the images of a batch among the masks.
    """

    def __init__(
        self,
        units: Sequence[AttentionUnit],
        layers: Sequence[int],
        heads: Sequence[Sequence[int]],
        *,
        query: Query,
        mass: float,
        n_shown: int,
        follows: bool,
        masks: Tensor | None,
        batch_size: int,
    ) -> None:
        self.units, self.layers, self.heads, self.query = list(units), list(layers), [list(h) for h in heads], query
        self.mass, self.n_shown, self.follows = mass, n_shown, follows
        self.masks, self.batch_size = masks, batch_size
        self.selections = [selection(units[i], query) for i in layers]
        self.on_map = [_queries_on_map(units[i]) for i in layers]
        self.sink, self.entropy, self.head_iou, self.head_pairs, self.mask_iou = (
            [RunningMean() for _ in layers] for _ in range(5)
        )
        self.layer_iou = RunningMean()
        self.n_images = 0
        self.kept: list[KeptBatch] = []
        self._n_kept = 0
        self._maps: dict[int, Tensor] = {}
        self._prefix: dict[int, Tensor] = {}
        self._rollout = Rollout()

    def read(self, index: int, tap: Tap, x: Tensor) -> None:
        """Feature maps are not needed."""

    def read_attention(self, index: int, unit: AttentionUnit, weights: Tensor) -> None:
        """Take a unit's attention weights ``(B * n_windows, heads, queries, keys)``."""
        n_needed = self.n_shown - self._n_kept
        if self.follows and n_needed > 0:
            self._rollout.follow(weights[:n_needed].detach().double())
        if index not in self.layers:
            return
        place = self.layers.index(index)
        entropies = row_entropies(entropy_terms(weights))  # (B * n_windows, heads, queries)
        if len(self.heads[place]) < unit.n_heads:
            weights, entropies = weights[:, self.heads[place]], entropies[:, self.heads[place]]
        self._maps[place], self._prefix[place] = placed(weights, unit, self.selections[place])
        windows = weights.unflatten(0, (-1, unit.n_windows))  # (B, n_windows, heads, queries, keys)
        prefix = unit.prefix_keys
        if len(prefix):
            on_prefix = windows[..., prefix.to(windows.device)].sum(dim=-1, dtype=torch.float64)
            self.sink[place].add(_over_queries(on_prefix, self.on_map[place]))
        self.entropy[place].add(_over_queries(entropies.unflatten(0, (-1, unit.n_windows)), self.on_map[place]))

    def close_batch(self, number: int, n_images: int) -> None:
        """Add what needs the maps of all layers of a batch, and keep those of the first images."""
        self.n_images += n_images
        if not self.layers:
            return
        maps = [self._maps[place] for place in range(len(self.layers))]
        masks = masks_of_layers(maps, self.mass)
        finite = [layer.flatten(2).isfinite().all(dim=-1) for layer in maps]  # (B, heads) of each layer
        for place, layer in enumerate(masks):
            overlap = where_finite(overlaps(layer, layer), finite[place], finite[place])
            self.head_pairs[place].add(overlap)
            self.head_iou[place].add(mean_of_pairs(overlap))
        size = (max(layer.shape[2] for layer in maps), max(layer.shape[3] for layer in maps))
        means = masks_of_layers([layer.mean(dim=1, keepdim=True) for layer in maps], self.mass)
        common = torch.cat([resized(layer, size) for layer in means], dim=1)  # (B, n_layers, h, w)
        all_finite = torch.stack([heads.all(dim=1) for heads in finite], dim=1)  # (B, n_layers)
        self.layer_iou.add(where_finite(overlaps(common, common), all_finite, all_finite))
        if self.masks is not None:
            self._compare_with_masks(masks, finite, number, n_images)
        n_needed = self.n_shown - self._n_kept
        if n_needed > 0 or not self.kept:  # of no images, the shapes
            self._keep(number, maps, n_needed)
        self._maps.clear()
        self._prefix.clear()
        self._rollout = Rollout()

    def _compare_with_masks(
        self, masks: Sequence[Tensor], finite: Sequence[Tensor], number: int, n_images: int
    ) -> None:
        assert self.masks is not None
        first = number * self.batch_size
        objects = self.masks[first : first + n_images].to(masks[0].device)
        for place, layer in enumerate(masks):
            object_masks = covered(objects, (layer.shape[2], layer.shape[3]))
            has_object = object_masks.flatten(1).any(dim=1)  # an object smaller than half a position has no mask
            if bool(has_object.any()):
                overlap = overlaps(layer[has_object], object_masks[has_object])  # (B, heads, 1)
                finite_heads = finite[place][has_object]  # (B, heads)
                self.mask_iou[place].add(
                    where_finite(overlap, finite_heads, torch.ones_like(finite_heads[:, :1]))[..., 0]
                )

    def _keep(self, number: int, maps: Sequence[Tensor], n_needed: int) -> None:
        first_maps = [layer[:n_needed].cpu().numpy() for layer in maps]
        prefix = [self._prefix[place][:n_needed].cpu().numpy() for place in range(len(maps))]
        product = self._rollout.product
        followed = None if product is None else row_maps(product, self.units[0], self.query).cpu().numpy()
        self.kept.append((number, first_maps, prefix, followed))
        self._n_kept += len(first_maps[0])

    def shown(self) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray | None]:
        """Return maps and prefix attention of each layer (n_shown, ...) and the rollout of the first images of all ranks."""
        batches = sorted((batch for share in distributed.gather_objects(self.kept) for batch in share), key=_number)
        n_layers = range(len(self.layers))
        maps = [np.concatenate([batch[1][i] for batch in batches])[: self.n_shown] for i in n_layers]
        prefix = [np.concatenate([batch[2][i] for batch in batches])[: self.n_shown] for i in n_layers]
        followed = [batch[3] for batch in batches if batch[3] is not None]
        return maps, prefix, np.concatenate(followed)[: self.n_shown] if followed else None


def _number(batch: Any) -> int:
    return batch[0]


def _queries_on_map(unit: AttentionUnit) -> Tensor:
    """Return the queries that numbers are averaged over: those on the map, or all of a unit whose queries are prefix tokens."""
    on_map = unit.queries[..., 0] >= 0
    return on_map if bool(on_map.any()) else torch.ones_like(on_map)


def _over_queries(values: Tensor, on_map: Tensor) -> Tensor:
    """Return the mean (B, heads) of values (B, n_windows, heads, queries) over the queries (n_windows, queries) on the map."""
    on_map = on_map.to(values.device)
    # padding queries may attend to nothing and be NaN: they are chosen away, not multiplied by zero
    values_on_map = torch.where(on_map[None, :, None, :], values, 0.0)
    return values_on_map.sum(dim=(1, 3)) / on_map.sum()
