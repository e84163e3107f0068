"""Attention units of a probe's model for measures that do without them where a model has none."""

from __future__ import annotations

from vitscope.core.probe import Probe
from vitscope.models.structure.attention_units import AttentionUnit, attention_units_of


def readable_units(probe: Probe) -> tuple[list[AttentionUnit], dict[str, str]]:
    """Return the units whose attention weights can be read, and why those of others cannot, as `warn_nulls` takes it."""
    if not probe.takes_images:
        return [], {"attention": "it is found by images alone, and the batches hold other inputs"}
    try:
        units, reasons = attention_units_of(probe)
    except ValueError:  # no residual units, or not all of them
        return [], {"attention": "the network's residual units are not known"}
    if not units and not reasons:
        return [], {"attention": "the network has none"}
    return units, {f"attention of {name}": reason for name, reason in reasons.items()}
