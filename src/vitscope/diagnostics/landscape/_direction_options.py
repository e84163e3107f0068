"""Options for directions in weight space, which all measures of this topic share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal, get_args

import numpy as np

from vitscope.core.weight_space import Checkpoints
from vitscope.linalg.weights.directions import NORMALIZATIONS, OFFICIAL_IGNORE

Kind = Literal["random", "eigenvectors", "pca", "gradient", "checkpoints"]
KINDS = get_args(Kind)

#: named sets of directions, normalization and ignore
Preset = Literal["official"]
PRESETS = get_args(Preset)


@dataclass(frozen=True)
class Source:
    """Options for directions in weight space, which all measures of this topic share.

    Attributes:
        directions: One of `KINDS`, or directions themselves (mappings by parameter name, or flat vectors).
        normalization: Scaling of the directions, see `vitscope.linalg.weights.directions.normalize`; None: ``filter`` for
            random directions and the gradient, which have no scale of their own, ``none`` for the rest.
        ignore: Parameters that stay, see `vitscope.linalg.weights.directions.moving`; None: ``bias_bn`` for those two, nothing
            for the rest.
        seed: Seed of random directions.
        eigenvectors: Arrays or mappings by parameter name, or the path of a saved result that holds ``eigenvectors`` (k, P).
        checkpoints: Pairs of a label and a state dict.
        labels: Labels of the checkpoints to use, in that order; None: all.
    """

    directions: str | Sequence[Any] = "random"
    normalization: str | None = None
    ignore: str | Sequence[str] | None = None
    seed: int = 0
    eigenvectors: Sequence[Any] | np.ndarray | str | PathLike[str] | None = None
    checkpoints: Checkpoints | None = None
    labels: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Refuse a kind that does not exist, or one whose material is missing."""
        if self.normalization is not None and self.normalization not in NORMALIZATIONS:
            names = ", ".join(NORMALIZATIONS)
            raise ValueError(f"Expected normalization to be one of {names}, received {self.normalization!r}.")
        if isinstance(self.directions, str) and self.directions not in KINDS:
            raise ValueError(f"Expected directions to be one of {', '.join(KINDS)}, received {self.directions!r}.")
        if self.directions == "eigenvectors" and self.eigenvectors is None:
            raise ValueError("Expected eigenvectors (arrays, or a saved result's path) for this kind, received None.")
        if self.directions in ("pca", "checkpoints") and not self.checkpoints:
            raise ValueError(f"Expected checkpoints for directions={self.directions!r}, received none.")

    @property
    def kind(self) -> str:
        """The kind's name; ``given`` for directions that were passed themselves."""
        return self.directions if isinstance(self.directions, str) else "given"

    @property
    def scaling(self) -> str:
        """The normalization in force."""
        return self.normalization or ("filter" if self.kind in ("random", "gradient") else "none")

    @property
    def ignored(self) -> tuple[str, ...]:
        """Parameters that stay, with the default of the kind of directions."""
        if self.ignore is None:
            return ("bias_bn",) if self.kind in ("random", "gradient") else ()
        return (self.ignore,) if isinstance(self.ignore, str) else tuple(self.ignore)

    def facts(self) -> dict[str, Any]:
        """Return what the card's solver entry says of the directions."""
        facts = {"directions": self.kind, "normalization": self.scaling, "ignore": list(self.ignored)}
        return {**facts, "seed": self.seed} if self.kind in ("random", "gradient") else facts


def check_preset(
    preset: str | None, directions: str | Sequence[Any], normalization: str | None, ignore: str | Sequence[str] | None
) -> None:
    """Check a preset and the options that it would replace.

    Raises:
        ValueError: An unknown preset, or one together with options that it would replace.
    """
    if preset is None:
        return
    if preset not in PRESETS:
        raise ValueError(f"Expected preset to be one of {', '.join(PRESETS)}, received {preset!r}.")
    kind = directions if isinstance(directions, str) else "given"
    if kind != "random" or normalization is not None or ignore is not None:
        raise ValueError(
            f"Expected preset={preset!r} with directions='random' and neither normalization nor ignore, received "
            f"{kind!r}, {normalization!r} and {ignore!r}."
        )


def preset_source(preset: str | None, source: Source) -> Source:
    """Return a source with the directions, normalization and ignore that a checked preset stands for; as it is without one."""
    if preset is None:
        return source
    return replace(source, normalization="filter_official", ignore=OFFICIAL_IGNORE)
