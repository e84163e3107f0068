"""Checks of a probe's network by forward passes: whether it repeats itself, and whether later passes draw random numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.core.batches.batch_format import BatchFormat
from vitscope.core.batches.batch_inputs import Inputs
from vitscope.core.checks.first_pass import FirstPass, untracked_norms
from vitscope.core.checks.unlikely_input import UnlikelyInputWarning
from vitscope.core.guard import probe_guard, repeatability
from vitscope.core.guard.module_state import Place, empty_place, refilled_places
from vitscope.core.guard.random_passes import RepeatedPasses, drawing_passes
from vitscope.core.guard.repeatability import Repeatability, warn_of_draws, worst_of
from vitscope.core.losses.own_loss import check_form, check_mean_over_images, check_repeated_values
from vitscope.core.objective import Objective
from vitscope.core.sharding.sharded_parameters import LocalShard
from vitscope.runtime import distributed

#: reads the first batch, each time anew
FirstBatch = Callable[[], tuple[Inputs, Tensor] | None]


class PassChecks:
    """Checks by passes over the first batch; each is made once.

    Args:
        model: The model, which is inside a guard and in eval mode whenever a method is called.
        objective: The objective whose data term is differentiated.
        first_batch: Function that reads the probe's first batch; None without one.
        batch_format: Form of the batches.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, first_batch: FirstBatch, batch_format: BatchFormat
    ) -> None:
        self.model, self.objective, self._first_batch = model, objective, first_batch
        self._format = batch_format
        self._notices: set[str] = set()  # each is given once
        self._tables: dict[Place, str] | None = None
        self._repeatability: dict[str, Repeatability] = {}
        self._is_loss_checked = not callable(objective.loss)

    @property
    def needs_copies(self) -> bool:
        """Whether a pass may write to the weights."""
        return not self._repeatability or any(check.written for check in self._repeatability.values())

    @property
    def random_modules(self) -> tuple[str, ...]:
        """The modules whose outputs differ between passes, where a check has met one."""
        return next((check.random for check in self._repeatability.values() if check.random), ())

    def examined(
        self, device: torch.device, gradient: bool, moves_weights: bool, n_images: int | None, uses_loss: bool
    ) -> Repeatability:
        """Empty the tables made from weights; return whether the model repeats itself, which is measured once.

        Args:
            device: The model's.
            gradient: Whether the loss is differentiated.
            moves_weights: Whether the model will be evaluated at other weights.
            n_images: Images of the first batch to use; None for all.
            uses_loss: Whether outputs go to the loss, which is then checked too.
        """
        level = "outputs"
        if gradient:
            level = "gradient"
        elif moves_weights:
            level = "moved weights"
        earlier_check = self._repeatability.get(level)
        if earlier_check is None and level == "outputs":
            earlier_check = next(iter(self._repeatability.values()), None)
        if earlier_check is not None and (self._is_loss_checked or not uses_loss):
            self._empty_tables()
            return earlier_check
        is_gathering = any(isinstance(p, LocalShard) for p in self.model.parameters())
        with distributed.failing_together(not is_gathering), probe_guard.kept_random_states(device):
            check = self._examine(gradient, moves_weights, n_images, uses_loss)
        # what one rank has seen all ranks act on
        self._repeatability[level] = worst_of(distributed.gather_objects(check))
        return self._repeatability[level]

    def watched(self, device: torch.device, outcome: Repeatability, refuses: bool) -> AbstractContextManager[None]:
        """Return a context in which later passes that draw random numbers are refused, or stated on the card."""
        if refuses:
            return drawing_passes(self.model, device, RepeatedPasses(self.model, device).check)
        if outcome.random or outcome.drew:  # it is stated already, or without an effect
            return nullcontext()

        def state(*_: Any) -> None:
            if not any(other.random for other in self._repeatability.values()):
                # the pass is not repeated: measures may read feature maps in it
                random = (f"model ({type(self.model).__name__})",)
                self._repeatability["outputs"] = replace(outcome, random=random)
                warn_of_draws(random)

        return drawing_passes(self.model, device, state)

    def _examine(self, gradient: bool, moves_weights: bool, n_images: int | None, uses_loss: bool) -> Repeatability:
        batches = [self._first_batch() for _ in range(2)]  # read twice: a shuffled loader shows at once
        if batches[0] is None:
            raise ValueError("Expected at least one batch (x, y), received none.")
        x, y = batches[0][0][:n_images], batches[0][1][:n_images]
        if self._tables is None:
            self._tables = refilled_places(self.model, lambda: self.model(x.clone()))
        self._empty_tables()
        if uses_loss and not self._is_loss_checked:
            self._check_loss(x, y)
        with FirstPass(self.model, x, self._format, self.objective.loss if uses_loss else None) as first_pass:
            check = repeatability.examine(self.model, x, y, self.objective if gradient else None, moves_weights)
        self._give([*untracked_norms(self.model), *([] if check.random else first_pass.notices())])
        return check

    def _give(self, notices: list[str]) -> None:
        for text in notices:
            if text not in self._notices:
                self._notices.add(text)
                warnings.warn(text, UnlikelyInputWarning, stacklevel=6)

    def _check_loss(self, x: Inputs, y: Tensor) -> None:
        assert callable(self.objective.loss)
        with torch.no_grad():
            outputs = self.model(x.clone())
        check_form(self.objective.loss, outputs, y, self.model)
        check_repeated_values(self.objective.loss, outputs, y)
        if isinstance(outputs, Tensor) and outputs.ndim and len(outputs) == len(y) > 1:
            check_mean_over_images(self.objective.loss, outputs, y)
        self._is_loss_checked = True

    def _empty_tables(self) -> None:
        for place, way in (self._tables or {}).items():
            empty_place(self.model, place, way)
