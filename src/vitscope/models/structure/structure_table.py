"""The units of a model and the kind of every parameter, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vitscope.core.guard.eager_execution import unwrapped
from vitscope.core.tap import Kind
from vitscope.models.structure.coverage import fix_of, model_name
from vitscope.models.structure.found_structure import find_structure
from vitscope.models.structure.parameter_groups import parameters_of, places_of
from vitscope.runtime.errors import StructureError
from vitscope.runtime.text_layout import aligned


@dataclass(frozen=True)
class StructureUnit:
    """A residual unit, or a layer between units such as pooling.

    Attributes:
        name: Unique name, such as ``blocks.1.attn``.
        kind: ``conv msa mlp pool``.
        stage: Number of the stage, from 1.
        parameters: Names of its parameters as in ``named_parameters()``.
        residual: Whether it adds to a stream.
        branch: Whether its branch can be read and removed.
        with_mlp: Whether a branch of kind ``msa`` holds an MLP too, which then counts as ``msa``.
    """

    name: str
    kind: Kind
    stage: int
    parameters: tuple[str, ...]
    residual: bool = True
    branch: bool = True
    with_mlp: bool = False


@dataclass(frozen=True)
class Structure:
    """Units of a model and kinds of its parameters; `str` gives a table.

    Attributes:
        model: Name of the model.
        units: Residual units in order, and layers between them; for a network without residual units, its convolutions.
        parameter_kinds: ``stem conv msa mlp pool head`` of each parameter by name.
        missing: What no unit covers, in words.
        is_residual: Whether any unit adds to a stream.
        sizes: Number of elements of each parameter by name.
    """

    model: str
    units: tuple[StructureUnit, ...]
    parameter_kinds: dict[str, Kind]
    missing: tuple[str, ...] = ()
    is_residual: bool = True
    sizes: dict[str, int] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every attention, MLP and parameter belongs to a unit, to the stem or to the head."""
        return not self.missing

    def check(self) -> None:
        """Check that the structure is complete.

        Raises:
            StructureError: It is not; names the first module that no unit covers.
        """
        if self.missing:
            raise StructureError(self.model, self.missing[0], fix_of(""))

    def __str__(self) -> str:
        """Return the units as a table, the parameters of each kind, and what is missing."""
        sizes = self.sizes or {}
        rows = [("unit", "kind", "stage", "parameters", "")]
        rows += [
            (u.name, u.kind, str(u.stage), f"{sum(sizes.get(n, 0) for n in u.parameters):,}", _remark(u))
            for u in self.units
        ]
        lines = aligned(rows)
        counts: dict[str, int] = {}
        for name, kind in self.parameter_kinds.items():
            counts[kind] = counts.get(kind, 0) + sizes.get(name, 0)
        lines.append("parameters: " + ", ".join(f"{kind} {n:,}" for kind, n in counts.items()))
        if not self.is_residual:
            lines.append("no residual unit: the network is read at its convolutions and pooling")
        lines += [f"not covered: {text}" for text in self.missing]
        return "\n".join(lines)


def _remark(unit: StructureUnit) -> str:
    if not unit.residual:
        return "not residual"
    remarks = []
    if not unit.branch:
        remarks.append("branch is no module's output")
    if unit.with_mlp:
        remarks.append("holds an MLP too")
    return ", ".join(remarks)


def structure(model: nn.Module, images: Tensor | None = None) -> Structure:
    """Return how a model is put together.

    Blocks that vitscope describes are found by their types; in other models one small forward pass in eval mode shows residual
    additions, what their branches compute, and the order of parameters. Units that were passed as ``structure=`` take the
    place of found ones.

    Args:
        model: Any module from images to outputs, also on the meta device.
        images: (B, C, H, W) that the model takes, of which the first is used; None to try the sizes that it states.

    Raises:
        StructureError: A model in which nothing is found.
    """
    inner = unwrapped(model)
    try:
        model_structure = find_structure(inner, images)
    except StructureError:
        raise
    except ValueError as error:
        raise StructureError(model_name(inner), str(error).rstrip("."), fix_of("")) from error
    missing = [text for text, _ in model_structure.missing]
    missing += (*model_structure.doubts, *model_structure.unclear)
    kinds: dict[str, Kind] = {}
    try:
        if model_structure.doubts or model_structure.unclear:
            places = model_structure.places or {}
        else:
            places = places_of(inner, model_structure)
        kinds = {name: kind for name, (kind, _) in places.items()}
    except ValueError as error:  # of described blocks
        missing.append(str(error).rstrip("."))
    units = tuple(
        StructureUnit(
            name=component.name,
            kind=component.part.kind,
            stage=component.stage,
            parameters=parameters_of(inner, component),
            residual=component.part.is_residual,
            branch=(component.part.branch_out or component.part.added) is not None,
            with_mlp=component.name in model_structure.with_mlp,
        )
        for component in model_structure.components
    )
    unassigned = [name for name, _ in inner.named_parameters() if name not in kinds]
    if unassigned and not missing:
        missing.append(f"parameter {unassigned[0]} belongs to no unit")
    sizes = {name: p.numel() for name, p in inner.named_parameters()}
    return Structure(model_name(inner), units, kinds, tuple(missing), any(u.residual for u in units), sizes)
