"""``vitscope runs list | show | export | delete``: the run folders of a project as a table, one by one, bundled or removed."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vitscope.cli import exit_codes
from vitscope.reports import run_description, run_index, run_listing
from vitscope.reports.exports import run_bundle
from vitscope.reports.run_listing import Summary
from vitscope.runs import run_removal, run_search
from vitscope.runs.run_dir import Run
from vitscope.runtime import errors, redaction
from vitscope.runtime.errors import ConfigError, DataError, StorageError
from vitscope.runtime.logging import log_problem
from vitscope.runtime.text_layout import aligned, count_text, duration_text, size_text

_logger = logging.getLogger(__name__)

USAGE = """usage: vitscope runs list [FOLDER] [model=PATTERN] [data=PATTERN] [experiment=PATTERN] [tags=PATTERN]
                     [state=STATE] [sort=KEY] [json=true]
       vitscope runs show RUN ... [json=true]
       vitscope runs export RUN ... to=bundle.zip|FOLDER [overwrite=true]
       vitscope runs delete RUN ... [keep=results] [dry=true] [yes=true]

  RUN           an id, the beginning of one, or the path of a run folder
  runs=FOLDER   the folder of runs (also paths.runs=); default: $VITSCOPE_RUNS, else runs
  PATTERN       alternatives separated by commas, with the wildcards * and ?; experiment= also matches tags
  state=        finished, stopped, running, failed
  sort=         id, model, data, experiment, seed, state, size, age, or a metric such as test/accuracy; sort=-age descends
  to=           configurations, results, figures, CSV, metrics and provenance, without weights; report.py runs=[...] reads it
  keep=results  delete only the checkpoints
  dry=true      print what would be deleted, and its size"""

_ROOT_OPTIONS = ("runs", "paths.runs")
_OPTIONS = {
    "list": (*run_listing.FILTERS, "sort", "json"),
    "show": ("json",),
    "export": ("to", "overwrite"),
    "delete": ("keep", "dry", "yes"),
}


def main() -> None:
    """Run the command with ``sys.argv`` and end the process with its exit code."""
    exit_codes.run(lambda: command(sys.argv[1:]))


def command(argv: Sequence[str]) -> None:
    """Run one of the actions.

    Raises:
        ConfigError: An unknown action, option or run.
        DataError: No run at all, or damaged run folders, after the others are shown.
        StorageError: A run that is alive is to be deleted, or a folder cannot be read or written.
    """
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return
    action, *rest = argv
    if action not in _OPTIONS:
        raise ConfigError("runs", action, "no such action", errors.nearest(action, _OPTIONS))
    names, options = _parse(action, rest)
    actions: dict[str, Callable[[list[str], dict[str, str]], None]] = {
        "list": list_runs,
        "show": show_runs,
        "export": export_runs,
        "delete": delete_runs,
    }
    actions[action](names, options)


def _parse(action: str, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the names and the options of a command line."""
    names: list[str] = []
    options: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or os.sep in key or os.path.lexists(argument):
            names.append(argument)
            continue
        allowed = (*_OPTIONS[action], *_ROOT_OPTIONS)
        if key not in allowed:
            raise ConfigError(key, value, f"no option of runs {action}", errors.nearest(key, allowed))
        options[key] = value
    for name in names:
        if name.startswith("-"):
            raise ConfigError(name, None, "no such option", "options are key=value, see `vitscope runs --help`")
    if not names and action != "list":
        raise ConfigError(
            "run", None, "no run named", f"write vitscope runs {action} <id>; `vitscope runs list` lists them"
        )
    return names, options


def _flag(options: Mapping[str, str], key: str) -> bool:
    value = options.get(key, "false").lower()
    if value not in ("true", "false"):
        raise ConfigError(key, options[key], "not true or false", f"write {key}=true, or leave it out")
    return value == "true"


def _root(options: Mapping[str, str]) -> Path:
    return Path(options.get("runs") or options.get("paths.runs") or os.environ.get("VITSCOPE_RUNS") or "runs")


def list_runs(names: Sequence[str], options: Mapping[str, str]) -> None:
    """Print a table of the runs in a folder, or a JSON array with one run a line.

    Raises:
        ConfigError: A wrong option.
        DataError: No run there, or damaged folders, which are named and left out.
    """
    as_json = _flag(options, "json")
    if len(names) > 1:
        raise ConfigError("runs", " ".join(names), "several folders", f"name one folder, such as runs={names[0]}")
    root = Path(names[0]) if names else _root(options)
    damaged = [run_index.Damage(path, f"has no {name}") for path, name in run_search.incomplete(root)]
    summaries = _summaries(run_search.every(root), damaged, root)
    if not summaries and not damaged:
        raise DataError(
            "paths.runs", root, "no run there", "train one (vitscope train), or name another folder: runs=<folder>"
        )
    patterns = {key: options[key] for key in run_listing.FILTERS if key in options}
    matches = run_listing.ordered(run_listing.matching(summaries, patterns), options.get("sort", "id"))
    if as_json:
        lines = ",\n ".join(json.dumps(redaction.redacted(summary.to_dict())) for summary in matches)
        print(f"[{lines}]")
    else:
        print(_table(matches))
        size = size_text(sum(summary.size for summary in matches))
        print(f"{len(matches)} of {len(summaries)} runs in {root}, {size}")
    if damaged:
        for damage in damaged:
            log_problem(_logger, str(damage))
        reason = f"{count_text(len(damaged), 'run folder')} damaged and left out, named above"
        raise DataError("runs", None, reason, "restore or delete them; the list has the others")


