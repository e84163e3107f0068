"""The figures of this room, one function a measure."""

from __future__ import annotations

from vitscope.diagnostics.landscape.plot_lines import loss_slice, plotly_loss_slice
from vitscope.diagnostics.landscape.plot_surface import loss_landscape, plotly_loss_landscape

__all__ = ["loss_landscape", "loss_slice", "plotly_loss_landscape", "plotly_loss_slice"]
