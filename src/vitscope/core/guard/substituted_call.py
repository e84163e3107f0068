"""Call a network with other tensors in place of its parameters, also where a module stands at several places in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def substituted_call(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Any) -> Any:
    """Return ``model(inputs)`` with ``tensors`` in place of its parameters; the model is as before afterwards.

    `torch.func.functional_call` leaves its tensors in a module that stands at two places, since it takes the two names of each
    parameter for two parameters and gives the second one's original back, which is the first one's substitute. So each module is
    named once here, and parameters that several modules share are named at each of these.

    Args:
        model: the network.
        tensors: tensors by name, as in ``model.named_parameters()``.
        inputs: the argument of the network.
    """
    first_names = {id(p): name for name, p in model.named_parameters()}
    substitutes = dict(tensors)
    for path, module in model.named_modules():
        for key, p in module.named_parameters(recurse=False, remove_duplicate=False):
            first_name = first_names[id(p)]
            if first_name in tensors:
                substitutes[f"{path}.{key}".lstrip(".")] = tensors[first_name]
    return functional_call(model, substitutes, (inputs,), tie_weights=False)
