"""Weights of a checkpoint: put into a network, and named by their hash."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.models import state_dicts
from vitscope.models.state_dicts import WeightReading
from vitscope.runtime.errors import CheckpointError, first_line
from vitscope.runtime.torch_internals import whole_tensor

_logger = logging.getLogger(__name__)

#: entries of checkpoints that hold the weights, and prefixes that wrappers put before their names
_NESTED = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("model.", "module.", "_orig_mod.")
#: the name of a checkpoint by which the averages over training steps that a file holds are meant
AVERAGE = "ema"
_OF_THE_IMAGES = "use the image size and the patch size it was made with (data.image_size, model.patch_size, ...)"
_OF_THE_MODEL = "use the model it was made with (data.num_classes, model.depth, ...)"


def model_state(content: Mapping[str, Any], network: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Return the network's own weights of a vitscope, Lightning or plain checkpoint, prefixes removed.

    Args:
        content: The contents of the file.
        network: The network of the weights: the only reading that fits it is taken, see `state_dicts.select_weights`. None, or
            where nothing fits: the usual entries, without the usual prefixes.

    Raises:
        ValueError: Two readings fit the network equally well.
    """
    reading = state_dicts.select_weights(network, content) if network is not None else None
    if reading is not None:
        return reading.tensors
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


def load_weights(
    network: nn.Module,
    content: Mapping[str, Any],
    path: Path,
    *,
    average: bool = False,
    report: bool = True,
    class_count_source: str = "",
) -> None:
    """Put a checkpoint's weights into ``network``; every key must be accounted for.

    They are looked for in every entry of the file and under every prefix, see `state_dicts.select_weights`. A file of the
    official code or of timm 0.5.4 is known by its key names, see `load_official_state_dict`. What torch's own
    `load_state_dict` fills in or renames (counters of batches that old files lack, a module's own hooks) is not missed.
    A log message states which entry was used where the file has averages too, or weights of something else.

    Args:
        network: The network; its weights are replaced.
        content: The contents of the file.
        path: The file, for errors.
        average: Whether to take averages over training steps (EMA, SWA) in place of the weights.
        report: Whether to log that message; not where the weights are only compared with the network.
        class_count_source: Words for the error: what decides the network's number of classes; empty where it is not known.

    Raises:
        CheckpointError: No averages, two readings that fit equally well, or keys or shapes that do not match, the first of
            them named.
    """
    from vitscope.models import load_official_state_dict

    averages = state_dicts.average_places(network, content)
    if average and not averages:
        held = ", ".join(entry or "the file itself" for entry in state_dicts.weight_entries(content)) or "no tensors"
        raise CheckpointError("ckpt", AVERAGE, f"{path} holds no averages, but {held}", "use ckpt=last")
    network_state = network.state_dict()
    try:
        reading = state_dicts.select_weights(network, content, average=average)
    except ValueError as error:
        raise CheckpointError("ckpt_path", path, str(error), "name that file with ckpt_path") from None
    state = _nearest_state(content, network_state, average) if reading is None else reading.tensors
    _check_stored_values(state, content, network, path)
    if set(state) != set(network_state):
        try:
            load_official_state_dict(network, state)
            if report:
                _report(reading, averages, path)
            return
        except ValueError as error:
            # the official code's names for another size of the model; otherwise say below which keys differ
            if " has shape " in str(error):
                raise CheckpointError("ckpt_path", path, str(error).rstrip("."), _OF_THE_MODEL) from error
    _check_values(state, network_state, path, class_count_source)
    try:
        incompatible_keys = network.load_state_dict(state, strict=False)
    except (RuntimeError, KeyError, TypeError) as error:
        # tensors that do not go into weights, or a hook that misses its own
        reason = " ".join(str(error).partition(":\n")[2].split())[:300] or first_line(error)  # after torch's headline
        raise CheckpointError("ckpt_path", path, reason.rstrip("."), "use the model it was made with") from None
    _check_keys(incompatible_keys.missing_keys, incompatible_keys.unexpected_keys, path)
    if report:
        _report(reading, averages, path)


def class_counts(network: nn.Module, content: Mapping[str, Any], *, average: bool = False) -> tuple[int, int] | None:
    """Return the numbers of classes of a checkpoint and of ``network`` where only these differ, else None."""
    network_state = network.state_dict()
    try:
        reading = state_dicts.select_weights(network, content, average=average)
    except ValueError:  # said when they are loaded
        return None
    state = _nearest_state(content, network_state, average) if reading is None else reading.tensors
    return state_dicts.class_counts(network_state, state)


