"""The objective card: under which conditions a number was measured, saved with every result."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

#: the card's keys in which two results must agree to be overlaid
COMPARED = (
    "loss", "l2", "weight_decay", "data", "split", "augmentation", "n_images", "batch_size",
    "mode", "bn_policy", "parameters", "dtype",
)  # fmt: skip


@dataclass(frozen=True)
class ObjectiveCard:
    """Under which conditions a number was measured; saved with every result.

    The first group (`COMPARED`) decides whether two results may share an axis; the rest is provenance.
    """

    loss: str = "unknown"
    l2: str = "unknown"
    weight_decay: float = 0.0
    data: str = "unknown"
    split: str = "unknown"
    augmentation: str = "unknown"
    n_images: int = 0
    batch_size: int = 0
    mode: str = "eval"
    bn_policy: str = "eval"
    parameters: str = "all"
    dtype: str = "float32"
    seed: int | None = None
    checkpoint: str = "unknown"
    epoch: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    solver: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the card as plain containers."""
        return asdict(self)

    def differences(self, other: ObjectiveCard) -> list[str]:
        """Return the names of the compared keys in which ``other`` differs."""
        return [key for key in COMPARED if getattr(self, key) != getattr(other, key)]


def check_comparable(cards: Mapping[str, ObjectiveCard | None]) -> None:
    """Refuse to overlay results that were measured under different objectives.

    Raises:
        ValueError: naming the keys that differ and both values.
    """
    named = [(name, card) for name, card in cards.items() if card is not None]
    for name, card in named[1:]:
        first_name, first = named[0]
        if keys := first.differences(card):
            pairs = "; ".join(f"{key}: {getattr(first, key)!r} and {getattr(card, key)!r}" for key in keys)
            raise ValueError(
                f"Expected results of one objective, received {first_name!r} and {name!r} that differ in {pairs}. "
                "Pass allow_different=True to overlay them all the same."
            )


def versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on."""
    import timm

    return {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
