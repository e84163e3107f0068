"""Plan of trainings and analyses for a figure or table, read from ``conf/reproduce.yaml``. This module runs nothing."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vitscope.config import loading
from vitscope.runtime import errors
from vitscope.runtime.errors import ConfigError

#: keys of a planned run that the plan interprets; the others are overrides of ``train.py``
PLAN_KEYS = ("experiment", "at", "model")


@dataclass(frozen=True)
class Trial:
    """One training, and what is measured on it.

    Attributes:
        overrides: Overrides of ``train.py`` with the seed; the caller chooses the folder of runs.
        tags: The moments at which to measure: ``end``, ``init``, ``epoch-0004``.
    """

    overrides: tuple[str, ...]
    tags: tuple[str, ...] = ("end",)

    @property
    def name(self) -> str:
        """The overrides in one line."""
        return " ".join(self.overrides)


@dataclass(frozen=True)
class Outcome:
    """Run folder, problems and results of a trial.

    Attributes:
        run: The run folder; None where it could not be trained.
        problems: Every analysis that failed or gave a number that is not finite, named.
        results: Names of the results, as ``analysis/tag-settings``: a run may have the same analysis with other settings.
    """

    run: Path | None
    problems: tuple[str, ...] = ()
    results: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drawing:
    """An analysis's figure.

    Attributes:
        analysis: The configuration's name.
        options: Keyword arguments of the measure's plot function.
    """

    analysis: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Relation:
    """A figure of numbers of runs over another number, or over a key of their configuration.

    Attributes:
        x: Quantity or configuration key of the x axis.
        y: Quantities to draw, one panel each.
    """

    x: str
    y: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """A figure or a table.

    Attributes:
        name: Name such as ``fig4`` or ``table-models``.
        trials: Trainings that the target needs.
        tags: The moments that its figures show.
        drawings: Figures of analyses.
        relations: Figures of numbers.
        table: A table of ``report.py``, or None.
        different: Whether results whose objective cards differ share a figure: that is then what it shows.
        baselines: Whether each model is also drawn beside itself at initialization and trained on random labels.
    """

    name: str
    trials: tuple[Trial, ...]
    tags: tuple[str, ...] = ("end",)
    drawings: tuple[Drawing, ...] = ()
    relations: tuple[Relation, ...] = ()
    table: str | None = None
    different: bool = False
    baselines: bool = False


def read(path: Path | None = None) -> dict[str, Any]:
    """Return the file's ``profiles`` and ``targets``."""
    return yaml.safe_load((path or loading.folder() / "reproduce.yaml").read_text())


def select(names: Sequence[str], plan: Mapping[str, Any]) -> list[str]:
    """Return the targets that are asked for: ``all``, a target, or a figure with all its parts (``fig1``: a, b, c).

    Raises:
        ConfigError: An unknown name.
    """
    target_names = list(plan["targets"])
    selected: list[str] = []
    for name in names:
        matches = [k for k in target_names if name == "all" or k == name or re.fullmatch(re.escape(name) + "[a-z]", k)]
        if not matches:
            possible = dict.fromkeys(["all", *groups(plan), *target_names])
            close = difflib.get_close_matches(name, possible, n=3, cutoff=0.5)
            fix = f"did you mean {' or '.join(close)}?" if close else f"choose from all, {', '.join(groups(plan))}"
            raise ConfigError("target", name, "no such figure or table", fix)
        selected += matches
    return list(dict.fromkeys(selected))


