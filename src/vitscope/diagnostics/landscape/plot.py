"""Figures of the landscape measures, one function for each."""

from __future__ import annotations

from vitscope.diagnostics.landscape.plot_lines import (
    linear_interpolation,
    loss_barrier,
    loss_slice,
    plotly_linear_interpolation,
    plotly_loss_slice,
)
from vitscope.diagnostics.landscape.plot_sharpness import plotly_sharpness, sharpness
from vitscope.diagnostics.landscape.plot_surface import loss_landscape, plotly_loss_landscape

__all__ = [
    "linear_interpolation",
    "loss_barrier",
    "loss_landscape",
    "loss_slice",
    "plotly_linear_interpolation",
    "plotly_loss_landscape",
    "plotly_loss_slice",
    "plotly_sharpness",
    "sharpness",
]
