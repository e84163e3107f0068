"""Similarity of the representations of two layers: unbiased mini-batch CKA (Figs 10a and D.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitscope.core.cost.image_passes import feature_pass_cost
from vitscope.core.cost.measure_cost import ENTRY, Options, Workload, declares_cost
from vitscope.core.feature_pass import run_feature_pass, shares_pass
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import TAP_COORDINATES, Result
from vitscope.core.tap import Tap
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.cka._blocks import block_structure, p_value
from vitscope.diagnostics.cka._hsic import MIN_IMAGES, gram, hsic
from vitscope.diagnostics.cka._representations import all_taps
from vitscope.diagnostics.cka._two_models import IMAGES_OF_OTHER, shows_one_model, tap_fields_of_both, through_both
from vitscope.runtime import distributed
from vitscope.runtime.value_ranges import NonNegativeInt, Seed

#: columns of the second model in tables
_OTHER_COORDINATES = {f"other_{column}": f"other_{name}" for column, name in TAP_COORDINATES.items()}


@dataclass(frozen=True)
class CKAResult(
    Result,
    coordinates=TAP_COORDINATES | {f"other_{column}": f"other_{name}" for column, name in TAP_COORDINATES.items()},
):
    """Similarities are ratios of averaged unbiased estimates: they may leave [0, 1] by chance and are not clipped.

    Attributes:
        taps: (n_taps,) names, by depth.
        kinds: (n_taps,) such as ``msa``.
        stages: (n_taps,) from 0, the stem.
        depths: (n_taps,) from 0 to 1.
        other_taps: (n_other_taps,) of the second model; those of the first where there is none. Likewise the next three.
        other_kinds: (n_other_taps,) see above.
        other_stages: (n_other_taps,) see above.
        other_depths: (n_other_taps,) see above.
        similarity: (n_taps, n_other_taps); NaN where a representation does not vary or is not finite.
        standard_error: (n_taps, n_other_taps) jackknife over batches, whose square is right on average (up to 20 %
            too large for few small batches); NaN with a single batch.
        block_structure: Mean similarity of pairs of taps within a stage minus that of pairs across stages, at each distance in
            taps, averaged over distances with the smaller of the two numbers of pairs as weight; None between two models, and
            where all blocks are in one stage.
        block_structure_p: One-sided p-value, the measured value counted, under stage boundaries drawn at random among all
            places between two taps; None likewise, or without permutations.
        n_images: Images used.
        n_batches: Batches used.
        card: Conditions of the measurement.
    """

    taps: tuple[str, ...]
    kinds: tuple[str, ...]
    stages: np.ndarray
    depths: np.ndarray
    other_taps: tuple[str, ...]
    other_kinds: tuple[str, ...]
    other_stages: np.ndarray
    other_depths: np.ndarray
    similarity: np.ndarray
    standard_error: np.ndarray
    block_structure: float | None
    block_structure_p: float | None
    n_images: int
    n_batches: int
    card: ObjectiveCard | None = None

    @property
    def is_within_model(self) -> bool:
        """Whether layers of one model are compared with each other."""
        return shows_one_model(self.taps, self.other_taps, self.card)

    def scalars(self) -> dict[str, float]:
        """Return the block structure and the mean similarity (of different layers, within one model)."""
        values = self.similarity
        if self.is_within_model:
            values = values[~np.eye(len(values), dtype=bool)]
        values = values[np.isfinite(values)]
        scalars = {"mean_similarity": float(values.mean()) if len(values) else None}
        scalars |= {"block_structure": self.block_structure, "block_structure_p": self.block_structure_p}
        return {name: value for name, value in scalars.items() if value is not None}


def accumulate(probe: Probe, *, n_permutations: int = 1000, seed: int = 0) -> _Sums:
    """Return what `cka` within one model keeps between batches; arguments and errors are its own."""
    probe.check_taps()
    return _Sums(probe, None, n_permutations, seed)


def _result_bytes(workload: Workload, options: Options) -> float | None:
    """Return the bytes of stages and depths of both sides and two numbers for each pair of taps."""
    if workload.map_sizes is None:
        return None
    n = len(workload.map_sizes)
    return ENTRY * (4 * n + 2 * n * n)


@declares_cost(feature_pass_cost(accumulate, _result_bytes))
@shares_pass(accumulate)
@record_options
def cka(
    probe: Probe, other: Probe | None = None, *, n_permutations: NonNegativeInt = 1000, seed: Seed = 0
) -> CKAResult:
    """Compare every pair of feature maps, within a model or between two, on the same images.

    Centered kernel alignment with linear kernels of the flattened maps (all positions and channels, prefix tokens left
    out): ``mean HSIC_1(K, L) / sqrt(mean HSIC_1(K, K) mean HSIC_1(L, L))``, HSIC_1 unbiased, averaged over mini-batches
    weighted by their images. Source: Nguyen et al. (2021), section 3; docs/definitions.md section 7.

    Args:
        probe: Model, images and taps; at least four images a batch.
        other: A second model with the same images in the same batches (each with its own normalization).
        n_permutations: Stage boundaries drawn for the null of the block structure; 0 leaves the p-value out.
        seed: Seed of the drawn stage boundaries.

    Raises:
        ValueError: A probe without taps, no batch of four images, images or targets that differ between the probes or come in
            another order, or a tap that was not reached.
    """
    for each in (probe, other or probe):
        each.check_taps()
    sums = _Sums(probe, other, n_permutations, seed)
    if other is None:
        run_feature_pass(probe, [sums], "cka")
    else:
        through_both(probe, other, sums, "cka")
    return sums.result()


class _Sums:
    """Sums that are kept between batches: the HSIC of every pair of taps, a small matrix a batch."""

    def __init__(self, probe: Probe, other: Probe | None, n_permutations: int, seed: int) -> None:
        self.probe, self.other, self.n_permutations, self.seed = probe, other, n_permutations, seed
        self.parts: list[tuple[int, int, np.ndarray]] = []  # batch, images, (S + T, S + T)
        self._grams: dict[int, Tensor] = {}
        self.relations: set[str] = set()  # how the second model's images are related to the first's

    def read(self, index: int, tap: Tap, x: Tensor) -> None:
        """Take one tap's feature maps ``(B, C, h, w)``."""
        if len(x) >= MIN_IMAGES:
            self._grams[index] = gram(x)

    def close_batch(self, number: int, n_images: int) -> None:
        """Compare the batch's maps, the first model's and the second's."""
        if n_images < MIN_IMAGES:
            return
        taps = all_taps(self.probe, self.other)
        for index, tap in enumerate(taps):
            if index not in self._grams:
                raise ValueError(
                    f"Expected a feature map at tap {tap.name!r}, received none: the model did not run it."
                )
        stacked = torch.stack([self._grams[index] for index in range(len(taps))])
        self.parts.append((number, n_images, hsic(stacked, stacked).cpu().numpy()))
        self._grams.clear()

    def result(self) -> CKAResult:
        """Return the similarities over the batches of all ranks."""
        probe, other = self.probe, self.other
        gathered = sorted(part for share in distributed.gather_objects(self.parts) for part in share)
        if not gathered:
            raise ValueError(
                f"Expected batches of at least {MIN_IMAGES} images for the unbiased estimator, received none."
            )
        weights = np.array([n for _, n, _ in gathered], dtype=np.float64)
        values = np.stack([hsic_ for _, _, hsic_ in gathered])  # (n_batches, S + T, S + T)
        if len(gathered) < probe.n_batches:
            n_skipped = probe.n_batches - len(gathered)
            warn_nulls("cka", {f"{n_skipped} batch(es)": f"fewer than {MIN_IMAGES} images, left out"})
        s, total = len(probe.taps), np.tensordot(weights, values, 1)
        similarity = _ratio(total, s, other is not None)
        _say_what_is_null(total, all_taps(probe, other))
        stages = np.array([tap.stage for tap in probe.taps])
        n_stages = len(set(stages[stages > 0]))  # stage 0 is the stem
        has_blocks = other is None and n_stages > 1
        p = p_value(similarity, stages, self.n_permutations, self.seed) if has_blocks else None
        return CKAResult(
            **tap_fields_of_both(probe, other or probe),
            similarity=similarity,
            standard_error=_jackknife(weights, values, s, other is not None),
            block_structure=block_structure(similarity, stages) if has_blocks else None,
            block_structure_p=p,
            n_images=int(weights.sum()),
            n_batches=len(gathered),
            card=probe.card(**self._facts()),
        )

    def _facts(self) -> dict[str, dict[str, str]]:
        if self.other is None:
            return {}
        relations = set[str]().union(*distributed.gather_objects(self.relations))
        return {"solver": {IMAGES_OF_OTHER: "; ".join(sorted(relations))}}


