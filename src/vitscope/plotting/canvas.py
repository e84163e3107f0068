"""The place on which plot functions draw: a figure of their own, or axes or a subfigure of the user."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
from matplotlib import rcParams, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import to_hex
from matplotlib.figure import Figure, FigureBase, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from vitscope.plotting.style import KIND_COLORS, style
from vitscope.plotting.text_fit import fit_legend
from vitscope.runtime.text_layout import count_text

#: width in inches of a column of a two-column page
COLUMN_WIDTH = 3.4

#: group id of a legend that lies above the panels, where a title of the whole figure would lie, too
ABOVE_PANELS = "above panels"

#: which panels have one axis: none, all, or those of a row or a column
Sharing = bool | Literal["none", "all", "row", "col"]

#: a cell of a grid of panels as matplotlib names its projection
RECTILINEAR = "rectilinear"


@dataclass(frozen=True)
class Drawing:
    """Requests of the caller of `vs.plot` that hold for whatever figure is drawn.

    Attributes:
        target: Axes of the user, or a figure or subfigure to fill; None for a figure of its own.
        figsize: Width and height in inches in the place of the plot function's; None for those.
        colors: Colors of the results in their order; empty for those of the style.
        kind_colors: Colors of kinds of units in the place of `KIND_COLORS`.
    """

    target: Sequence[Axes] | Figure | SubFigure | None = None
    figsize: tuple[float, float] | None = None
    colors: Sequence[str] = ()
    kind_colors: Mapping[str, str] = field(default_factory=dict)


_drawing: ContextVar[Drawing | None] = ContextVar("drawing", default=None)


@contextmanager
def drawing_with(drawing: Drawing) -> Iterator[None]:
    """Let `new_canvas`, `result_color` and `kind_color` follow the requests of the caller of `vs.plot`."""
    token = _drawing.set(drawing)
    try:
        yield
    finally:
        _drawing.reset(token)


def drawing_target(ax: Any) -> Sequence[Axes] | Figure | SubFigure | None:
    """Return what ``ax=`` of `vs.plot` stands for.

    Raises:
        ValueError: It is neither axes, nor a sequence of them, nor a figure or subfigure.
    """
    if ax is None or isinstance(ax, Figure | SubFigure):
        return ax
    axes = [ax] if isinstance(ax, Axes) else list(np.ravel(np.array(ax, dtype=object)))
    if not axes or not all(isinstance(panel, Axes) for panel in axes):
        raise ValueError(
            f"Expected ax to be axes of matplotlib, a sequence of them, a figure or a subfigure, received "
            f"{type(ax).__name__}; pass ax=plt.subplots()[1]."
        )
    return axes


def result_color(index: int) -> str:
    """Return the color of the result at this place: the user's, or that of the color cycle in force.

    A hexadecimal value, as ``C0`` would follow the parameters that are in force when the figure is saved.
    """
    if (drawing := _drawing.get()) and drawing.colors:
        return drawing.colors[index % len(drawing.colors)]
    cycle = rcParams["axes.prop_cycle"].by_key().get("color") or ["#000000"]
    return to_hex(cycle[index % len(cycle)])


def kind_color(kind: str) -> str:
    """Return the color of a kind of unit: the user's, or that of `KIND_COLORS`."""
    drawing = _drawing.get()
    return (drawing.kind_colors if drawing else {}).get(kind, KIND_COLORS.get(kind, KIND_COLORS["unknown"]))


def new_canvas(width: float = COLUMN_WIDTH, height: float = 2.4) -> Canvas:
    """Return the canvas of the next figure.

    Args:
        width: Width in inches, where the user chose neither a size nor axes.
        height: Height in inches, likewise.
    """
    drawing = _drawing.get() or Drawing()
    if drawing.target is not None:
        return Canvas(drawing.target)
    size = drawing.figsize or _size_of_the_user() or (width, height)
    return Canvas(NotebookFigure(figsize=size, layout="constrained"), resizable=drawing.figsize is None)