def _summaries(runs: Sequence[Run], damaged: list[run_index.Damage], root: Path | None = None) -> list[Summary]:
    """Return the summaries of readable runs; the others are added to ``damaged``. ``root`` has an index of all runs below it."""
    summaries = []
    for entry in run_index.collect(runs, damaged, root):
        try:
            summaries.append(run_listing.summarize(entry))
        except StorageError as error:
            damaged.append(run_index.Damage(entry.run.path, f"{error.value}: {error.why}"))
        except FileNotFoundError:  # deleted just now
            continue
    return summaries


def _named(names: Sequence[str], options: Mapping[str, str]) -> list[Summary]:
    """Return the summaries of named runs.

    Raises:
        ConfigError: No such run.
        DataError: One of them is damaged.
    """
    damaged: list[run_index.Damage] = []
    runs = run_listing.resolve(names, run_search.every(_root(options)))
    summaries = {summary.entry.run: summary for summary in _summaries(runs, damaged)}
    for damage in damaged:
        raise DataError(
            "run", damage.path, f"damaged: {damage.why}", "restore the file from a copy, or name another run"
        )
    return [summaries[run] for run in runs if run in summaries]


def _table(summaries: Sequence[Summary]) -> str:
    """Return an aligned table; numbers and sizes are at the right."""
    head = ["id", "model", "data", "experiment", "tags", "seed", "state", "metrics", "measured", "size", "age"]
    rows: list[Sequence[str]] = [head, *(_row(summary) for summary in summaries)]
    if not any(summary.tags for summary in summaries):
        rows = [[cell for name, cell in zip(head, row) if name != "tags"] for row in rows]
        head = list(rows[0])
    right = {head.index(name) for name in ("seed", "size", "age")}
    return redaction.masked("\n".join(aligned(rows, right)))


def _row(summary: Summary) -> tuple[str, ...]:
    entry = summary.entry
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in summary.main_metrics().items())
    measured = ", ".join(
        name if tags == ["end"] else f"{name} ({', '.join(tags)})" for name, tags in summary.measured().items()
    )
    if failures := len(summary.failures()):
        measured = f"{measured}, {failures} failed".removeprefix(", ")
    tags = ", ".join(summary.tags)
    cells = (entry.label, entry.data, summary.experiment, tags, str(entry.seed), summary.state, metrics, measured)
    return (
        entry.run.id,
        *(" ".join(c.split()) or "-" for c in cells),
        size_text(summary.size),
        duration_text(summary.age_s),
    )


def show_runs(names: Sequence[str], options: Mapping[str, str]) -> None:
    """Print runs in full: differences from defaults, provenance, metrics, results, checkpoints, figures and sizes.

    Raises:
        ConfigError: No such run.
        DataError: One of them is damaged.
    """
    as_json = _flag(options, "json")
    facts = [redaction.redacted(run_description.describe(summary)) for summary in _named(names, options)]
    if as_json:
        print("[" + ",\n ".join(json.dumps(fact, default=str) for fact in facts) + "]")
        return
    print("\n\n".join(run_description.text(fact) for fact in facts))


def export_runs(names: Sequence[str], options: Mapping[str, str]) -> None:
    """Write runs into a bundle without weights.

    Raises:
        ConfigError: No such run, no target, or one that exists.
        DataError: A run is damaged.
        StorageError: The bundle cannot be written.
    """
    overwrite = _flag(options, "overwrite")
    if not options.get("to"):
        raise ConfigError("to", None, "no target named", "add to=bundle.zip, or to=<folder>")
    target = Path(options["to"])
    summaries = _named(names, options)
    n_files = run_bundle.export(summaries, target, overwrite)
    runs = count_text(len(summaries), "run")
    is_archive = target.suffix == ".zip"  # which is unpacked anywhere, into a folder of its own
    unpack, folder = ("; unpack it, then", target.stem) if is_archive else (";", target)
    print(f"{runs}, {n_files} files, no weights: {target}{unpack} vitscope report paths.runs={folder}")


def delete_runs(names: Sequence[str], options: Mapping[str, str]) -> None:
    """Delete runs, or their checkpoints, once the user agrees; if one of them may not be deleted, none is.

    Raises:
        ConfigError: No such run, a folder that is not one, or no answer.
        StorageError: A run is alive, or a file cannot be deleted.
    """
    dry, agreed = _flag(options, "dry"), _flag(options, "yes")
    keep = options.get("keep")
    if keep not in (None, "results"):
        raise ConfigError("keep", keep, "no such choice", "write keep=results, or leave it out")
    runs = run_listing.resolve(names, run_search.every(_root(options)))
    removals = [run_removal.plan(run, keep == "results") for run in runs]
    for removal in removals:
        described = "run folder" if removal.whole else "checkpoints of"
        print(f"{'would delete' if dry else 'delete'}: {described} {removal.run.path}, {size_text(removal.size)}")
    total = size_text(sum(removal.size for removal in removals))
    if dry:
        print(f"{total} in all; nothing was deleted")
        return
    if not agreed and not _answer(f"Delete {total} for good? [y/N] "):
        print("nothing was deleted")
        return
    for removal in removals:
        run_removal.perform(removal)
    print(f"deleted {total}")


def _answer(question: str) -> bool:
    """Return whether the user agrees.

    Raises:
        ConfigError: Standard input has ended.
    """
    print(question, end="", flush=True)
    line = sys.stdin.readline()
    if not line:
        print()
        raise ConfigError("yes", None, "no answer on standard input, nothing was deleted", "add yes=true")
    return line.strip().lower() in ("y", "yes")
