"""The units of a model, from the descriptions of its blocks, from a traced forward pass, or as a user declares them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from vitscope.core.guard.trial_pass import UntraceableError
from vitscope.core.tap import Kind
from vitscope.models.structure import timm_blocks as timm_blocks  # describes timm's and torchvision's blocks
from vitscope.models.structure.coverage import NOT_COVERED, missing_from, model_name, residual_blocks
from vitscope.models.structure.declared_units import declared_components
from vitscope.models.structure.execution import Execution, execution
from vitscope.models.structure.residual_structure import (
    ModelComponent,
    is_known_by_children,
    owns,
    residual_structure,
)
from vitscope.models.tracing.graph import Trace
from vitscope.models.tracing.reads import adds_branch
from vitscope.models.tracing.recorder import trace
from vitscope.models.tracing.traced_structure import TracedStructure, traced_structure
from vitscope.runtime.errors import StructureError
from vitscope.runtime.torch_internals import RunningNormBase

Place = tuple[Kind, int]


@dataclass(frozen=True)
class FoundStructure:
    """Units of a model and what is not covered by them.

    Attributes:
        components: Residual units and layers between them, in order; without residual units, convolutions and pooling.
        missing: What belongs to no unit, and the class of the block around it.
        places: Kind and stage of each parameter where a traced pass has shown them; None for described blocks.
        unclear: What is not certain about parameters of a traced pass.
        unused: Names of the parameters that a traced pass does not use.
        doubts: Texts about units whose kind is not certain.
        with_mlp: Names of units of kind ``msa`` whose branch holds an MLP too.
        observed: The observed pass of described blocks; None where the model does not run.
    """

    components: list[ModelComponent]
    missing: list[tuple[str, str]]
    places: Mapping[str, Place] | None = None
    observed: Execution | None = None
    unclear: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    with_mlp: tuple[str, ...] = ()


def find_structure(model: nn.Module, images: Tensor | None = None) -> FoundStructure:
    """Find the units of a model.

    Descriptions of blocks are used where they cover all attention of the model, those by the names of children where a traced
    forward pass confirms them. Else the traced pass shows the residual additions; a network that has none is read at its
    convolutions. Declared units take the place of found ones.

    Args:
        model: The model, not wrapped.
        images: (B, C, H, W) that it takes; None to try the sizes that it states.

    Raises:
        ValueError: A model in which nothing is found; says how to declare units.
    """
    declared = declared_components(model)
    if not declared:
        return _found(model, images)
    try:
        model_structure = _found(model, images)
    except ValueError:
        model_structure = FoundStructure([], [])
    return _amended(model, model_structure, declared, images)


def _found(model: nn.Module, images: Tensor | None) -> FoundStructure:
    """Return the structure that the descriptions of known blocks give, or a traced pass where they are incomplete.

    Raises:
        ValueError: Neither gives a structure.
    """
    components, error = _components(model)
    guesses = [piece for piece in components if is_known_by_children(piece.block) and piece.part.is_residual]
    model_trace: Trace | None = None
    failure: UntraceableError | None = None
    if guesses:
        model_trace, failure = _traced(model, images)
        if model_trace is not None and not _confirms(model_trace, guesses):
            components, error = _components(model, by_children=False)
    described: FoundStructure | None = None
    if any(piece.part.is_residual for piece in components):
        described = _described(model, components, images)
        if _is_complete(described):
            return described
    if not guesses:
        model_trace, failure = _traced(model, images)
    if failure is not None and described is None and (error is not None or not _is_plain(model)):
        reason = " ".join(str(failure).split()).rstrip(".")
        raise StructureError(model_name(model), f"its forward pass fails: {reason}", _fix_of_pass(reason)) from failure
    if model_trace is not None:
        traced = traced_structure(model, model_trace)
        if traced is not None and (described is None or described.missing or _completes(traced, described)):
            return _of_trace(traced, described)
    if described is not None:
        return described
    if error is not None:
        raise error
    return _described(model, components, images)


def _confirms(model_trace: Trace, guesses: Sequence[ModelComponent]) -> bool:
    """Whether blocks that are known by the names of their children add the branch that begins at ``conv1``."""
    return all(
        adds_branch(model_trace, piece.block, piece.part, piece.block.get_submodule("conv1")) for piece in guesses
    )


def _is_complete(described: FoundStructure) -> bool:
    """Whether described blocks cover the model, and a forward pass shows no other sums and whole images in each block."""
    observed = described.observed
    is_partial = observed is not None and (observed.has_other_sums or observed.splits_images)
    return not described.missing and not is_partial


def _components(model: nn.Module, by_children: bool = True) -> tuple[list[ModelComponent], ValueError | None]:
    """Return the components that the descriptions of blocks give, or the error of a model that they do not fit."""
    try:
        return residual_structure(model, by_children), None
    except ValueError as error:
        return [], error


def _traced(model: nn.Module, images: Tensor | None) -> tuple[Trace | None, UntraceableError | None]:
    """Return a traced pass, or the error of a model that does not run."""
    try:
        return trace(model, images), None
    except UntraceableError as failure:
        return None, failure


def _described(model: nn.Module, components: list[ModelComponent], images: Tensor | None) -> FoundStructure:
    """Return the structure of described components, with what a forward pass shows beside them."""
    observed = execution(model, residual_blocks(components), images)
    components = _in_order_of_calls(components, observed)
    return FoundStructure(components, list(missing_from(model, components, observed)), None, observed)


def _in_order_of_calls(components: list[ModelComponent], observed: Execution | None) -> list[ModelComponent]:
    """Return components in the order in which a forward pass called their blocks, which is mostly that of registration.

    A block that was not called stays behind the one before it. Of blocks inside of others the order is left as it is.
    """
    blocks = {piece.block for piece in components}
    has_nested = any(inner in blocks for block in blocks for inner in block.modules() if inner is not block)
    if observed is None or has_nested:
        return components
    times, last = [], -1
    for piece in components:
        last = observed.starts.get(piece.block, last)
        times.append(last)
    return [piece for _, piece in sorted(zip(times, components), key=lambda pair: pair[0])]


def _of_trace(traced: TracedStructure, described: FoundStructure | None) -> FoundStructure:
    """Return the structure that a traced pass shows; what descriptions miss in stem or head is missing still."""
    missing = [(text, "") for text in traced.uncovered]
    outside = [name for name, (kind, _) in traced.places.items() if kind in ("stem", "head")]
    missing_before = described.missing if described is not None else []
    for text, block in missing_before:
        path = text.removesuffix(NOT_COVERED).split()[-1]
        if any(name.startswith(path + ".") for name in outside):
            missing.append((text, block))
    return FoundStructure(
        traced.components,
        list(dict.fromkeys(missing)),
        traced.places,
        None,
        tuple(traced.unclear),
        tuple(traced.unused),
        tuple(traced.doubts),
        tuple(traced.with_mlp),
    )


def _is_plain(model: nn.Module) -> bool:
    """Whether a model that does not run is a series of convolutions with a classifier behind them, by its registered layers.

    Linear layers before the last convolution, more than three behind it and parameters of other layers are those of blocks
    that only a forward pass can tell.
    """
    ignored = (RunningNormBase, nn.GroupNorm, nn.PReLU)
    layers = [m for m in model.modules() if [*m.parameters(recurse=False)] and not isinstance(m, ignored)]
    n_behind = 0
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            if n_behind:
                return False
        elif isinstance(layer, nn.Linear):
            n_behind += 1
        else:
            return False
    return n_behind <= 3


def _fix_of_pass(reason: str) -> str:
    """Return what to do about a model that does not run on images."""
    flexible = "choose another attention for measuring (attn_implementation='sdpa' in transformers); or "
    return (
        f"{flexible if 'FlexAttention' in reason else ''}pass images that it takes, vs.structure(model, images), or a module "
        "around it whose forward takes images (B, C, H, W) alone and returns logits; or name its layers, "
        'Probe(..., taps=[vitscope.Tap("block1", "conv", stage=1, depth=0.0, module=model.block1), ...])'
    )


def _completes(traced: TracedStructure, described: FoundStructure) -> bool:
    """Whether a traced pass shows units outside of the described blocks, or blocks that do not see whole images."""
    if traced.unclear or traced.uncovered or traced.doubts or described.observed is None:
        return False
    n_traced, n_described = (
        sum(c.part.is_residual for c in parts) for parts in (traced.components, described.components)
    )
    return n_traced > n_described or (n_traced == n_described and described.observed.splits_images)


def _amended(
    model: nn.Module, model_structure: FoundStructure, declared: Sequence[ModelComponent], images: Tensor | None
) -> FoundStructure:
    """Put declared units in the place of those that share parameters with them."""
    declared_names = {name for component in declared for name in component.parameters or ()}
    inside = tuple(component.name for component in declared)
    order = {name: i for i, (name, _) in enumerate(model.named_parameters())}

    def owned(component: ModelComponent) -> set[str]:
        return set(component.parameters if component.parameters is not None else _owned_by_path(model, component))

    is_residual = any(c.part.is_residual for c in model_structure.components)
    others = [c for c in model_structure.components if is_residual and not owned(c) & declared_names]
    components = sorted([*others, *declared], key=lambda c: min((order[name] for name in owned(c)), default=0))
    missing = [
        (t, b) for t, b in model_structure.missing if not any(_mentions(t, name) for name in (*inside, *declared_names))
    ]
    return FoundStructure(components, missing, _declared_places(model, model_structure, components, owned, images))


def _owned_by_path(model: nn.Module, component: ModelComponent) -> list[str]:
    return [name for name, _ in model.named_parameters() if owns(model, component, name)]


def _mentions(text: str, name: str) -> bool:
    return any(word.strip("'\",") == name or word.strip("'\",").startswith(name + ".") for word in text.split())


def _declared_places(
    model: nn.Module,
    model_structure: FoundStructure,
    components: Sequence[ModelComponent],
    owned: Callable[[ModelComponent], set[str]],
    images: Tensor | None,
) -> dict[str, Place]:
    """Return kinds by declared and found units; other parameters have the kind that was found, else that of their order.

    It is the order of first use in a forward pass; that of registration for parameters that the pass does not use, and where
    the model does not run.
    """
    places: dict[str, Place] = {}
    for component in components:
        places.update(dict.fromkeys(owned(component), (component.part.kind, component.stage)))
    names = [name for name, _ in model.named_parameters()]
    if model_structure.places is None and (observed := execution(model, (), images)) is not None:
        names = _by_first_use(names, observed)
    last = max((i for i, name in enumerate(names) if name in places), default=-1)
    latest: Place = ("stem", 0)
    head: Place = ("head", max(c.stage for c in components) + 1)
    complete: dict[str, Place] = {}
    for i, name in enumerate(names):
        if name in places:
            latest = places[name]
        if name in places or model_structure.places is None:
            complete[name] = places.get(name) or (latest if i <= last else head)
        elif name in model_structure.places:
            complete[name] = model_structure.places[name]
    return {name: complete[name] for name, _ in model.named_parameters() if name in complete}


def _by_first_use(names: Sequence[str], observed: Execution) -> list[str]:
    """Return names of parameters in the order of their first use; one that is not used stays behind the one before it."""
    times: dict[str, int] = {}
    latest = 0
    for name in names:
        latest = observed.first_use.get(name, latest)
        times[name] = latest
    return sorted(names, key=lambda name: times[name])
