"""Differences of checkpoints from a model, and the directions that contain most of these differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vitscope.linalg.weights.directions import Direction, inner, wide_dtype
from vitscope.runtime.errors import NumericalError


def difference(state: Mapping[str, Tensor], parameters: Mapping[str, Tensor], label: str = "checkpoint") -> Direction:
    """Return ``state - parameters``: the direction that leads from the parameters to a checkpoint.

    Raises:
        NumericalError: Weights of the checkpoint that are not finite.
        ValueError: A parameter that the checkpoint lacks, or of another shape.
    """
    for name, p in parameters.items():
        if name not in state:
            raise ValueError(f"Expected parameter {name!r} in checkpoint {label!r}, received none: is it this model's?")
        if state[name].shape != p.shape:
            raise ValueError(
                f"Expected {name!r} of shape {tuple(p.shape)} in checkpoint {label!r}, received {tuple(state[name].shape)}."
            )
        if not bool(torch.isfinite(state[name].sum(dtype=torch.float64))):
            fix = "leave it out with labels=, as one from after the training diverged"
            raise NumericalError("checkpoint", label, f"weights of {name!r} are not finite", fix)
    return {name: state[name].to(p.device, wide_dtype(p)) - p.detach() for name, p in parameters.items()}


def gram(vectors: Sequence[Mapping[str, Tensor]]) -> np.ndarray:
    """Return the inner products of all pairs (T, T), accumulated in float64."""
    size = len(vectors)
    products = np.zeros((size, size))
    for i in range(size):
        for j in range(i + 1):
            products[i, j] = products[j, i] = inner(vectors[i], vectors[j])
    return products


def principal_directions(differences: Sequence[Mapping[str, Tensor]], k: int = 2) -> tuple[list[Direction], np.ndarray]:
    """Return the first k principal directions of differences from one point, and all squared singular values.

    The singular value decomposition of the matrix of differences, without subtracting their mean (Li et al., NeurIPS 2018,
    section 7: the plane passes through the final weights), by way of the Gram matrix in float64. Directions have unit
    norm; the first difference projects on them with positive sign.

    Args:
        differences: ``checkpoint - final weights`` of each checkpoint.
        k: Number of directions; fewer come back where fewer differences are linearly independent.

    Raises:
        ValueError: No difference that is not zero.
    """
    squares, vectors = np.linalg.eigh(gram(differences))
    squares, vectors = np.maximum(squares[::-1], 0.0), vectors[:, ::-1]
    independent = int((squares > 1e-12 * max(squares.max(initial=0.0), 1e-300)).sum())
    if not independent:
        raise ValueError("Expected a checkpoint that differs from the final weights, received none.")
    directions = []
    for column in range(min(k, independent)):
        weights = vectors[:, column] / np.sqrt(squares[column])
        weights = weights if weights[0] >= 0 else -weights  # the first difference's coordinate has its sign
        total = {name: torch.zeros_like(d) for name, d in differences[0].items()}
        for weight, difference_ in zip(weights, differences):
            for name, d in difference_.items():
                total[name].add_(d, alpha=float(weight))
        directions.append(total)
    return directions, squares
