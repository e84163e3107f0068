"""Attention maps of layers and heads, rollout through all layers, and the numbers that they show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitscope.core.checks.option_checks import checks_options
from vitscope.core.cost.image_passes import feature_pass_cost
from vitscope.core.cost.measure_cost import Options, Workload, declares_cost
from vitscope.core.feature_pass import run_feature_pass, shares_pass
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.running_mean import estimate_lists
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.attention._map_options import (
    MapOptions,
    check_choices,
    chosen_heads,
    chosen_layers,
    object_masks,
)
from vitscope.diagnostics.attention._map_sums import MapSums
from vitscope.diagnostics.attention._placement import Query, check_query, resolved_query
from vitscope.diagnostics.attention._rollout import rollout_refusal
from vitscope.diagnostics.attention._shown_images import shown_images
from vitscope.models.structure.attention_units import AttentionUnit, attention_units_of
from vitscope.runtime import distributed
from vitscope.runtime.value_ranges import NonNegativeInt, PositiveShare
from vitscope.stats.intervals import Estimate, few_images

#: arrays of each layer, or one array where all layers have as many heads and positions
LayerArrays = np.ndarray | tuple[np.ndarray, ...]


@dataclass(frozen=True)
class AttentionMapsResult(
    Result,
    coordinates={"unit": "units", "stage": "stages", "depth": "depths"},
    untabulated=("maps", "prefix_attention", "rollout", "gradient_rollout", "images", "head_iou_pairs"),
):
    """Maps of the first images, and means over all images of the probe; half widths belong to 95% t-intervals over images.

    Arrays of layers are a tuple of one array per layer where these have different numbers of heads or positions. A network
    without attention has no layers.

    Attributes:
        units: (n_layers,) names of the chosen attention units, by depth.
        stages: (n_layers,) from 1.
        depths: (n_layers,) from 0 to 1, among all units of the model.
        n_heads: (n_layers,) heads of each, as chosen.
        n_keys: (n_layers,) keys of a query, with prefix tokens and padding.
        maps: (n_layers, n_shown, n_chosen_heads, h, w) attention of the query on each position of the keys' map; with prefix
            tokens and padding the sum is 1.
        prefix_attention: (n_layers, n_shown, n_chosen_heads, n_prefix) attention of the query on prefix tokens.
        query: ``class``, ``mean``, or row and column of a pixel, such as ``112, 112``.
        rollout: (n_shown, h, w) of the query through all layers; None where their tokens differ.
        gradient_rollout: (n_shown, h, w) relevance for the class; None likewise, or where it was not asked for.
        classes: (n_shown,) the class of the gradients; empty without any.
        sink_share: (n_layers, n_chosen_heads) share of attention on prefix tokens, mean over queries on the map; NaN in layers
            without prefix tokens.
        sink_share_half_width: (n_layers, n_chosen_heads) NaN with fewer than 128 images.
        entropy: (n_layers, n_chosen_heads) nats over all keys, mean over queries on the map.
        entropy_half_width: (n_layers, n_chosen_heads) likewise.
        head_iou: (n_layers,) intersection over union of the masks of two heads, mean over pairs; NaN of a single head.
        head_iou_half_width: (n_layers,) likewise.
        head_iou_pairs: (n_layers, n_chosen_heads, n_chosen_heads) of each pair.
        layer_iou: (n_layers, n_other_layers) of the masks of two layers, each of the mean over heads.
        layer_iou_half_width: (n_layers, n_other_layers) likewise.
        mask_iou: (n_layers, n_chosen_heads) of each head's mask with that of the object; NaN without masks.
        mask_iou_half_width: (n_layers, n_chosen_heads) likewise.
        mass: Share of a map's attention that its mask holds.
        images: (n_shown, height, width, 3) the images, 0 to 255.
        n_images: Images of the means.
        card: Conditions of the measurement.
    """

    units: tuple[str, ...]
    stages: np.ndarray
    depths: np.ndarray
    n_heads: np.ndarray
    n_keys: np.ndarray
    maps: LayerArrays
    prefix_attention: LayerArrays
    query: str
    rollout: np.ndarray | None
    gradient_rollout: np.ndarray | None
    classes: np.ndarray
    sink_share: LayerArrays
    sink_share_half_width: LayerArrays
    entropy: LayerArrays
    entropy_half_width: LayerArrays
    head_iou: np.ndarray
    head_iou_half_width: np.ndarray
    head_iou_pairs: LayerArrays
    layer_iou: np.ndarray
    layer_iou_half_width: np.ndarray
    mask_iou: LayerArrays
    mask_iou_half_width: LayerArrays
    mass: float
    images: np.ndarray
    n_images: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return means over layers and heads, the largest share on prefix tokens of a layer, and the largest IoU with a mask."""
        sinks = np.array([heads.mean() for heads in self.sink_share])
        n_layers = len(self.layer_iou)
        shares = [heads.mean() / np.log(keys) for heads, keys in zip(self.entropy, self.n_keys) if keys > 1]
        values = {
            "sink_share": _mean(sinks),
            "sink_share_largest": float(np.nanmax(sinks)) if np.isfinite(sinks).any() else np.nan,
            "entropy_share": _mean(np.array(shares)),
            "head_iou": _mean(self.head_iou),
            "layer_iou": _mean(self.layer_iou[~np.eye(n_layers, dtype=bool)]),
            "mask_iou_largest": _largest(self.mask_iou),
        }
        return {name: value for name, value in values.items() if np.isfinite(value)}


