"""Check that all attention of a model lies inside units of kind ``msa``, and no MLP outside of known units."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from vitscope.core.tap import Kind
from vitscope.models.structure.execution import Execution, Stack
from vitscope.models.structure.residual_structure import ModelComponent, gates_channels, is_gate
from vitscope.models.tracing.additions import is_attention_pooling
from vitscope.runtime.errors import StructureError
from vitscope.runtime.torch_internals import ConvolutionBase

#: attention that weighs channels or positions and mixes none, and pooling by attention in a head
_NO_MIXING = ("channel", "spatial", "split", "coord", "kernel", "pool", "gate", "cbam", "eca", "effective")
#: end of the text about a part without a unit, behind its name
NOT_COVERED = " is not part of a known unit"
#: share of the parameters from which convolutions in stem and head are a body; the four-layer stem of the smallest NFNet
#: (``test_nfnet`` with 3 classes) has 51 %
_BODY_SHARE = 0.6
#: number of such convolutions that a stem has at most (NFNet's); in small networks one holds most of the parameters
_STEM_LAYERS = 4
_ADVICE = (
    "pass structure=[vitscope.models.structure.UnitDescription(...), ...], {register}or pass "
    "Probe(..., taps=[vitscope.Tap(...), ...]) and units=[vitscope.models.structure.Unit(...), ...] by hand"
)


def fix_of(block: str) -> str:
    """Return what to do about a part without a unit; ``block`` is the class of the block around it, if it is known."""
    register = f"describe its block, @vitscope.models.structure.parts.register({block}), " if block else ""
    return _ADVICE.format(register=register)


def model_name(model: nn.Module) -> str:
    """Return the name of timm's configuration of a model, else that of its class."""
    configuration = getattr(model, "pretrained_cfg", None)
    name = configuration.get("architecture") if isinstance(configuration, dict) else None
    return name if isinstance(name, str) and name else type(model).__name__


def missing_from(
    model: nn.Module, components: Sequence[ModelComponent], observed: Execution | None
) -> Iterator[tuple[str, str]]:
    """Yield, for each module that attends, or is an MLP on tokens, outside of units, a text about it and its block's class.

    One small forward pass shows what attends: calls of attention, and products of activations with a softmax or a product
    of activations. Squeeze and excitation is none, nor is pooling by attention in a head. Where the model does not run, the
    modules' class names tell.

    Args:
        model: The model.
        components: The network's units.
        observed: The pass; None where the model does not run.
    """
    return _missing(model, components, observed)


def refuse_missing_units(model: nn.Module, missing: Sequence[tuple[str, str]]) -> None:
    """Raise StructureError that names the first part that no unit covers, if there is any."""
    for text, block in missing[:1]:
        raise StructureError(model_name(model), text, fix_of(block))


def warn_missing_units(model: nn.Module, missing: Sequence[tuple[str, str]]) -> None:
    """Warn once, in one line, of parts that no unit covers: no tap of the model follows it."""
    if missing:
        texts = [text for text, _ in missing]
        listed_texts = ", ".join(texts[:4]) + (f" and {len(texts) - 4} more" if len(texts) > 4 else "")
        warnings.warn(
            f"taps of {type(model).__name__}: no map is read after {listed_texts}; "
            "pass Probe(..., taps=[vitscope.Tap(...), ...])",
            stacklevel=3,
        )


def warn_doubts(model: nn.Module, doubts: Sequence[str]) -> None:
    """Warn once, in one line, of units whose kind is not certain."""
    if doubts:
        more = f" (and {len(doubts) - 1} more units)" if len(doubts) > 1 else ""
        warnings.warn(f"taps of {type(model).__name__}: {doubts[0]}{more}; pass structure=", stacklevel=3)


def warn_body_outside(model: nn.Module, kinds: Mapping[str, Kind]) -> None:
    """Warn if more than four convolutions with overlapping windows in stem and head hold over 60 % of the parameters.

    The encoder and decoder of plain convolutions around one residual block are such; patch embeddings, 1x1 convolutions and
    linear layers, of which classifiers are made, do not count.
    """
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    shares = dict.fromkeys(("stem", "head"), 0.0)
    n_layers = dict.fromkeys(shares, 0)
    for path, module in model.named_modules():
        if not isinstance(module, ConvolutionBase) or not _sees_neighbors(module):
            continue
        names = [f"{path}.{name}".removeprefix(".") for name, _ in module.named_parameters()]
        kind = kinds.get(names[0]) if names else None
        if kind in shares:
            shares[kind] += sum(sizes.get(name, 0) for name in names) / sum(sizes.values())
            n_layers[kind] += 1
    if sum(n_layers.values()) > _STEM_LAYERS and sum(shares.values()) > _BODY_SHARE:
        places = " and ".join(f"{n_layers[kind]} of {kind} ({share:.0%})" for kind, share in shares.items() if share)
        warnings.warn(
            f"{model_name(model)}: convolutions outside of residual units hold most of the parameters: {places}; they have "
            "kind stem or head and no tap, and no measure of units reads them; pass structure= to give them another kind",
            stacklevel=4,
        )


def _sees_neighbors(module: ConvolutionBase) -> bool:
    """Whether a convolution has overlapping windows of several positions."""
    return any(k > max(s, 1) for k, s in zip(module.kernel_size, module.stride))


def residual_blocks(components: Sequence[ModelComponent]) -> list[nn.Module]:
    """Return the blocks of the residual units, none for a plain network."""
    return [piece.block for piece in components if piece.part.is_residual]


