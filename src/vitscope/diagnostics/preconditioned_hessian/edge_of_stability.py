"""The largest Hessian eigenvalues along training, beside the limit of stability of the optimizer at each step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from vitscope.core.cost.measure_cost import ENTRY, MeasureCost, Options, Workload, declares_cost
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.optimizer_state import of_optimizer
from vitscope.core.probe import Probe
from vitscope.core.results.result import Result
from vitscope.core.run_inputs import PreviousResult
from vitscope.diagnostics.preconditioned_hessian._optimizer_limit import limit_of, warn_of_unknown
from vitscope.diagnostics.preconditioned_hessian._optimizer_metric import (
    flat_values,
    inverse_root,
    product_with_decay,
)
from vitscope.linalg.curvature.curvature_operator import Curvature
from vitscope.linalg.curvature.curvature_options import CurvatureArguments, CurvatureOptions, curvature_arguments
from vitscope.linalg.curvature.operator_factory import Curvatures, curvatures
from vitscope.linalg.curvature.product_cost import basis_bytes, curvature_options, lanczos_products, mean_products
from vitscope.linalg.curvature.start_vector import RANDOM_SHARE, start_along, start_vector, vector_seed
from vitscope.linalg.curvature.start_vector import warm_start as warm_start_vector
from vitscope.linalg.eigensolver import Eigenpairs, extreme_eigenvalues
from vitscope.linalg.preconditioned_operator import scaled_eigenvalues
from vitscope.runtime.value_ranges import NonNegativeInt, PositiveInt


@dataclass(frozen=True)
class EdgeOfStabilityResult(Result, coordinates={"step": "steps"}, untabulated=("eigenvectors", "scaled_eigenvector")):
    """Eigenvalues along training with the optimizer's limit, one entry for each step measured so far.

    The eigenvalues are those of H: the Hessian of the data term plus the optimizer's own coupled decay. The sharpness is the
    number that the limit is for: the largest eigenvalue of P^-1 H with the optimizer's preconditioner P, that of H without one.

    Attributes:
        steps: (n_steps,) optimizer steps that the weights have made.
        eigenvalues: (n_steps, k) the largest of H, descending.
        errors: (n_steps, k) estimates of their distance to an eigenvalue.
        converged: (n_steps, k) whether that is within the tolerance and, from a warm start, no larger one was likely passed over.
        sharpness: (n_steps,) largest eigenvalue of P^-1 H.
        sharpness_error: (n_steps,) estimate of its distance to an eigenvalue.
        sharpness_converged: (n_steps,) likewise.
        limit: (n_steps,) largest sharpness at which the next step's linearized full-batch iteration with frozen second moments
            does not diverge, see `vitscope.linalg.optimizer_stability`; NaN where it is unknown, infinite at rate 0.
        lr: (n_steps,) learning rate of the next step; NaN where it is unknown.
        overlap: (n_steps,) share of the subspace of the first k eigenvectors that lies in that of the step measured before,
            |V_before V^T|_F^2 / k; NaN where there is none.
        n_products: (n_steps,) products with H.
        optimizer: The optimizer's class, with SAM around it; empty where none is known.
        preconditioner: ``identity`` where P is none, else ``adamw`` (also of Adam), ``nadam``, ``rmsprop``, ``adagrad`` or, of
            several groups of SGD, ``groups``.
        formula: Formula of the limit at the last step, or the reason why it is unknown.
        eigenvectors: (k, size) of H at the last step; (0, 0) in a result that was read from a run folder.
        scaled_eigenvector: (size,) of P^-1/2 H P^-1/2 at the last step; (0,) likewise, and where P is none.
        card: Conditions of the last step.
    """

    steps: np.ndarray
    eigenvalues: np.ndarray
    errors: np.ndarray
    converged: np.ndarray
    sharpness: np.ndarray
    sharpness_error: np.ndarray
    sharpness_converged: np.ndarray
    limit: np.ndarray
    lr: np.ndarray
    overlap: np.ndarray
    n_products: np.ndarray
    optimizer: str
    preconditioner: str
    formula: str
    eigenvectors: np.ndarray = field(repr=False)
    scaled_eigenvector: np.ndarray = field(repr=False)
    card: ObjectiveCard | None = None

    #: fields that only the next measurement needs: a run keeps them for the last one alone
    carried_fields: ClassVar[tuple[str, ...]] = ("eigenvectors", "scaled_eigenvector")

    @property
    def ratio(self) -> np.ndarray:
        """Sharpness over its limit ``(n_steps,)``: above 1 the iteration is unstable; NaN where the limit is unknown."""
        return self.sharpness / self.limit

    def scalars(self) -> dict[str, float]:
        """Return the numbers of the last step, those that are known."""
        last = {
            "eigenvalue_max": self.eigenvalues[-1, 0],
            "sharpness": self.sharpness[-1],
            "limit": self.limit[-1],
            "ratio": self.ratio[-1],
            "overlap": self.overlap[-1],
            "lr": self.lr[-1],
            "converged": self.converged[-1].mean(),
            "n_products": self.n_products[-1],
        }
        return {name: float(value) for name, value in last.items() if np.isfinite(value)}


def _cost(workload: Workload, options: Options) -> MeasureCost:
    """Return the products of a new step: one search, and another in the optimizer's metric where it has one."""
    k = int(options["k"])
    probe, optimizer = workload.model_probe(), options["optimizer"]
    state = of_optimizer(optimizer, probe.model) if optimizer is not None else probe.optimizer()
    with curvatures(probe, curvature_options(options)) as operators:
        limit = limit_of(state, operators.mean())
    is_scaled = limit.scale is not None
    products = lanczos_products(workload, options, k)
    longest, gradients = products, 1 + (state is not None and state.ascent_radius > 0)
    if is_scaled:
        products, gradients = products + lanczos_products(workload, options, 1), gradients + 1
    n_vectors = k + is_scaled
    # one row: step, values, errors and flags, the sharpness with its error and flag, limit, rate, overlap, products
    row = ENTRY * (1 + 2 * k + 2 + 2 + 1 + 1) + k + 1
    return MeasureCost(
        mean_products(workload, options, products, gradients=gradients),
        held_bytes=float(n_vectors + is_scaled) * workload.parameter_bytes,
        held_bytes_shared=basis_bytes(workload, longest.expected),
        result_bytes=row + float(n_vectors * workload.parameter_bytes),
    )