class NotebookFigure(Figure):
    """A figure that notebooks show also where pyplot, which would tell them how, was not imported."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png", dpi=self.dpi)
        return picture.getvalue()


def _size_of_the_user() -> tuple[float, float] | None:
    """Return ``figure.figsize`` where it is neither matplotlib's nor the style's."""
    size = list(rcParams["figure.figsize"])
    return None if size in (list(rcParamsDefault["figure.figsize"]), list(style()["figure.figsize"])) else (*size,)


def panels_of(figure: Figure | SubFigure) -> list[Axes]:
    """Return the axes of a figure or subfigure and of the subfigures in it."""
    if isinstance(figure, Figure):
        return list(figure.axes)
    return [*figure.axes, *(axes for part in figure.subfigs for axes in panels_of(part))]


class Canvas:
    """A figure of its own, a subfigure of the user, or axes of the user, under the same methods.

    Attributes:
        figure: The whole figure.
    """

    def __init__(self, target: Sequence[Axes] | Figure | SubFigure, *, resizable: bool = False) -> None:
        """Draw on a figure, a subfigure or axes; a figure of the package's own is resizable."""
        self._parent = target if isinstance(target, FigureBase) else None
        self._axes = [] if isinstance(target, FigureBase) else list(target)
        root = target if self._parent is not None else self._axes[0]
        self.figure = cast(Figure, cast(Any, root).get_figure(root=True))
        self._resizable = resizable

    def axes(self, projection: str = RECTILINEAR) -> Axes:
        """Return the only panel."""
        return self.grid(1, 1, projections=[[projection]])[0, 0]

    def grid(
        self,
        rows: int,
        columns: int,
        *,
        projections: Sequence[Sequence[str]] | None = None,
        sharex: Sharing = False,
        sharey: Sharing = False,
        **options: Any,
    ) -> np.ndarray:
        """Return panels in rows and columns; on axes of the user, these in their order.

        Args:
            rows: Number of rows.
            columns: Number of columns.
            projections: Matplotlib's name of the projection of each panel; None where all are rectilinear.
            sharex: That of ``Figure.subplots``: False, True, ``row`` or ``col``.
            sharey: That of ``Figure.subplots``.
            options: ``width_ratios`` and ``height_ratios`` of a figure of its own.

        Raises:
            ValueError: The user gave another number of axes, or axes of another projection.
        """
        projections = projections or [[RECTILINEAR] * columns] * rows
        if self._parent is None:
            panels = self._axes_of_the_user(rows, columns, projections)
            _share(panels, sharex, sharey)
            return panels
        if all(name == RECTILINEAR for row in projections for name in row):
            return self._parent.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey, **options)
        # subfigures, as constrained layout does not see the labels of axes in three dimensions
        cells: Any = self._parent.subfigures(rows, columns, squeeze=False, **options)
        panels = np.empty((rows, columns), dtype=object)
        for row, column in np.ndindex(rows, columns):
            panels[row, column] = cells[row, column].add_subplot(projection=projections[row][column])
        return panels

    def stacked(self, n_panels: Sequence[int], height_ratios: Sequence[float]) -> list[Canvas]:
        """Return a canvas for each part of the figure, from top to bottom; axes of the user are dealt out in their order.

        Args:
            n_panels: Number of panels of each part.
            height_ratios: Heights of the parts of a figure of its own.

        Raises:
            ValueError: The user gave another number of axes.
        """
        if self._parent is not None:
            parts = self._parent.subfigures(len(n_panels), 1, squeeze=False, height_ratios=height_ratios)[:, 0]
            return [Canvas(part) for part in parts]
        if len(self._axes) != sum(n_panels):
            raise ValueError(
                f"Expected {sum(n_panels)} axes, received {len(self._axes)}; pass ax=plt.subplots({sum(n_panels)})[1], or a "
                "subfigure, which is filled."
            )
        ends = np.cumsum(n_panels)
        return [Canvas(self._axes[end - n : end]) for n, end in zip(n_panels, ends)]

    def _axes_of_the_user(self, rows: int, columns: int, projections: Sequence[Sequence[str]]) -> np.ndarray:
        if len(self._axes) != rows * columns:
            fix = f"ax=plt.subplots({rows}, {columns})[1]; or a subfigure, which is filled"
            if rows * columns == 1:
                fix = "ax=plt.subplots()[1]"
            raise ValueError(
                f"Expected {rows * columns} axes, received {len(self._axes)}: the figure has {count_text(rows, 'row')} of "
                f"{count_text(columns, 'panel')}; pass {fix}."
            )
        panels = np.array([*self._axes, None], dtype=object)[:-1].reshape(rows, columns)
        for axes, name in zip(panels.flat, np.ravel(np.array(projections))):
            if axes.name != name:
                raise ValueError(
                    f"Expected axes with projection={str(name)!r}, received {axes.name!r}; pass "
                    f"ax=plt.subplots({rows}, {columns}, subplot_kw={{'projection': {str(name)!r}}})[1]."
                )
        return panels

    def legend(
        self,
        handles: Sequence[Any] | None = None,
        labels: Sequence[str] | None = None,
        *,
        loc: Any = "outside upper left",
        ncols: int = 1,
        **options: Any,
    ) -> None:
        """Put one legend beside the panels, each label once; on axes of the user, into the last of them.

        Args:
            handles: Artists; None for all labeled ones.
            labels: Texts of the handles; None for their own labels.
            loc: Place beside the panels of a figure with constrained layout.
            ncols: Number of columns, fewer where they do not fit.
            options: Options of ``Figure.legend``.
        """
        panels = self._axes or panels_of(cast(Figure | SubFigure, self._parent))
        if handles is None:
            entries = {text: item for ax in panels for item, text in zip(*ax.get_legend_handles_labels())}
            handles, labels = list(entries.values()), list(entries)
        elif labels is None:
            labels = [str(handle.get_label()) for handle in handles]
        if not handles:
            return
        engine = self.figure.get_layout_engine()
        if self._parent is not None and isinstance(engine, ConstrainedLayoutEngine):
            width = self._parent.bbox.width / self.figure.dpi
            labels, ncols = fit_legend(list(labels or ()), ncols, width)
            legend = self._parent.legend(handles, labels, loc=loc, ncols=ncols, **options)
            if str(loc).startswith("outside upper"):
                legend.set_gid(ABOVE_PANELS)
        else:
            panels[-1].legend(handles, labels, **options)

    def colorbar(self, mappable: Any, **options: Any) -> Colorbar:
        """Add a color bar beside the axes in ``ax=``."""
        return self.figure.colorbar(mappable, **options)

    def set_title(self, text: str) -> None:
        """Title the whole: the figure of its own, or the first of the user's axes."""
        if self._parent is None:
            self._axes[0].set_title(text)
        else:
            self._parent.suptitle(text)

    def add_height(self, inches: float) -> None:
        """Make a figure whose size is not the user's higher."""
        if self._resizable:
            self.figure.set_figheight(self.figure.get_figheight() + inches)


def _share(panels: np.ndarray, sharex: Sharing, sharey: Sharing) -> None:
    """Join the limits of axes of the user as ``Figure.subplots`` joins those of its own."""
    for sharing, name in ((sharex, "x"), (sharey, "y")):
        groups = {"row": list(panels), "col": list(panels.T)}.get(str(sharing), [panels.ravel()] if sharing else [])
        for first, *others in groups:
            for axes in others:
                if not getattr(axes, f"get_shared_{name}_axes")().joined(first, axes):
                    with suppress(ValueError):  # joined with axes elsewhere
                        getattr(axes, f"share{name}")(first)
