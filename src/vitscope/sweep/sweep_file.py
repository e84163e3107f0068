"""A W&B sweep file as this package reads it: parameters, method, metric, and the arguments of each trial."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vitscope.config import loading
from vitscope.runtime import errors
from vitscope.runtime.errors import ConfigError
from vitscope.sweep import distributions

#: the only command with which values arrive as Hydra overrides
COMMAND = ("${env}", "python", "${program}", "${args_no_hyphens}")
METHODS = ("grid", "random", "bayes")


@dataclass(frozen=True)
class Sweep:
    """A sweep file with what the command line added to it.

    Attributes:
        path: The file.
        content: Keys of the file, ``overrides`` already written into ``parameters`` as single values.
    """

    path: Path
    content: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """The file's name, and a hash of everything that decides what the trials are."""
        identity = {
            key: self.content.get(key) for key in ("program", "method", "metric", "parameters", "early_terminate")
        }
        return f"{self.path.stem}-{loading.digest(identity)}"

    @property
    def program(self) -> str:
        """The script that a trial runs."""
        return str(self.content.get("program", "train.py"))

    @property
    def method(self) -> str:
        """``grid``, ``random`` or ``bayes``."""
        return str(self.content.get("method", "grid"))

    @property
    def parameters(self) -> Mapping[str, Any]:
        """``{key: {"value": ...} or {"values": [...]} or a distribution}``."""
        return self.content.get("parameters") or {}

    @property
    def swept(self) -> list[str]:
        """The keys that differ between trials."""
        return [
            key for key, node in self.parameters.items() if "value" not in node and len(node.get("values", "..")) > 1
        ]

    @property
    def metric(self) -> tuple[str, bool]:
        """The metric's name and whether a larger value is better."""
        node = self.content.get("metric") or {}
        return str(node.get("name", "val/accuracy")), node.get("goal", "maximize") == "maximize"

    @property
    def run_cap(self) -> int | None:
        """The number of trials that the file allows, None for no bound."""
        cap = self.content.get("run_cap")
        return None if cap is None else int(cap)


def bundled_files() -> dict[str, Path]:
    """Return the sweep files of the package by name: the checkout's ``sweeps/``, else those inside the installed package."""
    return {file.stem: file for file in sorted((loading.folder().parent / "sweeps").glob("*.yaml"))}


def find(name: str | Path) -> Path:
    """Return the path of a sweep file.

    Args:
        name: A path, or the name of a file of the package: ``heads``, ``heads.yaml`` or ``sweeps/heads.yaml``. A file at that
            path comes first.

    Raises:
        ConfigError: There is no such file.
    """
    path = Path(name)
    if path.is_file():
        return path
    files = bundled_files()
    if path.suffix in ("", ".yaml") and path.parent in (Path(), Path("sweeps")) and path.stem in files:
        return files[path.stem]
    fix = f"name a file, or a sweep of the package: {errors.nearest(path.stem, files)}"
    raise ConfigError("SWEEP", name, "cannot be read (no such file)", fix)


def read(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file; ``key=value`` overrides hold for every trial and win over the file's single values.

    Args:
        path: A path or a name, see `find`.
        overrides: Settings of every trial.

    Raises:
        ConfigError: No such file, not YAML, no parameters, or an override of a key that the file varies.
    """
    path = find(path)
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ConfigError(
            "SWEEP", path, f"cannot be read ({reason})", "name a file such as sweeps/models.yaml"
        ) from None
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())[:160]
        raise ConfigError("SWEEP", path, f"not YAML ({line})", "correct the file") from None
    if not isinstance(content, dict) or not isinstance(content.get("parameters"), dict) or not content["parameters"]:
        raise ConfigError("SWEEP", path, "no parameters in it", "write parameters: {seed: {values: [0, 1]}}")
    parameters = dict(content["parameters"])
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError("SWEEP", override, "not key=value", "give an override such as trainer.max_epochs=1")
        if key in parameters and not isinstance(parameters[key], Mapping):
            fix = "write {value: ...} or {values: [...]}"
            raise ConfigError(f"parameters.{key}", parameters[key], "not a mapping", fix)
        if key in parameters and "value" not in parameters[key]:
            raise ConfigError(key, text, "the sweep varies this key", "take it out of the command or of the file")
        parameters[key] = {"value": _scalar(text)}
    return Sweep(path, {**content, "parameters": parameters})


def arguments(params: Mapping[str, Any]) -> list[str]:
    """Return a trial's overrides exactly as a W&B agent writes them for ``${args_no_hyphens}``."""
    return [f"{key}={value}" for key, value in params.items()]


def label(sweep: Sweep, params: Mapping[str, Any]) -> str:
    """Return what distinguishes a trial, for people."""
    return " ".join(f"{key}={_short(params[key])}" for key in sweep.swept) or "the only trial"


def folder_name(index: int, params: Mapping[str, Any]) -> str:
    """Return the name of a trial's run folder."""
    return f"{index:03d}-{loading.digest(dict(params), 6)}"


def grid(sweep: Sweep) -> list[dict[str, Any]]:
    """Return all combinations, the last key varying fastest, as W&B's own grid does.

    Raises:
        ConfigError: A parameter with no finite list of values.
    """
    lists = {key: distributions.listed(key, node) for key, node in sweep.parameters.items()}
    return [dict(zip(lists, combination)) for combination in itertools.product(*lists.values())]


def random(sweep: Sweep, n: int) -> list[dict[str, Any]]:
    """Return the first ``n`` random trials; trial i depends on the sweep and on i only, so that a sweep can go on."""
    return [distributions.draw(sweep.parameters, f"{sweep.name}/{index}") for index in range(n)]


def count(sweep: Sweep, limit: int | None) -> int | None:
    """Return how many trials a search without a grid makes: the smaller of ``run_cap`` and ``limit``; None if neither."""
    bounds = [n for n in (sweep.run_cap, limit) if n is not None]
    return min(bounds) if bounds else None


def planned(sweep: Sweep, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the trials of a grid or random sweep.

    Raises:
        ConfigError: A random sweep that would never end.
    """
    n = count(sweep, limit)
    if sweep.method == "grid":
        return grid(sweep)[:n]
    if n is None:
        raise ConfigError(
            "run_cap", None, f"a {sweep.method} sweep has no end without it", "set run_cap in the file, or LIMIT=n"
        )
    return random(sweep, n)


def _scalar(text: str) -> Any:
    value = loading.typed_value(text)
    return value if isinstance(value, bool | int | float) else text


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