@declares_cost(_cost)
@record_options
@curvature_arguments(
    "tol", "parameters", "dtype", "bn", "micro_batch", "max_products", "max_memory", "seed", tol=1e-2, max_products=50
)
def edge_of_stability(
    probe: Probe,
    *,
    k: PositiveInt = 2,
    optimizer: Optimizer | None = None,
    step: NonNegativeInt | None = None,
    previous: PreviousResult | None = None,
    warm_start: bool = False,
    **curvature: Unpack[CurvatureArguments],
) -> EdgeOfStabilityResult:
    """Add a training step to a series of the largest Hessian eigenvalues and the optimizer's limit of stability.

    Full-batch gradient descent on a quadratic diverges where an eigenvalue exceeds 2 / lr; on networks the largest eigenvalue
    rises to about that value and stays there. The limits of other optimizers are those of
    `vitscope.linalg.optimizer_stability`, for the next step: the learning rate is the one that the schedule has set for it, and
    Adam's includes the bias correction of its first moment. Gradient clipping is not in any of them. Sharpness-aware
    minimization around SGD has the limit of Long and Bartlett (2023), with the norm of the data term's gradient over the probe's
    images; of Muon and of other optimizers the limit is unknown and the formula says why.

    A training measures it with ``experiment=edge_of_stability``; there ``previous`` and ``step`` are the run's.

    Args:
        probe: The model, batches and objective; the eigenvalues are those of the mean over all batches. These may be all images
            of the training set, which are gone through one batch, or ``micro_batch`` images, at a time.
        k: Number of eigenvalues, and dimension of the subspace that is compared with the one before.
        optimizer: Optimizer of the model; None for that of the run's checkpoint.
        step: Number of optimizer steps that the weights have made; None for what the run states, without a run for the number of
            entries so far.
        previous: Result of the step measured before, whose entries are kept; None begins a series. For the same step it is
            returned as it is.
        warm_start: False begins each search at the gradient, as `hessian_eigenvalues` does; True at the eigenvectors of
            ``previous``, and goes on until it is unlikely that a larger eigenvalue was passed over, which takes more products the
            larger the network is, see `vitscope.linalg.curvature.start_vector.warm_start`.
        curvature: ``tol``, ``parameters``, ``dtype``, ``bn``, ``micro_batch``, ``max_products``, ``max_memory``, ``seed``: see
            `vitscope.linalg.curvature.curvature_options.CurvatureOptions`. The default of ``tol``, 1 %, is below what a step at
            the edge changes; ``max_products`` is the budget of a search: values that it cuts short are marked.

    Raises:
        ValueError: A step before the last one of ``previous``, or a ``previous`` with another k or parameters; and as
            `hessian_eigenvalues`.
        CheckpointError: An optimizer state that is damaged.
        NumericalError: A loss that is not finite.

    Source: Cohen et al., Gradient descent on neural networks typically occurs at the edge of stability (2021); Adaptive gradient
        methods at the edge of stability (2022).

    Example:
        >>> series = None
        >>> for step in range(500):
        ...     if step % 10 == 0:
        ...         series = vs.edge_of_stability(probe, optimizer=optimizer, step=step, previous=series)
        ...     train_one_step()
        >>> vs.plot(series)
    """
    step = _step_of(probe, step, previous)
    if previous is not None:
        _check_previous(previous, step, k)
        if int(previous.steps[-1]) == step:
            return _of_same_step(probe, previous)
    options = CurvatureOptions(**curvature)
    options = replace(options, seed=vector_seed(options.seed, step))  # other random vectors at each step
    state = of_optimizer(optimizer, probe.model) if optimizer is not None else probe.optimizer()
    with curvatures(probe, options) as operators:
        mean = operators.mean()
        limit = limit_of(state, mean)
        if previous is None or previous.formula != limit.formula:
            warn_of_unknown(limit, step)
        product = mean if limit.decay is None else product_with_decay(mean, flat_values(operators, limit.decay))
        earlier = previous if warm_start else None
        pairs = _largest(mean, product, k, earlier, options)
        scaled_pairs = None
        if limit.scale is not None:
            scaled_pairs = _scaled_largest(operators, mean, product, limit.scale, earlier, options)
        card = operators.card(
            {"k": k, "which": "LA", **options.values("tol", "max_products", "seed"), "n_products": mean.n_products},
            **limit.l2,
        )
        vectors, scaled_vectors = _vectors_of(pairs), _vectors_of(scaled_pairs)
    sharpest = pairs if scaled_pairs is None else scaled_pairs  # without a preconditioner both are the same
    entry = {
        "steps": np.array([step]),
        "eigenvalues": pairs.values[None],
        "errors": pairs.errors[None],
        "converged": pairs.converged[None],
        "sharpness": sharpest.values[:1],
        "sharpness_error": sharpest.errors[:1],
        "sharpness_converged": sharpest.converged[:1],
        "limit": np.array([limit.threshold]),
        "lr": np.array([limit.lr]),
        "overlap": np.array([_overlap(previous, vectors)]),
        "n_products": np.array([mean.n_products]),
    }
    if previous is not None:
        entry = {name: np.concatenate([getattr(previous, name), value]) for name, value in entry.items()}
    return EdgeOfStabilityResult(
        **entry,
        optimizer=limit.optimizer,
        preconditioner=limit.preconditioner,
        formula=limit.formula,
        eigenvectors=vectors,
        scaled_eigenvector=scaled_vectors[0] if len(scaled_vectors) else np.zeros(0),
        card=card,
    )


