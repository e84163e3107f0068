"""Weights of a checkpoint: put into a network, and named by their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.runtime.errors import CheckpointError, first_line

#: where checkpoints keep the weights, and what wrappers put before their names
_NESTED = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("model.", "module.", "_orig_mod.")


def model_state(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the network's own weights of a vitscope, Lightning or plain checkpoint, prefixes removed."""
    state = _tensors(content)
    for prefix in _PREFIXES:
        state = _without(prefix, state)
    return state


def unwrapped(content: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Return a checkpoint's tensors by name as they are, then without one, two, ... prefixes of wrappers that all names share."""
    readings = [_tensors(content)]
    while prefix := next((p for p in _PREFIXES if readings[-1] and all(n.startswith(p) for n in readings[-1])), None):
        readings.append(_without(prefix, readings[-1]))
    return readings


def _tensors(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    nested = next((content[key] for key in _NESTED if isinstance(content.get(key), Mapping)), content)
    return {str(name): value for name, value in nested.items() if isinstance(value, torch.Tensor)}


def _without(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    shared = bool(state) and all(name.startswith(prefix) for name in state)
    return {name.removeprefix(prefix): value for name, value in state.items()} if shared else state


def load_weights(network: nn.Module, content: Mapping[str, Any], path: Path) -> None:
    """Put a checkpoint's weights into ``network``; every key must be accounted for.

    A file of the official code or of timm 0.5.4 is known by its key names, see `load_official_state_dict`. What torch's own
    `load_state_dict` fills in or renames (counters of batches that old files lack, a module's own hooks) is not missed.

    Raises:
        CheckpointError: keys or shapes that do not match, the first of them named.
    """
    from vitscope.models import load_official_state_dict

    network_state = network.state_dict()
    state = _fitting_state(content, network_state)
    if set(state) != set(network_state):
        try:
            load_official_state_dict(network, state)
            return
        except ValueError as error:
            # the official code's names for another size of the model; otherwise say below which keys differ
            if " has shape " in str(error):
                fix = "use the model it was made with (data.num_classes, model.depth, ...)"
                raise CheckpointError("ckpt_path", path, str(error).rstrip("."), fix) from error
    for name, tensor in network_state.items():
        if name in state and tensor.shape != state[name].shape:
            raise CheckpointError("ckpt_path", path, f"{name} is {tuple(state[name].shape)} there and {tuple(tensor.shape)} here",
                                  "use the model it was made with (data.num_classes, model.depth, ...)")  # fmt: skip
    try:
        incompatible_keys = network.load_state_dict(state, strict=False)
    except (
        RuntimeError,
        KeyError,
    ) as error:  # kinds of tensors that do not go into weights, or a hook that misses its own
        raise CheckpointError("ckpt_path", path, first_line(error), "use the model it was made with") from None
    for name in sorted({*incompatible_keys.missing_keys, *incompatible_keys.unexpected_keys}):
        where = "the checkpoint lacks it" if name in network_state else "the model has no such weight"
        raise CheckpointError("ckpt_path", path, f"{name}: {where}", "use the model it was made with (model=...)")


def _fitting_state(content: Mapping[str, Any], network_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors without wrappers' prefixes: of the readings, the one with most keys of ``network_state``.

    A network may itself keep everything under ``model.``, and wrappers may stand around each other (``module._orig_mod.``).
    """
    usual = model_state(content)
    readings = [usual, *unwrapped(content)]
    return max(readings, key=lambda state: len(state.keys() & network_state.keys()))


def weights_hash(network: nn.Module) -> str:
    """Return the first 16 digits of a SHA-256 over all weights and buffers, in order: the checkpoint's name on cards."""
    total = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else
                     str(tensor.item()).encode())  # fmt: skip
    return total.hexdigest()[:16]
