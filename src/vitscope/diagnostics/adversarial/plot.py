"""Accuracy against the size of the attack."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from vitscope.diagnostics.adversarial.adversarial import AdversarialResult
from vitscope.plotting.canvas import COLUMN_WIDTH, new_canvas, result_color

NORM = {"linf": r"$\ell_\infty$", "l2": r"$\ell_2$"}
LINES = {"fgsm": "--", "pgd": "-", "suite": "-", "square": ":"}
MARKERS = {"fgsm": "s", "pgd": "o", "square": "D", "suite": "v"}
NAMES = {"apgd_ce": "APGD-CE", "apgd_dlr": "APGD-DLR", "apgd_cw": "APGD-CW", "apgd_t": "APGD-T", "square": "Square"}


def adversarial(results: Mapping[str, AdversarialResult]) -> Figure:
    """Draw accuracy over the radius for each attack and result; radius 0 is the clean accuracy.

    Whiskers are 95% intervals over images (`vitscope.stats.intervals.share_interval`). The suite is named by its members.

    Args:
        results: One or more results by name, of one norm.

    Raises:
        ValueError: Results of several norms.
    """
    norms = sorted({result.norm for result in results.values()})
    if len(norms) > 1:
        raise ValueError(f"Expected results of one norm, received {' and '.join(norms)}.")
    canvas = new_canvas(COLUMN_WIDTH, 2.7)
    ax = canvas.axes()
    for index, (name, result) in enumerate(results.items()):
        color = result_color(index)
        for attack, accuracy, low, high in zip(
            result.attacks, result.accuracy, result.accuracy_low, result.accuracy_high
        ):
            ax.errorbar(
                [0, *result.epsilons],
                [100 * result.clean_accuracy, *(100 * accuracy)],
                # an end may miss the share itself by a rounding
                yerr=100 * np.maximum([[0, *(accuracy - low)], [0, *(high - accuracy)]], 0.0),
                color=color,
                linestyle=LINES.get(attack, "-."),
                marker=MARKERS.get(attack, "^"),
                markerfacecolor=result_color(index) if attack in ("pgd", "suite") else "white",
                elinewidth=0.7,
                label=" ".join(filter(None, (name, _named(attack, result)))),
            )
    ax.set(xlabel=f"{NORM[norms[0]]} radius (gray levels, 1/255)", ylabel="Accuracy (%)")
    ax.set_ylim(bottom=-1)
    canvas.legend(loc="outside upper center", ncols=2)
    return canvas.figure


def _named(attack: str, result: AdversarialResult) -> str:
    if attack == "suite":
        return " + ".join(NAMES[member] for member in result.suite_attacks)
    return NAMES.get(attack, attack.upper())
