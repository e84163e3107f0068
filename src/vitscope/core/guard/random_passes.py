"""Passes that draw random numbers on images that the check of repeatability has not seen.

A network may be random on some batches alone: dropout on images of one kind, on the last batch, after so many passes. Random
states around every pass show it at no cost; a pass that drew is repeated once and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vitscope.core.batches.batch_inputs import tensors_of
from vitscope.core.guard.fingerprints import Fingerprint, fingerprint
from vitscope.core.guard.pass_comparison import compare_passes, output_tensors, random_modules
from vitscope.core.guard.pass_hooks import hooked_passes
from vitscope.core.guard.probe_guard import kept_random_states
from vitscope.core.guard.random_states import RandomStates
from vitscope.core.guard.repeatability import Repeatability


@contextmanager
def drawing_passes(
    model: nn.Module, device: torch.device, drew: Callable[[tuple[Any, ...], Any], None]
) -> Iterator[None]:
    """Call ``drew(args, output)`` after each pass inside that drew random numbers, with the pass's inputs as they came.

    What draws between passes (a measure's own vectors and perturbations) does not count.
    """
    states = RandomStates(device, model)
    inputs: list[tuple[Any, ...]] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args)
        states.read()

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        args = inputs.pop()
        # a pass that failed gives no output, and inside a pass that ``drew`` makes nothing is watched
        if output is not None and not inputs and states.moved():
            inputs.append(args)
            try:
                drew(args, output)
            finally:
                inputs.clear()

    with hooked_passes(model, before, after):
        yield


class RepeatedPasses:
    """Repeats passes that drew random numbers and refuses a network whose outputs change, as `Repeatability.refuse` does.

    Args:
        model: The model inside a guard, in eval mode.
        device: The model's.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        self._equal: set[tuple[Fingerprint, ...]] = set()

    @torch.no_grad()
    def check(self, args: tuple[Any, ...], output: Any) -> None:
        """Run the model on ``args`` again, once for each input, and compare with ``output``.

        Raises:
            ValueError: The outputs differ.
        """
        key = tuple(fingerprint(t) for a in args for t in tensors_of(a))
        if key in self._equal:
            return
        with kept_random_states(self.device):
            first, second = output_tensors(output), output_tensors(self.model(*args))
            difference, bound = compare_passes(self.model, first, second, True, args[0])
            if difference > bound:
                Repeatability(random_modules(self.model, args[0]), difference, bound).refuse()
        self._equal.add(key)
