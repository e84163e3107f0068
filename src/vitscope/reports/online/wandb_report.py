"""A W&B report and a saved workspace, by the package wandb-workspaces, which is imported here alone.

Configurations are logged with flat keys, ``optimizer.lr``, which W&B addresses as ``optimizer.lr.value``; the package's own
``Config`` assumes nested ones, ``optimizer.value.lr`` (`wandb_workspaces.expr.groupby_str_to_key` describes both).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from vitscope.reports.online.report_content import ReportContent
from vitscope.reports.tables import table as cells
from vitscope.runtime.errors import ConfigError
from vitscope.runtime.redaction import masked, redacted

#: modules of the package, which is optional
REPORTS, WORKSPACES = "wandb_workspaces.reports.v2", "wandb_workspaces.workspaces"
#: key of rows in W&B by which curves are drawn (`vitscope.runs.wandb_mirror`)
STEP = "trainer/global_step"
#: longest title that W&B takes
LONGEST_TITLE = 128


def check_package() -> None:
    """Check that the package is installed.

    Raises:
        ConfigError: It is not.
    """
    try:
        importlib.import_module(REPORTS)
    except ImportError as error:
        fix = "pip install 'vitscope[report]'"
        raise ConfigError("wandb-report", None, f"needs the package wandb-workspaces ({error})", fix) from None


def build_report(content: ReportContent, entity: str, project: str, figures_run: str | None = None) -> Any:
    """Return the report as an object of wandb-workspaces; it is sent by its method ``save``.

    Args:
        content: What is shown.
        entity: User or team; empty for a report that is only written to a file: nothing is then asked of the server.
        project: Project of the runs.
        figures_run: W&B's id of the run that holds figures and tables; None without one.
    """
    wr = importlib.import_module(REPORTS)

    runs = _runset(wr, entity, project, "runs", content.run_ids, content)
    blocks: list[Any] = [
        wr.P(masked(f"{len(content.run_ids)} runs, grouped by {content.model_key}.")),
        wr.H2("Settings and outcomes"),
        wr.PanelGrid(runsets=[runs], panels=[_parallel_coordinates(wr, content)]),
        wr.H2("Metrics over steps"),
        wr.PanelGrid(
            runsets=[_runset(wr, entity, project, "runs", content.run_ids, content)], panels=_curves(wr, content)
        ),
    ]
    if content.claims is not None:
        table = masked(cells.markdown(content.claims))
        blocks += [wr.H2("Claims of the paper"), wr.MarkdownBlock(table)]
    if content.figures and figures_run:
        figure_runs = _runset(wr, entity, project, "figures", (figures_run,))
        blocks += [wr.H2("Figures"), wr.PanelGrid(runsets=[figure_runs], panels=_figures(wr, content))]
    return wr.Report(
        entity=entity, project=project, title=masked(content.title)[:LONGEST_TITLE], blocks=blocks, width="fluid"
    )


def build_workspace(content: ReportContent, entity: str, project: str, figures_run: str | None = None) -> Any:
    """Return the saved workspace; arguments are those of `build_report`."""
    wr, ws = importlib.import_module(REPORTS), importlib.import_module(WORKSPACES)

    ids = [*content.run_ids, figures_run] if figures_run else list(content.run_ids)
    sections = [
        ws.Section(name="Settings and outcomes", panels=[_parallel_coordinates(wr, content)], is_open=True),
        ws.Section(name="Metrics over steps", panels=_curves(wr, content), is_open=True),
    ]
    if content.figures and figures_run:
        sections.append(ws.Section(name="Figures", panels=_figures(wr, content), is_open=True))
    return ws.Workspace(
        entity=entity,
        project=project,
        name=masked(content.title)[:LONGEST_TITLE],
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(filters=_filter(ids)),
    )


def specifications(report: Any, workspace: Any) -> dict[str, Any]:
    """Return what the server would get of both, as plain containers without secrets."""
    models = {"report": report._to_model(), "workspace": workspace._to_model()}
    return redacted({
        name: {"title": model.display_name, "spec": model.spec.model_dump(mode="json", by_alias=True, exclude_none=True)}
        for name, model in models.items()
    })  # fmt: skip


def _runset(
    wr: Any, entity: str, project: str, name: str, run_ids: Sequence[str], grouped: ReportContent | None = None
) -> Any:
    groups = [f"config.{grouped.model_key}.value"] if grouped else []
    return wr.Runset(entity=entity, project=project, name=name, filters=_filter(run_ids), groupby=groups)


def _filter(run_ids: Sequence[str]) -> str:
    """Return the filter of exactly these runs."""
    return f"Metric('ID') in {list(run_ids)}"


def _parallel_coordinates(wr: Any, content: ReportContent) -> Any:
    columns = [_setting_column(wr, key) for key in content.settings]
    columns += [wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(name)) for name in content.outcomes]
    return wr.ParallelCoordinatesPlot(columns=columns, layout=wr.Layout(x=0, y=0, w=24, h=10))


def _setting_column(wr: Any, key: str) -> Any:
    """Return an axis for a flat key of the configuration."""

    class FlatKeyColumn(wr.ParallelCoordinatesPlotColumn):
        def _to_model(self) -> Any:
            model = super()._to_model()
            model.accessor = f"config:{key}.value"
            return model

    return FlatKeyColumn(metric=wr.Config(key), display_name=key)


def _curves(wr: Any, content: ReportContent) -> list[Any]:
    return [
        wr.LinePlot(
            title=name,
            x=STEP,
            y=[name],
            groupby=f"{content.model_key}.value",
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            layout=wr.Layout(x=8 * (i % 3), y=6 * (i // 3), w=8, h=6),
        )
        for i, name in enumerate(content.curves)
    ]


def _figures(wr: Any, content: ReportContent) -> list[Any]:
    return [
        wr.MediaBrowser(
            title=name.partition("/")[2], media_keys=[name], num_columns=1,
            layout=wr.Layout(x=12 * (i % 2), y=9 * (i // 2), w=12, h=9),
        )
        for i, name in enumerate(content.figures)
    ]  # fmt: skip
