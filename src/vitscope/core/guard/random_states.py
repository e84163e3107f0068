"""Random states of Python, NumPy, torch and of generators that modules hold: whether a pass drew numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class RandomStates:
    """The random states at one moment: of Python, NumPy and torch, and of generators on plain attributes of modules.

    Args:
        device: The device whose state is read, besides the CPU's.
        model: The model with the attributes to look at; None for the global states alone.
    """

    def __init__(self, device: torch.device, model: nn.Module | None = None) -> None:
        self._device = device
        modules = model.modules() if model is not None else ()
        self._generators = [
            value for module in modules for value in vars(module).values() if isinstance(value, _GENERATORS)
        ]
        self._states = self._read()

    def moved(self) -> bool:
        """Return whether numbers were drawn since the last reading, this one or the first."""
        before, self._states = self._states, self._read()
        return any(not _equal(a, b) for a, b in zip(before, self._states))

    def read(self) -> None:
        """Read the states again, for the next call of `moved`."""
        self._states = self._read()

    def _read(self) -> list[Any]:
        torch_states = [torch.random.get_rng_state()]
        if self._device.type == "cuda":
            torch_states.append(torch.cuda.get_rng_state(self._device))
        generator_states = [_generator_state(generator) for generator in self._generators]
        return [random.getstate(), np.random.get_state(), *torch_states, *generator_states]  # noqa: NPY002  the global state is meant


_GENERATORS = (torch.Generator, np.random.Generator, random.Random)


def _generator_state(generator: torch.Generator | np.random.Generator | random.Random) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return str(generator.bit_generator.state)  # nested dictionaries of numbers and arrays
    return generator.getstate()


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, tuple) and any(isinstance(x, np.ndarray) for x in a):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b))
    return bool(a == b)