def _vectors_of(pairs: Eigenpairs | None) -> np.ndarray:
    """Return the eigenvectors (k, n_parameters) in memory of the host; no rows where there are none."""
    if pairs is None or pairs.vectors is None:
        return np.zeros((0, 0))
    return pairs.vectors.cpu().numpy()


def _largest(
    operator: Curvature,
    product: Callable[[Tensor], Tensor],
    k: int,
    earlier: EdgeOfStabilityResult | None,
    options: CurvatureOptions,
) -> Eigenpairs:
    """Return the k largest eigenvalues of H with their vectors."""
    is_warm = earlier is not None and earlier.eigenvectors.size > 0
    if earlier is not None and is_warm:
        start = warm_start_vector(earlier.eigenvectors, operator, options.seed)
    else:
        start = start_vector(operator, options.seed)
    return extreme_eigenvalues(
        product,
        start,
        k,
        which="LA",
        vectors=True,
        shared=True,
        random_share=RANDOM_SHARE if is_warm else None,
        **options.search(),
    )


def _scaled_largest(
    operators: Curvatures,
    operator: Curvature,
    product: Callable[[Tensor], Tensor],
    scale: Mapping[str, Tensor],
    earlier: EdgeOfStabilityResult | None,
    options: CurvatureOptions,
) -> Eigenpairs:
    """Return the largest eigenvalue of P^-1/2 H P^-1/2 with its vector."""
    roots = [inverse_root(name, p, scale) for name, p in operators.parameters.items()]
    is_warm = earlier is not None and earlier.scaled_eigenvector.size > 0
    if earlier is not None and is_warm:
        start = warm_start_vector(earlier.scaled_eigenvector, operator, options.seed)
    else:
        entries = [root.expand(p.shape).reshape(-1) for root, p in zip(roots, operators.parameters.values())]
        start = start_along(operator.gradient(data_only=True) * torch.cat(entries).to(operator.dtype), options.seed)
    return scaled_eigenvalues(
        operator,
        roots,
        product,
        start=start,
        k=1,
        which="LA",
        vectors=True,
        shared=True,
        random_share=RANDOM_SHARE if is_warm else None,
        **options.search(),
    )


