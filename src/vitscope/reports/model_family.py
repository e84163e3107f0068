"""Family of a model among the paper's: vitscope's models by their builder, any other by the kinds of its taps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitscope.config import experiment_identity


def kin(cfg: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Return the family whose claims a run's model is evidence for; a timm model that is like none keeps its name.

    Args:
        cfg: A run's configuration.
        facts: The run's provenance, which holds the family that was derived from the model's units when it was built.
    """
    node = cfg.get("model") or {}
    if not str(node.get("_target_", "")).endswith(".timm_model"):
        return experiment_identity.family(cfg)
    return _recorded_family(facts) or experiment_identity.family(cfg)


def _recorded_family(facts: Mapping[str, Any]) -> str:
    """Return the family that a run's provenance holds, or an empty text."""
    noted = facts.get("model")
    family = noted.get("family") if isinstance(noted, Mapping) else None
    return family if isinstance(family, str) else ""
