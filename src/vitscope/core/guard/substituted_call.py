"""Call a network with other tensors in place of its parameters, also where a module stands at several places in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def substituted_call(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Any) -> Any:
    """Return ``model(inputs)`` with ``tensors`` in place of its parameters; the model is as before afterwards.

    Args:
        model: The network.
        tensors: Tensors by name, as in ``model.named_parameters()``.
        inputs: The argument of the network.
    """
    return call_with(model, tensors, (inputs,), {})


def call_with(
    module: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Return ``module(*args, **kwargs)`` with ``tensors`` in place of its parameters; the module is as before afterwards.

    `torch.func.functional_call` leaves its tensors in a module that stands at two places, since it takes the two names of each
    parameter for two parameters and gives the second one's original back, which is the first one's substitute. So each module is
    named once here, and parameters that several modules share are named at each of these.

    Args:
        module: A network, or a part of one.
        tensors: Tensors by name, as in ``module.named_parameters()``.
        args: Positional arguments of the module.
        kwargs: The call's keyword arguments.
    """
    first_names = {id(p): name for name, p in module.named_parameters()}
    substitutes = dict(tensors)
    for path, part in module.named_modules():
        for key, p in part.named_parameters(recurse=False, remove_duplicate=False):
            first_name = first_names[id(p)]
            if first_name in tensors:
                substitutes[f"{path}.{key}".lstrip(".")] = tensors[first_name]
    return functional_call(module, substitutes, args, dict(kwargs), tie_weights=False)
