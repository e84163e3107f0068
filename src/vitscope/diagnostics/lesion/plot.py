"""Figure of the loss of accuracy by each removed part, by depth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vitscope.diagnostics.lesion.lesion import LesionResult
from vitscope.plotting.canvas import COLUMN_WIDTH, kind_color, new_canvas
from vitscope.plotting.loss_label import loss_label
from vitscope.plotting.style import KIND_LABELS

#: value -> factor, axis label, and whether a loss is below zero
VALUES = {"accuracy": (100.0, "Accuracy change (points)"), "nll": (1.0, "NLL change (nats)")}

#: number of images below which a single unit's change of accuracy is mostly chance
FEW_IMAGES = 128

#: kinds of unit in the order of the legend
LESION_KINDS = ("conv", "msa", "mlp", "pool")


def lesion(results: Mapping[str, LesionResult], *, value: str = "accuracy") -> Figure:
    """Draw the change for each removed branch as a bar by depth, one panel a model (Fig 10b).

    Colors tell the kind of unit, vertical lines the stages, circles the same unit's ``conv3x3_identity``. Bars are means,
    whiskers 95% intervals over images; a dash stands for no change. With fewer than 128 images the title says that they are too
    few to tell single units apart.

    Args:
        results: One or more results by name.
        value: ``accuracy`` or ``nll``.

    Raises:
        ValueError: An unknown value.
    """
    if value not in VALUES:
        raise ValueError(f"Expected value to be one of {', '.join(VALUES)}, received {value!r}.")
    wide = max(len(result.units) for result in results.values()) > 20
    canvas = new_canvas(2 * COLUMN_WIDTH if wide else COLUMN_WIDTH, 0.6 + 1.9 * len(results))
    axes = canvas.grid(len(results), 1, sharey=True)[:, 0]
    for ax, (name, result) in zip(axes, results.items()):
        _bars(ax, result, value)
        few = f"{result.n_images} images: too few to tell" if result.n_images < FEW_IMAGES else ""
        ax.set(title=": ".join(filter(None, [name, few])), ylabel=loss_label(VALUES[value][1], results.values()))
    kinds = [kind for kind in LESION_KINDS if any(kind in result.kinds for result in results.values())]
    handles: list = [Patch(color=kind_color(kind), label=KIND_LABELS[kind]) for kind in kinds]
    circles = [ax.get_legend_handles_labels()[0][0] for ax in axes if ax.get_legend_handles_labels()[0]]
    canvas.legend(handles + circles[:1], loc="outside upper center", ncols=4)
    return canvas.figure


def _bars(ax: Axes, result: LesionResult, value: str) -> None:
    factor = VALUES[value][0]
    x = np.arange(len(result.units))
    change, half = (factor * getattr(result, f"{value}_{field}") for field in ("change", "half_width"))
    ax.bar(x, change, color=[kind_color(kind) for kind in result.kinds], width=0.8)
    has_interval = np.isfinite(half)  # where there is no interval there is no whisker
    ax.errorbar(
        x[has_interval],
        change[has_interval],
        yerr=half[has_interval],
        fmt="none",
        ecolor="black",
        elinewidth=0.7,
        capsize=2,
    )
    ax.axhline(0, color="black", linewidth=0.6)
    unchanged = x[change == 0]
    ax.plot(unchanged, np.zeros(len(unchanged)), "_", color="black", markersize=5)  # no bar would look forgotten
    for end in np.flatnonzero(np.diff(result.stages)):
        ax.axvline(end + 0.5, color="0.8", linewidth=0.6, zorder=0)
    if result.identity_units:
        place = [result.units.index(name) for name in result.identity_units]
        identity = factor * getattr(result, f"identity_{value}_change")
        ax.plot(
            place,
            identity,
            "o",
            color="black",
            markerfacecolor="white",
            markersize=4,
            label="3x3 convolution as identity",
        )
    ax.set_xticks(x, result.units, rotation=90, fontsize="xx-small" if len(x) > 12 else "x-small")
    ax.set_xlim(-0.7, len(x) - 0.3)