def accumulate(
    probe: Probe,
    *,
    images: NonNegativeInt = 8,
    query: Query = "auto",
    layers: Sequence[int | str] | None = None,
    heads: Sequence[int] | None = None,
    mass: PositiveShare = 0.6,
    gradient: bool = True,
    class_index: NonNegativeInt | None = None,
) -> _Sums:
    """Return what `attention_maps` keeps between batches; arguments and errors are its own."""
    return _Sums(probe, MapOptions(images, query, layers, heads, mass, gradient, class_index))


def _shown_images(workload: Workload, options: Options) -> int:
    """Return the number of images to show, which go through the model again, with those that show that images are independent."""
    n_shown = min(workload.n_images, int(options["images"]))
    n_together = min(2, n_shown, workload.first_batch)
    return n_shown + (n_together + 1 if n_together > 1 and options["gradient"] else 0)


@declares_cost(feature_pass_cost(accumulate, further_images=_shown_images))
@shares_pass(accumulate)
@record_options
@checks_options(check_query)
@checks_options(check_choices)
def attention_maps(
    probe: Probe,
    *,
    images: NonNegativeInt = 8,
    query: Query = "auto",
    layers: Sequence[int | str] | None = None,
    heads: Sequence[int] | None = None,
    mass: PositiveShare = 0.6,
    gradient: bool = True,
    class_index: NonNegativeInt | None = None,
    masks: Any = None,
) -> AttentionMapsResult:
    """Return attention maps of the first images, and statistics over all images, from explicit attention weights.

    A map is the attention of one query on each position of the keys: windows are put back in place, shifted ones are unrolled,
    and keys of a coarser grid keep it. Rollout is the product over layers of ``0.5 A + 0.5 I``, A the mean over heads (Abnar and
    Zuidema 2020). The gradient-weighted rollout is ``R <- R + mean_h(relu(dy/dA * A)) R`` from the identity, which is taken
    away at the end, with y the logit of a class (Chefer et al. 2021, "Generic attention-model explainability", self-attention).
    Both go through all layers and heads, in global attention over the same tokens in every layer.

    A mask is the fewest positions that hold the share ``mass`` of a map (Caron et al. 2021 draw those of 60 %). Masks of
    two layers are compared on the finest grid of the chosen layers, where each position takes the mask at its center. A
    network without attention, or whose attention cannot be read, has no layers, with a warning that says why.
    docs/diagnostics/attention_maps.md says how the numbers are read.

    Args:
        probe: Model and images.
        images: Number of images (the first of the probe) whose maps are kept; means are over all images.
        query: ``class`` for the class token, ``mean`` for the mean over queries on the map, or row and column of a pixel, whose
            position is the query. ``auto`` is the class token where every layer has one, else the mean.
        layers: Units by name or by number from 0, negative ones from the end, taken by depth; None for all that can be read.
        heads: Numbers of heads from 0, taken once each in ascending order; None for all. Rollouts use all heads.
        mass: Share of a map's attention that its mask holds.
        gradient: Whether to follow gradients for a class, which takes a backward pass of the first images.
        class_index: The class of the gradients; None for the model's own decision on each image.
        masks: (n_images, H, W) boolean masks of the objects in the order of the probe's images, an array or a tensor;
            ``probe.about["object_mask"]`` by default, which data sets with masks supply (``shapes``).

    Raises:
        ValueError: Residual units that are not known, an unknown layer or head, a class token that is not there, a pixel
            outside of the image, a class that the model does not have, or masks of other images.
    """
    sums = _Sums(probe, MapOptions(images, query, layers, heads, mass, gradient, class_index), masks)
    run_feature_pass(probe, [sums], "attention maps")
    return sums.result()


