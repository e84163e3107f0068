"""How alike the representations of two layers are: unbiased mini-batch CKA (Figs 10a and D.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor, nn

from vitscope import distributed
from vitscope.diagnostics.cka._blocks import block_structure, p_value
from vitscope.diagnostics.cka._hsic import MIN_IMAGES, gram, hsic
from vitscope.models.taps import Tap, reading
from vitscope.nulls import warn_nulls
from vitscope.probe import ObjectiveCard, Probe
from vitscope.progress import track


@dataclass(frozen=True)
class CKAResult:
    """Similarities are ratios of averaged unbiased estimates: they may leave [0, 1] by chance and are not clipped.

    Attributes:
        taps: (n_taps,) names, by depth.
        kinds: (n_taps,) such as ``msa``.
        stages: (n_taps,) from 0, the stem.
        depths: (n_taps,) from 0 to 1.
        other_taps: (n_other,) of the second model; those of the first where there is none. Likewise the next three.
        other_kinds: see above.
        other_stages: see above.
        other_depths: see above.
        similarity: (n_taps, n_other); NaN where a representation does not vary or is not finite.
        standard_error: (n_taps, n_other), jackknife over batches; NaN with a single batch.
        block_structure: similarity within minus across stages at equal distance; None between two models or within
            one stage.
        block_structure_p: one-sided p-value under stage boundaries drawn at random; None likewise.
        n_images: images used.
        n_batches: batches used.
        card: the conditions.
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

    def scalars(self) -> dict[str, float]:
        """Return the block structure and the mean similarity (of different layers, within one model)."""
        values = self.similarity
        if self.block_structure is not None or self.taps == self.other_taps:
            values = values[~np.eye(len(values), dtype=bool)]
        values = values[np.isfinite(values)]
        found = {"mean_similarity": float(values.mean()) if len(values) else None}
        found |= {"block_structure": self.block_structure, "block_structure_p": self.block_structure_p}
        return {name: value for name, value in found.items() if value is not None}


def cka(probe: Probe, other: Probe | None = None, *, n_permutations: int = 1000, seed: int = 0) -> CKAResult:
    """Compare every pair of feature maps, within a model or between two, on the same images.

    Centred kernel alignment with linear kernels of the flattened maps (all positions and channels, prefix tokens left
    out): ``mean HSIC_1(K, L) / sqrt(mean HSIC_1(K, K) mean HSIC_1(L, L))``, HSIC_1 unbiased, averaged over mini-batches
    weighted by their images. Source: Nguyen et al. (2021), section 3; PAPER.md section 7.

    Args:
        probe: model, images and taps; at least four images a batch.
        other: a second model with the same images in the same batches (each with its own normalisation).
        n_permutations: stage boundaries drawn for the null of the block structure.
        seed: of that draw.

    Raises:
        ValueError: no batch of four images, batches that differ between the probes, or a tap that was not reached.
    """
    second = other or probe
    parts = list(_hsic_of_batches(probe, other))
    gathered = sorted(part for share in distributed.gather_objects(parts) for part in share)
    if not gathered:
        raise ValueError(f"Expected batches of at least {MIN_IMAGES} images for the unbiased estimator, received none.")
    weights = np.array([n for _, n, _ in gathered], dtype=np.float64)
    values = np.stack([hsic_ for _, _, hsic_ in gathered])  # (n_batches, S + T, S + T)
    if len(gathered) < probe.n_batches:
        warn_nulls("cka", {f"{probe.n_batches - len(gathered)} batch(es)": f"fewer than {MIN_IMAGES} images, left out"})
    s = len(probe.taps)
    similarity = _ratio(np.tensordot(weights, values, 1), s, other is not None)
    _say_what_is_null(np.tensordot(weights, values, 1), (*probe.taps, *(second.taps if other else ())))
    stages = np.array([tap.stage for tap in probe.taps])
    return CKAResult(
        **_describe(probe.taps, ""),
        **_describe(second.taps, "other_"),
        similarity=similarity,
        standard_error=_jackknife(weights, values, s, other is not None),
        block_structure=block_structure(similarity, stages) if other is None else None,
        block_structure_p=p_value(similarity, stages, n_permutations, seed) if other is None else None,
        n_images=int(weights.sum()),
        n_batches=len(gathered),
        card=probe.card(),
    )


def _hsic_of_batches(probe: Probe, other: Probe | None) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield ``(index, images, HSIC of every pair of taps)`` of each batch of this rank that is large enough."""
    seconds = other.local_batches() if other else ()
    with probe.guard() as model, (other or probe).guard() as other_model:
        for first, second in zip_longest(track(probe.local_batches(), "cka"), seconds):
            if other is not None:
                _check_same(first, second)
            index, (x, _) = first
            if len(x) < MIN_IMAGES:
                continue
            grams = _grams(model, probe.taps, x)
            if other is not None:
                grams += _grams(other_model, other.taps, second[1][0])
            stacked = torch.stack(grams)
            yield index, len(x), hsic(stacked, stacked).cpu().numpy()


def _grams(model: nn.Module, taps: Sequence[Tap], x: Tensor) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    with reading(model, taps, lambda index, _, features: found.__setitem__(index, gram(features))):
        model(x)
    for index, tap in enumerate(taps):
        if index not in found:
            raise ValueError(f"Expected a feature map at tap {tap.name!r}, received none: the model did not run it.")
    return [found[index] for index in range(len(taps))]


def _check_same(first: tuple | None, second: tuple | None) -> None:
    if first is None or second is None:
        raise ValueError(
            "Expected the same images in the same batches of both probes, received more batches in one of them."
        )
    labels, others = (batch[1][1].cpu() for batch in (first, second))
    if not torch.equal(labels, others):
        what = (
            "that differ"
            if labels.shape == others.shape
            else f"of shapes {tuple(labels.shape)} and {tuple(others.shape)}"
        )
        raise ValueError(f"Expected the same images in the same batches of both probes, received targets {what}.")


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
    for tap, own in zip(taps, np.diagonal(total)):
        if not np.isfinite(own):
            reasons[tap.name] = "its activations are not finite"
        elif own == 0:
            reasons[tap.name] = "it does not vary between images"
        elif own < 0:
            reasons[tap.name] = "its own HSIC is below zero: more images are needed"
    warn_nulls("cka", reasons)


def _describe(taps: Sequence[Tap], prefix: str) -> dict:
    return {
        f"{prefix}taps": tuple(tap.name for tap in taps),
        f"{prefix}kinds": tuple(tap.kind for tap in taps),
        f"{prefix}stages": np.array([tap.stage for tap in taps]),
        f"{prefix}depths": np.array([tap.depth for tap in taps]),
    }
