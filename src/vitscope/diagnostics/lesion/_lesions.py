"""Removable parts of a model: one list of lesions, each a context in which the model lacks one part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from vitscope.models.structure.residual_units import Unit, conv3x3_identity, head_zeroed, zeroed

#: in the order in which their results are given
REMOVALS = ("branch_zero", "conv3x3_identity", "stage", "head")


@dataclass(frozen=True)
class Lesion:
    """Something that can be removed.

    Attributes:
        removal: One of `REMOVALS`.
        name: Name of the unit (``blocks.1.attn``), the group (``stage 1 msa``) or the head (``blocks.1.attn head 0``).
        first: The first unit it touches: what comes before this unit's block is as in the whole model.
        removed: Function that makes the context in which it is removed.
    """

    removal: str
    name: str
    first: Unit
    removed: Callable[[], AbstractContextManager[None]]


def check_removals(removals: Sequence[str]) -> None:
    """Raise ValueError where a kind of removal is unknown; without any, branches alone are removed."""
    unknown = [r for r in removals if r not in REMOVALS]
    if unknown:
        raise ValueError(f"Expected removals among {', '.join(REMOVALS)}, received {unknown[0]!r}.")


def lesions(units: Sequence[Unit], removals: Sequence[str]) -> list[Lesion]:
    """Return every lesion of the chosen kinds, in the order of the units they begin at.

    Raises:
        ValueError: The model has none of them.
    """
    all_lesions: list[Lesion] = []
    for unit in units:
        if "branch_zero" in removals:
            all_lesions.append(Lesion("branch_zero", unit.name, unit, partial(zeroed, unit)))
        if "conv3x3_identity" in removals and unit.conv3x3 is not None:
            all_lesions.append(Lesion("conv3x3_identity", unit.name, unit, partial(conv3x3_identity, unit)))
        if "head" in removals:
            for head in range(unit.n_heads):
                all_lesions.append(Lesion("head", f"{unit.name} head {head}", unit, partial(head_zeroed, unit, head)))
        if "stage" in removals:
            all_lesions.extend(_beginning_here(units, unit))
    if not all_lesions:
        raise ValueError(f"Expected something to remove, received a model without any of {', '.join(removals)}.")
    return all_lesions


def _beginning_here(units: Sequence[Unit], unit: Unit) -> list[Lesion]:
    """All MSA or all MLP of a stage, as one lesion that belongs to the first of them; alone it is no group."""
    if unit.kind not in ("msa", "mlp"):
        return []
    group = [other for other in units if (other.stage, other.kind) == (unit.stage, unit.kind)]
    if len(group) < 2 or group[0] is not unit:
        return []
    return [Lesion("stage", f"stage {unit.stage} {unit.kind}", unit, partial(zeroed, *group))]
