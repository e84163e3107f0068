"""Statement of what a model has, for the tests and measures that need it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vitscope.core.guard.eager_execution import unwrapped
from vitscope.models.structure.found_structure import find_structure
from vitscope.models.structure.parameter_groups import parameter_kinds


@dataclass(frozen=True)
class ModelCapabilities:
    """Parts that most models have; ``model.capabilities`` of a configuration states which of them a model lacks.

    Attributes:
        residual_units: Whether vitscope knows residual units of it, which lesions, branch transfer and attention need.
        stem: Whether it has parameters of kind ``stem``: those that are used before the first residual unit. A model without
            residual units has none, since its convolutions are all of kind ``conv``.
    """

    residual_units: bool = True
    stem: bool = True


def capabilities_of(model: nn.Module) -> ModelCapabilities:
    """Return what a model has, as its modules and a forward pass show it.

    Raises:
        ValueError: If the model has neither a known block nor a convolution, or a parameter whose kind is not certain.
    """
    return ModelCapabilities(
        residual_units=any(component.part.is_residual for component in find_structure(unwrapped(model)).components),
        stem="stem" in parameter_kinds(model).values(),
    )
