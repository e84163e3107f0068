"""Figures of result types of a user's package: a static method ``plot``."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pytest

import vitscope as vs
from vitscope.core.results.result import Result
from vitscope.plotting.canvas import new_canvas, result_color


@dataclass(frozen=True, repr=False)
class NormResult(Result):
    """Norms.

    Attributes:
        norm: (n,) norms.
    """

    norm: np.ndarray

    def scalars(self) -> dict[str, float]:
        return {"mean": float(self.norm.mean())}

    @staticmethod
    def plot(results, *, marker="o"):
        canvas = new_canvas(3.4, 2.4)
        ax = canvas.axes()
        for i, (name, result) in enumerate(results.items()):
            ax.plot(result.norm, marker=marker, color=result_color(i), label=name)
        ax.set(xlabel="layer", ylabel="norm", title="Norms")
        return canvas.figure


@dataclass(frozen=True, repr=False)
class NumberResult(Result):
    """A number.

    Attributes:
        value: The result's number.
    """

    value: float

    def scalars(self) -> dict[str, float]:
        return {"value": self.value}


def test_a_type_of_results_draws_itself() -> None:
    """With options of its own, colors of the caller, and on the caller's axes."""
    results = {"a": NormResult(np.arange(3.0)), "b": NormResult(np.ones(3))}
    (ax,) = vs.plot(results, marker="s", colors=["#ff0000", "#00ff00"], title=False, labels={"a": "mine"}).axes
    lines = ax.get_lines()
    assert [(line.get_label(), line.get_color(), line.get_marker()) for line in lines] == [
        ("mine", "#ff0000", "s"), ("b", "#00ff00", "s")
    ]  # fmt: skip
    assert ax.get_title() == ""
    figure, own = plt.subplots()
    assert vs.plot(results["a"], ax=own) is figure
    assert len(own.get_lines()) == 1
    plt.close("all")
    with pytest.raises(ValueError, match=r"options of the figure of NormResult \(marker\) or of every figure"):
        vs.plot(results, size=3)


def test_a_type_without_a_figure_names_the_method() -> None:
    """The notice that a run shows says what to add."""
    with pytest.raises(ValueError, match=r"NumberResult without one: give the class a static method plot\(results\)"):
        vs.plot(NumberResult(1.0))