class _Sums(MapSums):
    """Sums that are kept between batches."""

    reads_maps = False

    def __init__(self, probe: Probe, options: MapOptions, masks: Any = None) -> None:
        self.probe, self.gradient, self.class_index = probe, options.gradient, options.class_index
        units, self.unread = attention_units_of(probe)
        self.attention_units: Sequence[AttentionUnit] = units
        self.refusal = rollout_refusal(units, self.unread)
        places = chosen_layers(units, options.layers)
        layers = [units[place] for place in places]
        super().__init__(
            units,
            places,
            chosen_heads(layers, options.heads),
            query=resolved_query(probe.model, layers, options.query),
            mass=options.mass,
            n_shown=options.images,
            follows=options.images > 0 and not self.refusal,
            masks=object_masks(probe, masks),
            batch_size=probe.batch_size,
        )

    def result(self) -> AttentionMapsResult:
        """Return the maps and the means."""
        layers = [self.units[i] for i in self.layers]
        maps, prefix, followed = self.shown()
        first_images = shown_images(
            self.probe, self.n_shown, self.units, self.query, self.class_index, self.follows and self.gradient
        )
        n = len(layers)
        sink, entropy, head_iou, pairs, mask_iou, (layer_iou,) = estimate_lists(
            [self.sink, self.entropy, self.head_iou, self.head_pairs, self.mask_iou, [self.layer_iou]]
        )
        n_heads = [len(heads) for heads in self.heads]
        n_images = sum(distributed.gather_objects(self.n_images))
        self._say_what_is_null(layers, [e.mean for e in entropy], first_images.refusal, n_images)
        return AttentionMapsResult(
            units=tuple(unit.name for unit in layers),
            stages=np.array([unit.unit.stage for unit in layers]),
            depths=np.array([unit.unit.depth for unit in layers], dtype=np.float64),
            n_heads=np.array(n_heads),
            n_keys=np.array([unit.keys.shape[1] for unit in layers]),
            maps=_of_layers(maps, 5),
            prefix_attention=_of_layers(prefix, 4),
            query=_query_text(self.query),
            rollout=followed,
            gradient_rollout=first_images.relevance,
            classes=first_images.classes,
            sink_share=_means_of_heads(sink, n_heads),
            sink_share_half_width=_half_widths_of_heads(sink, n_heads),
            entropy=_of_layers([e.mean for e in entropy]),
            entropy_half_width=_of_layers([e.half_width for e in entropy]),
            head_iou=np.array([e.mean for e in head_iou]),
            head_iou_half_width=np.array([e.half_width for e in head_iou]),
            head_iou_pairs=_of_layers([e.mean for e in pairs], 3),
            layer_iou=layer_iou.mean.reshape(n, n) if n else np.zeros((0, 0)),
            layer_iou_half_width=layer_iou.half_width.reshape(n, n) if n else np.zeros((0, 0)),
            mask_iou=_means_of_heads(mask_iou, n_heads),
            mask_iou_half_width=_half_widths_of_heads(mask_iou, n_heads),
            mass=self.mass,
            images=first_images.pixels,
            n_images=n_images,
            card=self.probe.card(),
        )

    def _say_what_is_null(
        self, layers: Sequence[AttentionUnit], entropies: Sequence[np.ndarray], no_relevance: str, n_images: int
    ) -> None:
        if not layers:
            warn_nulls("attention_maps", self.unread or {"attention": "the network has none"})
            return
        reasons: dict[str, str] = {name: f"{reason}, left out" for name, reason in self.unread.items()}
        reasons |= {u.name: "its weights are not finite" for u, e in zip(layers, entropies) if not np.isfinite(e).all()}
        if self.refusal:
            reasons["rollout"] = self.refusal
        elif no_relevance:
            reasons["gradient_rollout"] = no_relevance
        without_prefix = [unit.name for unit, sums in zip(layers, self.sink) if not sums.count and self.n_images]
        if without_prefix:
            names = "all layers" if len(without_prefix) == len(layers) else ", ".join(without_prefix)
            reasons[f"sink_share of {names}"] = "no prefix tokens"
        single = [unit.name for unit, heads in zip(layers, self.heads) if len(heads) == 1]
        if single:
            reasons[f"head_iou of {', '.join(single)}"] = "a single head"
        warn_nulls("attention_maps", reasons | few_images(n_images))


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


def _largest(rows: LayerArrays) -> float:
    """Return the largest finite value of all rows; NaN without one."""
    values = np.concatenate([*(np.ravel(row) for row in rows), np.zeros(0)])
    values = values[np.isfinite(values)]
    return float(values.max()) if len(values) else float("nan")


def _of_layers(arrays: Sequence[np.ndarray], n_axes: int = 2) -> LayerArrays:
    """Return one array, with ``n_axes`` axes, where all layers have the same shape, else a tuple of them."""
    if not arrays:
        return np.zeros((0,) * n_axes)
    return np.stack(arrays) if len({array.shape for array in arrays}) == 1 else tuple(arrays)


def _means_of_heads(layers: Sequence[Estimate], n_heads: Sequence[int]) -> LayerArrays:
    return _of_layers([_filled(layer.mean, heads) for layer, heads in zip(layers, n_heads)])


def _half_widths_of_heads(layers: Sequence[Estimate], n_heads: Sequence[int]) -> LayerArrays:
    return _of_layers([_filled(layer.half_width, heads) for layer, heads in zip(layers, n_heads)])


def _filled(values: np.ndarray, n_heads: int) -> np.ndarray:
    """Return the values of heads, NaN where nothing was added."""
    return values if values.ndim else np.full(n_heads, np.nan)


def _query_text(query: Query) -> str:
    return query if isinstance(query, str) else ", ".join(f"{side:g}" for side in query)
