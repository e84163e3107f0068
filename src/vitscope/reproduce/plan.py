"""What has to be trained and measured for a figure or table, read from ``conf/reproduce.yaml``. Nothing is run here."""

from __future__ import annotations

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

#: keys of a run that are ours; the others are overrides of ``train.py``
PLAN_KEYS = ("experiment", "at", "model")


@dataclass(frozen=True)
class Trial:
    """One training, and what is measured on it.

    Attributes:
        overrides: of ``train.py``, the seed among them; the folder of runs is the caller's.
        tags: the moments at which to measure: ``end``, ``init``, ``epoch-0004``.
    """

    overrides: tuple[str, ...]
    tags: tuple[str, ...] = ("end",)

    @property
    def name(self) -> str:
        """The overrides in one line."""
        return " ".join(self.overrides)


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
        run: its folder; None where it could not be trained.
        problems: every analysis that failed or gave a number that is not finite, named.
        results: what was measured, as ``analysis/tag-settings``: a run may have the same analysis with other settings.
    """

    run: Path | None
    problems: tuple[str, ...] = ()
    results: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drawing:
    """An analysis's figure.

    Attributes:
        analysis: the configuration's name.
        options: of the room's figure.
    """

    analysis: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Relation:
    """A figure of numbers of runs over another number, or over a key of their configuration.

    Attributes:
        x: where each experiment stands.
        y: what is drawn, a panel each.
    """

    x: str
    y: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """A figure or a table.

    Attributes:
        name: such as ``fig4``, ``table-models``.
        trials: what it needs.
        tags: the moments that its figures show.
        drawings: figures of analyses.
        relations: figures of numbers.
        table: a table of ``report.py``, or None.
        different: whether results whose objective cards differ share a figure: that is then what it shows.
        baselines: whether each model is also drawn beside itself at initialisation and trained on random labels.
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
        ConfigError: an unknown name.
    """
    known = list(plan["targets"])
    chosen: list[str] = []
    for name in names:
        found = [k for k in known if name == "all" or k == name or re.fullmatch(re.escape(name) + "[a-z]", k)]
        if not found:
            raise ConfigError("target", name, "no such figure or table", errors.nearest(name, known))
        chosen += found
    return list(dict.fromkeys(chosen))


def target(name: str, plan: Mapping[str, Any], profile: str, seeds: int = 1) -> Target:
    """Return one target under a profile.

    Args:
        name: of the target.
        plan: from `read`.
        profile: one of ``plan["profiles"]``.
        seeds: of each experiment, from 0; claims take at least the profile's ``claim_seeds``.

    Raises:
        ConfigError: an unknown profile, model or moment.
    """
    if profile not in plan["profiles"]:
        raise ConfigError("profile", profile, "no such profile", errors.nearest(profile, plan["profiles"]))
    settings = plan["profiles"][profile]
    node = {**plan["targets"][name], **plan["targets"][name].get(profile, {})}
    if node.get("claims"):
        seeds = max(seeds, settings.get("claim_seeds", 1))
    shared = [f"profile={profile}", *settings.get("overrides", ())]
    trials = []
    for run in node["runs"]:
        tags = _moments(run.get("at", node.get("at", "end")), settings)
        for seed in range(seeds):
            for line in _expanded(run, settings["models"]):
                given = {"experiment": node["experiment"], **_pairs(shared), **line, "seed": seed}
                trials.append(Trial(tuple(f"{key}={value}" for key, value in given.items()), tags))
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


def _expanded(run: Mapping[str, Any], models: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield the command lines of a run's grid; a model's own keys come first, so that the run's win."""
    keys = list(run)
    lists = [run[key] if isinstance(run[key], list) else [run[key]] for key in keys]
    for values in itertools.product(*lists):
        chosen = dict(zip(keys, values))
        name = str(chosen.get("model"))
        if name not in models:
            raise ConfigError("model", name, "the profile has no such model", errors.nearest(name, models))
        experiment = {"experiment": chosen["experiment"]} if "experiment" in chosen else {}
        rest = {key: str(value) for key, value in chosen.items() if key not in PLAN_KEYS}
        yield {**experiment, **_pairs(models[name].split()), **rest}


def _pairs(overrides: Sequence[str]) -> dict[str, str]:
    return {key: value for key, _, value in (override.partition("=") for override in overrides)}


def _moments(name: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    if name in ("end", "init"):
        return (name,)
    known = settings.get("moments", {})
    if name not in known:
        raise ConfigError("at", name, "the profile has no such moment", errors.nearest(name, ["end", "init", *known]))
    return tuple(known[name])


def _drawing(entry: str | Mapping[str, Any]) -> Drawing:
    if isinstance(entry, str):
        return Drawing(entry)
    ((analysis, options),) = entry.items()
    return Drawing(analysis, options)
