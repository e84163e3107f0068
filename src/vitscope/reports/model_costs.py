"""Costs of the runs' models, read from their provenance: a report builds no model from a run's configuration."""

from __future__ import annotations

from vitscope.config.model_facts import Cost, count, recorded_cost
from vitscope.reports.run_entry import Entry

__all__ = ["Cost", "Costs", "count"]


class Costs:
    """Costs of the runs' models."""

    def of(self, entry: Entry) -> Cost:
        """Return the cost of a run's model as its provenance holds it."""
        return recorded_cost(entry.facts)
