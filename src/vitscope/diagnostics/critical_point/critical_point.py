"""Kind of the point at which training ended: a minimum, a saddle or neither, for the stated objective."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from vitscope.core.cost.image_passes import evaluations
from vitscope.core.cost.measure_cost import ENTRY, Count, MeasureCost, Options, Work, Workload, declares_cost
from vitscope.core.guard.substituted_call import substituted_call
from vitscope.core.losses.requirements import check_non_negative
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Batch, Probe
from vitscope.core.results.result import Result
from vitscope.diagnostics.critical_point._verdict import (
    ROUNDING,
    TINY,
    Limits,
    Row,
    judge,
    predicted_decrease,
    slice_drop,
)
from vitscope.linalg.curvature.curvature_options import CurvatureOptions, SearchArguments, curvature_arguments
from vitscope.linalg.curvature.operator_factory import Curvatures, curvatures
from vitscope.linalg.curvature.product_cost import GRAPH, basis_bytes, keeps_graph, lanczos_products, mean_products
from vitscope.linalg.curvature.row_slices import rows_of, whole_name, whole_point
from vitscope.linalg.krylov_basis import norm
from vitscope.linalg.optimizer_stability import adam_scale
from vitscope.linalg.solvers import solve
from vitscope.runtime import distributed
from vitscope.runtime.progress import track
from vitscope.runtime.value_ranges import IntAboveTwo, PositiveFloat

#: shares of the slice's end that are looked at besides its points: terms of higher order may hide the fall farther out
NEARER = (0.1, 0.01)
#: the tolerance's factors in further searches, as long as the sign of the smallest eigenvalue is not known
SHARPER = (1e-3, 1e-6)
#: entries of a row that become arrays of the result
COLUMNS = (
    "n_images",
    "gradient_norm",
    "smallest_eigenvalue",
    "smallest_residual",
    "largest_eigenvalue",
    "largest_residual",
    "converged",
)


@dataclass(frozen=True)
class CriticalPointResult(Result, coordinates={"images": "n_images", "distance": "distance"}):
    """Gradient and extreme curvature on growing parts of the data, and what follows from them.

    Attributes:
        n_images: (n_sizes,) images with a label of each part, the last one all.
        gradient_norm: (n_sizes,) norm of the objective's gradient.
        smallest_eigenvalue, smallest_residual: (n_sizes,) the most negative eigenvalue of the objective's Hessian.
        largest_eigenvalue, largest_residual: (n_sizes,).
        converged: (n_sizes,) whether both ends are within the tolerance.
        distance: (n_points,) along the unit eigenvector of the smallest eigenvalue on all images.
        slice_loss: (n_points,) the objective there.
        gradient_norm_nll: Norm of the loss's gradient on all images.
        gradient_norm_half_sq: Norm of the gradient of loss + wd/2 |w|^2, the probe's wd.
        gradient_norm_adamw: Norm of the gradient of loss + wd/2 sum (sqrt(v) + eps) w^2, which vanishes where AdamW rests; NaN
            where the optimizer's state is not at hand.
        decrease: The share of the objective that one gradient step is predicted to gain: the smaller of |g|^2 / (2 |H|) and
            |g| max(|w|, 1), over the objective.
        slice_drop: Depth to which the slice falls below its center, as a share of the objective; 0 where it does not fall by more
            than rounding.
        verdict: ``minimum``, ``saddle``, ``not stationary`` or ``inconclusive``, of the probe's objective.
        reasons: Why, one sentence each.
        card: Conditions of the measurement.
    """

    n_images: np.ndarray
    gradient_norm: np.ndarray
    smallest_eigenvalue: np.ndarray
    smallest_residual: np.ndarray
    largest_eigenvalue: np.ndarray
    largest_residual: np.ndarray
    converged: np.ndarray
    distance: np.ndarray
    slice_loss: np.ndarray
    gradient_norm_nll: float
    gradient_norm_half_sq: float
    gradient_norm_adamw: float
    decrease: float
    slice_drop: float
    verdict: str
    reasons: tuple[str, ...]
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return what is logged."""
        logged = {
            "gradient_norm": self.gradient_norm[-1],
            "gradient_norm_nll": self.gradient_norm_nll,
            "gradient_norm_half_sq": self.gradient_norm_half_sq,
            "gradient_norm_adamw": self.gradient_norm_adamw,
            "smallest_eigenvalue": self.smallest_eigenvalue[-1],
            "smallest_eigenvalue_first_batch": self.smallest_eigenvalue[0],
            "largest_eigenvalue": self.largest_eigenvalue[-1],
            "predicted_decrease": self.decrease,
            "slice_drop": self.slice_drop,
        }
        return {name: float(value) for name, value in logged.items() if np.isfinite(value)}


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return a search on each number of batches, and the evaluations of the slice.

    The last search is repeated more finely where the smallest eigenvalue cannot be told from zero, up to `SHARPER` times.
    """
    works: list[Work] = []
    products = lanczos_products(workload, options, 2)
    sizes = _sizes(workload.n_batches)
    for number, n_batches in enumerate(sizes):
        part = replace(workload, n_images=min(n_batches * workload.batch_size, workload.n_images))
        repeats, n_gradients = products, Count.exactly(2)
        if number == len(sizes) - 1:
            repeats = Count(products.expected, products.low, (1 + len(SHARPER)) * products.high)
            n_gradients = Count(2, 2, 2 + len(SHARPER))
        cost = MeasureCost(mean_products(part, options, repeats))
        works += (cost.measured() if number else cost).works
        if keeps_graph(part, options, part.n_batches):
            continue
        works.append(Work(GRAPH, n_gradients, part.n_images))
    n_points = int(options["n_points"])
    works.append(Work(GRAPH, Count.exactly(1), workload.n_images))  # the norms
    works.append(evaluations(workload, {}, Count.exactly(2 + n_points + 2 * len(NEARER))))
    return MeasureCost(
        works,
        held_bytes=2.0 * workload.parameter_bytes,
        held_bytes_shared=basis_bytes(workload, products.expected),
        result_bytes=len(sizes) * (6 * ENTRY + 1) + ENTRY * 2 * n_points,  # a flag takes a byte
    )


@declares_cost(_cost)
@record_options
@curvature_arguments(tol=1e-2)
def critical_point(
    probe: Probe,
    *,
    stationary: PositiveFloat = 1e-3,
    n_points: IntAboveTwo = 21,
    span: PositiveFloat = 1.0,
    **curvature: Unpack[SearchArguments],
) -> CriticalPointResult:
    """Judge whether the model is at a minimum or a saddle of the objective that the probe states.

    On the first batch, the first two, four, ... up to all: the gradient's norm and both ends of the spectrum, so that
    negative curvature that only mini-batches have shows as such. On all: the loss along the eigenvector of the smallest
    eigenvalue. A value is negative where it is below minus its residual (which is never below the resolution of the
    precision), however large the largest one is. The verdicts, in this order:

    - *inconclusive*: eigenvalues that did not converge.
    - *not stationary*: a gradient step is predicted to gain more than the share ``stationary`` of the objective L. The step
      is 1 / |H| times the gradient, |H| the largest eigenvalue by magnitude, and gains |g|^2 / (2 |H|); or it is as long as
      the weights (with a norm |w| of 1 at least) where that is shorter, and gains |g| |w| at most.
    - *inconclusive*: a zero Hessian. No eigenvalue is beyond the resolution of zero, or |H| |w|^2 / 2 is below the rounding
      of L.
    - *saddle*: a negative eigenvalue, and a slice that falls (a maximum counts, for it can be left downhill too);
      *inconclusive* where the slice does not fall.
    - *minimum*: a smallest eigenvalue that is positive; or one within its residual of zero (a flat direction) along which the
      slice falls by no more than the share ``stationary``, and that is known so well that no step as long as the weights
      could fall by more than that share. *Inconclusive*: a smallest eigenvalue within its residual of zero otherwise.

    Args:
        probe: The model, batches and the objective that was trained; batches are split over ranks.
        stationary: The share above.
        n_points: Points of the slice, at least 3.
        span: The slice goes from -span to span, in units of the step that the curvature predicts to change the objective by
            a tenth, sqrt(0.2 L / |lambda|); where lambda is within its residual of zero, with the residual in its place and
            no more than the weights' norm (1 where they are zero).
        curvature: ``tol`` (default 1e-2), ``parameters``, ``dtype``, ``bn``, ``micro_batch``, ``max_products``,
            ``max_memory``, ``basis``, ``seed``: see `vitscope.linalg.curvature.curvature_options.CurvatureOptions`.

    Raises:
        ValueError: Fewer than 3 points, fewer than 2 parameters, a span or share that is not positive, a negative
            objective; and as `hessian_eigenvalues`.
        NumericalError: A loss that is not finite.

    Source: docs/definitions.md sections 1 and 3: an AdamW solution is not stationary for cross entropy + wd/2 |w|^2.
    """
    if n_points < 3:
        raise ValueError(f"Expected n_points to be at least 3, received {n_points}.")
    for name, value in (("stationary", stationary), ("span", span)):
        if not value > 0:
            raise ValueError(f"Expected {name} to be positive, received {value}.")
    options = CurvatureOptions(**curvature)
    with curvatures(probe, options) as operators:
        check_non_negative(probe, "critical_point", _loss(operators, None))
        rows, direction = [], None
        for n_batches in track(_sizes(probe.n_batches), "critical point"):
            row, direction = _part(operators, n_batches, decide=n_batches == probe.n_batches)
            rows.append(row)
        table = {key: np.array([row[key] for row in rows]) for key in rows[0] if key in COLUMNS}
        last, loss = rows[-1], _loss(operators, None)
        weights = norm(torch.cat([p.detach().reshape(-1) for p in operators.parameters.values()]))
        distance = np.linspace(-span, span, n_points) * _step(last, loss, weights)
        assert direction is not None
        values = np.array([_loss(operators, direction * x) for x in track(distance, "slice")])
        near = [_loss(operators, direction * (distance[-1] * share * sign)) for share in NEARER for sign in (-1, 1)]
        norms = _gradient_norms(operators)
        eps = float(torch.finfo(next(iter(operators.parameters.values())).dtype).eps)
        card = operators.card({"solver": "lanczos", "tol": options.tol, "stationary": stationary, "seed": options.seed})
    decrease = predicted_decrease(last, loss, weights)
    drop = slice_drop(loss, [*values, *near], eps)
    reach = 0.5 * max(weights, 1.0) ** 2 / max(loss, TINY)  # share of the objective that a curvature of 1 can change
    limits = Limits(stationary, flat=max(ROUNDING * eps / reach, last["resolution"]), unknown=stationary / reach)
    verdict, reasons = judge(rows, decrease, drop, limits, norms, probe.objective.l2)
    return CriticalPointResult(
        **table,
        distance=distance,
        slice_loss=values,
        gradient_norm_nll=norms["nll"],
        gradient_norm_half_sq=norms["half_sq"],
        gradient_norm_adamw=norms["adamw"],
        decrease=decrease,
        slice_drop=drop,
        verdict=verdict,
        reasons=reasons,
        card=card,
    )


def _sizes(n_batches: int) -> list[int]:
    sizes = [2**i for i in range(n_batches.bit_length()) if 2**i < n_batches]
    return [*sizes, n_batches]


def _part(operators: Curvatures, n_batches: int, decide: bool) -> tuple[Row, Tensor]:
    """Return gradient norm and both ends on the first batches, and the smallest eigenvalue's eigenvector.

    Args:
        operators: The factory of operators.
        n_batches: Number of batches.
        decide: Search again, with a finer tolerance, where the smallest eigenvalue's sign is not known.
    """

    def batches() -> Iterator[tuple[int, Batch]]:
        return ((index, batch) for index, batch in operators.probe.local_batches() if index < n_batches)

    with distributed.failing_together():
        count = sum(operators.probe.objective.n_examples(y) for _, (_, y) in batches())
    n_local = torch.tensor(float(count), dtype=torch.float64)
    n_images = int(distributed.all_reduce_sum(n_local.to(operators.probe.device)).item())
    operator = operators.of(batches, n_images, reduce=True)
    gradient = norm(operator.gradient())
    search = {**operators.options.search(), "memory": operators.basis_memory(shared=True)}
    pairs = solve(operator, k=1, which="both", vectors=True, shared=True, **search).pairs
    converged = bool(pairs.converged.all())
    shares = SHARPER if decide and converged else ()
    for share in shares:
        is_unknown = pairs.resolution < pairs.residuals[1] >= abs(pairs.values[1])
        stop = not is_unknown or pairs.n_products >= operators.options.max_products
        if distributed.gather_objects(stop)[0]:  # rounding may differ between ranks, their products must not
            break
        finer = {**search, "tol": operators.options.tol * share}
        pairs = solve(operator, k=1, which="both", vectors=True, shared=True, **finer).pairs
    assert pairs.vectors is not None
    row = {
        "n_images": n_images,
        "gradient_norm": gradient,
        "smallest_eigenvalue": pairs.values[1],
        "smallest_residual": pairs.residuals[1],
        "largest_eigenvalue": pairs.values[0],
        "largest_residual": pairs.residuals[0],
        "converged": converged,
        "smallest_error": max(float(pairs.errors[1]), pairs.resolution),
        "resolution": pairs.resolution,
    }
    return row, pairs.vectors[1].clone()


def _step(row: Row, loss: float, weights: float) -> float:
    """Return the slice's unit of distance, see `critical_point`."""
    low, residual = abs(row["smallest_eigenvalue"]), row["smallest_residual"]
    if low > residual:
        return float(np.sqrt(0.2 * loss / low))
    longest = weights if weights > 0 else 1.0
    return min(float(np.sqrt(0.2 * loss / max(residual, TINY))), longest)


