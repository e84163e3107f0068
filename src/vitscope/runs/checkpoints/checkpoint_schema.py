"""Compare a checkpoint that training goes on from with what this training would save: keys, types, shapes, counters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vitscope.runtime.errors import CheckpointError

_REQUIRED = {"epoch": int, "global_step": int, "state_dict": dict, "loops": dict, "optimizer_states": list,
             "lr_schedulers": list, "callbacks": dict}  # fmt: skip

_RATES = ("lr", "initial_lr", "eps", "weight_decay", "momentum", "dampening", "alpha", "rho")
#: moments that torch's optimizers keep in the shape of the parameter; others may have any (Adafactor's rows and columns)
_OF_ITS_SHAPE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "sum", "acc_delta",
                 "prev", "exp_inf")  # fmt: skip
_SWITCHES = (
    "amsgrad",
    "maximize",
    "foreach",
    "capturable",
    "differentiable",
    "fused",
    "nesterov",
    "decoupled_weight_decay",
)


def check(
    content: Mapping[str, Any], path: Path, network: nn.Module, trainer: Any, optimizer: Optimizer | None = None
) -> None:
    """Check everything that Lightning will restore, before any of it is.

    Args:
        content: contents that `checkpoint_io.read` returned.
        path: file of the checkpoint, for the error.
        network: the model without Lightning's module around it, its weights already compared.
        trainer: Lightning's, not yet fitted: its loops and callbacks say what they would save.
        optimizer: a new one over the network's parameters, whose groups are compared; None for one group of all of them.

    Raises:
        CheckpointError: an entry is missing or of another kind, named by its place.
    """
    try:
        for key, kind in _REQUIRED.items():
            if key not in content:
                raise _Wrong(key, "is missing")
            if not isinstance(content[key], kind) or isinstance(content[key], bool):
                raise _Wrong(key, f"is a {_kind(content[key])}, not a {kind.__name__}")
        for key in ("epoch", "global_step"):
            if content[key] < 0:
                raise _Wrong(key, f"is {content[key]}, which is negative")
        for name in ("fit_loop", "validate_loop", "test_loop", "predict_loop"):
            _compare(content["loops"].get(name), getattr(trainer, name).state_dict(), f"loops.{name}")
        _check_counters(content)
        trained = [p for p in network.parameters() if p.requires_grad]
        groups = [trained] if optimizer is None else [group["params"] for group in optimizer.param_groups]
        _check_optimizers(content["optimizer_states"], groups)
        _check_schedules(content["lr_schedulers"])
        for callback in trainer.callbacks:
            if callback.state_key == "Checkpoints" and callback.state_key not in content["callbacks"]:
                raise _Wrong("callbacks.Checkpoints", "is missing")
            if callback.state_key in content["callbacks"]:
                _compare(
                    content["callbacks"][callback.state_key], callback.state_dict(), f"callbacks.{callback.state_key}"
                )
        for key in ("current_model_state",):
            if key in content:
                _check_weights(content[key], content["state_dict"], key)
    except _Wrong as wrong:
        raise CheckpointError("ckpt_path", path, f"{wrong}", "use another checkpoint") from None


def _check_counters(content: Mapping[str, Any]) -> None:
    """Compare the epoch and the step with the counters of the loops, which they are copies of, and with the note of ours."""
    fit = content["loops"]["fit_loop"]
    progress = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    if content["global_step"] != progress:
        raise _Wrong("global_step", f"is {content['global_step']} and its loops count {progress} steps")
    processed = fit["epoch_progress"]["current"]["processed"]
    if not 0 <= processed - content["epoch"] <= 1:  # at an epoch's end the loops have counted it already
        raise _Wrong("epoch", f"is {content['epoch']} and its loops count {processed}")
    note = content.get("vitscope", {})
    if note.get("pending", "") not in ("", "validation", "epoch end"):
        raise _Wrong("vitscope.training.resume_state", f"is {note['pending']!r:.40}")
    n_correct, n_images = note.get("right", 0), note.get("seen", 0)
    if not (isinstance(n_correct, int) and isinstance(n_images, int) and 0 <= n_correct <= n_images):
        raise _Wrong("vitscope", "does not count images")
    if note and not 0 <= note["epoch"] - content["epoch"] <= 1:
        raise _Wrong("vitscope.epoch", f"is {note['epoch']} and its loops count {content['epoch']}")


class _Wrong(Exception):
    """The place of an entry and what is wrong with it."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"its {place[:120]} {reason}")


