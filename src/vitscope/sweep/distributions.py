"""Values of a sweep's parameters: the lists of a grid, and W&B's distributions, drawn reproducibly."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

from vitscope.runtime.errors import ConfigError

#: distributions and the keys that each needs
DISTRIBUTIONS = {
    "constant": ("value",),
    "categorical": ("values",),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "q_uniform": ("min", "max"),
    "log_uniform": ("min", "max"),
    "log_uniform_values": ("min", "max"),
    "q_log_uniform_values": ("min", "max"),
    "normal": ("mu", "sigma"),
    "q_normal": ("mu", "sigma"),
}
KEYS = {"value", "values", "distribution", "probabilities", "min", "max", "mu", "sigma", "q"}


def distribution(key: str, node: Mapping[str, Any]) -> str:
    """Return the name of a parameter's distribution, inferred as W&B does where it is not stated.

    Raises:
        ConfigError: An unknown one, one whose bounds or step are missing or no such numbers, or shares that are no probabilities.
    """
    name = _stated_or_inferred(node)
    if name not in DISTRIBUTIONS:
        raise ConfigError(
            f"parameters.{key}", name, "no such distribution here", f"choose from {', '.join(DISTRIBUTIONS)}"
        )
    for needed in DISTRIBUTIONS[name]:
        if needed not in node:
            raise ConfigError(
                f"parameters.{key}", None, f"{name} needs {needed}", f"give {' and '.join(DISTRIBUTIONS[name])}"
            )
        if needed not in ("value", "values") and not _number(node[needed]):
            raise ConfigError(f"parameters.{key}.{needed}", node[needed], "not a number", "write 1.0e-3, not 1e-3")
    if "min" in DISTRIBUTIONS[name] and not node["min"] < node["max"]:
        raise ConfigError(f"parameters.{key}", None, f"min {node['min']} is not below max {node['max']}", "swap them")
    if name == "categorical":
        _check_choices(key, node)
    if name == "int_uniform":
        _check_whole(key, node)
    step = node.get("q", 1)
    if name.startswith("q_") and not (_number(step) and step > 0):
        raise ConfigError(f"parameters.{key}.q", step, "not a number greater than 0", "write 1.0e-3, not 1e-3")
    if name.endswith("log_uniform_values") and node["min"] <= 0:
        raise ConfigError(f"parameters.{key}.min", node["min"], "not greater than 0", "a logarithm needs that")
    return name


def _stated_or_inferred(node: Mapping[str, Any]) -> str:
    if "distribution" in node:
        return str(node["distribution"])
    if "value" in node:
        return "constant"
    if "values" in node:
        return "categorical"
    has_whole_bounds = all(isinstance(node.get(bound), int) for bound in ("min", "max"))
    return "int_uniform" if has_whole_bounds else "uniform"


def _check_whole(key: str, node: Mapping[str, Any]) -> None:
    for bound in ("min", "max"):
        if node[bound] != int(node[bound]):
            fix = "give a whole number, or use the distribution uniform"
            raise ConfigError(f"parameters.{key}.{bound}", node[bound], "not a whole number", fix)


def _check_choices(key: str, node: Mapping[str, Any]) -> None:
    values, shares = node["values"], node.get("probabilities")
    if not isinstance(values, list | tuple) or not values:
        raise ConfigError(
            f"parameters.{key}.values", values, "values must be a list of at least one value", "write values: [0, 1]"
        )
    if shares is None:
        return
    where, equal = f"parameters.{key}.probabilities", [round(1 / len(values), 4)] * len(values)
    fix = f"give one share for each of the {len(values)} values, such as {equal}"
    if not isinstance(shares, list | tuple) or len(shares) != len(values):
        raise ConfigError(where, shares, f"expected {len(values)} numbers, one for each value", fix)
    if not all(_number(share) and share >= 0 for share in shares):
        raise ConfigError(where, shares, "expected numbers of at least 0", fix)
    if abs(sum(shares) - 1) > 5e-5 * len(shares):  # each may be rounded to four decimals
        raise ConfigError(where, shares, f"they sum to {sum(shares):.6g}, expected 1", fix)


def listed(key: str, node: Mapping[str, Any]) -> list[Any]:
    """Return a parameter's values for a grid.

    Raises:
        ConfigError: A distribution that has no finite list.
    """
    name = distribution(key, node)
    if name == "constant":
        return [node["value"]]
    if name == "categorical":
        return list(node["values"])
    if name == "int_uniform":
        return list(range(int(node["min"]), int(node["max"]) + 1))
    raise ConfigError(f"parameters.{key}", name, "a grid needs a list", "give values, or use method: random")


def draw(parameters: Mapping[str, Any], seed: str) -> dict[str, Any]:
    """Return one value a parameter; equal seeds give equal values on every machine."""
    return {key: _value(key, node, random.Random(f"{seed}/{key}")) for key, node in parameters.items()}


def _value(key: str, node: Mapping[str, Any], source: random.Random) -> Any:
    name = distribution(key, node)
    if name == "constant":
        return node["value"]
    if name == "categorical":
        return source.choices(list(node["values"]), weights=node.get("probabilities"))[0]
    if name == "int_uniform":
        return source.randint(int(node["min"]), int(node["max"]))
    if name in ("normal", "q_normal"):
        drawn = source.gauss(node["mu"], node["sigma"])
    elif name == "log_uniform":  # W&B's bounds are exponents of e here
        drawn = math.exp(source.uniform(node["min"], node["max"]))
    elif name in ("log_uniform_values", "q_log_uniform_values"):
        drawn = math.exp(source.uniform(math.log(node["min"]), math.log(node["max"])))
    else:
        drawn = source.uniform(node["min"], node["max"])
    if not name.startswith("q_"):
        return drawn
    step = node.get("q", 1)
    return type(step)(round(drawn / step) * step)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
