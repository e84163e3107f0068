"""Options of a measure that its node does not spell out: the run's checkpoints, other probes, an untrained model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from vitscope.analyses import previous_result
from vitscope.analyses.context import AnalysisContext
from vitscope.analyses.spec import Analysis, probe_request
from vitscope.config import factories
from vitscope.config.keys.analysis_keys import CROSS_VALIDATION
from vitscope.core.probe import Probe
from vitscope.core.run_inputs import FromRun, run_inputs
from vitscope.core.sharding.sharded_parameters import is_sharded
from vitscope.runs import api, partial_results
from vitscope.runs.checkpoints import checkpoint_sequence

_logger = logging.getLogger(__name__)


def options(
    analysis: Analysis, place: AnalysisContext, rows: partial_results.PartialRows, settings: Callable[[], str]
) -> dict[str, Any]:
    """Return the inputs that a measure takes from its run, see `run_inputs`, and that its node leaves open.

    Args:
        analysis: the measure, its options and its images.
        place: run, network and data that are measured.
        rows: finished rows of an interrupted measurement.
        settings: returns the digits that name the analysis's settings.
    """
    supply: dict[FromRun, Callable[[], Any]] = {
        FromRun.ROWS: lambda: rows,
        FromRun.CHECKPOINTS: lambda: checkpoint_sequence.of_run(place.run),
        FromRun.VALIDATION: lambda: _validation_probe(place),
        FromRun.UNTRAINED: lambda: _model_before_training(analysis, place),
        FromRun.PREVIOUS: lambda: previous_result.previous(place.run.results / analysis.name, place, settings()),
    }
    supplied: dict[str, Any] = {}
    for name, kind in run_inputs(analysis.measure).items():
        value = analysis.options.get(name)
        if kind is FromRun.TRAINING:
            supplied[name] = None if value == CROSS_VALIDATION else _training_probe(place, value or {})
        elif value is None:
            supplied[name] = supply[kind]()
    return supplied


def needed_splits(analysis: Analysis, datamodule: Any) -> set[str]:
    """Return the splits whose images an analysis reads: those of its probe, and of the probes that its run supplies."""
    splits = {str(probe_request(analysis, datamodule)["split"])}
    for name, kind in run_inputs(analysis.measure).items():
        value = analysis.options.get(name)
        if kind is FromRun.VALIDATION and value is None:
            splits.add("val")
        elif kind is FromRun.TRAINING and value != CROSS_VALIDATION:
            splits.add("train")
    return splits


def _validation_probe(place: AnalysisContext) -> Probe:
    request = {"split": "val", "augment": False, "n_images": None, "batch_size": place.datamodule.eval_batch_size}
    return factories.probe(place.cfg, place.network, place.datamodule, request)


def _training_probe(place: AnalysisContext, images: Mapping[str, Any]) -> Probe:
    """Return a probe of clean training images: ``n_images``, ``batch_size`` and ``seed`` as the analysis states them."""
    request = {"n_images": None, "batch_size": place.datamodule.eval_batch_size, **images}
    return factories.probe(place.cfg, place.network, place.datamodule, {**request, "split": "train", "augment": False})


def loaded(key: str, value: Any, probe: Probe) -> Any:
    """Turn ``other=runs/<id>`` into a probe of that run on the same images, named checkpoints into their weights."""
    if key == "checkpoints" and value is not None:
        return checkpoint_sequence.named(value, probe.model)
    if key != "other" or not isinstance(value, str):
        return value
    other = api.load_probe(value, split=probe.about["split"])
    other.model.to(probe.device)
    about = {**probe.about, "checkpoint": other.about["checkpoint"]}
    return Probe(other.model, probe.batches, probe.objective, about=about, optimizer=other.optimizer)


def _model_before_training(analysis: Analysis, place: AnalysisContext) -> nn.Module | None:
    initial = untrained_model(place.cfg, place.network)
    if initial is None:
        _logger.info(
            f"{analysis.name}: the model has the weights that it begins with, so that no change by training is measured"
        )
    return initial


def untrained_model(cfg: DictConfig, network: nn.Module) -> nn.Module | None:
    """Return the model that the configuration describes before training; None where the network still has its weights.

    A network without training has no change to measure: its difference from itself would be zeros that look like a result.

    Args:
        cfg: the run's configuration; pretrained weights are left out, which are no initialisation.
        network: the network that is measured.
    """
    initial = factories.model(_untrained(cfg))
    return None if _has_equal_weights(network, initial) else initial


def _has_equal_weights(network: nn.Module, other: nn.Module) -> bool:
    if is_sharded(network):  # of a training; a comparison would gather all weights
        return False
    weights, others = dict(network.named_parameters()), dict(other.named_parameters())
    return weights.keys() == others.keys() and all(
        p.shape == others[name].shape and torch.equal(p.detach().cpu(), others[name].detach().to("cpu", p.dtype))
        for name, p in weights.items()
    )


def _untrained(cfg: DictConfig) -> DictConfig:
    """Return the configuration without pretrained weights, which are no initialisation."""
    if not cfg.model.get("pretrained", False):
        return cfg
    cfg = copy.deepcopy(cfg)
    cfg.model.pretrained = False
    return cfg