def _kind(value: Any) -> str:
    return type(value).__name__


def _compare(value: Any, like: Any, place: str) -> None:
    """Compare a saved state with one of the same object: keys, kinds of leaves, counters that are not negative."""
    if isinstance(like, Mapping):
        if not isinstance(value, Mapping):
            raise _Wrong(place, f"is a {_kind(value)}, not a dict")
        for key, item in like.items():
            if key not in value:
                raise _Wrong(f"{place}.{key}", "is missing")
            _compare(value[key], item, f"{place}.{key}")
    elif like is None:  # a number that is not known at the start
        plain = (float, int, Tensor) if "Checkpoints" not in place else (float, int)
        if (
            value is not None
            and (isinstance(value, bool) or not isinstance(value, plain))
            and not (isinstance(value, str) and place.endswith("message"))
        ):
            raise _Wrong(place, f"is a {_kind(value)}, not a number")
        _check_number(value, place)
    elif isinstance(like, Tensor):
        if not isinstance(value, Tensor) or value.shape != like.shape:
            raise _Wrong(place, f"is a {_kind(value)}, not a tensor of shape {tuple(like.shape)}")
    elif isinstance(like, float):
        if not isinstance(value, float | int) or isinstance(value, bool):
            raise _Wrong(place, f"is a {_kind(value)}, not a number")
    elif type(value) is not type(like) and not (value is None and isinstance(like, str)):
        raise _Wrong(place, f"is a {_kind(value)}, not a {_kind(like)}")
    elif type(like) is int and isinstance(value, int) and value < 0 <= like:
        raise _Wrong(place, f"is {value}, which is negative")


def _check_number(value: Any, place: str) -> None:
    if isinstance(value, float) and math.isnan(value):
        raise _Wrong(place, "is NaN")


def _check_optimizers(states: list[Any], expected_groups: Sequence[Sequence[Tensor]]) -> None:
    parameters = [p for group in expected_groups for p in group]
    if len(states) != 1:
        raise _Wrong("optimizer_states", f"holds {len(states)} optimizers, not one")
    for state in states:
        place = "optimizer_states[0]"
        if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
            raise _Wrong(place, "does not hold the state of an optimizer")
        groups = state.get("param_groups")
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise _Wrong(f"{place}.param_groups", f"is a {_kind(groups)}, not a list of groups")
        numbers = [group.get("params") for group in groups]
        if not all(isinstance(n, list) and all(type(i) is int for i in n) for n in numbers):
            raise _Wrong(f"{place}.param_groups", "does not number its parameters")
        if sorted(i for n in numbers for i in n) != list(range(len(parameters))):
            raise _Wrong(f"{place}.param_groups", f"does not hold the model's {len(parameters)} parameters")
        if [len(n) for n in numbers] != [len(group) for group in expected_groups]:
            raise _Wrong(
                f"{place}.param_groups", f"holds groups of other sizes than {len(expected_groups)} of this training"
            )
        for group in groups:
            for key, value in group.items():
                if key != "params":
                    _check_option(value, f"{place}.param_groups.{key}")
        for index, moments in state["state"].items():
            if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(moments, dict):
                raise _Wrong(f"{place}.state", f"has an entry {index!r} that is no parameter's")
            for key, value in moments.items():
                _check_moment(value, parameters[index], f"{place}.state.{index}.{key}")
        for n in numbers:
            _check_same_keys({i: state["state"][i] for i in n if i in state["state"]}, f"{place}.state")