def _check_stored_values(state: Mapping[str, Any], content: Any, network: nn.Module, path: Path) -> None:
    """Refuse weights that are no tensors, hold no values (of the meta device), or hold NaN, by the name of the first one."""
    weights = {name for name, _ in network.named_parameters()}
    named_values = {name: value for name, value in _named_values(content, 3) if name not in state}
    arrays = [
        name
        for name, value in named_values.items()
        if not isinstance(value, Tensor) and any(name == w or name.endswith(f".{w}") for w in weights)
    ]
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    empty = [name for name, value in tensors.items() if value.is_meta]
    # masks of attention hold -inf
    broken = [name for name, value in tensors.items() if not value.is_meta and _is_broken(value, name in weights)]
    for names, reason, way_out in (
        (arrays, "is no tensor, but an array or a list", "save tensors: torch.save(model.state_dict(), ...)"),
        (empty, "is a tensor of the meta device, without values", "save the model after its weights were loaded"),
        (broken, "holds values that are not finite: training has diverged", "use an earlier checkpoint"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError("ckpt_path", path, f"{names[0]} {reason}{more}", way_out)


def _named_values(node: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a file and of the mappings in it by their names there."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            if isinstance(value, Mapping) and depth:
                yield from _named_values(value, depth - 1)
            else:
                yield str(name), value


def _is_broken(value: Tensor, is_weight: bool) -> bool:
    if not (value.is_floating_point() or value.is_complex()) or value.layout != torch.strided or value.is_quantized:
        return False
    return bool(value.isnan().any()) or (is_weight and not bool(value.isfinite().all()))


def _check_values(
    state: Mapping[str, Any], network_state: Mapping[str, Any], path: Path, class_count_source: str
) -> None:
    """Refuse tensors of another shape than the model's, naming the first ones, and complex or integer ones for real weights."""
    shared = {name: value for name, value in network_state.items() if name in state and isinstance(value, Tensor)}
    differing = [name for name, value in shared.items() if getattr(state[name], "shape", None) != value.shape]
    if differing:
        texts = [
            f"{name} has shape {tuple(state[name].shape)} in the checkpoint, the model needs {tuple(shared[name].shape)}"
            for name in differing[:2]
        ]
        reason = "; ".join(texts) + (f" (and {len(differing) - 2} more)" if len(differing) > 2 else "")
        classes = state_dicts.class_counts(network_state, state)
        if not classes and state_dicts.differs_in_positions(network_state, state):
            reason += ": it was made for another number of positions"
            raise CheckpointError("ckpt_path", path, reason, _OF_THE_IMAGES)
        if classes:
            source = f" ({class_count_source})" if class_count_source else ""
            reason += f": it was made for {classes[0]} classes, the model is for {classes[1]}{source}"
        raise CheckpointError("ckpt_path", path, reason, _OF_THE_MODEL)
    for name, value in shared.items():
        is_integer = not state[name].is_floating_point() and not state[name].is_complex()
        if (state[name].is_complex() and not value.is_complex()) or (is_integer and value.is_floating_point()):
            raise CheckpointError(
                "ckpt_path", path, f"{name} is of {state[name].dtype}, the model's is of {value.dtype}", _OF_THE_MODEL
            )


def _check_keys(missing: Sequence[str], unexpected: Sequence[str], path: Path) -> None:
    """Refuse keys that only the model or only the checkpoint has, naming the first ones of each."""
    if not missing and not unexpected:
        return
    parts = [
        f"{sorted(keys)[0]}: {reason}"
        + (f" ({len(keys)} such: {', '.join(sorted(keys)[:3])})" if len(keys) > 1 else "")
        for keys, reason in ((missing, "the checkpoint lacks it"), (unexpected, "the model has no such weight"))
        if keys
    ]
    raise CheckpointError("ckpt_path", path, ", ".join(parts), "use the model it was made with (model=...)")


def _report(reading: WeightReading | None, averages: Sequence[str], path: Path) -> None:
    """State which weights were taken where a file has several, or more than those."""
    if reading is None:
        return
    if reading.is_average:
        _logger.info(f"ckpt_path={path}: loaded the averages over training steps ({reading.place})")
    elif averages:
        _logger.info(f"ckpt_path={path}: loaded {reading.place}; ckpt=ema loads the averages ({', '.join(averages)})")
    elif reading.other_names:
        names, n = ", ".join(reading.other_names[:3]), len(reading.other_names)
        _logger.info(
            f"ckpt_path={path}: loaded {len(reading.tensors)} weights {reading.place}; {n} others are left out: {names}"
        )


def _nearest_state(content: Mapping[str, Any], network_state: Mapping[str, Any], average: bool) -> Mapping[str, Any]:
    """Return the tensors, prefixes of wrappers removed, of the reading with most of the model's keys; none of them fits.

    A network may itself keep everything under ``model.``, and wrappers may stand around each other (``module._orig_mod.``).
    """
    if average:
        entries = state_dicts.weight_entries(content)
        contents = [tensors for entry, tensors in entries.items() if entry in state_dicts.average_entries(content)]
    else:
        contents = [content]
    readings = [state for inner in contents for state in (model_state(inner), *unwrapped(inner))]
    return max(readings, key=lambda state: len(state.keys() & network_state.keys()), default={})


def weights_hash(network: nn.Module) -> str:
    """Return the first 16 digits of a SHA-256 over all weights and buffers, in order: the checkpoint's name on cards."""
    total = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        total.update(name.encode())
        if not isinstance(tensor, Tensor):  # the extra state of a module
            total.update(repr(tensor).encode())
            continue
        tensor = whole_tensor(tensor)
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else
                     str(tensor.item()).encode())  # fmt: skip
    return total.hexdigest()[:16]
