"""Accuracy against the size of the attack."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from vitscope.diagnostics.adversarial.adversarial import AdversarialResult

NORM = {"linf": r"$\ell_\infty$", "l2": r"$\ell_2$"}
LINES = {"fgsm": "--", "pgd": "-"}


def adversarial(results: Mapping[str, AdversarialResult]) -> Figure:
    """Draw accuracy over the radius for each attack and result; radius 0 is the clean accuracy.

    Whiskers are 95% intervals over images.

    Args:
        results: one or more results by name, of one norm.

    Raises:
        ValueError: results of several norms.
    """
    norms = sorted({result.norm for result in results.values()})
    if len(norms) > 1:
        raise ValueError(f"Expected results of one norm, received {' and '.join(norms)}.")
    figure = Figure(figsize=(3.4, 2.7), layout="constrained")
    ax = figure.subplots()
    for index, (name, result) in enumerate(results.items()):
        for attack, accuracy, error in zip(result.attacks, result.accuracy, result.accuracy_standard_error):
            ax.errorbar(
                [0, *result.epsilons],
                [100 * result.clean_accuracy, *(100 * accuracy)],
                yerr=[0, *(196 * error)],
                color=f"C{index}",
                linestyle=LINES[attack],
                marker="o" if attack == "pgd" else "s",
                markerfacecolor=f"C{index}" if attack == "pgd" else "white",
                elinewidth=0.7,
                label=" ".join(filter(None, (name, attack.upper()))),
            )
    ax.set(xlabel=f"{NORM[norms[0]]} radius (gray levels, 1/255)", ylabel="Accuracy (%)")
    ax.set_ylim(bottom=-1)
    figure.legend(loc="outside upper center", ncols=2)
    return figure
