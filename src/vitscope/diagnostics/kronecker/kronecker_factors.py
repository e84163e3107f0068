"""Spectra of the Kronecker factors (K-FAC) of every linear layer and convolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Unpack

import numpy as np
from torch import Tensor, nn

from vitscope.core.batches.batch_inputs import Inputs
from vitscope.core.cost.image_passes import EVALUATION, guard_checks
from vitscope.core.cost.measure_cost import Count, MeasureCost, Options, Work, Workload, WorkUnit, declares_cost
from vitscope.core.losses.requirements import check_classes
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.kronecker._kfac_factors import (
    APPROXIMATIONS,
    FISHERS,
    Approximation,
    Fisher,
    covered_layers,
    kronecker_factors_of,
    refuse_without_curvlinops,
)
from vitscope.diagnostics.kronecker._layers import present_kinds
from vitscope.diagnostics.kronecker._power_laws import LEAST_POINTS, PowerLaw, fit_power_law, mean_by_kind
from vitscope.linalg.curvature.curvature_options import CurvatureArguments, CurvatureOptions, curvature_arguments
from vitscope.linalg.curvature.parameter_subsets import subset_name
from vitscope.linalg.curvature.product_cost import curvature_options
from vitscope.models.structure.parameter_groups import kinds_of_probe
from vitscope.runtime.value_ranges import PositiveInt, PositiveShare


@dataclass(frozen=True)
class KroneckerFactorsResult(Result, coordinates={"layer": "layers", "group": "groups"}):
    """Eigenvalues of both factors of each layer and the exponents of their decay.

    K-FAC approximates a layer's block of the Fisher matrix by ``A x B``: A the second moment of the layer's inputs, B that of the
    gradients with respect to its outputs.

    Attributes:
        layers: (n_layers,) names of the modules.
        kinds: (n_layers,) kind of the unit of each; ``unknown`` where the model's units are not known.
        input_sizes: (n_layers,) rows of A.
        output_sizes: (n_layers,) rows of B.
        input_eigenvalues: (n_layers, n_values) the largest of A, descending; NaN beyond its size.
        output_eigenvalues: (n_layers, n_values) the largest of B, likewise.
        input_effective_ranks: (n_layers,) participation ratio ``tr(A)^2 / tr(A^2)``.
        output_effective_ranks: (n_layers,) of B.
        input_exponents: (n_layers,) decay a of ``lambda_i ~ i^-a`` of A, over the eigenvalues of at least ``least_share`` of the
            largest; NaN with fewer than 4.
        input_half_widths: (n_layers,) half the 95 % interval of the slope in ordinary least squares.
        output_exponents: (n_layers,) of B.
        output_half_widths: (n_layers,) likewise.
        traces: (n_layers,) ``tr(A) tr(B)``.
        groups: (n_groups,) kinds that occur.
        mean_input_exponents: (n_groups,) mean over the layers of a kind.
        mean_input_intervals: (n_groups, 2) 95 % over layers; NaN with fewer than 3.
        mean_output_exponents: (n_groups,) likewise.
        mean_output_intervals: (n_groups, 2) likewise.
        n_uncovered: Trained parameters in no layer's weight: biases, norms, tokens, grouped convolutions, convolutions that pad
            their input themselves, weights that are made before each pass, read past their module, shared by modules, or used
            several times in a pass.
        card: Conditions of the measurement.
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    input_sizes: np.ndarray
    output_sizes: np.ndarray
    input_eigenvalues: np.ndarray
    output_eigenvalues: np.ndarray
    input_effective_ranks: np.ndarray
    output_effective_ranks: np.ndarray
    input_exponents: np.ndarray
    input_half_widths: np.ndarray
    output_exponents: np.ndarray
    output_half_widths: np.ndarray
    traces: np.ndarray
    groups: tuple[str, ...]
    mean_input_exponents: np.ndarray
    mean_input_intervals: np.ndarray
    mean_output_exponents: np.ndarray
    mean_output_intervals: np.ndarray
    n_uncovered: int
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return what is logged: the mean exponents of each kind, where there are some."""
        logged = {f"input_exponent_{group}": value for group, value in zip(self.groups, self.mean_input_exponents)}
        logged |= {f"output_exponent_{group}": value for group, value in zip(self.groups, self.mean_output_exponents)}
        return {name: float(value) for name, value in logged.items() if np.isfinite(value)}


#: images that pass through the model once to find the layers that it calls
_N_SHOWING = 2


@contextmanager
def _factors(probe: Probe, options: Options, with_eigenvalues: bool) -> Iterator[Callable[[], object]]:
    refuse_without_curvlinops()
    with probe.guard(second_order=True, dtype=curvature_options(options).torch_dtype) as model:
        layers = covered_layers(model, _few_images(probe))
        settings = (options["fisher"], options["approximation"], int(options["seed"]))
        yield lambda: kronecker_factors_of(probe, model, layers, *settings, with_eigenvalues=with_eigenvalues)


_OPTIONS = ("dtype", "fisher", "approximation")
#: the sums of a batch
_FACTORS = WorkUnit("Kronecker factors", partial(_factors, with_eigenvalues=False), _OPTIONS)
#: the same and the eigenvalues of all factors
_SPECTRA = WorkUnit("Kronecker factors and their eigenvalues", partial(_factors, with_eigenvalues=True), _OPTIONS)


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return one pass with the sums of the factors, which each rank makes whole, and their eigenvalues."""
    works = [
        Work(_FACTORS, Count.exactly(1), workload.n_images - workload.first_batch, is_divided=False),
        Work(_SPECTRA, Count.exactly(1), workload.first_batch, is_divided=False),
        Work(EVALUATION, Count.exactly(1), min(_N_SHOWING, workload.first_batch), is_divided=False),
        *guard_checks(workload, second_order=True),
    ]
    return MeasureCost(works)


