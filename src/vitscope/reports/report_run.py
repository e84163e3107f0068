"""One report from its composed configuration: runs overlaid in figures, tables and a page; nothing is measured."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.colors import is_color_like
from omegaconf import DictConfig, OmegaConf

from vitscope.config import loading
from vitscope.plotting.style import KIND_COLORS
from vitscope.reports import run_entry, run_index, saved_results
from vitscope.reports.claims import claim_verdicts
from vitscope.reports.claims.effect_sizes import ReportRuns
from vitscope.reports.exports import study_export
from vitscope.reports.figures import figure_captions, figure_plan, figure_worker, html_page, step_histories
from vitscope.reports.model_costs import Costs
from vitscope.reports.tables import baselines, factorial_tables, headline_tables, terminal_table
from vitscope.reports.tables import table as cells
from vitscope.reports.tables.table import Problem, Table
from vitscope.reports.value_lookup import FAILED, Selection
from vitscope.runs import run_dir, run_search
from vitscope.runtime import errors, stop_flag
from vitscope.runtime.errors import ConfigError, DataError
from vitscope.runtime.logging import log_problem
from vitscope.runtime.text_layout import count_text

_logger = logging.getLogger(__name__)

TABLES = (*headline_tables.TABLES, "claims", *factorial_tables.NAMES)
GROUP_BY = ("model", "run")

#: problems printed one by one; the page and strict runs name all
MOST_LINES = 20


def report(cfg: DictConfig) -> Path:
    """Write what a composed configuration asks for; print the table that was asked for, or the headline one.

    Args:
        cfg: The configuration of ``conf/report.yaml``.

    Returns:
        The page, or the table's Markdown file.

    Raises:
        ConfigError: An unknown table or grouping.
        CheckpointError: A named run that is none.
        DataError: No run at all; run folders that are damaged, after the others are reported; with ``strict``, a number or
            a figure that is missing or failed.
        StorageError: The folder cannot be written.
    """
    cfg = _with_lists(cfg)
    _check(cfg)
    out = Path(cfg.out)
    stop_flag.check()
    damaged: list[run_index.Damage] = []
    entries, saved = _read_entries(cfg, damaged)
    panels, lacking = _plan_figures(cfg, entries, saved)
    tables, judged, figures = _write_tables_and_figures(cfg, entries, panels, out)
    stop_flag.check()
    terminal_table.show(next(iter(tables.values())))
    problems = [problem for table in tables.values() for problem in table.problems]
    target = out / "tables" / f"{next(iter(tables))}.md"
    if not cfg.table:
        problems += figure_plan.missing_results(entries, _analyses(cfg) or [], cfg.tag) + lacking
        problems += [
            Problem("failed", f"figure {figure.panel.name}", figure.panel.analysis, figure.picture.problem)
            for figure in figures
            if figure.picture.problem
        ]
        if cfg.page:
            target = html_page.write(out / f"{cfg.name}.html", entries, tables, judged, figures, problems)
            print(f"\n{count_text(len(figures), 'figure')}, {len(tables)} tables: {target}")
    _log_problems(list(dict.fromkeys(problems)), bool(cfg.strict), cfg)
    if damaged:
        reason = f"{count_text(len(damaged), 'run folder')} damaged and left out, named above"
        raise DataError("runs", None, reason, "restore or delete them; the report has the others")
    return target


def _with_lists(cfg: DictConfig) -> DictConfig:
    """Return the configuration with lists of one where one name was given alone, as in ``runs=runs/a``."""
    listed = cfg.copy()
    for key in ("runs", "analyses"):
        if isinstance(cfg[key], str):
            listed[key] = [cfg[key]]
    return listed


def _read_entries(
    cfg: DictConfig, damaged: list[run_index.Damage]
) -> tuple[list[run_entry.Entry], list[run_entry.Entry]]:
    """Return what the runs and the saved results hold; damaged runs are logged and added to ``damaged``.

    Raises:
        DataError: Nothing can be read.
    """
    index_root = Path(cfg.paths.runs) if cfg.runs is None else None
    entries = run_index.collect(_folders(cfg, damaged), damaged, index_root)
    for damage in damaged:
        log_problem(_logger, str(damage))
    saved = saved_results.saved_entries(_saved_files(cfg), cfg.tag, entries)
    if not entries and not saved:
        key = "runs" if cfg.runs is not None else "paths.runs"
        raise DataError(key, None, "no run that can be read", "name other run folders: runs=[runs/<id>]")
    return entries, saved


def _plan_figures(
    cfg: DictConfig, entries: Sequence[run_entry.Entry], saved: Sequence[run_entry.Entry]
) -> tuple[list[figure_plan.Panel], list[Problem]]:
    """Return the figures to draw, and what figures beside baselines lack; none where a single table is asked for.

    Raises:
        ConfigError: A label, a name of ``order`` or a color that fits no run.
        DataError: No run has a result that can be drawn.
    """
    drawable = [*entries, *saved]
    _check_labels(loading.plain(cfg.labels) or {}, drawable)
    if cfg.table:
        return [], []
    panels = _panels(cfg, drawable)
    if not (panels or cfg.baselines or _analyses(cfg) == []):
        _refuse_no_figure(cfg, drawable)
    if not cfg.baselines:
        return panels, []
    beside, lacking = baselines.panels(entries, _analyses(cfg), bool(cfg.allow_different))
    return [*panels, *beside], lacking


def _write_tables_and_figures(
    cfg: DictConfig, entries: Sequence[run_entry.Entry], panels: Sequence[figure_plan.Panel], out: Path
) -> tuple[dict[str, Table], list[claim_verdicts.ClaimVerdict], list[figure_captions.DrawnPanel]]:
    """Write the tables while worker processes draw; return them, the verdicts on the claims, and the figures."""
    options, colors = loading.plain(cfg.plot) or {}, loading.plain(cfg.colors)
    jobs = [figure_captions.drawing_job(panel, out, options.get(panel.analysis), cfg.pdf, colors) for panel in panels]
    with figure_worker.drawing(jobs) as finish:
        tables, judged = _tables(cfg, entries, out)
        stop_flag.check()
        figures = [figure_captions.with_picture(panel, picture) for panel, picture in zip(panels, finish())]
    if not cfg.table and cfg.tag in (None, "all"):
        for history in step_histories.step_histories(entries, _analyses(cfg), loading.plain(cfg.labels)):
            figures.append(step_histories.draw_history(history, out, pdf=cfg.pdf is not False))
    return tables, judged, figures


def _check(cfg: DictConfig) -> None:
    for key in ("labels", "colors"):
        if cfg[key] is not None and not OmegaConf.is_dict(cfg[key]):
            raise ConfigError(key, cfg[key], "not a mapping from names", f"write '{key}={{convnet-18: ResNet-18}}'")
    if cfg.order is not None and not OmegaConf.is_list(cfg.order):
        raise ConfigError("order", cfg.order, "not a list of names", "write 'order=[vit-tiny,convnet-18]'")
    for name, color in (cfg.colors or {}).items():
        if not is_color_like(color):
            raise ConfigError(f"colors.{name}", color, "no color of matplotlib", "write a name or '#1f77b4'")
    for key, value, names in (("table", cfg.table, TABLES), ("group_by", cfg.group_by, GROUP_BY)):
        if value not in names and not (key == "table" and value is None):
            raise ConfigError(key, value, "no such choice", errors.nearest(str(value), names))
    if not re.fullmatch(r"[^/\\\0\n]{1,100}", str(cfg.name)) or str(cfg.name) in (".", ".."):
        raise ConfigError(
            "name", repr(cfg.name), "not the name of a file", "leave out folders; out=... says where it goes"
        )
    if cfg.runs is not None and not list(cfg.runs):
        raise ConfigError("runs", "[]", "no run named", "name run folders, or leave it out for all of paths.runs")


def _saved_files(cfg: DictConfig) -> list[Path]:
    """Return those of ``runs`` that are files of ``result.save``."""
    return [Path(path) for path in cfg.runs or [] if Path(path).suffix == saved_results.SUFFIX]


def _folders(cfg: DictConfig, damaged: list[run_index.Damage]) -> list[run_dir.Run]:
    """Return the runs to read; folders that look like runs without what makes one are added to ``damaged``."""
    if cfg.runs is not None:
        folders = [path for path in cfg.runs if Path(path) not in _saved_files(cfg)]
        return list(dict.fromkeys(run for path in folders for run in _runs_of(Path(path))))
    root = Path(cfg.paths.runs)
    incomplete = run_search.incomplete(root)
    damaged += [run_index.Damage(path, f"has no {name}") for path, name in incomplete]
    if (run_folders := run_search.every(root)) or incomplete:
        return run_folders
    raise DataError("paths.runs", root, "no run there", "train one (python train.py), or name another folder")


def _runs_of(path: Path) -> list[run_dir.Run]:
    """Return the run of a folder, or all runs below one that is none, such as an exported bundle."""
    runs_below = run_search.every(path) if path.is_dir() and not (path / "config.yaml").is_file() else []
    return runs_below or [run_dir.find(path)]


def _tables(
    cfg: DictConfig, entries: Sequence[run_entry.Entry], out: Path
) -> tuple[dict[str, Table], list[claim_verdicts.ClaimVerdict]]:
    """Build and write the tables that were asked for; return them, and the claims where they are among them."""
    tag = cfg.tag if cfg.tag not in (None, "all") else run_entry.END
    selection = Selection(entries, tag, bool(cfg.allow_different), or_newest=cfg.tag is None)
    costs = Costs()
    crossed: dict[str, Table] = {}
    if cfg.table in (None, *factorial_tables.NAMES):
        crossed = factorial_tables.write_factorial_tables(selection, out)
    if cfg.table in factorial_tables.NAMES:
        return _written({cfg.table: crossed[cfg.table]}, out), []
    table_names = [cfg.table] if cfg.table else [name for name in TABLES if name not in factorial_tables.NAMES]
    judged = claim_verdicts.judge(ReportRuns(selection, costs)) if "claims" in table_names else []
    models = list(cfg.expect.models or []) if cfg.table else []
    seeds = [int(seed) for seed in cfg.expect.seeds or []] if cfg.table else []
    labels, order = loading.plain(cfg.labels), list(cfg.order or [])
    tables: dict[str, Table] = {}
    for name in table_names:
        if name == "claims":
            tables[name] = claim_verdicts.table(judged, study_export.data_names(entries))
        else:
            tables[name] = headline_tables.build(name, selection, costs, models, seeds, labels, order)
    tables |= {name: table for name, table in crossed.items() if table.rows}
    return _written(tables, out), judged


def _written(tables: dict[str, Table], out: Path) -> dict[str, Table]:
    for table in tables.values():
        cells.write(table, out / "tables")
    return tables


def _analyses(cfg: DictConfig) -> list[str] | None:
    return None if cfg.analyses is None else list(cfg.analyses)


def _panels(cfg: DictConfig, entries: Sequence[run_entry.Entry]) -> list[figure_plan.Panel]:
    planned = figure_plan.panels(
        entries,
        tag=cfg.tag,
        analyses=_analyses(cfg),
        group_by=cfg.group_by,
        labels=loading.plain(cfg.labels),
        order=list(cfg.order or []),
        allow_different=bool(cfg.allow_different),
    )
    if not planned:
        return planned
    names = {curve.label for panel in planned for curve in panel.curves}
    for key, stated_names in (("order", cfg.order or []), ("colors", cfg.colors or {})):
        for name in stated_names:
            if name not in names and not (key == "colors" and name in KIND_COLORS):
                raise ConfigError(key, name, "no such name in a legend", errors.nearest(str(name), names))
    return planned


def _check_labels(labels: Mapping[str, str], entries: Sequence[run_entry.Entry]) -> None:
    """Refuse names that no run has, and one label for two experiments, which would pass for seeds of one.

    Raises:
        ConfigError: With the name or the label.
    """
    known_names = {name for entry in entries for name in (entry.id, entry.label, f"{entry.label}, {entry.id}")}
    for name in labels:
        if name not in known_names:
            raise ConfigError("labels", name, "no run or model of this name", errors.nearest(str(name), known_names))
    experiments: dict[str, str] = {}
    for entry in entries:
        label = labels.get(entry.id, labels.get(entry.label, entry.label))
        if experiments.setdefault(label, entry.group) != entry.group:
            raise ConfigError("labels", label, "the label of two experiments", "give each a label of its own")


def _refuse_no_figure(cfg: DictConfig, entries: Sequence[run_entry.Entry]) -> None:
    """Refuse a report of runs with results none of which can be drawn; runs that were trained alone have tables.

    Raises:
        DataError: With what each run has at which moment.
    """
    held = [(entry, [m for m in entry.results if not m.error]) for entry in entries if not entry.superseded]
    if not any(results for _, results in held) and any(entry.trained for entry, _ in held):
        return
    listed = "; ".join(
        f"{entry.id}: " + (", ".join(dict.fromkeys(f"{m.analysis} at {m.tag}" for m in results)) or "nothing")
        for entry, results in held
    )
    key, value = ("analyses", list(cfg.analyses)) if cfg.tag is None and cfg.analyses else ("tag", cfg.tag)
    raise DataError(
        key, value, f"no run has a result of it ({listed})", "choose from these, or measure them: analyze.py"
    )


def _log_problems(problems: Sequence[Problem], strict: bool, cfg: DictConfig) -> None:
    """Log what failed and what is missing of that which was asked for; with ``strict`` end with an error.

    An analysis that nobody named is not asked for: the page alone says that a table lacks it.
    """
    table, analyses = cfg.table, _analyses(cfg) or []
    asked_problems = listed_problems = list(problems)
    if not strict and not table:
        asked_problems = [problem for problem in problems if problem.kind == FAILED or problem.metric in analyses]
        listed_problems = asked_problems[:MOST_LINES]
    for problem in listed_problems:
        log_problem(_logger, str(problem))
    if len(listed_problems) < len(asked_problems):
        log_problem(_logger, f"... and {len(asked_problems) - len(listed_problems)} more; the page names them all")
    if strict and problems:
        kinds = {kind: sum(p.kind == kind for p in problems) for kind in ("missing", "failed")}
        counted = " and ".join(f"{n} {kind}" for kind, n in kinds.items() if n)
        raise DataError(
            "table" if table else "analyses", table, f"{counted}, named above", "train or measure them again"
        )
