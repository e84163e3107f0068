"""Kinds of the parameters that a measure of a probe sorts its numbers by."""

from __future__ import annotations

from collections.abc import Sequence

from vitscope.core.probe import Probe
from vitscope.core.undefined_values import warn_nulls
from vitscope.models.structure.parameter_groups import parameter_kinds

#: kind of a parameter of a network whose units are not known
UNKNOWN = "unknown"


def kinds_of_probe(probe: Probe, names: Sequence[str], measure: str, unknown: str = UNKNOWN) -> tuple[str, ...]:
    """Return the kind of each parameter; where kinds are not certain, ``unknown`` for all, with a warning that says why.

    Args:
        probe: The model and its images.
        names: Names of its parameters; rows of one are ``name[part]``.
        measure: Name of the measure, for the warning.
        unknown: Kind of parameters that have none.
    """
    try:
        with probe.calling():
            kinds = parameter_kinds(probe.model, probe.first_images())
    except ValueError as error:
        reason = str(error).partition("; ")[0].rstrip(".")
        warn_nulls(measure, {"the kinds of parameters": reason})
        return (unknown,) * len(names)
    return tuple(str(kinds.get(name, kinds.get(name.rpartition("[")[0], unknown))) for name in names)
