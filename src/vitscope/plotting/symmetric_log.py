"""Symmetric logarithmic axis for values of both signs and very different magnitudes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

#: decades between the largest value and the linear part, at most: of smaller ones the sign cannot be told from rounding errors
_MAX_DECADES = 6
#: distances between labels that fit on the axis of a column's width
_MAX_INTERVALS = 5


def symmetric_log_x_axis(axes: Axes, magnitudes: np.ndarray, values: Sequence[np.ndarray]) -> None:
    """Set a symmetric logarithmic scale on the x axis, with a line at zero and few labels, at powers of ten.

    The axis is linear between zero and the power of ten below the smallest magnitude, which lies at most six decades below
    the largest one. It is linear everywhere where all values are zero.

    Args:
        axes: The axes to scale, with the values drawn.
        magnitudes: Absolute values that must be told from zero, of any shape; zeros and values that are not finite are left out.
        values: The values that are drawn; their signs decide on which sides of zero there are ticks.
    """
    axes.axvline(0, color="0.6", linewidth=0.6, zorder=0)
    nonzero = magnitudes[np.isfinite(magnitudes) & (magnitudes > 0)]
    if not nonzero.size:
        return
    top = int(np.floor(np.log10(nonzero.max())))
    bottom = min(max(int(np.floor(np.log10(nonzero.min()))), top - _MAX_DECADES), top - 1)
    axes.set_xscale("symlog", linthresh=10.0**bottom)
    signs = [sign for sign in (-1, 1) if any((sign * array > 0).any() for array in values)]
    n_units = (top + 1 - bottom) * len(signs) + 2  # decades, and the linear part on both sides, which is as long as one
    step = -(-n_units // _MAX_INTERVALS)
    powers = [10.0**exponent for exponent in range(top, bottom, -step)]  # smaller ones would stand on the label of zero
    axes.xaxis.set_major_locator(FixedLocator(sorted([0.0, *(sign * power for sign in signs for power in powers)])))
    axes.xaxis.set_minor_locator(NullLocator())
