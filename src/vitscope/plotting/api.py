"""`vs.plot`: find a result's figure in its topic, check that results may share it, draw it in the style in force."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import FontProperties

from vitscope.core.objective_card import check_comparable
from vitscope.core.results.result import Result
from vitscope.plotting.canvas import ABOVE_PANELS, Drawing, drawing_target, drawing_with, panels_of
from vitscope.plotting.named_results import chosen_colors, named_results
from vitscope.plotting.style import STYLE as STYLE
from vitscope.plotting.style import figure_style, parameters_context
from vitscope.plotting.text_fit import fit_labels
from vitscope.runtime import safe_files
from vitscope.runtime.atomic_write import temporary_path


def plot(
    results: Any,
    *,
    ax: Axes | Sequence[Axes] | Figure | SubFigure | None = None,
    figsize: tuple[float, float] | None = None,
    colors: Any = None,
    labels: Sequence[str] | Mapping[str, str] | None = None,
    order: Sequence[str] | None = None,
    title: bool | str = True,
    allow_different: bool = False,
    **options: Any,
) -> Figure:
    """Draw one result, or several of one measure in one figure.

    A figure of its own has the look of `vs.style`, with every parameter in its place that ``rcParams``, ``rc_context`` or a
    style sheet changes from matplotlib's default. On ``ax`` it has your parameters alone.

    Figures take these options (``view="depth"``); the others take none:

    ============================== ==========================================================================
    ``attention_maps``             ``view``: both, maps, numbers; ``head``
    ``cka``                        ``vmin``, ``vmax``, ``cmap``
    ``calibration``                ``show_scaled``
    ``corruption``                 ``view``: both, severity, type
    ``effective_rank``             ``share``
    ``effective_receptive_field``  ``view``: last, taps, depth
    ``feature_map_variance``       ``view``: both, variance, ratio; ``log``
    ``frequency_noise_robustness`` ``view``: bands, rms; ``relative``
    ``hessian_block_densities``    ``vmax``, ``cmap``
    ``hessian_max_eigenvalue_spectrum`` ``log``
    ``lesion``                     ``value``: accuracy, nll
    ``loss_landscape``             ``value``: nll, l2_half_sq, l2_sum_norm, nll+l2_half_sq, nll+l2_sum_norm, accuracy, ece;
                                   ``kind``: both, surface, contour; ``log``
    ``loss_slice``                 ``value``: nll, l2_half_sq, l2_sum_norm, accuracy, ece; ``log``
    ``patch_pca``                  ``images``
    ``oversmoothing``              ``view``: depth, layers
    ``relative_log_amplitude``     ``view``: both, frequency, depth; ``curve``: paper, size_corrected, first_ac;
                                   ``axis``: true, paper
    ``similarity``                 ``minus_null``, ``vmax``, ``cmap``
    ``spectral_density``           ``floor``
    ``token_norms``                ``view``: all, norms, artefacts, massive, sinks, maps; ``tap``; ``images``
    ``trajectory``                 ``kind``: pca, polar
    ============================== ==========================================================================

    Args:
        results: A result, a sequence of them, or a mapping from the names in the legend to results.
        ax: Axes to draw on, as many as the figure has panels; or a figure or subfigure without axes, which is filled. By
            default a figure of its own.
        figsize: Width and height in inches of a figure of its own; by default ``figure.figsize`` where you changed it, else
            3.4 inches a panel.
        colors: A color for each result, or a mapping from names of results, or from kinds of units (``conv``, ``msa``,
            ``mlp``, ``pool``, ``stem``, ``head``), to colors; by default the color cycle, and the kinds' colors of `vs.style`.
        labels: Names in the legend, one a result, or a mapping from the names in ``results`` to them.
        order: Names of the results that are drawn first, in this order.
        title: False for no title (of panels that show one result each, the result's name stays); a text for a title of the
            figure.
        allow_different: Whether to overlay results whose objective cards differ.
        options: Options of the figure, see above.

    Returns:
        The figure; that of ``ax``, where it is given.

    Raises:
        ValueError: Nothing to draw, results of several measures, objectives that differ, an unknown option, or axes that are
            not as many as the figure has panels.
    """
    named = named_results(results, labels, order)
    measure, draw = plot_function(named)
    _check_options(measure, draw, options)
    if not allow_different:
        check_comparable({name: getattr(result, "card", None) for name, result in named.items()})
    if ax is not None and figsize is not None:
        raise ValueError("Expected ax or figsize, received both: the figure of ax has its size.")
    target = drawing_target(ax)
    context = nullcontext() if target is not None else parameters_context(figure_style())
    with context:
        cycle = [to_hex(color) for color in rcParams["axes.prop_cycle"].by_key().get("color", ["#000000"])]
        result_colors, kind_colors = chosen_colors(colors, list(named), cycle)
        with drawing_with(Drawing(target, figsize, result_colors, kind_colors)):
            figure = draw(named, **options)
        panels = target if isinstance(target, Sequence) else panels_of(target or figure)
        if target is None:
            fit_labels(figure)
        _set_titles(figure if target is None else target, panels, list(named), title)
    return figure


def plot_function(named: Mapping[str, Any]) -> tuple[str, Callable[..., Figure]]:
    """Return the name of the results' measure and its plot function.

    A type of results may have its own, a static method ``plot(results, *, options) -> Figure`` of a mapping from names to
    results. Otherwise it is the function of the measure's name in the module ``plot`` beside the measure's.

    Raises:
        ValueError: Results of several measures, or of one without a figure.
    """
    types = list({type(result) for result in named.values()})
    static_method: Callable[..., Figure] | None = getattr(types[0], "plot", None) if len(types) == 1 else None
    if callable(static_method) and hasattr(types[0], "scalars"):
        return types[0].__name__, static_method
    modules = {type(result).__module__ for result in named.values()}
    if len(modules) != 1:
        raise ValueError(f"Expected results of one measure, received {sorted(modules)}.")
    topic, _, measure = modules.pop().rpartition(".")
    draw = None
    if topic and all(hasattr(result, "scalars") for result in named.values()):
        try:
            draw = getattr(importlib.import_module(f"{topic}.plot"), measure, None)
        except ModuleNotFoundError as error:
            if error.name not in (f"{topic}.plot", topic):
                raise
    if draw is None and len(types) == 1 and isinstance(next(iter(named.values())), Result):
        raise ValueError(
            f"Expected results of a measure that has a figure, received {types[0].__name__} without one: give the class a "
            "static method plot(results) that returns a matplotlib Figure (docs/own_code.md)."
        )
    if draw is None:
        kinds = ", ".join(sorted({type(result).__name__ for result in named.values()}))
        raise ValueError(f"Expected results of a measure such as vs.hessian_eigenvalues(probe), received {kinds}.")
    return measure, draw


def figure_options(draw: Callable[..., Any]) -> list[str]:
    """Return the names of the options of a plot function."""
    return [p.name for p in inspect.signature(draw).parameters.values() if p.kind is p.KEYWORD_ONLY]


def _check_options(measure: str, draw: Callable[..., Any], options: Mapping[str, Any]) -> None:
    accepted = figure_options(draw)
    if unknown := [name for name in options if name not in accepted]:
        shared = [p.name for p in inspect.signature(plot).parameters.values() if p.kind is p.KEYWORD_ONLY]
        raise ValueError(
            f"Expected options of the figure of {measure} ({', '.join(accepted) or 'it has none'}) or of every figure "
            f"({', '.join(shared)}), received {', '.join(unknown)}."
        )


def _set_titles(target: Any, panels: Sequence[Axes], names: Sequence[str], title: bool | str) -> None:
    """Remove titles where none is wanted, but for the names of results that have panels of their own."""
    if title is True:
        return
    if title is False:
        for axes in panels:
            name = axes.get_title().partition("\n")[0]
            axes.set_title(name if len(names) > 1 and name in names else "")
            axes.set_title("", loc="left")
    text = title or ""
    if isinstance(target, Figure | SubFigure):
        if len(panels) == 1 and text:
            panels[0].set_title(text)
        elif above := [legend for legend in target.legends if legend.get_gid() == ABOVE_PANELS] if text else []:
            lines = filter(None, [text, above[0].get_title().get_text()])
            above[0].set_title("\n".join(lines), prop=FontProperties(size=rcParams["figure.titlesize"]))
        elif text or target.get_suptitle():
            target.suptitle(text)
    elif text:
        panels[0].set_title(text)


def save_figure(figure: Figure, stem: Path, *, formats: Sequence[str] = ("png", "pdf")) -> tuple[Path, ...]:
    """Write ``<stem>.png`` (300 dots an inch) and ``<stem>.pdf``, or the formats asked for; return their paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = tuple(stem.with_name(f"{stem.name}.{ending}") for ending in formats)
    engine = figure.get_layout_engine()
    with parameters_context(figure_style()):
        for path in paths:
            safe_files.refuse_links(path)
            temporary = temporary_path(path)  # a kill leaves the file of before, or this one
            temporary.unlink(missing_ok=True)  # never through a link that waits under that name
            figure.savefig(temporary, dpi=300, format=path.suffix[1:])
            os.replace(temporary, path)
            figure.set_layout_engine("none")  # laid out once: again for each file would cost a fifth of the time
    figure.set_layout_engine(engine)
    return paths