def groups(plan: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the figures and tables with the targets that are their parts: ``fig1`` to ``[fig1a, fig1b, fig1c]``."""
    names: dict[str, list[str]] = {}
    for name in plan["targets"]:
        part = re.fullmatch(r"(fig[A-Z]?\d+)[a-z]", name)
        names.setdefault(part[1] if part else name, []).append(name)
    return names


def target(
    name: str, plan: Mapping[str, Any], profile: str, seeds: int | range = 1, overrides: Sequence[str] = ()
) -> Target:
    """Return one target under a profile.

    Args:
        name: Name of the target.
        plan: The plan that `read` returns.
        profile: One of ``plan["profiles"]``.
        seeds: Number of seeds of each experiment, from 0, or a range of seeds. With a number, claims take at least the
            profile's ``claim_seeds``.
        overrides: Settings of every run, ``key=value``; see `run_overrides.checked`.

    Raises:
        ConfigError: An unknown profile, model or moment, or an override of a key that the target sets itself.
    """
    if profile not in plan["profiles"]:
        raise ConfigError("profile", profile, "no such profile", errors.nearest(profile, plan["profiles"]))
    settings = plan["profiles"][profile]
    node = {**plan["targets"][name], **plan["targets"][name].get(profile, {})}
    own_settings = _pairs(overrides)
    _refuse_varied(name, node, own_settings)
    if isinstance(seeds, int):
        seeds = range(max(seeds, settings.get("claim_seeds", 1)) if node.get("claims") else seeds)
    shared = [f"profile={profile}", *settings.get("overrides", ())]
    trials = []
    # seed by seed, so that a study that is interrupted has whole seeds
    for seed in seeds:
        for run in node["runs"]:
            tags = _moments(run.get("at", node.get("at", "end")), settings)
            for line in _expanded(run, settings["models"]):
                settings_of_trial = {
                    "experiment": node["experiment"], **_pairs(shared), **line, "seed": seed, **own_settings
                }  # fmt: skip
                trials.append(Trial(tuple(f"{key}={value}" for key, value in settings_of_trial.items()), tags))
    return Target(
        name,
        tuple(dict.fromkeys(trials)),
        _moments(node.get("at", "end"), settings),
        tuple(_drawing(entry) for entry in node.get("draw", ())),
        tuple(Relation(entry["x"], tuple(entry["y"])) for entry in node.get("relate", ())),
        node.get("table"),
        bool(node.get("different", False)),
        bool(node.get("baselines", False)),
    )


def _refuse_varied(name: str, node: Mapping[str, Any], own_settings: Mapping[str, str]) -> None:
    """Refuse an override of a key that a target's runs set, by which they differ."""
    own_keys = {key.lstrip("+"): key for key in own_settings}
    for run in node["runs"]:
        for key in run:
            if key in own_keys and key not in PLAN_KEYS:
                values = ", ".join(map(str, run[key] if isinstance(run[key], list) else [run[key]]))
                reason = f"{name} sets this key itself ({values})"
                raise ConfigError(key, own_settings[own_keys[key]], reason, f"leave it out, or leave out {name}")


def _expanded(run: Mapping[str, Any], models: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield the command lines of a run's grid; a model's own keys come first, so that the run's win."""
    keys = list(run)
    lists = [run[key] if isinstance(run[key], list) else [run[key]] for key in keys]
    for values in itertools.product(*lists):
        point = dict(zip(keys, values))
        name = str(point.get("model"))
        if name not in models:
            raise ConfigError("model", name, "the profile has no such model", errors.nearest(name, models))
        experiment = {"experiment": point["experiment"]} if "experiment" in point else {}
        overrides = {key: str(value) for key, value in point.items() if key not in PLAN_KEYS}
        yield {**experiment, **_pairs(models[name].split()), **overrides}


def _pairs(overrides: Sequence[str]) -> dict[str, str]:
    return {key: value for key, _, value in (override.partition("=") for override in overrides)}


def _moments(name: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    if name in ("end", "init"):
        return (name,)
    moments = settings.get("moments", {})
    if name not in moments:
        raise ConfigError("at", name, "the profile has no such moment", errors.nearest(name, ["end", "init", *moments]))
    return tuple(moments[name])


def _drawing(entry: str | Mapping[str, Any]) -> Drawing:
    if isinstance(entry, str):
        return Drawing(entry)
    ((analysis, options),) = entry.items()
    return Drawing(analysis, options)
