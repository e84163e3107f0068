"""Figures of the norms of tokens: by depth, and as maps of single images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from vitscope.diagnostics.tokens.plot_oversmoothing import oversmoothing as oversmoothing
from vitscope.diagnostics.tokens.token_norms import TokenNormsResult
from vitscope.plotting.canvas import COLUMN_WIDTH, Canvas, new_canvas, result_color
from vitscope.plotting.depth_axis import DEPTH_LABEL, shade_bands, shared_legend
from vitscope.plotting.style import MARKERS

#: line style and label of the kinds of prefix tokens
PREFIX_LINES = {
    "class": ("--", "Class token"),
    "distillation": ("-.", "Distillation token"),
    "register": (":", "Register tokens"),
    "unknown": ("--", "Prefix tokens"),
}
#: largest over smallest value from which an axis of norms is logarithmic
_WIDE = 30.0
#: the same for the colors of maps
_WIDE_COLORS = 5.0


def token_norms(
    results: Mapping[str, TokenNormsResult], *, view: str = "all", tap: str | None = None, images: int = 5
) -> Figure:
    """Draw norms, artefacts, massive activations and attention sinks over depth, and a row of maps of images for each result.

    The band of the norms reaches from the 5 % to the 95 % quantile of the patch tokens; lines of prefix tokens are means over
    the tokens of a kind. Squares in the maps are artefacts.

    Args:
        results: Results by the name in the legend and the titles.
        view: ``all``, or one of ``norms``, ``artefacts``, ``massive``, ``sinks``, ``maps``.
        tap: Tap whose maps are drawn; by default the one with the largest share of artefacts, or the last with more than one
            position.
        images: Number of images with a map, the first ones.

    Raises:
        ValueError: An unknown view or tap, or fewer than one image.
    """
    curves: dict[str, Callable[[Axes, Mapping[str, TokenNormsResult]], None]] = {
        "norms": _norms,
        "artefacts": _artefacts,
        "massive": _massive,
        "sinks": _sinks,
    }
    if view not in ("all", *curves, "maps"):
        raise ValueError(f"Expected view to be one of all, {', '.join(curves)}, maps, received {view!r}.")
    if images < 1:
        raise ValueError(f"Expected at least one image, received {images}.")
    drawn = [name for name in curves if view in (name, "all")]
    if not any(len(result.attention_units) for result in results.values()):
        if view == "sinks":
            raise ValueError("Expected a result with attention for view='sinks', received none; pass view='norms'.")
        drawn = [name for name in drawn if name != "sinks"]
    mapped = results if view in ("all", "maps") else {}
    heights = [*(1.0 for _ in drawn), *(0.85 for _ in mapped)]
    canvas = new_canvas(COLUMN_WIDTH, 0.4 + 1.45 * len(drawn) + 1.25 * len(mapped))
    axes = canvas.grid(len(heights), 1, height_ratios=heights)[:, 0]
    for ax, name in zip(axes, drawn):
        curves[name](ax, results)
        ax.set_xlim(-0.02, 1.02)
        ax.tick_params(labelbottom=name == drawn[-1])
    if drawn:
        axes[len(drawn) - 1].set_xlabel(DEPTH_LABEL)
    for ax, (name, result) in zip(axes[len(drawn) :], mapped.items()):
        _maps(canvas, ax, name, result, _mapped_tap(result, tap), images)
    if drawn:
        shared_legend(canvas, axes[: len(drawn)])
    return canvas.figure


def _norms(ax: Axes, results: Mapping[str, TokenNormsResult]) -> None:
    for index, (name, result) in enumerate(results.items()):
        color = result_color(index)
        ax.fill_between(
            result.depths, result.norm_quantiles[:, 1], result.norm_quantiles[:, 3], color=color, alpha=0.2, linewidth=0
        )
        _curve(ax, index, result, result.norm, result.norm_half_width, name or _position_label(result))
        for kind in dict.fromkeys(result.prefix_kinds):
            columns = np.array(result.prefix_kinds) == kind
            style, label = PREFIX_LINES[kind]
            line_color = color if len(results) > 1 else "black"
            values = result.prefix_norm[:, columns].mean(axis=1)
            ax.plot(result.depths, values, style, color=line_color, linewidth=1.0, label=label)
    _bands(ax, results)
    _log_where_wide(ax)
    ax.set_ylabel("Token norm")


def _position_label(result: TokenNormsResult) -> str:
    return "Patch tokens" if "msa" in result.kinds or len(result.prefix_kinds) else "Positions"


def _artefacts(ax: Axes, results: Mapping[str, TokenNormsResult]) -> None:
    for index, (name, result) in enumerate(results.items()):
        half_width = 100 * result.artefact_share_half_width
        _curve(ax, index, result, 100 * result.artefact_share, half_width, name or _position_label(result))
    _bands(ax, results)
    highest = max((np.nan_to_num(np.asarray(line.get_ydata(), float)).max() for line in ax.lines), default=0.0)
    ax.set_ylim(-0.05 * (highest or 1.0), 1.15 * highest or 1.0)
    ax.set_ylabel("Artefacts\n(% of tokens)")


def _massive(ax: Axes, results: Mapping[str, TokenNormsResult]) -> None:
    for index, (name, result) in enumerate(results.items()):
        _curve(ax, index, result, result.massive_ratio, result.massive_ratio_half_width, name or None)
    _bands(ax, results)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high > 300:  # near the limit of Sun et al.
        ax.axhline(1000, color="0.5", linewidth=0.8, zorder=1, label="1000 times the median")
    elif high < 10 * low:
        ax.set_ylim(low / 2, high * 2)
    if high < 100 * low:
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylabel("Largest / median\nmagnitude")


def _sinks(ax: Axes, results: Mapping[str, TokenNormsResult]) -> None:
    ax.axhline(1, color="0.5", linewidth=0.6, zorder=1)
    for index, (name, result) in enumerate(results.items()):
        ax.errorbar(
            result.attention_depths,
            result.sink_ratio,
            result.sink_ratio_half_width,
            marker=MARKERS[index % len(MARKERS)],
            markersize=3,
            elinewidth=0.8,
            color=result_color(index),
            label=name or None,
        )
        for kind in dict.fromkeys(result.prefix_kinds):
            columns = np.array(result.prefix_kinds) == kind
            style, label = PREFIX_LINES[kind]
            color = result_color(index) if len(results) > 1 else "black"
            values = result.attention_prefix[:, columns].mean(axis=1)
            ax.plot(result.attention_depths, values, style, color=color, linewidth=1.0, label=label)
    _log_where_wide(ax)
    ax.set_ylabel("Largest attention\n/ equal share")


def _curve(
    ax: Axes, index: int, result: TokenNormsResult, values: np.ndarray, half_widths: np.ndarray, label: str | None
) -> None:
    ax.errorbar(
        result.depths,
        values,
        half_widths,
        marker=MARKERS[index % len(MARKERS)],
        markersize=3,
        elinewidth=0.8,
        color=result_color(index),
        label=label,
        zorder=3,
    )


def _bands(ax: Axes, results: Mapping[str, TokenNormsResult]) -> None:
    if len(results) == 1:
        (result,) = results.values()
        areas = result.map_sizes.prod(axis=1)
        shade_bands(ax, result.depths, result.kinds, [False, *(areas[1:] < areas[:-1])])


def _log_where_wide(ax: Axes) -> None:
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines] or [np.zeros(0)])
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) and values.max() > _WIDE * values.min():
        ax.set_yscale("log")


def _mapped_tap(result: TokenNormsResult, tap: str | None) -> int:
    """Return the index of the tap whose maps are drawn."""
    if tap is not None:
        if tap not in result.taps:
            raise ValueError(f"Expected one of the taps {', '.join(result.taps)}, received {tap!r}.")
        return result.taps.index(tap)
    if result.first_artefact_tap >= 0:
        return int(np.nanargmax(result.artefact_share))
    several = np.flatnonzero(result.map_sizes.prod(axis=1) > 1)
    return int(several[-1]) if len(several) else len(result.taps) - 1


def _maps(canvas: Canvas, ax: Axes, name: str, result: TokenNormsResult, tap: int, images: int) -> None:
    """Draw the norms of the first images side by side, with squares around artefacts."""
    h, w = (int(side) for side in result.map_sizes[tap])
    norms = np.asarray(result.norms_patch[tap][:images], float).reshape(-1, h, w)
    gap = max(1, w // 8)
    strip = np.full((h, len(norms) * (w + gap) - gap), np.nan)
    for number, values in enumerate(norms):
        strip[:, number * (w + gap) : number * (w + gap) + w] = values
    finite = strip[np.isfinite(strip) & (strip > 0)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.5, 1.5)
    wide = high > _WIDE_COLORS * low
    image = ax.imshow(strip, norm=LogNorm(low, high) if wide else Normalize(low, high), interpolation="nearest")
    rows, columns = np.nonzero(np.nan_to_num(strip) > result.artefact_threshold[tap])
    if len(rows):
        ax.plot(columns, rows, "s", markerfacecolor="none", markeredgecolor="red", markersize=3, markeredgewidth=0.6)
    ax.set(xticks=[], yticks=[], title=f"{name}, {result.taps[tap]}" if name else result.taps[tap])
    for side in ax.spines.values():
        side.set_visible(False)
    bar = canvas.colorbar(image, ax=ax, location="bottom", shrink=0.8, aspect=40, pad=0.05)
    bar.set_label("Norm", labelpad=1)
    if wide:
        bar.ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        bar.ax.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        bar.ax.xaxis.set_minor_formatter(NullFormatter())