def _overlap(previous: EdgeOfStabilityResult | None, vectors: np.ndarray) -> float:
    """Return |V_before V^T|_F^2 / k, the mean squared cosine of the principal angles."""
    if previous is None or previous.eigenvectors.shape != vectors.shape or not vectors.size:
        return float("nan")
    before, now = (torch.from_numpy(v).double() for v in (previous.eigenvectors, vectors))
    return float((before @ now.T).square().sum()) / len(vectors)


def _step_of(probe: Probe, step: int | None, previous: EdgeOfStabilityResult | None) -> int:
    """Return the number of steps that the weights have made: as given, as the run states, or that of one more step."""
    stated = probe.about.get("step") if step is None else step
    if stated is None:
        return 0 if previous is None else int(previous.steps[-1]) + 1
    if isinstance(stated, bool) or int(stated) != stated or stated < 0:
        raise ValueError(f"Expected step to be a whole number of at least 0, or None, received {step!r}.")
    return int(stated)


def _check_previous(previous: EdgeOfStabilityResult, step: int, k: int) -> None:
    """Refuse a series of other eigenvalues, or of later steps."""
    if not isinstance(previous, EdgeOfStabilityResult):
        raise ValueError(f"Expected previous to be a result of edge_of_stability or None, received {previous!r}.")
    if previous.eigenvalues.shape[1] != k:
        raise ValueError(f"Expected previous with k={k} eigenvalues, received {previous.eigenvalues.shape[1]}.")
    if int(previous.steps[-1]) > step:
        raise ValueError(
            f"Expected a step of at least {int(previous.steps[-1])}, the last of previous, received {step}."
        )


def _of_same_step(probe: Probe, previous: EdgeOfStabilityResult) -> EdgeOfStabilityResult:
    """Return the series as it is; other weights after the same step are not those that the optimizer moves."""
    stated, before = probe.about.get("checkpoint"), previous.card.checkpoint if previous.card is not None else None
    if stated is not None and before not in (None, "unknown", stated):
        warnings.warn(
            f"edge_of_stability: the weights are not those that were measured after step {int(previous.steps[-1])} (an average "
            "of weights?), and no optimizer moves them; the series ends there",
            stacklevel=4,
        )
    return previous
