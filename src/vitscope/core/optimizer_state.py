"""Read an optimizer's class, hyper-parameters and state by parameter name, from a live optimizer or a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

#: keys by which the parameter groups of an optimizer of torch.optim are known, the most particular ones first
_KEYS = {
    "SGD": {"momentum", "dampening", "nesterov"},
    "NAdam": {"betas", "eps", "momentum_decay"},
    "RMSprop": {"alpha", "eps", "momentum", "centered"},
    "Adagrad": {"lr_decay", "initial_accumulator_value", "eps"},
    "Adam": {"betas", "eps", "amsgrad"},
}

_MUON = (
    "Muon's step has one length whatever the gradient's is, so that on a quadratic it neither converges nor diverges at any "
    "curvature: it has no limit"
)


@dataclass(frozen=True)
class ParameterState:
    """State and settings of an optimizer for one parameter.

    Attributes:
        group: The hyper-parameters of its group.
        state: Moments and steps of the parameter; empty before the first step.
        shape: Shape of the parameter.
    """

    group: Mapping[str, Any]
    state: Mapping[str, Any]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer at a point of training.

    Attributes:
        name: Class of the optimizer in `torch.optim`, such as ``AdamW``; another class's name where it is none of those.
        parameters: State and settings of each parameter that it trains, by name; empty where it cannot be told.
        unknown: Why no limit of stability can be derived, or an empty text.
        ascent_radius: Radius rho of sharpness-aware minimization around this optimizer; 0 without.
    """

    name: str
    parameters: Mapping[str, ParameterState]
    unknown: str = ""
    ascent_radius: float = 0.0

    @property
    def decoupled(self) -> bool:
        """Whether it is AdamW: the decay acts on the weights beside the preconditioned step."""
        return self.name == "AdamW"


def of_optimizer(optimizer: Optimizer, model: nn.Module) -> OptimizerState:
    """Return the state of a live optimizer of ``model``'s parameters."""
    named = {id(p): name for name, p in model.named_parameters()}
    parameters = {
        named[id(p)]: ParameterState(
            {key: value for key, value in group.items() if key != "params"}, optimizer.state.get(p, {}), tuple(p.shape)
        )
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) in named
    }
    base, rho = getattr(optimizer, "base", None), getattr(optimizer, "rho", None)
    if isinstance(base, Optimizer) and rho is not None:  # sharpness-aware minimization around another optimizer
        return _around(type(base).__name__, parameters, float(rho), type(base).__module__)
    return _known(type(optimizer).__name__, parameters, type(optimizer).__module__)


def of_checkpoint(saved: Mapping[str, Any], model: nn.Module, target: Mapping[str, Any] | None) -> OptimizerState:
    """Return the state that a checkpoint holds (``optimizer.state_dict()``) of an optimizer of ``model``'s parameters.

    Args:
        saved: ``param_groups`` and ``state``.
        model: The model whose trainable parameters the optimizer was given, in their order.
        target: The configuration's optimizer (``_target_``, of SAM with ``rho`` and ``base``), where it is known.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: A state that no optimizer writes.
    """
    groups, state = list(saved["param_groups"]), saved["state"]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    target = dict(target or {})
    inner = target.get("base") if str(target.get("_target_", "")).endswith(".SAM") else target
    path = str((inner or {}).get("_target_", ""))
    module, _, name = path.rpartition(".")
    if all("param_names" in group for group in groups):
        names = [[_own_name(n, trained) for n in group["param_names"]] for group in groups]
    elif len(groups) == 1:
        names = [list(trained)]
    else:
        return OptimizerState(name or "optimizer", {}, f"{len(groups)} groups of parameters without names")
    parameters = {}
    for group, group_names in zip(groups, names):
        if len(group["params"]) != len(group_names) or not all(n in trained for n in group_names):
            reason = f"its groups hold {len(group['params'])} parameters where the model trains {len(group_names)}"
            return OptimizerState(name or "optimizer", {}, reason)
        facts = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for number, parameter in zip(group["params"], group_names):
            of_one = state.get(number, {})
            _check_shapes(parameter, trained[parameter], of_one)
            parameters[parameter] = ParameterState(facts, of_one, tuple(trained[parameter].shape))
    if inner is not target:
        return _around(name, parameters, float(target.get("rho", 0.05)), module)
    return _known(name, parameters, module)


def _own_name(name: str, trained: Mapping[str, Any]) -> str:
    return name if name in trained else name.removeprefix("model.")


def _check_shapes(name: str, p: Tensor, state: Mapping[str, Any]) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor) and value.ndim and value.shape != p.shape:
            raise ValueError(f"{key} of {name} is {tuple(value.shape)}, the parameter {tuple(p.shape)}")


def _around(base: str, parameters: Mapping[str, ParameterState], rho: float, module: str) -> OptimizerState:
    kind = _known(base, parameters, module)
    if rho == 0:  # no ascent: the base optimizer itself
        return kind
    reason = (
        f"SAM takes the gradient at the end of an ascent of length rho={rho:g}, which changes the limit of {kind.name}"
    )
    return replace(kind, unknown=kind.unknown or reason, ascent_radius=0.0 if kind.unknown else rho)


def _known(name: str, parameters: Mapping[str, ParameterState], module: str) -> OptimizerState:
    """Return the state with the class that its groups' keys and its own name agree on."""
    foreign = bool(module) and not (module == "torch.optim" or module.startswith("torch.optim."))
    groups = [p.group for p in parameters.values()]
    fitting_names = [kind for kind, keys in _KEYS.items() if groups and all(keys <= set(group) for group in groups)]
    kind_name = fitting_names[0] if fitting_names else ""
    if kind_name == "Adam":  # AdamW has the same keys
        is_decoupled = [bool(group.get("decoupled_weight_decay", name == "AdamW")) for group in groups]
        if all(is_decoupled):
            kind_name = "AdamW"
        elif any(is_decoupled):
            kind_name = ""
    same = not name or name == kind_name or {name, kind_name} == {"Adam", "AdamW"}
    if foreign or not kind_name or not same:
        description = name or "an optimizer of another kind"
        return OptimizerState(
            description, {}, _MUON if "Muon" in description else f"no limit is known of {description}"
        )
    return OptimizerState(kind_name, parameters)
