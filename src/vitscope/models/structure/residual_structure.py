"""Find the residual units and pooling layers of a model by the types of its modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Literal

from torch import Tensor, nn

from vitscope.core.tap import Kind, Layout, TokenOrder
from vitscope.runtime.torch_internals import original_function

#: parameters that stand in front of the patches in models that do not state how many do
TOKENS = (
    "class_token", "cls_token", "dist_token", "distillation_token", "reg_token", "reg_tokens", "register_token",
    "register_tokens",
)  # fmt: skip

#: what to do about a model whose residual units are not known; in YAML the descriptions are ``model.structure``
DESCRIBING_UNITS = (
    'describe its residual units, Probe(..., structure=[{"module": "blocks.*.attn", "kind": "msa"}, ...]) with the names of '
    "its modules"
)


@dataclass(frozen=True)
class Read:
    """A tensor of the forward pass: the output, the first input or a sum in a module, and the meaning of its axes.

    ``NCHW`` and ``NHWC`` are maps; ``NLC`` (tokens, channels), ``NCL`` (channels, tokens) and ``LNC`` (tokens before images) are
    sequences. Of a module that
    runs ``n_calls`` times in a forward pass, call number ``call`` is read, counted from 0. ``n_prefix`` is the number of
    prefix tokens of this tensor where a forward pass has shown it; None where the unit states it. ``has_map`` is false for a
    tensor without positions, such as a class token alone. ``exact`` is false where the tensor is scaled or cut before it is used.
    ``shows_grid`` is false for a sequence if no convolution or pooling of the traced pass has a map of as many positions.
    ``order`` is that of the tokens of such a sequence or of an unknown layout, or why it is not certain; None where it was not
    sought. ``guesses_prefix`` is true where the names of the model's tokens alone say how many stand in front; a forward pass
    then shows the order. A sum is addition ``number`` of those that the module's call makes itself, counted from 0; with an
    ``operand`` the tensor that it adds is meant, number ``operand`` of the addition's two tensors.
    """

    module: nn.Module
    at: Literal["output", "input", "sum"] = "output"
    layout: Layout = "NCHW"
    call: int = 0
    n_calls: int = 1
    n_prefix: int | None = None
    has_map: bool = True
    exact: bool = True
    shows_grid: bool = True
    guesses_prefix: bool = False
    order: TokenOrder | str | None = None
    number: int = 0
    operand: int | None = None


@dataclass(frozen=True)
class ResidualUnit:
    """One residual unit (or pooling layer) of a block, as the describing function of its type states it.

    Attributes:
        kind: What the unit does.
        after: The map after the unit's residual addition; None where no module returns or receives it.
        branch_in: The normalized input of the residual branch; without a norm, the stream. None for pooling.
        branch_out: The branch's output as it is added; its module returns that tensor. None for pooling.
        added: The operand of the addition, where no module returns the branch as it is added.
        suffix: Name of the unit inside its block, empty if the block is one unit.
        children: The block's children and parameters that belong to this unit; empty for all of them.
        attention: The module that calls ``scaled_dot_product_attention``, for units of kind ``msa``.
        conv3x3: The 3x3 convolution that an identity can replace, if there is one.
        subsamples: Whether the map becomes smaller.
        stream: The stream that the unit reads, where a forward pass has shown it.
        residual: Whether the unit adds to a stream, also where no module returns its branch (``branch_out`` is None).
    """

    kind: Kind
    after: Read | None
    branch_in: Read | None = None
    branch_out: Read | None = None
    suffix: str = ""
    children: tuple[str, ...] = ()
    attention: nn.Module | None = None
    conv3x3: nn.Conv2d | None = None
    subsamples: bool = False
    residual: bool = False
    stream: Read | None = None
    added: Read | None = None

    @property
    def is_residual(self) -> bool:
        """Whether the unit adds to a stream; pooling and layers between units do not."""
        return self.residual or self.branch_out is not None


@dataclass(frozen=True)
class ModelComponent:
    """A `ResidualUnit` at its place in a model: name, block, stage (from 1), and the number of its prefix tokens.

    ``parameters`` are the names of its parameters where a forward pass has shown them; None where they are those of ``block``
    and ``part.children``.
    """

    name: str
    part: ResidualUnit
    block: nn.Module
    stage: int
    n_prefix: int
    parameters: tuple[str, ...] | None = None


@singledispatch
def parts(block: nn.Module) -> tuple[ResidualUnit, ...]:
    """The units of a block in the order they run; empty if the type is unknown.

    A new model's file registers its own blocks: ``@parts.register(MyBlock)``.
    """
    return ()


def subsamples(block: nn.Module) -> bool:
    """Whether any convolution or pooling of the block has a stride."""
    strides = (
        getattr(m, "stride", 1) for m in block.modules() if isinstance(m, nn.Conv2d | nn.AvgPool2d | nn.MaxPool2d)
    )
    return any(s > 1 if isinstance(s, int) else max(s) > 1 for s in strides)


def replaceable_conv3x3(block: nn.Module) -> nn.Conv2d | None:
    """The last 3x3 convolution of the block's branch that keeps the number of channels, or None."""
    shortcuts = [getattr(block, name, None) for name in ("shortcut", "downsample")]
    of_shortcut = {m for shortcut in shortcuts if isinstance(shortcut, nn.Module) for m in shortcut.modules()}
    candidates = [
        m for m in block.modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) and m.in_channels == m.out_channels and m not in of_shortcut
    ]  # fmt: skip
    return candidates[-1] if candidates else None


