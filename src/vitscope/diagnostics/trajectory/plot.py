"""The figures of a trajectory: its principal plane with the errors of that plane, and the polar form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, NullLocator

from vitscope.diagnostics.trajectory.trajectory import TrajectoryResult
from vitscope.plotting.canvas import COLUMN_WIDTH, Canvas, new_canvas, result_color
from vitscope.plotting.loss_label import loss_label

#: inches
HEIGHTS = {"pca": 2.8, "loss": 2.2, "polar": 2.8}


def trajectory(results: Mapping[str, TrajectoryResult], *, kind: str = "pca") -> Figure:
    """Draw each trajectory in its principal plane, over the loss there where it was measured, with the plane's errors.

    Below the plane: the NLL of each checkpoint against that of its projection, and how far off the plane it lies. The polar
    form (``kind="polar"``) is Fig 1b of Park & Kim, which its author asked readers to ignore; it is for comparison only.

    Args:
        results: Results by the name shown above each column.
        kind: ``pca`` or ``polar``.

    Raises:
        ValueError: An unknown kind.
    """
    if kind not in ("pca", "polar"):
        raise ValueError(f"Expected kind to be pca or polar, received {kind!r}.")
    if kind == "polar":
        return _polar(results)
    heights = [HEIGHTS["pca"], HEIGHTS["loss"]]
    canvas = new_canvas(COLUMN_WIDTH * len(results), sum(heights))
    planes, losses = canvas.grid(2, len(results), height_ratios=heights)
    for axes in losses[1:]:
        axes.sharey(losses[0])
    for plane, loss_axes, (name, result) in zip(planes, losses, results.items()):
        _plane(canvas, plane, result)
        plane.set_title(_title(name, result))
        _losses(loss_axes, result)
    return canvas.figure


def plotly_trajectory(results: Mapping[str, TrajectoryResult]) -> go.Figure:
    """Return the paths in their planes as an interactive figure, each checkpoint's numbers on hover."""
    figure = go.Figure()
    for name, result in results.items():
        columns = result.nll, result.in_plane_nll, result.projection_error, result.accuracy
        figure.add_trace(
            go.Scatter(
                x=result.coordinates[:, 0],
                y=result.coordinates[:, 1],
                name=name,
                mode="lines+markers",
                text=list(result.labels),
                customdata=np.stack(columns, axis=1),
                hovertemplate=loss_label("%{text}<br>NLL %{customdata[0]:.4g}", [result])
                + ", in the plane %{customdata[1]:.4g}"
                "<br>%{customdata[2]:.0%} of its distance off the plane<br>accuracy %{customdata[3]:.3f}",
            )
        )
    figure.update_layout(xaxis_title="first principal direction", yaxis_title="second principal direction")
    return figure


def _title(name: str, result: TrajectoryResult) -> str:
    held, off = result.explained_variance.sum(), result.projection_error.max()
    lines = [name] if name else []
    lines += [
        f"The plane holds {held:.1%} of the variance,",
        f"checkpoints lie up to {off:.0%} of their distance off it",
    ]
    if result.n_nonfinite:
        lines.append(f"{result.n_nonfinite} measured points not finite")
    return "\n".join(lines)