def _check_same_keys(states: Mapping[int, Mapping[str, Any]], place: str) -> None:
    """Every parameter of a group has moments of the same names: one that lacks one, or all of them, was damaged.

    An optimizer that treats parameters in several ways (timm's Muon) notes in a switch which way it is; moments of other shapes
    than the parameter's (Adafactor's) may be those of matrices alone.
    """
    names_by_switches: dict[frozenset[Any], set[frozenset[str]]] = {}
    for moments in states.values():
        switches = frozenset((key, value) for key, value in moments.items() if isinstance(value, bool))
        of_any_shape = {str(name) for name in moments if name not in (*_OF_ITS_SHAPE, "step")}
        names_by_switches.setdefault(switches, set()).add(frozenset(map(str, moments)) - of_any_shape)
    if any(len(names) > 1 for names in names_by_switches.values()):
        raise _Wrong(place, "does not hold the same entries for every parameter")


def _check_option(value: Any, place: str) -> None:
    """Check an option of an optimizer's group by its name: rates, pairs of rates, switches; others only for NaN."""
    name = place.rpartition(".")[2]
    if name == "eps" and isinstance(value, tuple) and value:  # Adafactor has two, the first may be None
        for part in value:
            _check_option(0.0 if part is None else part, place)
        return
    if name in _RATES and not (_is_rate(value) or (isinstance(value, Tensor) and value.numel() == 1)):
        raise _Wrong(place, f"is {value!r:.40}, not a number of at least 0")
    if name == "betas" and not (
        isinstance(value, list | tuple) and len(value) == 2 and all(_is_rate(v) and v <= 1 for v in value)
    ):
        raise _Wrong(place, f"is {value!r:.40}, not two numbers from 0 to 1")
    if name in _SWITCHES and not (value is None or isinstance(value, bool)):
        raise _Wrong(place, f"is a {_kind(value)}, not a bool")
    _check_number(value, place)


def _check_moment(value: Any, parameter: Tensor, place: str) -> None:
    if isinstance(value, Tensor):
        has_shape = place.rpartition(".")[2] in _OF_ITS_SHAPE
        if has_shape and value.ndim and value.shape != parameter.shape:
            raise _Wrong(place, f"has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
        if has_shape and not value.is_floating_point() and value.ndim:
            raise _Wrong(place, f"is of {value.dtype}, not of floating point")
        if not bool(torch.isfinite(value).all()):
            raise _Wrong(place, "is not finite")
    elif isinstance(value, bool) and place.rpartition(".")[2] not in (*_OF_ITS_SHAPE, "step"):
        return  # a switch, such as timm's use_muon
    elif value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise _Wrong(place, f"is a {_kind(value)}, not a tensor")
    if place.endswith((".exp_avg", ".exp_avg_sq", ".max_exp_avg_sq")) and not (isinstance(value, Tensor) and
                                                                               value.shape == parameter.shape):  # fmt: skip
        raise _Wrong(place, f"is not a tensor of shape {tuple(parameter.shape)}")
    if place.endswith(".step") and (
        value is None or (isinstance(value, Tensor) and value.numel() != 1) or not 0 <= float(value) < math.inf
    ):
        raise _Wrong(place, "is no number of steps")


def _check_schedules(schedules: list[Any]) -> None:
    if len(schedules) != 1:
        raise _Wrong("lr_schedulers", f"holds {len(schedules)} schedules, not one")
    for index, state in enumerate(schedules):
        place = f"lr_schedulers[{index}]"
        if not isinstance(state, dict):
            raise _Wrong(place, f"is a {_kind(state)}, not a dict")
        for key in ("last_epoch", "_step_count"):
            if type(state.get(key)) is not int or state[key] < 0:
                raise _Wrong(f"{place}.{key}", f"is {state.get(key)!r:.40}, not a number of steps")
        for key in ("base_lrs", "_last_lr"):
            rates = state.get(key)
            if not isinstance(rates, list) or not rates or not all(_is_rate(rate) for rate in rates):
                raise _Wrong(f"{place}.{key}", f"is {rates!r:.40}, not a list of learning rates")
        if not isinstance(state.get("lr_lambdas", []), list):
            raise _Wrong(f"{place}.lr_lambdas", f"is a {_kind(state['lr_lambdas'])}, not a list")


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _check_weights(weights: Any, like: Mapping[str, Any], place: str) -> None:
    if not isinstance(weights, Mapping) or set(weights) != set(like):
        raise _Wrong(place, "does not hold the names of state_dict")
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor) or tensor.shape != like[name].shape:
            raise _Wrong(f"{place}.{name}", "is not a tensor of that weight's shape")