def residual_structure(model: nn.Module, by_children: bool = True) -> list[ModelComponent]:
    """The residual units and pooling layers of a model in the order of registration.

    Blocks are recognized by type (`parts`); strided convolutions and pooling between them count as pooling
    layers. A stage is a container of blocks, counted from 1. A model without a known block is read after each
    of its convolutions and pooling layers, with a new stage at each subsampling; it has no residual units.

    Args:
        model: The model.
        by_children: Whether the names of children describe hand-written blocks.

    Raises:
        ValueError: If there is neither a known block nor a convolution other than a lone patch embedding.
    """
    components: list[ModelComponent] = []
    stages: list[str] = []
    for name, module, ancestors in _walk(model, by_children):
        for part in _units_of_module(module, by_children):
            if part.is_residual and _container(name) not in stages:
                stages.append(_container(name))
            stage = len(stages) + (not part.is_residual)  # a pooling layer opens the stage after it
            unit_name = ".".join(filter(None, (name, part.suffix)))
            n_prefix, is_stated = _prefix_tokens(ancestors)
            part = part if is_stated else _with_guessed_prefix(part, n_prefix)
            components.append(ModelComponent(unit_name, part, module, stage, n_prefix))
    residual = [i for i, piece in enumerate(components) if piece.part.is_residual]
    # pooling before the first unit belongs to the stem, after the last to the head
    components = components[residual[0] : residual[-1] + 1] if residual else _structure_without_units(model)
    if not components:
        raise ValueError(
            f"{type(model).__name__} has no block that vitscope knows: {DESCRIBING_UNITS}; measures of feature maps alone take "
            'Probe(..., taps=[vitscope.Tap("block1", "conv", stage=1, depth=0.0, module=model.block1), ...]) instead.'
        )
    return components


def is_known_by_children(block: nn.Module) -> bool:
    """Whether only the names of a block's children describe it, which do not tell in what order its forward runs them."""
    described = next(cls for cls in type(block).__mro__ if cls in parts.registry)
    return described is nn.Module and not type(block).__module__.startswith("torchvision.")


def _registered_units(module: nn.Module, by_children: bool) -> tuple[ResidualUnit, ...]:
    return parts(module) if by_children or not is_known_by_children(module) else ()


def _units_of_module(module: nn.Module, by_children: bool) -> tuple[ResidualUnit, ...]:
    """What is registered for the type, else pooling for any strided layer that stands between blocks."""
    registered = _registered_units(module, by_children)
    if registered:
        _check_forward(module)
    if not registered and isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) and subsamples(module):
        return (ResidualUnit("pool", Read(module), subsamples=True),)
    return registered


def _check_forward(block: nn.Module) -> None:
    """Raise ValueError where a block runs other code than the type that describes it: its units may lie elsewhere."""
    described = next(cls for cls in type(block).__mro__ if cls in parts.registry)
    if described is nn.Module:  # known by its name or children
        return
    instance_forward = original_function(block.__dict__.get("forward"))
    forward = type(block).forward if instance_forward is None else instance_forward
    actual_forward = getattr(forward, "__func__", forward)
    if actual_forward is not described.forward:
        name = type(block).__name__
        raise ValueError(
            f"Expected blocks that run as {described.__module__}.{described.__name__}, received {name} with a forward of its "
            f"own: describe it, @vitscope.models.structure.parts.register({name}), or pass taps=[...] and units=[...]."
        )


