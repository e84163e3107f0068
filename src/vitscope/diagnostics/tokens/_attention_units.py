"""Attention units of a probe's model for measures that do without them where a model has none."""

from __future__ import annotations

from collections.abc import MutableMapping
from weakref import WeakKeyDictionary

from vitscope.core.probe import Probe
from vitscope.models.structure.attention_units import AttentionUnit, attention_units

#: units by probe: they are found by a traced forward pass, whose result several measures of a shared pass use
_units: MutableMapping[Probe, tuple[list[AttentionUnit], dict[str, str]]] = WeakKeyDictionary()


def readable_units(probe: Probe) -> tuple[list[AttentionUnit], dict[str, str]]:
    """Return the units whose attention weights can be read, and why those of others cannot, as `warn_nulls` takes it."""
    if probe not in _units:
        _units[probe] = _found_units(probe)
    return _units[probe]


def _found_units(probe: Probe) -> tuple[list[AttentionUnit], dict[str, str]]:
    if not probe.takes_images:
        return [], {"attention": "it is found by images alone, and the batches hold other inputs"}
    try:
        with probe.calling():
            units, reasons = attention_units(probe.model, probe.first_images())
    except ValueError:  # no residual units, or not all of them
        return [], {"attention": "the network's residual units are not known"}
    if not units and not reasons:
        return [], {"attention": "the network has none"}
    return units, {f"attention of {name}": reason for name, reason in reasons.items()}