def _ratio(total: np.ndarray, n_first: int, between: bool) -> np.ndarray:
    rows, columns = slice(n_first), slice(n_first, None) if between else slice(None)
    scale = np.sqrt(np.where(np.diagonal(total) > 0, np.diagonal(total), np.nan))
    return total[rows, columns] / np.outer(scale[rows], scale[columns])


def _jackknife(weights: np.ndarray, values: np.ndarray, n_first: int, between: bool) -> np.ndarray:
    n = len(values)
    total = np.tensordot(weights, values, 1)
    left_out = np.stack([_ratio(total - w * v, n_first, between) for w, v in zip(weights, values)])
    if n < 2:
        return np.full(left_out.shape[1:], np.nan)
    return np.sqrt((n - 1) / n * np.square(left_out - left_out.mean(0)).sum(0))


def _say_what_is_null(total: np.ndarray, taps: Sequence[Tap]) -> None:
    reasons = {}
    for tap, self_similarity in zip(taps, np.diagonal(total)):
        if not np.isfinite(self_similarity):
            reasons[tap.name] = "its activations are not finite"
        elif self_similarity == 0:
            reasons[tap.name] = "it does not vary between images"
        elif self_similarity < 0:
            reasons[tap.name] = "its own HSIC is below zero: more images are needed"
    warn_nulls("cka", reasons)