def _plane(canvas: Canvas, axes: Axes, result: TrajectoryResult) -> None:
    if result.plane_nll.size:
        _surface(canvas, axes, result)
    path = np.concatenate([result.coordinates, [[0.0, 0.0]]])
    axes.plot(*path.T, "-", color="black", linewidth=2, alpha=0.6)
    axes.plot(*path.T, "o-", color="white", markeredgecolor="black", markeredgewidth=0.4, linewidth=1, markersize=3)
    axes.plot(
        *path[0],
        "s",
        color="#D55E00",
        markeredgecolor="black",
        markeredgewidth=0.4,
        markersize=5,
        label=result.labels[0],
    )
    axes.plot(
        *path[-1], "*", color="#E69F00", markeredgecolor="black", markeredgewidth=0.4, markersize=8, label="Model"
    )
    axes.legend(loc="upper left", frameon=True, framealpha=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    shares = result.explained_variance
    axes.set(xlabel=f"Direction 1 ({shares[0]:.0%})", ylabel=f"Direction 2 ({shares[1]:.0%})")
    if result.plane_nll.size:
        axes.set(xlim=result.x[[0, -1]], ylim=result.y[[0, -1]])
    axes.set_aspect("equal", adjustable="box" if result.plane_nll.size else "datalim", anchor="N")


def _surface(canvas: Canvas, axes: Axes, result: TrajectoryResult) -> None:
    z = np.ma.masked_invalid(result.plane_nll.T)  # matplotlib wants (y, x)
    if z.count() == 0:
        return
    low, high = float(z.min()), float(z.max())
    logarithmic = low > 0 and high / low > 20
    levels = np.geomspace(low, high, 14) if logarithmic else np.linspace(low, max(high, low + 1e-9), 14)
    levels[-1] = np.nextafter(levels[-1], np.inf)  # contourf leaves out what lies on the last level
    scale = LogNorm(levels[0], levels[-1]) if logarithmic else Normalize(levels[0], levels[-1])
    drawn = axes.contourf(result.x, result.y, z, levels=levels, norm=scale, cmap=rcParams["image.cmap"])
    axes.contour(result.x, result.y, z, levels=levels, colors="black", linewidths=0.3, alpha=0.5)
    broken = np.ma.masked_where(~np.ma.getmaskarray(z), np.ones(z.shape))
    if broken.count():
        axes.pcolor(
            result.x, result.y, broken, shading="nearest", facecolor="none", edgecolor="#D55E00", hatch="////", linewidth=0.0
        )  # fmt: skip
    # in the axes' own frame: they are as flat as the path is, and the bar with them
    bar = canvas.colorbar(
        drawn, cax=axes.inset_axes((1.03, 0.0, 0.05, 1.0)), label=loss_label("NLL in the plane (nats)", [result])
    )
    bar.set_ticks(levels[::3].tolist(), labels=[f"{level:.3g}" for level in levels[::3]])
    bar.ax.yaxis.set_minor_locator(NullLocator())


def _losses(axes: Axes, result: TrajectoryResult) -> None:
    index = np.arange(len(result.labels))
    axes.plot(index, result.nll, "o-", color=result_color(0), label="Checkpoint itself")
    # an older checkpoint's weights with the last one's statistics are another function, however near the plane is
    borrowed = result.batchnorm and result.card is not None and result.card.bn_policy == "eval"
    its = "Its projection,\nBatchNorm as at the end" if borrowed else "Its projection"
    axes.plot(index, result.in_plane_nll, "s--", color=result_color(1), label=its)
    axes.set(xlabel="Checkpoint", ylabel=loss_label("NLL (nats)", [result]))
    step = max(1, len(index) // 6)
    axes.set_xticks(index[::step], [result.labels[i] for i in index[::step]], rotation=30, ha="right")
    other = axes.twinx()
    other.spines["right"].set_visible(True)
    other.bar(index, result.projection_error, width=0.5, color=result_color(2), alpha=0.25, linewidth=0)
    other.set(ylim=(0, 1), ylabel="Distance off the plane (share)")
    axes.set_zorder(other.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.legend(loc="best")


def _polar(results: Mapping[str, TrajectoryResult]) -> Figure:
    canvas = new_canvas(COLUMN_WIDTH, HEIGHTS["polar"])
    axes: Any = canvas.axes("polar")
    if (
        isinstance(engine := canvas.figure.get_layout_engine(), ConstrainedLayoutEngine)
        and len(canvas.figure.axes) == 1
    ):
        engine.set(rect=(0.0, 0.06, 1.0, 0.92))  # it ignores labels of a wedge
    for index, (name, result) in enumerate(results.items()):
        axes.plot(result.angle, result.radius, "o-", color=result_color(index), label=name or None)
    axes.set_thetalim(0, np.pi / 2 if max(np.nanmax(r.angle) for r in results.values()) <= np.pi / 2 else np.pi)
    axes.set_ylim(0, 1.05 * max(r.radius.max() for r in results.values()))
    canvas.set_title(
        "r: distance from the end, θ: angle to the start\n(two numbers of a long path: for comparison only)"
    )
    if any(results):
        axes.legend(loc="upper right", bbox_to_anchor=(1.12, 1.05))
    return canvas.figure
