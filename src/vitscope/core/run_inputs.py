"""Inputs of a measure that the run it is made in can supply: declared by the type of the argument.

A measure writes ``checkpoints: RunCheckpoints | None = None``; where its analysis leaves the option open, the run's own
checkpoints are passed. Called from Python, the argument is an ordinary one that is None by default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping
from enum import Enum
from typing import Annotated, Any, get_args, get_type_hints

from torch import nn

from vitscope.core.probe import Probe
from vitscope.core.weight_space import Checkpoints


class FromRun(Enum):
    """A kind of input that a run supplies."""

    ROWS = "rows of an interrupted measurement"
    CHECKPOINTS = "the run's checkpoints"
    VALIDATION = "a probe of the validation images"
    UNTRAINED = "the run's model before training"
    TRAINING = "a probe of training images without augmentation"
    PREVIOUS = "the result of the same analysis at the step measured before"


ResumableRows = Annotated[MutableMapping[str, Mapping[str, Any]], FromRun.ROWS]
RunCheckpoints = Annotated[Checkpoints, FromRun.CHECKPOINTS]
ValidationProbe = Annotated[Probe, FromRun.VALIDATION]
UntrainedModel = Annotated[nn.Module, FromRun.UNTRAINED]
TrainingProbe = Annotated[Probe, FromRun.TRAINING]
PreviousResult = Annotated[Any, FromRun.PREVIOUS]


def run_inputs(measure: Callable[..., Any]) -> dict[str, FromRun]:
    """Return the arguments of a measure that a run supplies, by name."""
    hints = get_type_hints(inspect.unwrap(measure), include_extras=True)
    inputs = {}
    for name, hint in hints.items():
        for part in (hint, *get_args(hint)):  # alone, or in a union with None
            for declared in getattr(part, "__metadata__", ()):
                if isinstance(declared, FromRun):
                    inputs[name] = declared
    return inputs
