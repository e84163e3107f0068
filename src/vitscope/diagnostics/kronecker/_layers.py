"""Weights that are matrices, and the kinds of the units they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from vitscope.models.structure.parameter_groups import KIND_ORDER, UNKNOWN


def weight_matrices(parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the parameters that are matrices or kernels of more than one row and column.

    Raises:
        ValueError: There is none.
    """
    names = [
        name for name, p in parameters.items() if p.ndim >= 2 and 1 < len(p) < p.numel() and p.numel() > max(p.shape)
    ]
    if not names:
        raise ValueError(
            "Expected at least one weight of two or more dimensions, received vectors alone: choose parameters=."
        )
    return names


def present_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """Return the kinds that occur, in the order in which results list them."""
    return tuple(kind for kind in (*KIND_ORDER, UNKNOWN) if kind in kinds)