def _walk(model: nn.Module, by_children: bool) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...]]]:
    """Modules in registration order with their ancestors; the inside of what is described is left out."""
    stack: list[tuple[str, nn.Module, tuple[nn.Module, ...]]] = [("", model, ())]
    while stack:
        name, module, ancestors = stack.pop()
        yield name, module, ancestors
        registered = _registered_units(module, by_children)
        described = [part.suffix for part in registered]
        if any(part.is_residual for part in registered) or "" in described:
            continue
        children = [
            (f"{name}.{child}".strip("."), m, (*ancestors, module))
            for child, m in module.named_children() if child not in described
        ]  # fmt: skip
        stack.extend(reversed(children))


def _container(name: str) -> str:
    parent = name.rpartition(".")[0]
    return parent[: -len("blocks")].rstrip(".") if parent.split(".")[-1] == "blocks" else parent


def _prefix_tokens(ancestors: tuple[nn.Module, ...]) -> tuple[int, bool]:
    """Number of prefix tokens, as the innermost ancestor states it or shows by its class, distillation and register tokens.

    Also whether that is certain: in networks of others such tokens may stand behind the patches, and ``num_tokens`` count these.
    """
    for module in reversed(ancestors):
        is_known = type(module).__module__.partition(".")[0] in ("timm", "torchvision")
        for name in ("num_prefix_tokens", "num_tokens") if is_known else ("num_prefix_tokens",):
            stated = getattr(module, name, None)
            if isinstance(stated, int):
                return stated, True
        tokens = [token for name in TOKENS if isinstance(token := getattr(module, name, None), Tensor)]
        if tokens:
            n = sum(token.shape[-2] if token.ndim > 1 else 1 for token in tokens)  # (1, n, C), (n, C) or (C,)
            return n, is_known
    return 0, True


def _with_guessed_prefix(part: ResidualUnit, n_prefix: int) -> ResidualUnit:
    """Return a unit whose reads of sequences are to be checked by a forward pass."""
    reads = {"after": part.after, "branch_in": part.branch_in, "branch_out": part.branch_out}
    changed = {
        name: replace(read, n_prefix=n_prefix, guesses_prefix=True)
        for name, read in reads.items()
        if read is not None and read.layout in ("NLC", "NCL", "LNC")
    }
    return replace(part, **changed)


def _structure_without_units(model: nn.Module) -> list[ModelComponent]:
    components: list[ModelComponent] = []
    stage = 1
    others = tuple(
        f"{name}." for name, module in model.named_modules() if is_gate(module) or "Aux" in type(module).__name__
    )
    for name, module in model.named_modules():
        # a gate's convolutions see one average for the whole map, an auxiliary head runs in training alone
        if name.startswith(others):
            continue
        is_subsampling = isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) and subsamples(module)
        if is_subsampling and components:
            stage += 1
        if isinstance(module, nn.Conv2d):
            part = ResidualUnit("conv", Read(module), subsamples=is_subsampling)
        elif is_subsampling:
            part = ResidualUnit("pool", Read(module), subsamples=True)
        else:
            continue
        components.append(ModelComponent(name, part, module, stage, 0))
    return [] if len(components) == 1 and _is_patch_embedding(components[0].block) else components


def is_gate(module: nn.Module) -> bool:
    """Return whether a module is squeeze and excitation, by the names of timm's, torchvision's and usual hand-written ones."""
    name = type(module).__name__.lower()
    return "squeezeexcit" in name or name in ("semodule", "selayer", "seblock", "se")


def gates_channels(module: nn.Module) -> bool:
    """Return whether a module is squeeze and excitation or timm's global context, which weighs channels likewise."""
    return is_gate(module) or type(module).__name__.lower() == "globalcontext"


def in_auxiliary_head(model: nn.Module, name: str) -> bool:
    """Return whether a parameter belongs to a classifier that runs in training alone, by the class names of GoogLeNet's."""
    words = name.split(".")[:-1]
    modules = (model.get_submodule(".".join(words[: i + 1])) for i in range(len(words)))
    return any("Aux" in type(module).__name__ for module in modules)


def _is_patch_embedding(module: nn.Module) -> bool:
    """Whether a model whose only convolution this is must be a transformer of unknown blocks."""
    return isinstance(module, nn.Conv2d) and module.stride == module.kernel_size and max(module.kernel_size) > 1


def owns(model: nn.Module, piece: ModelComponent, name: str) -> bool:
    """Whether a parameter belongs to a unit of a described block, by its name."""
    suffix = piece.part.suffix
    path = piece.name.removesuffix(suffix).rstrip(".") if suffix else piece.name
    if path and not name.startswith(path + "."):
        return False
    child = name[len(path) + 1 :].split(".")[0] if path else name.split(".")[0]
    return not piece.part.children or child in piece.part.children
