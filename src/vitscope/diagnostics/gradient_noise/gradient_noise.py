"""Noise scale of the gradient and coherence of the gradients of images, by kind of parameter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch

from vitscope.core.cost.image_passes import GRADIENT, TAPS
from vitscope.core.cost.measure_cost import ENTRY, Count, MeasureCost, Options, Work, Workload, WorkUnit, declares_cost
from vitscope.core.losses.requirements import check_image_losses
from vitscope.core.losses.targets import labeled
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.gradient_noise._gradient_sums import GradientSums
from vitscope.diagnostics.gradient_noise._hessian_moments import HessianMoments, hessian_moments
from vitscope.diagnostics.gradient_noise._noise_statistics import (
    LEAST_EFFECTIVE_IMAGES,
    NoiseStatistics,
    effective_images,
)
from vitscope.linalg.curvature.curvature_options import CurvatureArguments, CurvatureOptions, curvature_arguments
from vitscope.linalg.curvature.operator_factory import Curvatures, curvatures
from vitscope.linalg.curvature.product_cost import curvature_options, mean_products, product_checks
from vitscope.linalg.per_example_gradients import MOST_IMAGES, PerExampleGradients
from vitscope.models.structure.parameter_groups import KIND_ORDER, kinds_of_probe
from vitscope.runtime.value_ranges import NonNegativeInt
from vitscope.stats.intervals import LEAST_IMAGES, few_images

#: error of a gradient's direction, in radians, from which images are counted as short
_DIRECTION_ERROR = 0.01

#: name of the group of all parameters
ALL = "all"


@dataclass(frozen=True)
class GradientNoiseResult(Result, coordinates={"group": "groups"}):
    """Moments of the gradients of images; of all parameters first, then of each kind. Numbers that are not defined are NaN.

    With the gradient g_i of the loss of image i, their mean g, and expectations over images:

    Attributes:
        groups: (n_groups,) ``all``, then kinds of unit such as ``msa``; ``all`` alone where the model's units are not known.
        n_parameters: (n_groups,) parameters of each.
        gradient_square_norm: (n_groups,) unbiased estimate of ``|E g_i|^2``; it can be negative.
        trace_covariance: (n_groups,) unbiased estimate of the trace of the covariance of g_i.
        noise_scale: (n_groups,) their ratio ``tr(Sigma) / |E g_i|^2``, in images: the simple noise scale; NaN where the gradient
            cannot be told from zero.
        noise_scale_interval: (n_groups, 2) 95 %, by the jackknife; the upper end is infinite where the gradient may be zero. NaN
            with fewer than 128 images, or where less than 16 of them make the sum of ``|g_i|^2`` (`effective_images`).
        coherence: (n_groups,) ``E g_i . g_j / E |g_i|^2`` of two images, unbiased in both parts; 1 where all gradients are
            equal, 0 where they have no common part.
        coherence_interval: (n_groups, 2) likewise.
        m_coherence: (n_groups,) ``n |g|^2 / mean |g_i|^2`` on these n images, from 0 to n; 1 for orthogonal gradients.
        mean_cosine: (n_groups,) mean cosine of the angle between the gradients of two images, each restricted to the group.
        mean_cosine_interval: (n_groups, 2) likewise.
        gsnr: (n_groups,) mean over parameters of the squared expectation of a gradient's entry over its variance, with the bias
            of the square removed; parameters whose entries do not vary are left out.
        square_norms: (n_groups, n_images) ``|g_i|^2`` of the images with a label.
        effective_images: (n_groups,) ``(sum |g_i|^2)^2 / sum |g_i|^4``: images of equal length that would vary as much.
        hessian_noise_scale: ``tr(H Sigma) / (G^T H G)`` of all parameters, in images; NaN where it was not asked for, or where
            one of the parts is not positive.
        trace_hessian_covariance: Estimate of ``tr(H Sigma)``; NaN likewise.
        trace_hessian_covariance_error: Standard error of that estimate over random vectors; NaN likewise.
        gradient_curvature: Unbiased estimate of ``G^T H G`` with ``G = E g_i``; NaN likewise.
        card: Conditions of the measurement.
    """

    groups: tuple[str, ...]
    n_parameters: np.ndarray
    gradient_square_norm: np.ndarray
    trace_covariance: np.ndarray
    noise_scale: np.ndarray
    noise_scale_interval: np.ndarray
    coherence: np.ndarray
    coherence_interval: np.ndarray
    m_coherence: np.ndarray
    mean_cosine: np.ndarray
    mean_cosine_interval: np.ndarray
    gsnr: np.ndarray
    square_norms: np.ndarray
    effective_images: np.ndarray
    hessian_noise_scale: float
    trace_hessian_covariance: float
    trace_hessian_covariance_error: float
    gradient_curvature: float
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return what is logged: noise scale, coherence and mean cosine of all parameters and of each kind, where defined."""
        logged = {"trace_covariance": self.trace_covariance[0], "gradient_square_norm": self.gradient_square_norm[0]}
        for i, group in enumerate(self.groups):
            logged |= {f"noise_scale_{group}": self.noise_scale[i], f"coherence_{group}": self.coherence[i]}
            logged |= {f"mean_cosine_{group}": self.mean_cosine[i], f"gsnr_{group}": self.gsnr[i]}
        logged["hessian_noise_scale"] = self.hessian_noise_scale
        return {name: float(value) for name, value in logged.items() if np.isfinite(value)}


