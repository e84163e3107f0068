"""Parameters by what they belong to: the curvature of attention against that of convolutions, of one stage, of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn


def select_parameters(
    model: nn.Module, parameters: Mapping[str, Tensor], subset: str | list[str] | None
) -> dict[str, Tensor]:
    """Return those of ``parameters`` that ``subset`` names, in the model's order.

    Args:
        model: whose parameters they are.
        parameters: by name.
        subset: None for all; else one or several of ``kind:msa`` (``stem conv msa mlp pool head``), ``stage:2``,
            ``layer:blocks.3.attn`` (a module's own and its children's), or a pattern such as ``*.qkv.weight``.

    Raises:
        ValueError: nothing matches; names what there is.
    """
    if subset is None or subset == "all":
        return dict(parameters)
    selected: set[str] = set()
    for rule in [subset] if isinstance(subset, str) else subset:
        selected |= _matching(model, list(parameters), rule)
    return {name: p for name, p in parameters.items() if name in selected}


def _matching(model: nn.Module, names: list[str], rule: str) -> set[str]:
    what, _, value = rule.partition(":")
    if what in ("kind", "stage") and value:
        from vitscope.models.structure.parameter_groups import parameter_kinds, parameter_stages

        groups = parameter_kinds(model) if what == "kind" else parameter_stages(model)
        matches = {name for name in names if str(groups.get(name)) == value}
        candidates = sorted({str(groups.get(name)) for name in names})
    elif what == "layer" and value:
        matches = {name for name in names if name == value or name.startswith(value + ".")}
        candidates = sorted({name.rpartition(".")[0] for name in names})
    else:
        matches = {name for name in names if fnmatchcase(name, rule)}
        candidates = names
    if not matches:
        listed = ", ".join(candidates[:12]) + (", ..." if len(candidates) > 12 else "")
        raise ValueError(f"Expected a parameter subset that matches something, received {rule!r}; there are: {listed}.")
    return matches


def subset_name(subset: str | list[str] | None) -> str:
    """Return the subset as the objective card writes it."""
    return subset if isinstance(subset, str) else "all" if subset is None else ", ".join(subset)
