"""Check a sweep file before its first trial starts: one line for each setting that would break a trial.

A W&B agent writes ``key=value`` for ``${args_no_hyphens}`` and Hydra parses that, so that some YAML values arrive as
something else: ``null`` as the string ``None``, ``1,2`` as a sweep of its own, ``1e-3`` (a string in YAML) as it stands.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from vitscope.config import caps, error_translation, hydra_internals, loading
from vitscope.config.validation import METRICS, validate
from vitscope.runtime import errors
from vitscope.runtime.errors import ConfigError, VitscopeError
from vitscope.sweep import distributions, early_termination, sweep_file
from vitscope.sweep.sweep_file import COMMAND, METHODS, Sweep

TOP_KEYS = (
    "program", "project", "entity", "name", "description", "method", "metric", "parameters", "command", "run_cap",
    "early_terminate",
)  # fmt: skip
#: keys that name a run's folder or how it goes on: they are the runner's
RUN_KEYS = ("run", "run_dir", "ckpt_path", "skip_finished", "paths.runs")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def check(sweep: Sweep, *, thorough: bool = False, has_overrides: bool = False) -> None:
    """Refuse a sweep that would break.

    Args:
        sweep: The sweep.
        thorough: That of `problems`.
        has_overrides: Whether settings of the command hold for every trial, which may be what is wrong.

    Raises:
        ConfigError: The first problem; the others follow in its text.
    """
    sweep_problems = problems(sweep, thorough=thorough)
    if sweep_problems:
        first, *others = sweep_problems
        more = f" (and {len(others)} more: {'; '.join(others)})" if others else ""
        fix = "correct the file, or the settings behind its name" if has_overrides else "correct the file"
        raise ConfigError("SWEEP", sweep.path, first + more, fix)


def problems(sweep: Sweep, *, thorough: bool = False) -> list[str]:
    """Return what would break, one line each; an empty list for a good file.

    Args:
        sweep: The sweep.
        thorough: Compose and build every trial of a grid (ten of a search) instead of validating the first.
    """
    sweep_problems = [*_top(sweep.content), *_command(sweep), *_search(sweep)]
    for key, node in sweep.parameters.items():
        sweep_problems += _parameter(key, node)
    if sweep_problems:
        return sweep_problems  # nothing could be composed from these values
    return list(_composed(sweep, thorough))


def _top(content: Mapping[str, Any]) -> Iterator[str]:
    for key in content:
        if key not in TOP_KEYS:
            yield f"{key}: no such key; {errors.nearest(str(key), TOP_KEYS)}"
    for key in ("program", "method", "command"):
        if key not in content:
            yield f"{key}: missing; W&B would take a default that does not fit"


def _command(sweep: Sweep) -> Iterator[str]:
    command = sweep.content.get("command", list(COMMAND))
    if not isinstance(command, list) or tuple(command) != COMMAND:
        yield f"command: {command} is not the pattern that hands over overrides; write [{', '.join(COMMAND)}]"
    if Path(sweep.program).name != "train.py":
        yield f"program: {sweep.program} takes no training overrides; write train.py"


def _search(sweep: Sweep) -> Iterator[str]:
    content = sweep.content
    if sweep.method not in METHODS:
        yield f"method: {sweep.method} is unknown; choose from {', '.join(METHODS)}"
    terminate = content.get("early_terminate")
    if content.get("metric") is not None:
        yield from _metric(content["metric"])
    elif sweep.method == "bayes" or terminate is not None:
        yield "metric: missing, and bayes and early_terminate need it; write metric: {name: val/accuracy, goal: maximize}"
    cap = content.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 1):
        yield f"run_cap: {cap} is not a whole number from 1"
    if terminate is not None:
        try:
            early_termination.rungs(terminate if isinstance(terminate, dict) else {"type": terminate})
        except ConfigError as error:
            yield str(error)


def _metric(metric: Any) -> Iterator[str]:
    entries = metric if isinstance(metric, dict) else {"name": metric, "goal": None}
    name, goal = entries.get("name"), entries.get("goal", "minimize")  # W&B's default
    if name not in METRICS:
        yield f"metric.name: {name} is not logged every epoch; {errors.nearest(str(name), METRICS)}"
    if goal not in ("minimize", "maximize") or "goal" not in entries:
        yield f"metric.goal: {goal} must be stated; choose maximize or minimize"


def _parameter(key: str, node: Any) -> Iterator[str]:
    if not isinstance(node, Mapping):
        yield f"parameters.{key}: {node} is not a mapping; write {{value: {node}}}"
        return
    if "parameters" in node:
        yield f"parameters.{key}: nested parameters arrive as a dict, which is no override; write dotted keys such as {key}.name"
        return
    for name in sorted(set(map(str, node)) - distributions.KEYS):
        yield f"parameters.{key}.{name}: no such key; {errors.nearest(name, distributions.KEYS)}"
    if key in RUN_KEYS or key.startswith("hydra"):
        yield f"parameters.{key}: the runner sets it; take it out"
    try:
        distributions.distribution(key, node)
    except ConfigError as error:
        yield str(error)
        return
    values = node.get("values", [node["value"]] if "value" in node else [])
    if not isinstance(values, list) or ("values" in node and not values):
        yield f"parameters.{key}: values must be a list with something in it"
        return
    if any(values.count(value) > 1 and type(value) is not bool for value in values):
        yield f"parameters.{key}: a value occurs twice in {values}"
    for value in values:
        yield from _value(key, value)


def _value(key: str, value: Any) -> Iterator[str]:
    fault = _fault(value)
    if fault:
        yield f"parameters.{key}: {value!r} {fault}"
    else:
        yield from _parsed(key, value)


def _fault(value: Any) -> str | None:
    """Return what becomes of a value that no override can carry, and what to write; None for others."""
    if value is None or value == "None":
        return 'arrives as the string None; write "null" in quotes'
    if isinstance(value, Mapping):
        return "is a dict, which is no override; write dotted keys"
    if isinstance(value, float) and not math.isfinite(value):
        return "is not a finite number"
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return f"is a string in YAML; write the number with a dot, such as {_dotted(value)}"
    if not isinstance(value, str | bool | int | float | list):
        return f"is a {type(value).__name__}; write a number, a string or a list"
    if "=" in str(value):
        return "has an = in it, which no override can carry; use another name"
    return None


def _parsed(key: str, value: Any) -> Iterator[str]:
    try:
        (override,) = hydra_internals.parse_overrides(sweep_file.arguments({key: value}))
    except HydraException as error:
        yield f"parameters.{key}: {value!r} is no override ({str(error).splitlines()[0]}); quote or rename it"
        return
    if override.is_sweep_override():
        yield f'parameters.{key}: {value!r} would start a sweep of its own; write a list as a string, "[1,2]"'


def _dotted(text: str) -> str:
    mantissa, _, exponent = text.strip().lower().partition("e")
    return text if "." in mantissa else f"{mantissa}.0e{exponent}"


def _composed(sweep: Sweep, thorough: bool) -> Iterator[str]:
    for index, params in enumerate(_some(sweep, thorough)):
        try:
            cfg = compose_trial(params)
            if thorough:
                from vitscope.config import factories

                factories.model(cfg)
        except (VitscopeError, ValueError) as error:
            yield f"trial {index} ({sweep_file.label(sweep, params)}): {error}"


def _some(sweep: Sweep, thorough: bool) -> list[dict[str, Any]]:
    if sweep.method == "grid":
        trials = sweep_file.grid(sweep)
        return trials if thorough else trials[:1]
    return sweep_file.random(sweep, min(10, sweep.run_cap or 10) if thorough else 1)


def compose_trial(params: Mapping[str, Any]) -> DictConfig:
    """Return the configuration of one trial, validated.

    Raises:
        ConfigError: An undeclared key, an unknown choice, or values that do not fit together.
    """
    hydra_internals.clear_application()  # that of a multirun
    with hydra_internals.composing_from(str(loading.folder())):
        try:
            _declared(params)
            cfg = compose("train", overrides=sweep_file.arguments(params))
        except (HydraException, OmegaConfBaseException) as error:
            raise error_translation.explain(error) or error from None
    loading.drop_unchosen(cfg)
    caps.apply_caps(cfg)
    validate(cfg)
    return cfg


def _declared(params: Mapping[str, Any]) -> None:
    """Refuse dotted keys that the groups chosen by this trial do not have, with the nearest names."""
    groups = {key: value for key, value in params.items() if "." not in key}
    base = compose("train", overrides=sweep_file.arguments(groups))
    for key, value in params.items():
        node: Any = base
        *parents, last = key.split(".")
        for part in parents:
            node = node.get(part) if isinstance(node, DictConfig) and part in node else None
        if not isinstance(node, DictConfig) or (last not in node and key not in groups):
            names = [str(name) for name in node] if isinstance(node, DictConfig) else [str(name) for name in base]
            raise ConfigError(key, value, "no declared key", errors.nearest(last, names))
