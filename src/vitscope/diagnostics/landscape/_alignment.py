"""Alignment of the start of a straight line to its end by permutations of units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from vitscope.core.probe import Probe
from vitscope.models.permutations.weight_alignment import Method, align_weights

Alignment = Literal["none", "weights", "activations"]
ALIGNMENTS = get_args(Alignment)


def check_alignment(alignment: str) -> bool:
    """Tell whether an alignment was chosen.

    Raises:
        ValueError: An unknown one.
    """
    if alignment not in ALIGNMENTS:
        raise ValueError(f"Expected alignment to be one of {', '.join(ALIGNMENTS)}, received {alignment!r}.")
    return alignment != "none"


def aligned_weights(
    probe: Probe, start: Mapping[str, Tensor], end: Mapping[str, Tensor], alignment: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the start with its units in the order of the end's, and what the card says of it.

    Raises:
        ValueError: Batches of more than images, or units that cannot be followed.
        NumericalError: A permutation that changes the network's function.
    """
    if not probe.takes_images:
        raise ValueError(
            f"Expected batches of images with alignment={alignment!r}, received others: use alignment='none'."
        )
    images = _Images(probe)
    method: Method = "weights" if alignment == "weights" else "activations"
    aligned = align_weights(probe.model, start, target=end, method=method, images=images)
    facts = {"alignment_distances": [aligned.distance_before, aligned.distance_after]}
    return aligned.state_dict, facts


class _Images:
    """The images of a probe's batches, which can be read several times."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe

    def __iter__(self) -> Any:
        """Yield the images of each batch."""
        return (x for x, _ in self._probe.iter_batches())
