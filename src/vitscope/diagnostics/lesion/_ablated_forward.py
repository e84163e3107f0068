"""Forward passes of a model with and without its parts: each image's loss and correctness."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from vitscope.core.evaluation import evaluate
from vitscope.core.probe import Batch, Probe
from vitscope.core.weight_space import recalibrate
from vitscope.diagnostics.lesion._lesions import Lesion
from vitscope.models.structure.residual_units import Unit, resumed
from vitscope.runtime import stop_flag
from vitscope.runtime.distributed import world_size
from vitscope.runtime.progress import track
from vitscope.runtime.resumable_map import Partial, Row, stored_row

Rows = tuple[np.ndarray, np.ndarray]


def batch_by_batch(
    probe: Probe, model: nn.Module, units: Sequence[Unit], lesions: Sequence[Lesion], partial: Partial | None
) -> Iterator[Rows]:
    """Yield ``(losses, correct)`` of each batch of this rank, ``(1 + n_lesions, B)``: the whole model, then each lesion.

    The first batch is measured by full passes. Where more batches follow, each of its lesioned passes is also started at the
    block that the lesion changes; only if all logits are equal, bit for bit, are the other batches measured that way.

    Args:
        probe: Model and images.
        model: The guarded model.
        units: All units of the model, to start lesioned passes at the block they change; empty for full passes.
        lesions: The lesions.
        partial: Finished batches.
    """
    plan = _PassPlan(units)
    for index, batch in track(probe.local_batches(), "lesion"):
        passes = _Passes(probe, model, lesions, batch)
        has_successor = index + world_size() < probe.n_batches
        row = stored_row(partial, f"batch {index}", functools.partial(plan.measure, passes, has_successor))
        yield np.asarray(row["losses"]), np.asarray(row["correct"])


class _PassPlan:
    """The choice between full passes and passes that start at a block, which the first measured batch decides."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = units
        self.verified = False

    def measure(self, passes: _Passes, has_successor: bool) -> Row:
        """Return losses and correctness ``(1 + n_lesions, B)`` of one batch.

        Args:
            passes: The forward passes of the batch.
            has_successor: Whether this rank measures another batch, for which a comparison of both ways pays.
        """
        if self.units and not self.verified and has_successor:
            (losses, correct), difference = passes.compared(self.units)
            self.verified = not difference
            if difference:
                self.units = ()
                _warn_of_full_passes(difference)
        else:
            losses, correct = passes.resumed(self.units) if self.units and self.verified else passes.full()
        return {"losses": losses, "correct": correct}


def _warn_of_full_passes(difference: str) -> None:
    text = f"lesion: {difference}; every lesion is measured by full passes instead, with correct numbers in more time"
    warnings.warn(text, stacklevel=6)


def lesion_by_lesion(probe: Probe, model: nn.Module, lesions: Sequence[Lesion]) -> Iterator[Rows]:
    """Yield the same for all images of this rank at once, BatchNorm's statistics recomputed for each lesion."""
    rows = []
    for lesion in track([None, *lesions], "lesion"):
        with ExitStack() as stack:
            if lesion is not None:
                stack.enter_context(lesion.removed())
            recalibrate(model, probe.iter_batches())
            rows.append(_measured(probe, model, (batch for _, batch in probe.local_batches())))
    yield _stacked(rows)


def batch_passes(
    probe: Probe, model: nn.Module, lesions: Sequence[Lesion], batch: Batch, units: Sequence[Unit]
) -> Callable[[], Rows]:
    """Return the function that makes the passes of one batch: from the images, or with ``units`` from the lesioned block."""
    passes = _Passes(probe, model, lesions, batch)
    return (lambda: passes.resumed(units)) if units else passes.full


