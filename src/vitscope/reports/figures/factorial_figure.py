"""The figure of the 2x2x2: both models under every condition, and what each factor does to the difference between them."""

from __future__ import annotations

import itertools

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitscope.plotting.api import STYLE
from vitscope.reports.claims.factorial_analysis import L2_FORMS, OBJECTIVES, QUANTITIES, FactorialResult, Quantity
from vitscope.reports.claims.factorial_runs import IMAGES, MODELS, TRAININGS
from vitscope.reports.tables.table import LEAST_SEEDS
from vitscope.stats.t_tests import Interval

#: places on the x axis of the upper rows
X_POSITIONS = tuple(itertools.product(TRAININGS, IMAGES))
MARKERS = {"convnet": "o", "vit": "s"}


def draw(result: FactorialResult) -> Figure:
    """Draw a column a quantity: a row an objective with both models' numbers, and below them the factors' effects.

    Bars are 95% intervals, where three seeds or more give them, or directions or mini-batches of one seed.

    Args:
        result: The answer.
    """
    with style.context(STYLE):
        rows = len(OBJECTIVES) + 1
        figure = Figure(figsize=(2.9 * len(QUANTITIES), 1.55 * len(OBJECTIVES) + 2.3))
        cells = figure.subplots(rows, len(QUANTITIES), squeeze=False, height_ratios=[*[1.0] * len(OBJECTIVES), 1.35])
        for column, quantity in enumerate(QUANTITIES):
            for row, objective in enumerate(OBJECTIVES):
                _draw_values(cells[row, column], result, quantity, objective)
                if column == 0:
                    cells[row, column].set_ylabel(OBJECTIVES[objective])
            cells[0, column].set_title(quantity.title)
            _draw_effects(cells[-1, column], result, quantity, names=column == 0)
        handles, names = cells[0, 0].get_legend_handles_labels()
        if not handles:
            handles, names = cells[0, -1].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(MODELS))
    return figure


def _draw_values(ax: Axes, result: FactorialResult, quantity: Quantity, objective: str) -> None:
    if objective not in quantity.objectives or not any(key[0] == quantity.key for key in result.values):
        _draw_placeholder(ax, "not defined" if objective not in quantity.objectives else "missing")
        return
    for number, (family, name) in enumerate(MODELS.items()):
        values = [result.values[quantity.key, (*place, objective), family] for place in X_POSITIONS]
        positions = np.arange(len(X_POSITIONS)) + 0.16 * (number - 0.5)
        bars = np.array([_bars(v, result) for v in values]).T  # (2, n): below and above
        ax.errorbar(positions, [v.mean for v in values], yerr=bars, fmt=MARKERS[family], color=f"C{number}",
                    label=f"{name} ({result.labels[family]})")  # fmt: skip
    ax.axvline(len(IMAGES) - 0.5, color="0.85", linewidth=0.6, zorder=0)
    ax.set_xlim(-0.5, len(X_POSITIONS) - 0.5)
    ax.set_xticks(range(len(X_POSITIONS)), [f"{images}\n{training}" for training, images in X_POSITIONS], fontsize=6)
    ax.yaxis.set_major_locator(MaxNLocator(4))
    low, high = ax.get_ylim()
    if low > 0 and high / low > 30:
        ax.set_yscale("log")


def _draw_effects(ax: Axes, result: FactorialResult, quantity: Quantity, *, names: bool) -> None:
    quantity_effects = [effect for effect in result.effects if effect.quantity == quantity.key]
    lines = [("training", ""), ("images", ""), *(("objective", l2) for l2 in L2_FORMS)]
    for place, (factor, l2) in enumerate(lines):
        # training and images have an effect in the 2x2x2 of either L2 form; the one in force is shown
        effect = next(
            (effect for effect in quantity_effects if effect.factor == factor and effect.l2 == (l2 or L2_FORMS[0])),
            None,
        )
        if effect is not None and np.isfinite(effect.difference.mean):
            bar = max(_bars(effect.difference, result))
            ax.errorbar(effect.difference.mean, place, xerr=bar, fmt="D", color="black")
    ax.axvline(0, color="0.6", linewidth=0.6, zorder=0)
    ax.set_ylim(len(lines) - 0.5, -0.5)
    words = ["trained strong", "augmented images", *(OBJECTIVES[l2].removeprefix("NLL ") for l2 in L2_FORMS)]
    ax.set_yticks(range(len(lines)), words if names else [""] * len(lines))
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.set_xlabel("effect on ViT − ConvNet\n(left: ViT looks flatter)")


def _bars(interval: Interval, result: FactorialResult) -> tuple[float, float]:
    """Return the distances to both ends of an interval, 0 for one over too few seeds, which the tables do not print either."""
    return (0.0, 0.0) if 1 < len(result.seeds) < LEAST_SEEDS else interval.bars


def _draw_placeholder(ax: Axes, word: str) -> None:
    ax.text(0.5, 0.5, word, transform=ax.transAxes, ha="center", va="center", color="0.5")
    ax.set_xticks([])
    ax.set_yticks([])