@declares_cost(_cost)
@record_options
@curvature_arguments("dtype", "seed")
def kronecker_factors(
    probe: Probe,
    *,
    fisher: Fisher = "type-2",
    approximation: Approximation = "expand",
    n_values: PositiveInt = 64,
    least_share: PositiveShare = 1e-3,
    **curvature: Unpack[CurvatureArguments],
) -> KroneckerFactorsResult:
    """Compute the spectra of the Kronecker factors of every linear layer and convolution through curvlinops.

    Needs ``pip install 'vitscope[kfac]'``. Under ``torch.distributed`` every rank computes all of it.

    Args:
        probe: The model, batches of images and classes, and the cross entropy. Images without a label are left out.
        fisher: Gradients of B: ``type-2`` from the loss's Hessian in the outputs (the Gauss-Newton matrix; a backward pass a
            class), ``mc`` from drawn labels, ``empirical`` from the data's targets, soft or smoothed as the objective has them.
        approximation: ``expand`` or ``reduce``, how positions of a layer's input are summed (Eschenhagen et al. 2023).
        n_values: Eigenvalues of each factor that are kept.
        least_share: The smallest eigenvalue in the fit of the decay, as a share of the largest.
        curvature: ``dtype``, ``seed``: see `vitscope.linalg.curvature.curvature_options.CurvatureOptions`.

    Raises:
        ValueError: curvlinops is not installed, another loss than the cross entropy, batches of more than images, an unknown
            ``fisher`` or ``approximation``, no layer.
        NumericalError: Weights that are not finite.

    Source: Martens and Grosse, Optimizing Neural Networks with Kronecker-Factored Approximate Curvature (ICML 2015); Grosse and
    Martens (ICML 2016) for convolutions; Eschenhagen et al., K-FAC for Modern Neural Network Architectures (NeurIPS 2023).
    """
    options = CurvatureOptions(**curvature)
    _check(probe, fisher, approximation)
    refuse_without_curvlinops()
    n_parameters = sum(p.numel() for p in probe.parameters().values())
    with probe.guard(second_order=True, dtype=options.torch_dtype) as model:
        layers = covered_layers(model, _few_images(probe))
        if not layers:
            raise ValueError(
                "Expected a model with trained nn.Linear or nn.Conv2d layers that a pass calls once, received one without."
            )
        factors = kronecker_factors_of(probe, model, layers, fisher, approximation, options.seed)
        n_covered = sum(_weight(layers[name]).numel() for name in factors)
        card = probe.card(
            parameters=subset_name(model, "weights of linear layers and convolutions"),
            solver={"operator": f"K-FAC {fisher}", "seed": options.seed},
        )
    names = tuple(factors)
    inputs = [factor.inputs for factor in factors.values()]  # eigenvalues of A
    outputs = [factor.outputs for factor in factors.values()]  # and of B
    kinds = kinds_of_probe(probe, [f"{name}.weight".lstrip(".") for name in names], "kronecker_factors")
    groups = present_kinds(kinds)
    input_decays, output_decays = (_decays(spectra, least_share, kinds, groups) for spectra in (inputs, outputs))
    is_undefined = np.isnan(input_decays.exponents) | np.isnan(output_decays.exponents)
    reason = f"fewer than {LEAST_POINTS} eigenvalues for a decay"
    warn_nulls("kronecker_factors", {name: reason for name, is_null in zip(names, is_undefined) if is_null})
    return KroneckerFactorsResult(
        layers=names,
        kinds=kinds,
        input_sizes=np.array([len(values) for values in inputs]),
        output_sizes=np.array([len(values) for values in outputs]),
        input_eigenvalues=_padded(inputs, n_values),
        output_eigenvalues=_padded(outputs, n_values),
        input_effective_ranks=np.array([_participation(values) for values in inputs]),
        output_effective_ranks=np.array([_participation(values) for values in outputs]),
        input_exponents=input_decays.exponents,
        input_half_widths=input_decays.half_widths,
        output_exponents=output_decays.exponents,
        output_half_widths=output_decays.half_widths,
        traces=np.array([a.sum() * b.sum() for a, b in zip(inputs, outputs)]),
        groups=groups,
        mean_input_exponents=input_decays.means,
        mean_input_intervals=input_decays.intervals,
        mean_output_exponents=output_decays.means,
        mean_output_intervals=output_decays.intervals,
        n_uncovered=n_parameters - n_covered,
        card=card,
    )


