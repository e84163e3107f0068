"""Weights as a layer uses them: names without wrappers, masks of pruned weights, weights that are made from parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from vitscope.runtime.torch_internals import WRAPPER_ATTRIBUTES

#: parameters from which torch.nn.utils makes a weight before each pass: weight_norm, spectral_norm
_MADE_FROM = (("_g", "_v"), ("_orig",))


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Return the name of each parameter in the network itself, whatever it is wrapped in, by its name in ``model``.

    The wrappers are the modules from the top on that have no parameters of their own and one child with parameters (a class
    of the user's, ``DataParallel``, a sequence of a normalization and the network), and, anywhere, those that keep the
    wrapped module as ``module``, ``_orig_mod``, ``_fsdp_wrapped_module`` or ``_checkpoint_wrapped_module``. A weight that
    is pruned (``weight_orig``) keeps its name. Where two parameters would share a name, all keep those that they have.
    """
    top = ""
    module: nn.Module = model
    while next(module.parameters(recurse=False), None) is None:
        children = [(name, m) for name, m in module.named_children() if next(m.parameters(), None) is not None]
        if len(children) != 1:
            break
        top, module = f"{top}{children[0][0]}.", children[0][1]
    masks = pruning_masks(model)
    names = {}
    for name, _ in model.named_parameters():
        short = name.removeprefix(top).removesuffix("_orig") if name in masks else name.removeprefix(top)
        *path, last = short.split(".")
        names[name] = ".".join([part for part in path if part not in WRAPPER_ATTRIBUTES] + [last])
    return names if len(set(names.values())) == len(names) else {name: name for name in names}


def pruning_masks(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks of pruned parameters (``torch.nn.utils.prune``) by the names of the parameters."""
    masks = {}
    for path, module in model.named_modules():
        buffers = dict(module.named_buffers(recurse=False, remove_duplicate=False))
        for key, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            mask = buffers.get(f"{key.removesuffix('_orig')}_mask")
            if key.endswith("_orig") and mask is not None:
                masks[f"{path}.{key}".lstrip(".")] = mask
    return masks


def _made_by_hooks(own_parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield each weight of a module that a hook makes from parameters, and the endings of the names of these."""
    for ends in _MADE_FROM:
        for name in own_parameters:
            key = name.removesuffix(ends[0])
            has_all_parts = name.endswith(ends[0]) and all(f"{key}{end}" in own_parameters for end in ends)
            if has_all_parts and key not in own_parameters:
                yield key, ends


def made_weights(model: nn.Module) -> dict[str, str]:
    """Return the parameters from which weights are made before each pass, by name, with the names of those weights.

    ``torch.nn.utils.parametrize`` (weight norm, spectral norm and others) and the older hooks of ``weight_norm`` and
    ``spectral_norm``. Pruned weights, which are products with a mask, are not among them.
    """
    sources: dict[str, str] = {}
    masks = pruning_masks(model)
    names = {id(p): name for name, p in model.named_parameters()}
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for key, chain in cast(nn.ModuleDict, module.parametrizations).items():
                sources |= {names[id(p)]: f"{path}.{key}".lstrip(".") for p in chain.parameters() if id(p) in names}
        own_parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        for key, ends in _made_by_hooks(own_parameters):
            parts = [f"{path}.{key}{end}".lstrip(".") for end in ends]
            if not set(parts) & set(masks):
                sources |= dict.fromkeys(parts, f"{path}.{key}".lstrip("."))
    return sources


def refuse_made_weights(model: nn.Module, moved: Iterable[str], normalization: str) -> None:
    """Raise ValueError where a direction that is scaled to the weights would move parameters that are no weights.

    The network does not change with the length of ``v`` in weight norm, or of a spectrally normalized weight: norms of these
    parameters say nothing about the weight that the layer uses.
    """
    sources = made_weights(model) if normalization != "none" else {}
    for name in moved:
        if name in sources:
            raise ValueError(
                f"Expected weights that are parameters with normalization={normalization!r}, received {sources[name]!r}, which "
                f"is made from {name!r}: pass a copy of the model after torch.nn.utils.parametrize.remove_parametrizations (or "
                "remove_weight_norm, remove_spectral_norm), or normalization='none'."
            )


def masked(direction: dict[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Set the entries of a direction that belong to pruned weights to zero in place, and return the direction."""
    for name, d in direction.items():
        if name in masks:
            d.mul_(masks[name].to(d))
    return direction
