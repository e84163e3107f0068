"""Kind of unit and stage of each parameter."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import get_args

from torch import Tensor, nn

from vitscope.core.guard.eager_execution import unwrapped
from vitscope.core.guard.parameter_use import parameter_owners
from vitscope.core.probe import Probe
from vitscope.core.tap import Kind
from vitscope.core.undefined_values import warn_nulls
from vitscope.models.structure.coverage import (
    fix_of,
    model_name,
    refuse_missing_units,
    residual_blocks,
    warn_body_outside,
)
from vitscope.models.structure.execution import Execution
from vitscope.models.structure.found_structure import FoundStructure, find_structure
from vitscope.models.structure.residual_structure import TOKENS, ModelComponent, in_auxiliary_head, is_gate, owns
from vitscope.runtime.errors import StructureError

Place = tuple[Kind, int]

#: kinds in the order in which results list them
KIND_ORDER: tuple[Kind, ...] = get_args(Kind)
#: kind of a parameter of a network whose units are not known
UNKNOWN = "unknown"


def parameter_kinds(model: nn.Module, images: Tensor | None = None) -> dict[str, Kind]:
    """Kind of every parameter by its name in ``named_parameters()``: ``stem conv msa mlp pool head``.

    A parameter inside a residual unit or pooling layer has that unit's kind (norms with their branch, a projection
    shortcut with its block). The others are ordered by one forward pass: ``stem`` is what is first used before the first
    unit is called (class token and position embedding too), ``head`` what is first used after the last unit. Norms between
    units belong to the unit before, convolutions are ``conv``. Only where the model does not run on ``images``, or on
    images of the size that it states, the order of registration takes the place of the order of execution.

    Args:
        model: The model.
        images: (B, C, H, W), of which the first is used; None to try the sizes that the model states.

    Raises:
        ValueError: Nothing in the model is known, see `vitscope.models.structure.taps.taps`; attention or an MLP outside of its
            units; a parameter outside of its units that is not used, or used between them for something else.
    """
    return {name: kind for name, (kind, _) in _places(model, images).items()}


def kinds_of_probe(probe: Probe, names: Sequence[str], measure: str, unknown: str = UNKNOWN) -> tuple[str, ...]:
    """Return the kind of each parameter; where kinds are not certain, ``unknown`` for all, with a warning that says why.

    Args:
        probe: The model and its images.
        names: Names of its parameters; rows of one are ``name[part]``.
        measure: Name of the measure, for the warning.
        unknown: Kind of parameters that have none.
    """
    try:
        with probe.calling():
            kinds = parameter_kinds(probe.model, probe.first_images())
    except ValueError as error:
        reason = str(error).partition("; ")[0].rstrip(".")
        warn_nulls(measure, {"the kinds of parameters": reason})
        return (unknown,) * len(names)
    return tuple(str(kinds.get(name, kinds.get(name.rpartition("[")[0], unknown))) for name in names)


def parameter_stages(model: nn.Module, images: Tensor | None = None) -> dict[str, int]:
    """Stage of every parameter by name: 0 for the stem, from 1 for the blocks, one past the last for the head.

    Arguments and errors are those of `parameter_kinds`.
    """
    return {name: stage for name, (_, stage) in _places(model, images).items()}


def _places(model: nn.Module, images: Tensor | None) -> dict[str, Place]:
    names = [name for name, _ in model.named_parameters()]
    inner = unwrapped(model)
    model_structure = find_structure(inner, images)
    refuse_missing_units(inner, model_structure.missing)
    original = [name for name, _ in inner.named_parameters()]  # those of a compiled model have a prefix
    places = places_of(inner, model_structure)
    return dict(zip(names, (places[name] for name in original), strict=True))


def parameters_of(model: nn.Module, component: ModelComponent) -> tuple[str, ...]:
    """Return the names of the parameters of a unit."""
    if component.parameters is not None:
        return component.parameters
    return tuple(name for name, _ in model.named_parameters() if owns(model, component, name))


def places_of(inner: nn.Module, model_structure: FoundStructure) -> Mapping[str, Place]:
    """Return kind and stage of each parameter of a model whose units were found.

    Raises:
        ValueError: A parameter outside of units that is not used, or used between them for something else.
    """
    for text in (*model_structure.doubts, *model_structure.unclear)[:1]:
        raise StructureError(model_name(inner), text, fix_of(""))
    if model_structure.places is not None:
        _warn_unused(model_structure.unused)
        _warn_with_mlp(model_structure.with_mlp)
        warn_body_outside(inner, {name: kind for name, (kind, _) in model_structure.places.items()})
        return model_structure.places
    components, observed = model_structure.components, model_structure.observed
    original = [name for name, _ in inner.named_parameters()]
    owned = {name: piece for name in original for piece in components if owns(inner, piece, name)}
    if observed is None:
        warnings.warn(
            f"{type(inner).__name__} does not run on images of the sizes that were tried: kinds and stages follow the order of "
            "registration; pass images=",
            stacklevel=4,
        )
    if observed is None:
        return _by_registration(original, owned, components)
    places = _by_execution(inner, owned, components, observed)
    if any(piece.part.is_residual for piece in components):
        warn_body_outside(inner, {name: kind for name, (kind, _) in places.items()})
    return places


def _by_registration(
    names: Sequence[str], owned: Mapping[str, ModelComponent], components: Sequence[ModelComponent]
) -> dict[str, Place]:
    last = max((i for i, name in enumerate(names) if name in owned), default=-1)
    places: dict[str, Place] = {}
    latest: Place = ("stem", 0)
    for i, name in enumerate(names):
        if name in owned:
            latest = (owned[name].part.kind, owned[name].stage)
        places[name] = latest if i <= last else ("head", components[-1].stage + 1)
    return places


def _by_execution(
    model: nn.Module, owned: Mapping[str, ModelComponent], components: Sequence[ModelComponent], observed: Execution
) -> dict[str, Place]:
    _check_used(model, owned, observed)
    units = residual_blocks(components) or [piece.block for piece in components]
    start = min((observed.starts[block] for block in units if block in observed.starts), default=0)
    end = max((observed.ends[block] for block in units if block in observed.ends), default=0)
    owners = parameter_owners(model)
    inside = tuple(f"{path}." for path, module in model.named_modules() if module in units or is_gate(module))
    places: dict[str, Place] = {}
    latest: Place = (components[0].part.kind, components[0].stage)
    names = sorted((name for name, _ in model.named_parameters()), key=lambda name: observed.first_use.get(name, 0))
    for name in names:
        time = observed.first_use.get(name, 0)  # 0 where the pass does not use it
        if name in owned and (time or not in_auxiliary_head(model, name)):
            places[name] = (owned[name].part.kind, owned[name].stage)
            latest = places[name] if time else latest
        elif time > end or in_auxiliary_head(model, name):
            places[name] = ("head", components[-1].stage + 1)
        elif name not in observed.reaching:
            raise _unclear(
                name, "used before the end of the last unit without an effect on its output, as in a second head"
            )
        elif time < start:
            places[name] = ("stem", 0)
        else:
            p = model.get_parameter(name)
            latest = latest if name.startswith(inside) else _between(name, p, owners[name], model, latest)
            places[name] = ("stem", 0) if _is_token(name) else latest
    return places


def _between(name: str, p: Tensor, owner: nn.Module, model: nn.Module, latest: Place) -> Place:
    """Return the place of a parameter that no unit owns and that runs between units: a convolution or the layer before.

    Raises:
        ValueError: It is neither of a convolution or norm, nor a vector (a scale or an offset of channels), nor a token.
    """
    if isinstance(owner, nn.Conv2d):
        return "conv", latest[1]
    is_vector = owner is not model and not isinstance(owner, nn.Linear) and p.numel() == max(p.shape, default=1)
    if is_vector or "norm" in type(owner).__name__.lower() or _is_token(name):
        return latest
    raise _unclear(name, f"of {type(owner).__name__}, used between units")


def _is_token(name: str) -> bool:
    """Whether it is a class token or position embedding, which a hybrid adds after its convolutions."""
    key = name.rpartition(".")[2]
    return key in TOKENS or key in ("pos_embed", "pos_embedding", "position_embeddings", "cls_pos")


def _check_used(model: nn.Module, owned: Mapping[str, ModelComponent], observed: Execution) -> None:
    unused = [name for name, _ in model.named_parameters() if name not in observed.first_use]
    for name in unused:
        if name not in owned and not in_auxiliary_head(model, name):
            raise _unclear(name, "that the forward pass in eval mode does not use")
    _warn_unused(unused)


def _warn_unused(unused: Sequence[str]) -> None:
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        warnings.warn(
            f"parameters that the forward pass in eval mode does not use have their unit's kind: {', '.join(unused[:3])}{more}",
            stacklevel=6,
        )


def _warn_with_mlp(names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"one branch holds attention and an MLP, whose parameters have kind msa: {', '.join(names[:3])}{more}",
            stacklevel=6,
        )


def _unclear(name: str, what: str) -> ValueError:
    return ValueError(
        f"Expected each parameter in a known unit, before the first (stem) or after the last (head), received {name!r} {what}: "
        "delete it from the model, describe its block with @vitscope.models.structure.parts.register(Block), or choose "
        "parameters by layer:<module> or a name pattern."
    )