def _check(probe: Probe, fisher: str, approximation: str) -> None:
    if fisher not in FISHERS:
        raise ValueError(f"Expected fisher to be one of {', '.join(FISHERS)}, received {fisher!r}.")
    if approximation not in APPROXIMATIONS:
        raise ValueError(
            f"Expected approximation to be one of {', '.join(APPROXIMATIONS)}, received {approximation!r}."
        )
    check_classes(probe, "kronecker_factors")
    if not probe.takes_images:
        raise ValueError(
            "kronecker_factors needs batches of images and targets alone, (x, y) or a mapping of both, received batches of more "
            "entries or a forward=: wrap the model in a module that takes the images."
        )


class _Decays(NamedTuple):
    """Decay of the eigenvalues of one of the two factors; the attributes of `KroneckerFactorsResult` say more.

    Attributes:
        exponents: (n_layers,).
        half_widths: (n_layers,).
        means: (n_groups,) of the exponents.
        intervals: (n_groups, 2) of the means.
    """

    exponents: np.ndarray
    half_widths: np.ndarray
    means: np.ndarray
    intervals: np.ndarray


def _decays(
    spectra: Sequence[np.ndarray], least_share: float, kinds: tuple[str, ...], groups: tuple[str, ...]
) -> _Decays:
    """Fit the decay of each layer's eigenvalues, and average the exponents by kind."""
    fits = [_decay(values, least_share) for values in spectra]
    exponents = np.array([fit.exponent for fit in fits])
    means, intervals = mean_by_kind(exponents, kinds, groups)
    return _Decays(exponents, np.array([fit.half_width for fit in fits]), means, intervals)


def _few_images(probe: Probe) -> Inputs:
    """Return two images, which show the layers that a pass calls."""
    x, _ = next(probe.iter_batches())
    return x[:_N_SHOWING]


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _decay(values: np.ndarray, least_share: float) -> PowerLaw:
    """Return the fit of ``i^-exponent`` to the eigenvalues of at least a share of the largest."""
    used_values = values[values >= least_share * values[0]] if values[0] > 0 else values[:0]
    fit = fit_power_law(np.arange(1, len(used_values) + 1), used_values)
    return PowerLaw(-fit.exponent, fit.half_width, fit.r_squared, fit.n_points)


def _padded(spectra: list[np.ndarray], n: int) -> np.ndarray:
    """Return at most the first n eigenvalues of each layer as a table (n_layers, n_values), filled up with NaN."""
    rows = np.full((len(spectra), min(n, max(map(len, spectra)))), np.nan)
    for row, values in zip(rows, spectra):
        row[: len(values)] = values[: len(row)]
    return rows


def _participation(values: np.ndarray) -> float:
    """Return the participation ratio of eigenvalues, see `KroneckerFactorsResult`."""
    square = float(np.square(values).sum())
    return float(values.sum()) ** 2 / square if square > 0 else float("nan")