@torch.no_grad()
def _loss(operators: Curvatures, offset: Tensor | None) -> float:
    """Return the objective on all batches, with the analyzed parameters moved by ``offset (size,)``."""
    point: dict[str, Tensor] = dict(operators.model.named_parameters())
    if offset is not None:
        start = 0
        for name, p in operators.parameters.items():
            point[name] = p + offset[start : start + p.numel()].view_as(p)
            start += p.numel()
    total = torch.zeros((), dtype=torch.float64, device=operators.probe.device)
    with distributed.failing_together():
        for _, (x, y) in operators.probe.local_batches():
            total += operators.probe.objective.data_loss(substituted_call(operators.model, point, x), y, "sum").double()
    data = distributed.all_reduce_sum(total).item() / operators.probe.n_labeled
    return data + float(operators.probe.objective.l2_term(whole_point(point, operators.parameters)).double())


def _gradient_norms(operators: Curvatures) -> dict[str, float]:
    objective, data = operators.probe.objective, operators.mean().gradient(data_only=True)
    weights = torch.cat([p.detach().reshape(-1) for p in operators.parameters.values()])
    norms = {"nll": norm(data), "half_sq": norm(data + objective.weight_decay * weights), "adamw": float("nan")}
    scales = objective.decay_scale
    if scales is None and (optimizer := operators.probe.optimizer()) is not None:
        scales = adam_scale(optimizer)  # of the checkpoint, whatever form of L2 the objective has
    names = {name: whole_name(name, p) for name, p in operators.parameters.items()}
    if scales is not None and all(name in scales for name in names.values()):
        parts = [rows_of(scales[names[name]], p).reshape(-1) for name, p in operators.parameters.items()]
        scale = torch.cat([part.to(weights) for part in parts])
        norms["adamw"] = norm(data + objective.weight_decay * scale * weights)
    return norms
