"""The classifier of a network, and contents of files of weights in which a new classifier stands for the file's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

#: layers whose weight has a row a class
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class ReplacedHead:
    """Contents of a file whose classifier is replaced by the network's own, newly initialized one.

    Attributes:
        content: The contents, to be read like those of any file.
        new_names: Names of the network's parameters and buffers that keep their initial values.
        left_out: The file's tensors that are left out, by their names in the file, with their shapes.
    """

    content: dict[Any, Any]
    new_names: tuple[str, ...]
    left_out: dict[str, tuple[int, ...]]


def classifier_names(network: nn.Module, num_classes: int) -> list[str]:
    """Return the names of the modules that make logits of features.

    They are what timm's ``get_classifier()`` returns; of other networks the last linear layer or convolution with
    ``num_classes`` outputs.

    Args:
        network: Network to look into.
        num_classes: The head's number of classes.

    Raises:
        ValueError: It has no such layer.
    """
    get_classifier = getattr(network, "get_classifier", None)
    returned = get_classifier() if callable(get_classifier) else ()
    modules = returned if isinstance(returned, tuple | list) else (returned,)
    classifier_ids = {
        id(module) for module in modules if isinstance(module, nn.Module) and any(True for _ in module.parameters())
    }
    names = [name for name, module in network.named_modules() if id(module) in classifier_ids]
    if not names:
        named = [(name, module) for name, module in network.named_modules() if isinstance(module, _LAYERS)]
        names = [name for name, module in named if module.weight.shape[0] == num_classes][-1:]
    if not names or "" in names:
        raise ValueError(
            f"Expected a network with a classifier of {num_classes} classes, received {type(network).__name__} without "
            "one (a last linear layer, or timm's get_classifier())."
        )
    return names


def with_new_head(network: nn.Module, content: Mapping[Any, Any], num_classes: int) -> ReplacedHead:
    """Return the contents of a file with the network's own classifier in place of the file's.

    A file without a classifier gets one. All other names have to fit as in any file.

    Args:
        network: Network with newly initialized weights.
        content: Contents of the file: a state dict, or a mapping with one inside.
        num_classes: The network's number of classes.

    Raises:
        ValueError: The network has no classifier, or nothing but one.
    """
    heads = tuple(f"{name}." for name in classifier_names(network, num_classes))
    state = network.state_dict()
    new = {name: value for name, value in state.items() if name.startswith(heads)}
    others = [name for name, value in state.items() if name not in new and isinstance(value, Tensor)]
    if not others:
        raise ValueError(f"Expected a network with more than its classifier, received {type(network).__name__}.")
    left_out: dict[str, tuple[int, ...]] = {}
    replaced = _replaced(content, heads, new, max(others, key=len), left_out)
    return ReplacedHead(replaced, tuple(new), left_out)


def _replaced(
    node: Mapping[Any, Any],
    heads: Sequence[str],
    new: Mapping[str, Any],
    last: str,
    left_out: dict[str, tuple[int, ...]],
) -> dict[Any, Any]:
    """Return a mapping with new classifiers beside each tensor of the name ``last``, whatever prefix it has."""
    entries: dict[Any, Any] = {}
    names = [str(name) for name, value in node.items() if isinstance(value, Tensor)]
    prefixes = [prefix for name in names if name.endswith(last)
                if not (prefix := name.removesuffix(last)) or prefix.endswith(".")]  # fmt: skip
    starts = tuple(prefix + head for prefix in prefixes for head in heads)
    for name, value in node.items():
        if isinstance(value, Tensor) and starts and str(name).startswith(starts):
            left_out[str(name)] = tuple(value.shape)
        else:
            entries[name] = _replaced(value, heads, new, last, left_out) if isinstance(value, Mapping) else value
    entries.update({prefix + name: value for prefix in prefixes for name, value in new.items()})
    return entries