@contextmanager
def _image_gradients(probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
    with _gradient_sums(probe, options) as sums:
        yield sums.first_pass


@contextmanager
def _image_products(probe: Probe, options: Options) -> Iterator[Callable[[], object]]:
    with _gradient_sums(probe, options) as sums:
        first = sums.first_pass()
        yield lambda: sums.products(first)


@contextmanager
def _gradient_sums(probe: Probe, options: Options) -> Iterator[GradientSums]:
    subset_options = curvature_options(options)
    groups = _groups(probe, subset_options)
    with curvatures(probe, subset_options) as operators:
        yield GradientSums(operators, _per_example_gradients(operators), groups)


_OPTIONS = ("parameters", "dtype", "micro_batch")
#: the gradients of each image and their sums
_IMAGE_GRADIENTS = WorkUnit("gradient of each image", _image_gradients, _OPTIONS)
#: the gradients of each image and their products with these sums
_IMAGE_PRODUCTS = WorkUnit("gradient of each image, products with their sums", _image_products, _OPTIONS)


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return one pass with the gradients of each image, another for intervals, and what the curvature takes.

    The first images are differentiated once more to check the gradients. A random vector of the curvature takes a gradient and
    a product, and one product more is along the mean gradient.
    """
    n, n_vectors = workload.n_images, int(options["n_hessian_vectors"])
    n_at_once = min(workload.first_batch, options["micro_batch"] or MOST_IMAGES)
    works = [Work(_IMAGE_GRADIENTS, Count.exactly(1), n)]
    if n >= LEAST_IMAGES:
        works.append(Work(_IMAGE_PRODUCTS, Count.exactly(1), n))
    works += [
        Work(TAPS, Count.exactly(1), workload.first_batch, is_divided=False),
        Work(GRADIENT, Count.exactly(1), n_at_once, is_divided=False, is_check=True),
        *product_checks(workload, options),
    ]
    if n_vectors:
        products = MeasureCost(mean_products(workload, options, Count.exactly(n_vectors + 1)))
        works += [Work(GRADIENT, Count.exactly(n_vectors), n), *products.measured().works]
    return MeasureCost(works, held_bytes=4.0 * ENTRY * workload.n_parameters)


@declares_cost(_cost)
@record_options
@curvature_arguments("parameters", "dtype", "micro_batch", "seed")
def gradient_noise(
    probe: Probe,
    *,
    n_hessian_vectors: NonNegativeInt = 0,
    **curvature: Unpack[CurvatureArguments],
) -> GradientNoiseResult:
    """Measure the noise of the gradient over images, and how much the gradients of images agree.

    The simple noise scale ``tr(Sigma) / |G|^2`` is the batch size, in images, at which noise and signal of the gradient are
    equal. G and Sigma are of the data term: the L2 term is the same for all images, and is left out. Each gradient is that of one
    image in eval mode, so that BatchNorm uses its running statistics.

    Args:
        probe: The model, batches and objective; batches are split over ranks. Images without a label are left out.
        n_hessian_vectors: Random vectors for ``tr(H Sigma)``, each a gradient and a Hessian-vector product over all images; 0 to
            leave the noise scale with the Hessian out.
        curvature: ``parameters``, ``dtype``, ``micro_batch`` (images whose gradients are in memory at once; None for as many
            as an eighth of the free memory holds, at most 64), ``seed``: see
            `vitscope.linalg.curvature.curvature_options.CurvatureOptions`.

    Raises:
        ValueError: Fewer than 3 images with a label, BatchNorm without running statistics or other layers in which the images of
            a batch influence each other, a loss that returns a mean alone, pixels without a label; and as `hessian_eigenvalues`.

    Example:
        ``vs.gradient_noise(probe).noise_scale[0]`` is the simple noise scale of all parameters.

    Source: McCandlish, Kaplan, Amodei et al., An Empirical Model of Large-Batch Training (2018), section 2 and appendix A.1;
    Chatterjee and Zielinski, On the Generalization Mystery in Deep Learning (2022) for m-coherence; Liu et al., Understanding Why
    Neural Networks Generalize Well Through GSNR of Parameters (ICLR 2020).
    """
    options = CurvatureOptions(**curvature)
    check_image_losses(probe, "gradient_noise")
    n_images = sum(int(labeled(y).sum()) for _, y in probe.batches)
    if n_images < 3:
        raise ValueError(f"Expected at least 3 images with a label for gradient_noise, received {n_images}: pass more.")
    groups = _groups(probe, options)
    with curvatures(probe, options) as operators:
        gradients = _per_example_gradients(operators)
        sums = GradientSums(operators, gradients, groups)
        statistics, square_norms, gsnr = sums.statistics(n_images)
        curved = hessian_moments(operators, sums.mean, n_images, n_hessian_vectors)
        _warn_of_rounding(square_norms[:, 0], _rounding(operators))
        card = operators.card({"n_hessian_vectors": n_hessian_vectors, "seed": options.seed})
    names = tuple(groups)
    _warn_undefined(names, statistics, gsnr, square_norms, n_hessian_vectors, curved)
    return GradientNoiseResult(
        groups=names,
        n_parameters=np.array([sum(sums.sizes[i] for i in places) for places in groups.values()]),
        **vars(statistics),
        gsnr=gsnr,
        square_norms=square_norms.T,
        effective_images=effective_images(square_norms),
        hessian_noise_scale=curved.noise_scale,
        trace_hessian_covariance=curved.trace,
        trace_hessian_covariance_error=curved.error,
        gradient_curvature=curved.curvature,
        card=card,
    )


def _per_example_gradients(operators: Curvatures) -> PerExampleGradients:
    objective = operators.probe.objective
    return PerExampleGradients(
        operators.model,
        lambda outputs, y: objective.data_loss(outputs, y, "none")[0],
        operators.parameters,
        operators.options.micro_batch,
    )


def _groups(probe: Probe, options: CurvatureOptions) -> dict[str, list[int]]:
    """Return the places of each group's parameters among those that are analyzed."""
    with curvatures(probe, options) as operators:
        names = list(operators.parameters)
    groups = {ALL: list(range(len(names)))}
    kinds = kinds_of_probe(probe, names, "gradient_noise")
    by_kind = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in KIND_ORDER}
    return groups | {kind: places for kind, places in by_kind.items() if places}


