"""Keys of a state dict that torch fills in itself: files that older versions of torch wrote do not have them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def default_keys(model: nn.Module) -> set[str]:
    """Return the keys that `load_state_dict` does not miss: the counters of batches of normalization layers.

    Versions of torch before 0.4.1 had none; torch goes on with the layer's own.
    """
    return {
        f"{name}.num_batches_tracked" if name else "num_batches_tracked"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _NormBase) and module.num_batches_tracked is not None
    }


def with_default_keys(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` with the model's own values of the default keys that it lacks."""
    model_state = model.state_dict()
    return {
        **state,
        **{
            key: model_state[key].detach().clone()
            for key in sorted(default_keys(model) - set(state))
            if key in model_state
        },
    }
