"""Instantiate everything and run two images before the run folder is made, so that invalid configurations leave no files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from vitscope.config import factories, instantiate, loading
from vitscope.config.loss import loss_choice
from vitscope.config.signature_checks import shown
from vitscope.core import lr_schedule
from vitscope.core.batches.batch_format import BatchFormat
from vitscope.core.objective import Objective
from vitscope.linalg.curvature.parameter_subsets import check_subset
from vitscope.runtime.errors import ConfigError, DataError, first_line
from vitscope.runtime.logging import is_main_process

_logger = logging.getLogger(__name__)

#: exceptions that a constructor raises for a value that its signature allows and its code does not
REFUSALS = (TypeError, ValueError, RuntimeError, KeyError, AttributeError)


#: layers that `torch.use_deterministic_algorithms` refuses to differentiate on a GPU
NONDETERMINISTIC_LAYERS = (
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.FractionalMaxPool2d,
    nn.MaxUnpool2d,
    nn.ReflectionPad2d,
)


def rehearse(cfg: DictConfig, network: nn.Module, data: Any) -> None:
    """Build the trainer, callbacks, optimizer, schedule and loaders of a training, and send two images through the network.

    Args:
        cfg: A validated configuration.
        network: The network, on the CPU; it is left as it was.
        data: The data module, set up for training.

    Raises:
        ConfigError: Naming the group that does not work.
        DataError: There would be no step.
    """
    if data.num_classes < 2:
        fix = "add images of another class, or measure with analyze.py"
        raise ConfigError("data.num_classes", data.num_classes, "a classifier is trained on two classes or more", fix)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    callbacks = [_built(node, f"callbacks.{name}") for name, node in cfg.callbacks.items()]
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    _built(cfg.trainer, "trainer", logger=False, callbacks=callbacks, **quiet)
    _deterministic(cfg, network)
    _optimizer(loading.plain(cfg.optimizer), network)
    _steps(cfg.trainer, data)
    for name, node in cfg.analysis.items():
        split = (node.get("probe") or {}).get("split") or "test"
        if split not in ("train", "val", "test"):  # a further one of this set, or a slip
            try:
                data.split(split)
            except DataError as error:
                raise ConfigError(f"analysis.{name}.probe.split", split, error.why, error.fix) from error
    check_subsets(cfg, network)
    _forward(cfg, network, data)


def check_subsets(cfg: DictConfig, network: nn.Module) -> None:
    """Warn of parameters that an analysis names and the network does not have; refuse them with ``on_error=raise``.

    Raises:
        ConfigError: Naming the key.
    """
    for name, node in cfg.analysis.items():
        subset = loading.plain(node).get("parameters")
        try:
            check_subset(network, subset)
        except ValueError as error:
            key, reason = f"analysis.{name}.parameters", str(error).rstrip(".")
            if node.get("on_error", "warn") == "raise":
                raise ConfigError(key, shown(subset), reason, "correct the name or the pattern") from error
            if is_main_process():
                _logger.warning(f"{key}={shown(subset)}: {reason}; the analysis will have no result for this network")


def _built(node: Any, path: str, **supplied: Any) -> Any:
    try:
        return instantiate.instantiate(node, path, **supplied)
    except REFUSALS as error:
        raise ConfigError(path, None, first_line(error).rstrip("."), "correct its values") from error


def _deterministic(cfg: DictConfig, network: nn.Module) -> None:
    """Refuse layers and a loss without deterministic gradients on a GPU: torch would stop at the first backward pass.

    Max pooling has them (see `torch.use_deterministic_algorithms`), and so has a mean over all positions.
    """
    trainer = cfg.trainer
    if trainer.get("deterministic") is not True or trainer.get("accelerator") == "cpu" or not torch.cuda.is_available():
        return
    fix = "set trainer.deterministic=warn, or replace it"
    for name, module in network.named_modules():
        averages_all = isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1), [1, 1])
        if isinstance(module, NONDETERMINISTIC_LAYERS) and not averages_all:
            reason = f"{type(module).__name__} {name!r} of the model has no deterministic gradient on a GPU"
            raise ConfigError("trainer.deterministic", True, reason, fix)
        if isinstance(module, nn.Upsample) and module.mode != "nearest":
            reason = f"Upsample {name!r} of the model has no deterministic gradient on a GPU"
            raise ConfigError("trainer.deterministic", True, reason, "set trainer.deterministic=warn")
    if cfg.objective.get("loss") == "dense_cross_entropy":
        reason = "the cross entropy of every pixel is not deterministic on a GPU"
        raise ConfigError("trainer.deterministic", True, reason, "set trainer.deterministic=warn")


def _optimizer(node: dict[str, Any], network: nn.Module) -> None:
    options = node.pop("schedule", None) or {}
    build = factories.optimizer_builder(node, network)
    weight = nn.Parameter(torch.ones(1))

    def loss() -> Any:
        with torch.enable_grad():
            weight.grad = None
            value = weight.square().sum()
            value.backward()
        return value

    try:
        build([p for p in network.parameters() if p.requires_grad])
        if "network" not in build.keywords:  # one that looks at the network cannot train another weight
            build([weight]).step(loss)
    except REFUSALS as error:
        is_muon = str(node.get("_target_")) == "torch.optim.Muon"
        fix = "choose optimizer=muon, which trains the other parameters with AdamW" if is_muon else "correct its values"
        raise ConfigError("optimizer", None, first_line(error).rstrip("."), fix) from error
    try:
        for step in (0, 99):
            lr_schedule.factor(step, steps_per_epoch=10, total_epochs=10, **options)
    except REFUSALS as error:
        raise ConfigError("optimizer.schedule", None, first_line(error).rstrip("."), "correct its values") from error


def _steps(trainer: Mapping[str, Any], data: Any) -> None:
    loaders = {"train": data.train_dataloader, "val": data.val_dataloader}
    for stage, loader in loaders.items():
        limit, n_available = trainer.get(f"limit_{stage}_batches"), len(loader())
        if isinstance(limit, float) and limit > 0 and int(limit * n_available) == 0:
            reason = f"no batch of the {n_available} there are"
            raise ConfigError(f"trainer.limit_{stage}_batches", limit, reason, "raise it, or give a number of batches")


def _forward(cfg: DictConfig, network: nn.Module, data: Any) -> None:
    modes = {name: module.training for name, module in network.named_modules()}
    images = torch.zeros(2, data.channels, data.image_size, data.image_size)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = BatchFormat().selected(network.eval()(images))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise ConfigError("data.image_size", data.image_size, f"the model cannot take its images ({first_line(error)})",
                          "make model and data.image_size fit") from error  # fmt: skip
    finally:
        for name, module in network.named_modules():
            module.training = modes[name]
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (2, data.num_classes):
        raise ConfigError("data.num_classes", data.num_classes, f"two images give {cfg.model._target_}'s outputs {shape}",
                          "make the model's number of classes equal")  # fmt: skip
    _loss(cfg, data, logits.detach())


def _loss(cfg: DictConfig, data: Any, logits: torch.Tensor) -> None:
    """Evaluate the loss on two images with targets of each form that the recipe gives."""
    loss = loss_choice.build(cfg.objective)
    targets = [(torch.tensor([0, 1]), float(cfg.objective.label_smoothing))]
    targets += [(torch.eye(2, logits.shape[1]), 0.0)] if data.mixes else []
    try:
        for y, smoothing in targets:
            with torch.random.fork_rng(devices=[]):
                Objective(label_smoothing=smoothing, loss=loss).data_loss(logits.float(), y)
    except REFUSALS as error:
        raise ConfigError("objective.loss", None, f"cannot be evaluated ({first_line(error).rstrip('.')})",
                          "choose cross_entropy, mse or bce, or change your loss") from error  # fmt: skip
