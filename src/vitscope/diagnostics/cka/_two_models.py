"""Forward passes of two models over the same images, for measures that compare their feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor

from vitscope.core.batches.batch_inputs import tensors_of
from vitscope.core.feature_pass import Accumulator
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.tap import tap_fields
from vitscope.diagnostics.cka._images import image_relation
from vitscope.models.structure.taps import reading
from vitscope.runtime import distributed
from vitscope.runtime.progress import track

#: key of the card's solver that says how a second model's images are related to the first's
IMAGES_OF_OTHER = "images_of_other"


class PairAccumulator(Accumulator, Protocol):
    """An accumulator that reads the maps of two models and notes how the second's images are related to the first's."""

    relations: set[str]


def tap_fields_of_both(probe: Probe, other: Probe) -> dict[str, Any]:
    """Return the fields of a result that name the taps of both models, the second's with ``other_`` before their names."""
    return {**tap_fields(probe.taps), **{f"other_{name}": value for name, value in tap_fields(other.taps).items()}}


def shows_one_model(taps: Sequence[str], other_taps: Sequence[str], card: ObjectiveCard | None) -> bool:
    """Tell whether both sides of a result are one model: two of one architecture have equal taps, too, and other maps."""
    is_between = card is not None and IMAGES_OF_OTHER in (card.solver or {})
    return tuple(taps) == tuple(other_taps) and not is_between


def through_both(probe: Probe, other: Probe, sums: PairAccumulator, measure: str) -> None:
    """Make a forward pass of each model over this rank's batches, the second's taps numbered after the first's.

    Raises:
        ValueError: Images or targets that differ between the probes or come in another order, on every rank.
    """
    with distributed.failing_together():
        _read_batches(probe, other, sums, measure)


def _read_batches(probe: Probe, other: Probe, sums: PairAccumulator, measure: str) -> None:
    s = len(probe.taps)
    with probe.guard(logits=False) as model, other.guard(logits=False) as other_model:
        for first, second in zip_longest(track(probe.local_batches(), measure), other.local_batches()):
            sums.relations.add(_check_same(first, second, measure))
            number, (x, _) = first
            with reading(model, probe.taps, sums.read):
                model(x)
            with reading(other_model, other.taps, lambda index, tap, maps: sums.read(s + index, tap, maps)):
                other_model(second[1][0])
            sums.close_batch(number, len(x))


def _check_same(first: tuple | None, second: tuple | None, measure: str) -> str:
    """Return how the two batches' images are related (see `image_relation`); ValueError where they are not the same."""
    if first is None or second is None:
        raise ValueError(
            "Expected the same images in the same batches of both probes, received more batches in one of them."
        )
    labels, others = (batch[1][1].cpu() for batch in (first, second))
    if not torch.equal(labels, others):
        what = "that differ"
        if labels.shape != others.shape:
            what = f"of shapes {tuple(labels.shape)} and {tuple(others.shape)}"
        raise ValueError(f"Expected the same images in the same batches of both probes, received targets {what}.")
    inputs = [tensors_of(batch[1][0]) for batch in (first, second)]
    if [len(tensors) for tensors in inputs] != [1, 1]:
        return "equal" if _are_equal(*inputs) else _refuse_entries(measure)
    return image_relation(inputs[0][0], inputs[1][0])


def _are_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second)
    )


def _refuse_entries(measure: str) -> str:
    raise ValueError(
        f"Expected equal entries in the same batches of both probes, received others: {measure} recognizes differently processed "
        "images where they are all that a model is given."
    )
