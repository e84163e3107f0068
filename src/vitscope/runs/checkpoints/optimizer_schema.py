"""Check the states of the optimizer and of the learning rate in a checkpoint that training resumes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitscope.runs.checkpoints.state_comparison import WrongEntry, check_number, is_rate, kind_name

_RATES = ("lr", "initial_lr", "eps", "weight_decay", "momentum", "dampening", "alpha", "rho")
#: moments that torch's optimizers keep in the shape of the parameter; others may have any (Adafactor's rows and columns)
_OF_ITS_SHAPE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "sum", "acc_delta",
                 "prev", "exp_inf")  # fmt: skip
#: moments of Adam, which are tensors
_TENSORS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_SWITCHES = (
    "amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "nesterov", "decoupled_weight_decay",
)  # fmt: skip


def check_optimizers(states: list[Any], expected_groups: Sequence[Sequence[Tensor]]) -> None:
    """Check that a list holds the state of one optimizer over the given groups of parameters.

    Raises:
        WrongEntry: An entry is missing, not finite, or of another kind.
    """
    if len(states) != 1:
        raise WrongEntry("optimizer_states", f"holds {len(states)} optimizers, not one")
    place, state = "optimizer_states[0]", states[0]
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
        raise WrongEntry(place, "does not hold the state of an optimizer")
    numbers = _numbers_of_groups(state.get("param_groups"), expected_groups, f"{place}.param_groups")
    for group in state["param_groups"]:
        for key, value in group.items():
            if key != "params":
                _check_option(value, f"{place}.param_groups.{key}")
    moments = state["state"]
    _check_moments(moments, [p for group in expected_groups for p in group], f"{place}.state")
    for group_numbers in numbers:
        _check_same_keys({i: moments[i] for i in group_numbers if i in moments}, f"{place}.state")


def _numbers_of_groups(groups: Any, expected_groups: Sequence[Sequence[Tensor]], place: str) -> list[list[int]]:
    """Return the numbers of the parameters of each group; they count the parameters of the expected groups."""
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise WrongEntry(place, f"is a {kind_name(groups)}, not a list of groups")
    numbers = [group.get("params") for group in groups]
    if not all(isinstance(entry, list) and all(type(number) is int for number in entry) for entry in numbers):
        raise WrongEntry(place, "does not number its parameters")
    sizes = [len(group) for group in expected_groups]
    if sorted(number for entry in numbers for number in entry) != list(range(sum(sizes))):
        raise WrongEntry(place, f"does not hold the model's {sum(sizes)} parameters")
    if [len(entry) for entry in numbers] != sizes:
        raise WrongEntry(place, f"holds groups of other sizes than {len(sizes)} of this training")
    return numbers


def _check_moments(moments_of: Mapping[Any, Any], parameters: Sequence[Tensor], place: str) -> None:
    """Check the moments of each parameter, by its number."""
    for number, moments in moments_of.items():
        if type(number) is not int or not 0 <= number < len(parameters) or not isinstance(moments, dict):
            raise WrongEntry(place, f"has an entry {number!r} that is no parameter's")
        for key, value in moments.items():
            _check_moment(value, parameters[number], f"{place}.{number}.{key}")


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
        raise WrongEntry(place, "does not hold the same entries for every parameter")


def _check_option(value: Any, place: str) -> None:
    """Check an option of an optimizer's group by its name: rates, pairs of rates, switches; others only for NaN."""
    name = place.rpartition(".")[2]
    if name == "eps" and isinstance(value, tuple) and value:  # Adafactor has two, the first may be None
        for part in value:
            _check_option(0.0 if part is None else part, place)
        return
    if name in _RATES and not (is_rate(value) or (isinstance(value, Tensor) and value.numel() == 1)):
        raise WrongEntry(place, f"is {value!r:.40}, not a number of at least 0")
    if name == "betas":
        is_pair = isinstance(value, list | tuple) and len(value) == 2
        if not is_pair or not all(is_rate(beta) and beta <= 1 for beta in value):
            raise WrongEntry(place, f"is {value!r:.40}, not two numbers from 0 to 1")
    if name in _SWITCHES and not (value is None or isinstance(value, bool)):
        raise WrongEntry(place, f"is a {kind_name(value)}, not a bool")
    check_number(value, place)


def _check_moment(value: Any, parameter: Tensor, place: str) -> None:
    """Check a moment, a counter or a switch of a parameter by the last part of its place."""
    name = place.rpartition(".")[2]
    if isinstance(value, bool) and name not in (*_OF_ITS_SHAPE, "step"):
        return  # a switch, such as timm's use_muon
    if isinstance(value, Tensor):
        _check_tensor(value, parameter, name, place)
    elif value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise WrongEntry(place, f"is a {kind_name(value)}, not a tensor")
    if name in _TENSORS and not (isinstance(value, Tensor) and value.shape == parameter.shape):
        raise WrongEntry(place, f"is not a tensor of shape {tuple(parameter.shape)}")
    if name == "step" and not _is_step_count(value):
        raise WrongEntry(place, "is no number of steps")


def _is_step_count(value: Any) -> bool:
    if value is None or (isinstance(value, Tensor) and value.numel() != 1):
        return False
    return 0 <= float(value) < math.inf


def _check_tensor(moment: Tensor, parameter: Tensor, name: str, place: str) -> None:
    if name in _OF_ITS_SHAPE and moment.ndim:
        if moment.shape != parameter.shape:
            raise WrongEntry(place, f"has shape {tuple(moment.shape)}, not {tuple(parameter.shape)}")
        if not moment.is_floating_point():
            raise WrongEntry(place, f"is of {moment.dtype}, not of floating point")
    if not bool(torch.isfinite(moment).all()):
        raise WrongEntry(place, "is not finite")


def check_schedules(schedules: list[Any]) -> None:
    """Check that a list holds the state of one schedule of learning rates.

    Raises:
        WrongEntry: An entry is missing or of another kind.
    """
    if len(schedules) != 1:
        raise WrongEntry("lr_schedulers", f"holds {len(schedules)} schedules, not one")
    state, place = schedules[0], "lr_schedulers[0]"
    if not isinstance(state, dict):
        raise WrongEntry(place, f"is a {kind_name(state)}, not a dict")
    for key in ("last_epoch", "_step_count"):
        if type(state.get(key)) is not int or state[key] < 0:
            raise WrongEntry(f"{place}.{key}", f"is {state.get(key)!r:.40}, not a number of steps")
    for key in ("base_lrs", "_last_lr"):
        rates = state.get(key)
        if not isinstance(rates, list) or not rates or not all(is_rate(rate) for rate in rates):
            raise WrongEntry(f"{place}.{key}", f"is {rates!r:.40}, not a list of learning rates")
    if not isinstance(state.get("lr_lambdas", []), list):
        raise WrongEntry(f"{place}.lr_lambdas", f"is a {kind_name(state['lr_lambdas'])}, not a list")
