"""The command line of ``vitscope reproduce``: targets, settings, and the help that lists both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitscope.config import loading
from vitscope.reproduce import plan as reproduction
from vitscope.reproduce import run_overrides
from vitscope.runtime import errors
from vitscope.runtime.errors import ConfigError
from vitscope.runtime.text_layout import count_text

USAGE = """usage: vitscope reproduce TARGET ... [profile=smoke] [seeds=1] [gpus=0,1 | jobs=2] [overrides='key=value ...']
                          [dry=true] [launcher=slurm [slurm.KEY=value ...]] [runs=FOLDER] [out=FOLDER]
                          [export=FOLDER] [from=FOLDER[,FOLDER ...]]

  TARGET        all, or figures and tables of the list below; fig1 is fig1a, fig1b and fig1c
  profile=      {profiles}
  seeds=5       seeds 0 to 4 of each experiment; seeds=5-8: seeds 5, 6, 7 and 8, for instance on another machine
  gpus=0,1      one run at a time on each of these GPUs (0+1: a run on two); jobs=4 beside it: two on each
  jobs=2        two runs side by side on the CPU, which share its cores
  overrides=    settings of every training, such as 'optimizer.lr=1e-3 trainer.max_epochs=50'; such runs have folders of their own
  dry=true      only list the runs that each target needs, which exist, and the estimated hours and disk space
  launcher=slurm  submit each run as a SLURM job through submitit; jobs=8: at most 8 at a time; slurm.partition=gpu
                slurm.time=1440 (minutes) ... are options of sbatch, see docs/reproduce.md
  runs=         the folder of runs; default: runs/reproduce-<profile>
  out=          the folder of figures and tables; default: figures/<profile>
  export=FOLDER write the numbers of the targets as small JSON: configurations, metrics, scalars, cards and hashes, no weights
  from=FOLDER   train and measure nothing: draw the targets' tables and figures of numbers from such a folder, or from several
                with other seeds (from=FOLDER,FOLDER), of which export=FOLDER makes one

The same command resumes: finished runs and results are kept.

