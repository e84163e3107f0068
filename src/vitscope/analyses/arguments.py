"""Options of a measure that its node does not spell out: the run's checkpoints, other probes, an untrained model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, open_dict
from torch import nn

from vitscope.analyses import previous_result
from vitscope.analyses.context import AnalysisContext
from vitscope.analyses.spec import Analysis, probe_request
from vitscope.config import factories, loading
from vitscope.config.keys.analysis_keys import CROSS_VALIDATION
from vitscope.core.probe import Probe
from vitscope.core.run_inputs import FromRun, run_inputs
from vitscope.core.sharding.sharded_parameters import is_sharded
from vitscope.runs import api, partial_results, run_dir
from vitscope.runs.checkpoints import checkpoint_sequence
from vitscope.runtime.distributed import gather_objects, rank

_logger = logging.getLogger(__name__)

#: keys of the data that say how an image becomes what a network sees
_PROCESSING = (
    "image_size", "mean", "std", "crop_pct", "interpolation", "crop_mode", "background", "pixel_range", "transform",
)  # fmt: skip


def options(
    analysis: Analysis, place: AnalysisContext, rows: partial_results.PartialRows, settings: Callable[[], str]
) -> dict[str, Any]:
    """Return the inputs that a measure takes from its run, see `run_inputs`, and that its node leaves open.

    Args:
        analysis: The measure, its options and its images.
        place: Run, network and data that are measured.
        rows: Finished rows of an interrupted measurement.
        settings: Function that returns the digits that name the analysis's settings.
    """
    supply: dict[FromRun, Callable[[], Any]] = {
        FromRun.ROWS: lambda: rows,
        FromRun.CHECKPOINTS: lambda: _checkpoints(place),
        FromRun.VALIDATION: lambda: _validation_probe(place),
        FromRun.UNTRAINED: lambda: _model_before_training(analysis, place),
        FromRun.PREVIOUS: lambda: _previous(analysis, place, settings()),
    }
    supplied: dict[str, Any] = {}
    for name, kind in run_inputs(analysis.measure).items():
        value = analysis.options.get(name)
        if kind is FromRun.TRAINING:
            supplied[name] = None if value == CROSS_VALIDATION else _training_probe(place, value or {})
        elif value is None:
            supplied[name] = supply[kind]()
    return supplied


def input_sizes(
    analysis: Analysis, cfg: DictConfig, network: nn.Module, data: Any, n_checkpoints: int
) -> dict[str, int]:
    """Return the sizes of the inputs that a measure would take from its run, by name.

    Args:
        analysis: The measure and its options.
        cfg: Validated configuration.
        network: The network whose untrained counterpart may be an input.
        data: Data module.
        n_checkpoints: Number of the run's own checkpoints.
    """
    sizes = {}
    for name, kind in run_inputs(analysis.measure).items():
        value = analysis.options.get(name)
        if kind is FromRun.TRAINING and value != CROSS_VALIDATION:
            available, n_images = len(data.split("train")), (value or {}).get("n_images")
            sizes[name] = available if n_images is None else min(available, int(n_images))
        elif kind is FromRun.VALIDATION:
            sizes[name] = len(data.split("val"))
        elif kind is FromRun.CHECKPOINTS:
            sizes[name] = n_checkpoints
        elif kind is FromRun.UNTRAINED:
            sizes[name] = int(untrained_model(cfg, network) is not None)
    return sizes


def _checkpoints(place: AnalysisContext) -> checkpoint_sequence.Snapshots:
    """Return the run's checkpoints that the first rank sees: another machine may not see yet what it has just written."""
    return checkpoint_sequence.Snapshots(gather_objects(checkpoint_sequence.of_run(place.run).files)[0])


def _previous(analysis: Analysis, place: AnalysisContext, settings: str) -> Any | None:
    """Return the series' newest result, and the first rank's where ranks do not see the same: all begin with its vectors."""
    result = previous_result.previous(place.run.results / analysis.name, place, settings)
    views = gather_objects(None if result is None else _size(result))
    if views == views[:1] * len(views):
        return result
    return gather_objects(result if rank() == 0 else None)[0]


