"""Forward passes of a model with and without its parts: each image's loss and correctness."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from torch import Tensor, nn

from vitscope import interrupt
from vitscope.diagnostics.lesion._lesions import Lesion
from vitscope.evaluate import evaluate
from vitscope.models.units import Unit, resumed
from vitscope.points import recalibrate
from vitscope.probe import Batch, Probe
from vitscope.progress import track

Partial = MutableMapping[str, Mapping[str, Any]]
Rows = tuple[np.ndarray, np.ndarray]


def batch_by_batch(
    probe: Probe, model: nn.Module, units: Sequence[Unit], chosen: Sequence[Lesion], partial: Partial | None
) -> Iterator[Rows]:
    """Yield ``(losses, correct)`` of each batch of this rank, ``(1 + n_lesions, B)``: the whole model, then each lesion.

    Args:
        probe: model and images.
        model: the guarded model.
        units: all units of the model, to start lesioned passes at the block they change; empty for full passes.
        chosen: the lesions.
        partial: finished batches.
    """
    for index, batch in track(probe.local_batches(), "lesion"):
        key = f"batch {index}"
        row = partial.get(key) if partial is not None else None
        if row is None:
            losses, correct = _one_batch(probe, model, units, chosen, batch)
            row = {"losses": losses, "correct": correct}
            if partial is not None:
                partial[key] = row
        yield np.asarray(row["losses"]), np.asarray(row["correct"])


def lesion_by_lesion(probe: Probe, model: nn.Module, chosen: Sequence[Lesion]) -> Iterator[Rows]:
    """Yield the same for all images of this rank at once, BatchNorm's statistics recomputed for each lesion."""
    rows = []
    for lesion in track([None, *chosen], "lesion"):
        with ExitStack() as stack:
            if lesion is not None:
                stack.enter_context(lesion.removed())
            recalibrate(model, probe.iter_batches())
            rows.append(_measured(probe, model, (batch for _, batch in probe.local_batches())))
    losses, correct = zip(*rows)
    yield np.stack(losses), np.stack(correct)


def _one_batch(probe: Probe, model: nn.Module, units: Sequence[Unit], chosen: Sequence[Lesion], batch: Batch) -> Rows:
    inputs: dict[nn.Module, Tensor] = {}
    with ExitStack() as stack:
        for block in {unit.block for unit in units}:
            stack.callback(block.register_forward_pre_hook(lambda m, args: _keep(inputs, m, args[0])).remove)
        rows = [_measured(probe, model, [batch])]
    for lesion in chosen:
        interrupt.check()
        with lesion.removed(), ExitStack() as stack:
            if lesion.first.block in inputs:
                stack.enter_context(resumed(units, lesion.first, inputs[lesion.first.block]))
            rows.append(_measured(probe, model, [batch]))
    losses, correct = zip(*rows)
    return np.stack(losses), np.stack(correct)


def _keep(inputs: dict[nn.Module, Tensor], block: nn.Module, x: Tensor) -> None:
    inputs[block] = x.clone()  # the model may go on to change its stream in place


def _measured(probe: Probe, model: nn.Module, batches: Iterable[Batch]) -> Rows:
    found = [evaluate(model, [batch], probe.objective, per_image=True, reduce=False) for batch in batches]
    # a rank without a batch has no image
    losses, correct = [np.empty(0)] + [f.losses for f in found], [np.empty(0)] + [f.correct for f in found]
    return np.concatenate(losses), np.concatenate(correct)
