"""Accuracy class by class, worst first."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from vitscope.diagnostics.evaluation.evaluation import EvaluationResult
from vitscope.plotting.canvas import new_canvas, result_color


def evaluation(results: Mapping[str, EvaluationResult]) -> Figure:
    """Draw the accuracy of each class that has images, sorted, over the share of classes; top-1 and top-5 in the legend."""
    canvas = new_canvas()
    axes = canvas.axes()
    for index, (name, result) in enumerate(results.items()):
        sorted_accuracy = np.sort(result.class_accuracy[result.class_count > 0])
        share = 100 * (np.arange(len(sorted_accuracy)) + 1) / len(sorted_accuracy)
        label = f"{name or 'All classes'}: {100 * result.accuracy:.1f}%, top-5 {100 * result.accuracy_top5:.1f}%"
        steps = 100 * np.append(sorted_accuracy[0], sorted_accuracy)
        axes.step(np.append(0, share), steps, where="pre", color=result_color(index), label=label)
    axes.set(xlim=(0, 100), ylim=(0, 101), xlabel="Classes, worst first (%)", ylabel="Accuracy of a class (%)")
    canvas.legend(loc="outside upper center")
    return canvas.figure
