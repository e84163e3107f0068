"""The axes of planes and lines: from a seed, the Hessian, the gradient, a run's checkpoints, or given as they are."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
import torch

from vitscope.core.probe import Probe
from vitscope.core.weight_space import check_movable, select_checkpoints
from vitscope.diagnostics.landscape._direction_options import Source
from vitscope.linalg.weights.checkpoint_pca import difference, principal_directions
from vitscope.linalg.weights.directions import (
    Direction,
    as_direction,
    filter_parameters,
    inner,
    moving,
    norm,
    normalize,
    orthogonalize,
    random_direction,
    scale,
    wide_dtype,
)
from vitscope.linalg.weights.effective_weights import canonical_names, pruning_masks, refuse_made_weights
from vitscope.linalg.weights.weight_space_walk import set_aside
from vitscope.runtime import distributed


@dataclass(frozen=True)
class Axes:
    """A plane's two directions, and the checkpoints' places in it.

    Attributes:
        first: Set aside (see `vitscope.linalg.weights.weight_space_walk.set_aside`).
        second: Second direction, on the model's device.
        norms: (2,) Euclidean norms.
        cosine: The cosine between the two.
        labels: Labels of the checkpoints, for ``pca`` and ``checkpoints``.
        path: (n_checkpoints, 2) their coordinates, orthogonally projected.
        projection_error: (n_checkpoints,) distance from the plane over distance from the center.
    """

    first: Direction
    second: Direction
    norms: np.ndarray
    cosine: float
    labels: tuple[str, ...] = ()
    path: np.ndarray = field(default_factory=lambda: np.empty((0, 2)))
    projection_error: np.ndarray = field(default_factory=lambda: np.empty(0))


def plane_axes(probe: Probe, source: Source) -> Axes:
    """Return the two axes of a plane through the probe's weights.

    Raises:
        ValueError: Directions that do not fit the model, fewer than two of them, or parallel ones.
    """
    check_movable(probe)
    labels, differences = checkpoint_differences(probe, source)
    if source.kind == "pca":
        components = [_reaching(d, differences) for d in principal_directions(differences)[0]]
        if len(components) < 2:
            raise ValueError(f"Expected checkpoints that span a plane with the model, received {', '.join(labels)}.")
        first, second = components
        first, second = (_scaled(probe, source, d) for d in (first, second))
    else:
        first = set_aside(direction(probe, source, 0, differences))
        second = direction(probe, source, 1, differences, other=first)
    norms, product = np.array([norm(first), norm(second)]), inner(first, second)
    cosine = product / norms.prod() if norms.prod() else float("nan")
    if not abs(cosine) < 1 - 1e-9:
        raise ValueError(f"Expected two directions that span a plane, received a cosine of {cosine:.12g}.")
    path, errors = _projected(differences, first, second)
    return Axes(set_aside(first) if source.kind == "pca" else first, second, norms, cosine, labels, path, errors)


def checkpoint_differences(probe: Probe, source: Source) -> tuple[tuple[str, ...], list[Direction]]:
    """Return the labels of the checkpoints that ``pca`` and ``checkpoints`` use, and the ways there; else nothing."""
    labels, differences = [], []
    for label, state in (
        select_checkpoints(source.checkpoints, source.labels) if source.kind in ("pca", "checkpoints") else ()
    ):
        labels.append(label)
        differences.append(difference(state, probe.parameters(), label))
    return tuple(labels), differences


def direction(
    probe: Probe, source: Source, index: int, differences: Sequence[Direction] = (), other: Direction | None = None
) -> Direction:
    """Return the source's direction number ``index``, scaled, on the model's device.

    Args:
        probe: The probe with the weights at which the plane begins.
        source: The options.
        index: 0 for a line or a plane's first axis.
        differences: Differences of the checkpoints from the weights, for ``checkpoints`` and ``pca``.
        other: The plane's first axis, against which the second of ``gradient`` is made orthogonal.

    Raises:
        ValueError: There are not so many directions.
    """
    parameters = probe.parameters()
    if source.kind == "random":
        names = canonical_names(probe.model)
        return _scaled(probe, source, random_direction(moving(parameters, source.ignored), source.seed, index, names))
    if source.kind == "gradient":
        if index == 0:
            vector = objective_gradient(probe)
            return _scaled(probe, source, scale(vector, 1 / max(norm(vector), 1e-300)))
        vector = random_direction(parameters, source.seed, index, canonical_names(probe.model))
        vector = _scaled(probe, source, vector)
        vector = orthogonalize(vector, other) if other else vector
        return scale(vector, norm(other) / norm(vector)) if other and source.scaling == "none" else vector
    saved_direction = _given(source, differences)
    if index >= len(saved_direction):
        raise ValueError(
            f"Expected at least {index + 1} directions from {source.kind!r}, received {len(saved_direction)}."
        )
    return _scaled(probe, source, as_direction(saved_direction[index], parameters))


def objective_gradient(probe: Probe) -> Direction:
    """Return the gradient of the objective (L2 term included) over all batches, in the model's precision, at least float32.

    Raises:
        ValueError: See `Probe.guard`; or a gradient that is not finite.
    """
    with probe.guard(second_order=True) as model:
        parameters = probe.parameters()
        names, leaves = list(parameters), list(parameters.values())
        total = [torch.zeros_like(p, dtype=torch.float64) for p in leaves]
        with distributed.failing_together():
            for _, (x, y) in probe.local_batches():
                loss = probe.objective.data_loss(model(x), y, "sum") / probe.n_labeled
                for t, g in zip(total, torch.autograd.grad(loss, leaves, materialize_grads=True)):
                    t.add_(g)
        total = [distributed.all_reduce_sum(t) for t in total]
        l2 = probe.objective.l2_term(dict(model.named_parameters()))
        if l2.requires_grad:
            for t, g in zip(total, torch.autograd.grad(l2, leaves, materialize_grads=True)):
                t.add_(g)
    gradient = {name: t.to(wide_dtype(p)) for name, p, t in zip(names, leaves, total)}
    if not np.isfinite(size := norm(gradient)) or size == 0:
        raise ValueError(f"Expected a finite gradient that is not zero, received one of norm {size}.")
    return gradient


def _given(source: Source, differences: Sequence[Direction]) -> Sequence[Any] | np.ndarray:
    if source.kind == "checkpoints":
        return differences
    if source.kind == "pca":
        return [_reaching(d, differences) for d in principal_directions(differences)[0]]
    if source.kind == "given":
        return source.directions
    if isinstance(source.eigenvectors, str | PathLike):
        return _saved_vectors(source.eigenvectors)
    assert source.eigenvectors is not None
    return source.eigenvectors


def _saved_vectors(path: str | PathLike[str]) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
            saved = archive["eigenvectors"] if "eigenvectors" in archive.files else np.empty((0, 0))
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"Expected eigenvectors to be a saved result, received {str(path)!r} ({error}).") from None
    if not len(saved):
        raise ValueError(f"Expected a result saved with eigenvectors=true, received {str(path)!r}, which holds none.")
    return saved


def _scaled(probe: Probe, source: Source, vector: Direction) -> Direction:
    if source.ignored:
        moving_parameters = moving(probe.parameters(), source.ignored)
        vector = {name: d for name, d in vector.items() if name in moving_parameters}
    refuse_made_weights(probe.model, vector, source.scaling)
    filters, masks = filter_parameters(probe.model), pruning_masks(probe.model)
    # given points are reached as they are: a pruned entry counts in their L2 term
    masks = masks if source.kind in ("random", "gradient") or source.scaling != "none" else {}
    return normalize(vector, probe.parameters(), source.scaling, filters, masks)


def _reaching(unit: Direction, differences: Sequence[Direction]) -> Direction:
    """Lengthen a unit direction so that the farthest checkpoint's coordinate is 1 or -1."""
    return scale(unit, max(abs(inner(d, unit)) for d in differences))


def _projected(differences: Sequence[Direction], first: Direction, second: Direction) -> tuple[np.ndarray, np.ndarray]:
    gram = np.array([[inner(a, b) for b in (first, second)] for a in (first, second)])
    path, errors = np.zeros((len(differences), 2)), np.zeros(len(differences))
    for row, d in enumerate(differences):
        products = np.array([inner(d, first), inner(d, second)])
        path[row] = np.linalg.solve(gram, products)
        square = inner(d, d)
        errors[row] = np.sqrt(max(0.0, 1 - path[row] @ products / square)) if square > 0 else 0.0
    return path, errors