class _Passes:
    """Forward passes of one batch: by the whole model, and with each lesion."""

    def __init__(self, probe: Probe, model: nn.Module, lesions: Sequence[Lesion], batch: Batch) -> None:
        self.probe, self.model, self.lesions, self.batch = probe, model, lesions, batch

    def full(self) -> Rows:
        """Return losses and correctness ``(1 + n_lesions, B)``, every pass from the images to the logits."""
        rows = [self._pass()[0]]
        for lesion in self.lesions:
            rows.append(self._lesioned(lesion)[0])
        return _stacked(rows)

    def resumed(self, units: Sequence[Unit]) -> Rows:
        """Return the same from passes that start at the block which the lesion changes."""
        inputs = _BlockInputs(units)
        with inputs.recorded():
            rows = [self._pass()[0]]
        for lesion in self.lesions:
            rows.append(self._lesioned(lesion, units, inputs)[0])
        return _stacked(rows)

    def compared(self, units: Sequence[Unit]) -> tuple[Rows, str]:
        """Return what `full` does, and how a pass that starts at a block differs from it; empty if none does."""
        inputs, difference = _BlockInputs(units), ""
        with inputs.recorded():
            rows = [self._pass()[0]]
        difference = inputs.obstacle()
        for lesion in self.lesions:
            row, logits = self._lesioned(lesion)
            rows.append(row)
            if not difference:
                difference = self._difference(lesion, logits, units, inputs)
        return _stacked(rows), difference

    def _difference(self, lesion: Lesion, expected: Tensor, units: Sequence[Unit], inputs: _BlockInputs) -> str:
        where = f"a pass that starts at the block of {lesion.first.name!r}"
        try:
            logits = self._lesioned(lesion, units, inputs)[1]
        except stop_flag.Interrupted:
            raise
        except Exception as error:  # the model's own code met an input of a kind that it never has
            return f"{where} fails ({type(error).__name__})"
        if logits.shape == expected.shape and bool(((logits == expected) | (logits.isnan() & expected.isnan())).all()):
            return ""
        if logits.shape != expected.shape:
            return f"{where} gives another number of logits"
        return f"{where} changes the logits of a full pass by up to {float((logits - expected).abs().max()):.2g}"

    def _lesioned(
        self, lesion: Lesion, units: Sequence[Unit] = (), inputs: _BlockInputs | None = None
    ) -> tuple[Rows, Tensor]:
        stop_flag.check()
        with lesion.removed(), ExitStack() as stack:
            block = lesion.first.block
            if inputs is not None and block in inputs.values:
                stack.enter_context(resumed(units, lesion.first, inputs.values[block]))
            return self._pass()

    def _pass(self) -> tuple[Rows, Tensor]:
        logits: list[Tensor] = []

        def forward(x: Tensor) -> Tensor:
            logits.append(self.model(x))
            return logits[-1]

        return _measured(self.probe, forward, [self.batch]), logits[0]


class _BlockInputs:
    """The first argument of every block in a whole pass, and what forbids to start a pass there."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.names = {unit.block: unit.name for unit in units}
        self.values: dict[nn.Module, Tensor] = {}
        self.calls: Counter[nn.Module] = Counter()
        self._others: set[nn.Module] = set()  # called with something else than a tensor in front

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep the inputs of the pass inside."""
        with ExitStack() as stack:
            for block in self.names:
                stack.callback(block.register_forward_pre_hook(self._note).remove)
            yield

    def _note(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self.calls[block] += 1
        if args and isinstance(args[0], Tensor):
            self.values[block] = args[0].clone()  # the model may go on to change its stream in place
        else:
            self._others.add(block)

    def obstacle(self) -> str:
        """Return why no pass can start at a block; empty if nothing forbids it."""
        for block, name in self.names.items():
            if self.calls[block] > 1:
                return f"the block of {name!r} runs {self.calls[block]} times in one pass"
            if block in self._others:
                return f"the block of {name!r} does not have one tensor as its first argument"
        return ""


def _stacked(rows: Sequence[Rows]) -> Rows:
    losses, correct = zip(*rows)
    return np.stack(losses), np.stack(correct)


def _measured(probe: Probe, forward: Callable[[Tensor], Tensor], batches: Iterable[Batch]) -> Rows:
    evaluations = []
    for x, y in batches:
        if probe.objective.n_examples(y):
            evaluations.append(evaluate(forward, [(x, y)], probe.objective, per_image=True, reduce=False))
        else:
            forward(x)  # whose outputs are compared
    # a rank without a batch, and a batch without labels, have no image
    losses = [np.empty(0), *(evaluation.losses for evaluation in evaluations)]
    correct = [np.empty(0), *(evaluation.answers for evaluation in evaluations)]
    return np.concatenate(losses), np.concatenate(correct)
