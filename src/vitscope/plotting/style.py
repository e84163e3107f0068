"""The style of figures: `vs.style`, and the colors and markers of models and of kinds of units."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import matplotlib
from matplotlib import rcParams, rcParamsDefault

#: the style sheet; ``plt.style.use("vitscope.plotting.vitscope")`` takes it too
STYLE = Path(__file__).with_name("vitscope.mplstyle")

#: the color cycle of the style sheet (Okabe & Ito), for libraries that do not read it
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

#: a marker for each model, so that color is not all that tells models apart: seven beside the eight colors of the style sheet,
#: so that no two of 56 models look alike
MARKERS = "osD^vPX"

#: the color of each kind of unit, the same in every figure and under every style sheet
KIND_COLORS = {
    "stem": "#56B4E9",
    "conv": "#0072B2",
    "msa": "#D55E00",
    "mlp": "#009E73",
    "pool": "#E69F00",
    "head": "#000000",
    "unknown": "#999999",
}

#: the marker of each kind of unit
KIND_MARKERS = {"stem": "D", "conv": "s", "msa": "o", "mlp": "^", "pool": "v", "head": "X", "unknown": "."}

#: the name of each kind of unit in legends
KIND_LABELS = {
    "stem": "Stem",
    "conv": "Conv",
    "msa": "MSA",
    "mlp": "MLP",
    "pool": "Pooling",
    "head": "Head",
    "unknown": "Other",
}


class Style(dict[str, Any]):
    """Matplotlib parameters that are also a context manager: ``with vs.style(): ...`` or ``plt.style.use(vs.style())``."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        super().__init__(parameters)
        self._contexts: list[AbstractContextManager[None]] = []

    def __enter__(self) -> Style:
        context = parameters_context(self)
        context.__enter__()
        self._contexts.append(context)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._contexts.pop().__exit__(kind, error, traceback)


def style(**changes: Any) -> Style:
    """Return the style of the package's figures, for figures and axes of your own.

    It is made for one column of a two-column page (3.4 inches, 8 points); sizes of single texts follow ``font.size``. Models
    are told apart by the colors of Okabe & Ito, in their order: blue #0072B2, vermilion #D55E00, green #009E73, purple
    #CC79A7, orange #E69F00, sky blue #56B4E9, black #000000. Kinds of units have fixed colors under every style sheet:
    Conv #0072B2, MSA #D55E00, MLP #009E73, Pooling #E69F00, Stem #56B4E9, Head #000000.

    `vs.plot` draws its own figures in this style, with every parameter in its place that you changed from matplotlib's
    default; on axes of yours it draws with your parameters alone.

    Args:
        changes: Parameters in the place of the style's, with ``__`` for a dot: ``font__size=10``.

    Returns:
        The parameters by name: a context manager, and what ``plt.style.use`` takes.

    Raises:
        ValueError: Matplotlib has no such parameter.
    """
    parameters = {key.replace("__", "."): value for key, value in changes.items()}
    if unknown := [key for key in parameters if key not in rcParamsDefault]:
        raise ValueError(
            f"Expected names of matplotlib's parameters such as font__size=10, received {', '.join(unknown)}."
        )
    return Style({**_sheet(), **parameters})


def figure_style() -> dict[str, Any]:
    """Return the package's style with the parameters that the user changed from matplotlib's defaults in their place."""
    sheet = _sheet()
    current, default = (cast(Mapping[str, Any], parameters) for parameters in (rcParams, rcParamsDefault))
    return {**sheet, **{key: current[key] for key in sheet if current[key] != default[key]}}


def parameters_context(parameters: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Return a context in which these parameters of matplotlib are in force."""
    return matplotlib.rc_context(cast(Any, dict(parameters)))


@cache
def _sheet() -> dict[str, Any]:
    return cast(dict[str, Any], dict(matplotlib.rc_params_from_file(STYLE, use_default_template=False)))