figures of the paper:
{figures}
tables:
{tables}
beyond the paper:
{questions}"""
OPTIONS = ("profile", "seeds", "runs", "out", "gpus", "jobs", "overrides", "dry", "launcher", "export", "from")


@dataclass(frozen=True)
class Request:
    """A command line.

    Attributes:
        names: Targets; ``all``, or a figure for all its parts.
        profile: Profile of ``conf/reproduce.yaml``.
        seeds: Number of seeds of each experiment, or a range of seeds.
        runs: The folder of runs.
        out: The folder of figures, a folder a target in it.
        gpus: GPUs such as ``0,1``; None for none in particular.
        jobs: Number of jobs side by side; None for one, or one per GPU.
        overrides: Settings of every run.
        dry: Whether only to list the work.
        launcher: ``local`` or ``slurm``.
        slurm: Options of ``sbatch``.
        export: Folder to write the numbers of the targets to.
        sources: Folders of a study's parts from which to draw; none to train and measure.
    """

    names: list[str]
    profile: str = "smoke"
    seeds: int | range = 1
    runs: Path = Path("runs/reproduce-smoke")
    out: Path = Path("figures/smoke")
    gpus: str | None = None
    jobs: int | None = None
    overrides: tuple[str, ...] = ()
    dry: bool = False
    launcher: str = "local"
    slurm: Mapping[str, Any] = field(default_factory=dict)
    export: Path | None = None
    sources: tuple[Path, ...] = ()

    def seeds_text(self) -> str:
        """Return the seeds in words, such as ``5 seeds`` or ``seeds 5 to 8``."""
        if isinstance(self.seeds, range):
            return f"seeds {self.seeds[0]} to {self.seeds[-1]}" if len(self.seeds) > 1 else f"seed {self.seeds[0]}"
        return count_text(self.seeds, "seed")


def parse(argv: Sequence[str]) -> Request:
    """Return what a command line asks for.

    Raises:
        ConfigError: An unknown option, or a value that does not fit.
        SystemExit: The help was asked for and has been printed.
    """
    if not argv or {"-h", "--help"} & set(argv):
        print(usage())
        raise SystemExit(0)
    names = [word for word in argv if "=" not in word]
    options = dict(word.split("=", 1) for word in argv if "=" in word)
    _refuse_unknown(names, options)
    settings = {key: value for key, value in options.items() if value}  # make leaves what was not set empty
    _refuse_beside_source(settings)
    sources = tuple(Path(part) for part in settings.get("from", "").split(",") if part)
    profile = settings.get("profile", "smoke")
    study = sources[0].name if sources else profile
    overrides = run_overrides.checked(settings.get("overrides", ""))
    suffix = run_overrides.suffix(overrides)
    launcher = settings.get("launcher", "local")
    slurm = _slurm_options(settings, launcher)
    return Request(
        names=names,
        profile=profile,
        seeds=_seeds(settings.get("seeds", "1")),
        runs=Path(settings.get("runs", f"runs/reproduce-{profile}{suffix}")),
        out=Path(settings.get("out", f"figures/{study}{suffix}")),
        gpus=settings.get("gpus"),
        jobs=_whole("jobs", settings["jobs"]) if "jobs" in settings else None,
        overrides=overrides,
        dry=_flag("dry", settings.get("dry", "false")),
        launcher=launcher,
        slurm=slurm,
        export=Path(settings["export"]) if "export" in settings else None,
        sources=sources,
    )


def _refuse_unknown(names: Sequence[str], options: Mapping[str, str]) -> None:
    """Refuse options that are unknown or are not written as key=value, and a command line without a target."""
    for name in names:
        if name.startswith("-"):
            fix = "options are key=value, such as dry=true; see vitscope reproduce --help"
            raise ConfigError(name, None, "no such option", fix)
    for key in options:
        if key not in OPTIONS and not key.startswith("slurm."):
            raise ConfigError(key, options[key], "no such option", errors.nearest(key, OPTIONS))
    if not names:
        raise ConfigError(
            "target", None, "no figure or table named", "write vitscope reproduce all, or fig4, or table-models"
        )


def _slurm_options(settings: Mapping[str, str], launcher: str) -> dict[str, Any]:
    """Return the options of ``sbatch``; refuse an unknown launcher, and settings that do not go with it."""
    if launcher not in ("local", "slurm"):
        raise ConfigError("launcher", launcher, "no such launcher", "choose local or slurm")
    slurm = {
        key.removeprefix("slurm."): loading.typed_value(value)
        for key, value in settings.items()
        if key.startswith("slurm.")
    }
    minutes = slurm.get("time", 1)
    if not isinstance(minutes, int):
        raise ConfigError("slurm.time", minutes, "not a whole number of minutes", "write slurm.time=720 for 12 hours")
    if slurm and launcher != "slurm":
        raise ConfigError(f"slurm.{next(iter(slurm))}", None, "launcher=slurm is not set", "add launcher=slurm")
    if launcher == "slurm" and "gpus" in settings:
        raise ConfigError(
            "gpus", settings["gpus"], "SLURM chooses the GPUs", "leave it out; slurm.gpus_per_node=2 asks for two"
        )
    return slurm


def _refuse_beside_source(settings: Mapping[str, str]) -> None:
    """Refuse options that train or measure beside ``from=``; make always gives a profile and seeds, which then have no effect."""
    others = [key for key in settings if key not in ("from", "out", "profile", "seeds", "export")]
    if "from" in settings and others:
        reason = "from= draws from committed numbers and runs nothing"
        raise ConfigError(others[0], settings[others[0]], reason, "leave one of the two out")


def usage() -> str:
    """Return the help: options, and every target."""
    plan = reproduction.read()
    groups = reproduction.groups(plan)
    figures = [name if parts == [name] else f"{name} ({', '.join(parts)})" for name, parts in groups.items()
               if name.startswith("fig")]  # fmt: skip
    tables = [name for name in groups if name.startswith("table-")]
    questions = [name for name in groups if not name.startswith(("fig", "table-"))]
    return USAGE.format(
        profiles=", ".join(plan["profiles"]),
        figures=_wrapped(figures),
        tables=_wrapped(tables),
        questions=_wrapped(questions),
    )


def _wrapped(names: Sequence[str], width: int = 110) -> str:
    lines = [""]
    for name in names:
        if lines[-1] and len(lines[-1]) + len(name) > width:
            lines.append("")
        lines[-1] += f"  {name}"
    return "\n".join(lines)


def _whole(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(name, text, "not a whole number of at least 1", f"write {name}=2")
    return int(text)


def _seeds(text: str) -> int | range:
    """Return the number of seeds, or the range of ``5-8``."""
    first, dash, last = text.partition("-")
    if not dash:
        return _whole("seeds", text)
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise ConfigError("seeds", text, "not a range of seeds", "give the first and the last one, such as seeds=5-8")
    return range(int(first), int(last) + 1)


def _flag(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise ConfigError(name, text, "not true or false", f"write {name}=true, or leave it out")
    return text.lower() in ("true", "1")
