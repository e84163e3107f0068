"""Context of an analysis: the run, the network and the data that it is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig
from torch import nn

from vitscope.analyses.spec import Analysis
from vitscope.runs.run_dir import Run
from vitscope.runs.wandb_mirror import WandbMirror


@dataclass(frozen=True)
class AnalysisContext:
    """Everything that an analysis needs: configuration, run folder, network, data and checkpoint.

    Attributes:
        cfg: The run's configuration.
        run: The run folder.
        network: The model, on its device.
        datamodule: The data module, which gives the batches.
        tag: ``init``, ``epoch-0099``, ``step-000120`` or ``end``.
        epoch: Epoch of the weights, for the card.
        step: Optimizer steps that the weights have made, for the card and the journal.
        mirror: W&B.
        content: The checkpoint the weights came from, where there is one.
        due: The analyses that will be made here; those of the feature maps of the same images share a forward pass.
        ahead: Results of such a pass by name, until their turn comes.
        alone: Names of those that such a pass failed for.
        changes: Values of the network and the folder of images that are not the run's, see
            `vitscope.analyses.run_changes.changed_values`.
        draws: Whether figures are drawn; of a step among many only where ``at_steps`` names it, as a figure takes longer than
            many a measure.
    """

    cfg: DictConfig
    run: Run
    network: nn.Module
    datamodule: Any
    tag: str
    epoch: int | None = None
    step: int = 0
    mirror: WandbMirror = field(default_factory=WandbMirror)
    content: Mapping[str, Any] | None = None
    due: Sequence[Analysis] = ()
    ahead: dict[str, Any] = field(default_factory=dict)
    alone: set[str] = field(default_factory=set)
    changes: Mapping[str, Any] = field(default_factory=dict)
    draws: bool = True