def _rounding(operators: Curvatures) -> float:
    """Return the relative rounding of the gradients."""
    return float(torch.finfo(next(iter(operators.parameters.values())).dtype).eps)


def _warn_of_rounding(square_norms: np.ndarray, eps: float) -> None:
    """Warn where the directions of short gradients are not known: for confident answers, ``p - y`` is no larger than rounding."""
    lengths = np.sqrt(square_norms)
    n_short = int((lengths < eps / _DIRECTION_ERROR * lengths.max()).sum()) if np.isfinite(lengths).all() else 0
    if n_short > 0.01 * len(lengths):
        warnings.warn(
            f"gradient_noise: {n_short} of {len(lengths)} images have gradients so short beside the longest one that rounding "
            "changes their direction; mean_cosine needs dtype='float64'",
            stacklevel=3,
        )


def _warn_undefined(
    groups: tuple[str, ...], statistics: NoiseStatistics, gsnr: np.ndarray, square_norms: np.ndarray, n_vectors: int,
    curved: HessianMoments,
) -> None:  # fmt: skip
    reasons = few_images(len(square_norms))
    has_intervals = not reasons
    for i, group in enumerate(groups):
        if np.isnan(statistics.noise_scale[i]):
            is_finite = np.isfinite(statistics.gradient_square_norm[i])
            zero = "no gradient that can be told from zero" if is_finite else "gradients that are not finite"
            reasons[f"noise_scale of {group}"] = zero
        if has_intervals and effective_images(square_norms)[i] < LEAST_EFFECTIVE_IMAGES:
            reason = f"fewer than {LEAST_EFFECTIVE_IMAGES} images make the sum of squared lengths"
            reasons[f"intervals of noise_scale and coherence of {group}"] = reason
        if np.isnan(gsnr[i]):
            reasons[f"gsnr of {group}"] = "no entry that varies"
    if n_vectors and np.isnan(curved.noise_scale):
        reasons["hessian_noise_scale"] = "tr(H Sigma) or G^T H G is not positive"
    warn_nulls("gradient_noise", reasons)