def _size(result: Any) -> list[Any]:
    """Return what tells results of a series apart: their lengths, and whether they have their vectors."""
    return [value.shape for value in vars(result).values() if isinstance(value, np.ndarray)]


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


def loaded(key: str, value: Any, probe: Probe, request: Mapping[str, Any], place: AnalysisContext) -> Any:
    """Turn ``other=runs/<id>`` into a probe of that run on the same images, named checkpoints into their weights.

    Args:
        key: Name of the option.
        value: The argument's value.
        probe: The probe of the network that is measured.
        request: Which images it has, see `vitscope.analyses.spec.probe_request`.
        place: Run, network and data that are measured.
    """
    if key == "checkpoints" and value is not None:
        return checkpoint_sequence.named(value, probe.model)
    if key != "other" or not isinstance(value, str):
        return value
    other = api.load_probe(value, split=probe.about["split"])
    other.model.to(probe.device)
    facts = {"checkpoint": other.about["checkpoint"], "epoch": other.about.get("epoch")}
    cfg = _processed_as(place.cfg, run_dir.find(value).config())
    if loading.plain(cfg.data) == loading.plain(place.cfg.data) and cfg.data.get("transform") != "model":
        batches, about = probe.batches, {**probe.about, **facts}
    else:
        processed_probe = _processed_images(cfg, other.model, {**request, "seed": probe.about["seed"]})
        batches, about = processed_probe.batches, {**processed_probe.about, **facts}
    return Probe(other.model, batches, probe.objective, about=about, optimizer=other.optimizer)


def _processed_as(cfg: DictConfig, other_cfg: DictConfig) -> DictConfig:
    """Return a configuration whose images are processed as another run's, which may have other means and deviations or sizes."""
    cfg = copy.deepcopy(cfg)
    if cfg.data.get("_target_") != other_cfg.data.get("_target_"):  # of another package, whose keys are not known
        return cfg
    with open_dict(cfg):
        for name in _PROCESSING:
            cfg.data.pop(name, None)
            if name in other_cfg.data:
                cfg.data[name] = other_cfg.data[name]
    return cfg


def _processed_images(cfg: DictConfig, network: nn.Module, request: Mapping[str, Any]) -> Probe:
    """Return a probe of the same images as a configuration processes them for a network."""
    data = factories.data(cfg)
    data.adapt_to(network)
    with open_dict(cfg):
        cfg.objective.l2 = "none"  # needs no state of an optimizer: the objective is that of the measured network
    return factories.probe(cfg, network, data, request)


def _model_before_training(analysis: Analysis, place: AnalysisContext) -> nn.Module | None:
    initial = untrained_model(_with_seed_of_run(place), place.network)
    if initial is None:
        _logger.info(
            f"{analysis.name}: these are the initial weights, so that there is no change by training to measure"
        )
    return initial


def _with_seed_of_run(place: AnalysisContext) -> DictConfig:
    """Return the configuration with the seed that the run's training began with: ``seed=`` of a command chooses images alone."""
    seed = place.run.config().get("seed", place.cfg.seed)
    if seed == place.cfg.seed:
        return place.cfg
    cfg = copy.deepcopy(place.cfg)
    cfg.seed = seed
    return cfg


def untrained_model(cfg: DictConfig, network: nn.Module) -> nn.Module | None:
    """Return the model that the configuration describes before training; None where the network still has its weights.

    A network without training has no change to measure: its difference from itself would be zeros that look like a result.

    Args:
        cfg: The run's configuration; pretrained weights are left out, which are no initialization.
        network: The network that is measured.
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
    """Return the configuration without pretrained weights, which are no initialization."""
    if not cfg.model.get("pretrained", False):
        return cfg
    cfg = copy.deepcopy(cfg)
    cfg.model.pretrained = False
    return cfg