def _missing(
    model: nn.Module, components: Sequence[ModelComponent], observed: Execution | None
) -> Iterator[tuple[str, str]]:
    """Yield the description and the parent's class name of each module that is not covered, once."""
    reported: set[str] = set()
    for what, stack in _uncovered(model, components, observed):
        name, module = stack[-1]
        if name not in reported:
            reported.add(name)
            parent = type(stack[-2][1] if len(stack) > 1 else module).__name__
            yield f"{what} {name or type(module).__name__}{NOT_COVERED}", parent


def _uncovered(
    model: nn.Module, components: Sequence[ModelComponent], observed: Execution | None
) -> Iterator[tuple[str, Stack]]:
    """Yield a description and the modules of each part outside of units, which may be one several times."""
    if observed is None:
        for stack in _stacks(model):
            if _is_named_attention(stack[-1][1]) and not _is_covered(stack, components, by_name=True):
                yield "attention module", stack
        return
    for stack in _uncovered_attention(model, components, observed):
        yield "attention module", stack
    yield from _uncovered_layers(model, components, observed)


def _uncovered_attention(
    model: nn.Module, components: Sequence[ModelComponent], observed: Execution
) -> Iterator[Stack]:
    """Yield the modules of attention outside of units: of what attends, then of what runs and is named so."""
    end = _end_of_blocks(components, observed)
    for call in observed.attention:
        is_pooling_of_head = call.time > end and _is_pooling(call.stack)
        if _is_gated(call.stack) or is_pooling_of_head:
            continue
        if not _is_covered(call.stack, components, by_name=call.queries < 2 and not call.fused):
            yield _owner(call.stack)
    for stack in _stacks(model):
        module = stack[-1][1]
        attends = module in observed.starts and _is_named_attention(module) and not _is_gated(stack)
        if attends and not _is_covered(stack, components, by_name=True):
            yield stack


def _uncovered_layers(
    model: nn.Module, components: Sequence[ModelComponent], observed: Execution
) -> Iterator[tuple[str, Stack]]:
    """Yield a description and the modules of MLPs and of layers on tokens outside of blocks."""
    blocks, end = residual_blocks(components), _end_of_blocks(components, observed)
    # a network without residual blocks has no MLP before the last of its components
    last = end or max((observed.starts.get(piece.block, 0) for piece in components), default=0)
    for stack in _stacks(model):
        ends_before = observed.ends.get(stack[-1][1], last) < last
        if ends_before and _is_named_mlp(stack) and not _in_block(stack, blocks):
            yield "MLP", stack
    for stack, _ in observed.pointwise:
        if not _is_gated(stack) and not _in_block(stack, blocks):
            yield "MLP of 1x1 convolutions", stack
    for stack, time in observed.token_layers:
        if time > end and not _is_gated(stack) and not _is_pooling(stack) and not _in_block(stack, blocks):
            yield "linear layer on tokens after the last unit", stack


def _end_of_blocks(components: Sequence[ModelComponent], observed: Execution) -> int:
    """Return the time at which the last residual block has ended; 0 for a plain network."""
    return max((observed.ends.get(block, 0) for block in residual_blocks(components)), default=0)


def _is_covered(stack: Stack, components: Sequence[ModelComponent], by_name: bool) -> bool:
    """Whether the innermost module belongs to an msa unit; by name alone, a gate of a known convolution unit is covered too."""
    modules = [module for _, module in stack]
    for piece in components:
        kinds = ("msa", "pool", "conv") if by_name else ("msa",)
        if not piece.part.is_residual or piece.part.kind not in kinds or piece.block not in modules:
            continue
        depth = modules.index(piece.block)
        inside = stack[depth + 1][0].removeprefix(stack[depth][0]).strip(".") if depth + 1 < len(stack) else ""
        if not piece.part.children or not inside or inside.split(".")[0] in piece.part.children:
            return True
    return False


def _owner(stack: Stack) -> Stack:
    """Cut the stack after the innermost module that has parameters: a softmax or dropout has none."""
    for depth in range(len(stack), 0, -1):
        if next(stack[depth - 1][1].parameters(), None) is not None:
            return stack[:depth]
    return stack[:1]


def _in_block(stack: Stack, blocks: Sequence[nn.Module]) -> bool:
    return any(module is block for _, module in stack for block in blocks)


def _is_gated(stack: Stack) -> bool:
    return any(gates_channels(module) for _, module in stack)


def _is_pooling(stack: Stack) -> bool:
    return any(is_attention_pooling(module) for _, module in stack)


def _is_named_attention(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    name = type(module).__name__
    holds = "Attention" in name or "Attn" in name
    if not holds or any(word in name.lower() for word in _NO_MIXING) or is_gate(module):
        return False
    return next(module.parameters(), None) is not None and "block" not in name.lower()


def _is_named_mlp(stack: Stack) -> bool:
    if _is_gated(stack) or "head" in type(stack[-1][1]).__name__.lower():
        return False
    name = type(stack[-1][1]).__name__.lower()
    return (
        any(word in name for word in ("mlp", "feedforward", "ffn"))
        and next(stack[-1][1].parameters(), None) is not None
    )


def _stacks(model: nn.Module) -> Iterator[Stack]:
    """Yield every module with its ancestors and their names."""
    modules = dict(model.named_modules())
    for name in modules:
        words = name.split(".") if name else []
        paths = ["", *(".".join(words[: i + 1]) for i in range(len(words)))]
        yield tuple((path, modules[path]) for path in paths if path in modules)
