"""Build the Lightning module and the trainer of a configuration."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import torch
from omegaconf import DictConfig
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EarlyStopping, RichProgressBar

from vitscope.config import experiment_identity, factories, instantiate, loading
from vitscope.config.loss import loss_choice
from vitscope.runs.checkpoints.checkpoint_io import AtomicCheckpointIO
from vitscope.runs.run_dir import Run
from vitscope.runtime.errors import ConfigError
from vitscope.training import lightning_internals
from vitscope.training.checkpoint_callback import Checkpoints
from vitscope.training.diagnostics_callback import DiagnosticCallback
from vitscope.training.lightning_module import Classifier
from vitscope.training.progress_callbacks import EpochAccuracy, PlainProgress
from vitscope.training.stop_callbacks import ConfigurationCheck, EarlyChecks, RunFolderCheck, StopWithoutCheckpoint

#: advice of Lightning that does not apply to this package's loaders, which are in memory and know their position, and a
#: deprecation that Lightning 2.6 triggers on torch 2.14
_IGNORED_WARNINGS = (
    ".*LeafSpec.*",
    ".*does not have many workers.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*You're resuming from a checkpoint that ended before the epoch ended.*",
)


def check_accelerator(cfg: DictConfig) -> None:
    """Refuse a training on GPUs where there is none, before a folder is made.

    Raises:
        ConfigError: With the keys of the same training on the CPU.
    """
    accelerator = cfg.trainer.get("accelerator")
    is_on_cpu = accelerator == "cpu" or not torch.cuda.is_available()
    if cfg.trainer.get("sync_batchnorm") and is_on_cpu:
        raise ConfigError(
            "trainer.sync_batchnorm", True, "torch's SyncBatchNorm needs CUDA GPUs", "set it to false on the CPU"
        )
    if accelerator not in ("gpu", "cuda") or torch.cuda.is_available():
        return
    if accelerator == "gpu" and torch.backends.mps.is_available():
        return
    is_of_several_processes = cfg.trainer.get("strategy") not in (None, "auto")
    fix = "set trainer=cpu, or trainer.accelerator=cpu for a resumed run"
    if is_of_several_processes:
        fix = "set trainer.accelerator=cpu trainer.devices=2 for two processes on the CPU"
    raise ConfigError("trainer.accelerator", accelerator, "torch finds no GPU on this machine", fix)


def build_module(cfg: DictConfig, network: Any, data: Any) -> Classifier:
    """Return the Lightning module that trains ``network`` with the optimizer, schedule and objective of a configuration."""
    optimizer = loading.plain(cfg.optimizer)
    lr_schedule = optimizer.pop("schedule", {})
    return Classifier(
        network,
        num_classes=data.num_classes,
        optimizer=factories.optimizer_builder(optimizer, network),
        lr_schedule=lr_schedule,
        label_smoothing=float(cfg.objective.label_smoothing),
        loss=loss_choice.build(cfg.objective),
        mix=data.mixed if data.mixes else None,
        seed=int(cfg.seed),
        compile=bool(cfg.compile),
        channels_last=bool(cfg.get("channels_last", False)),
    )


def build_trainer(cfg: DictConfig, run: Run, logger: Any, diagnostics: DiagnosticCallback) -> Any:
    """Return Lightning's Trainer with the callbacks of a configuration.

    Args:
        cfg: Validated configuration.
        run: Run folder; checkpoints are written below it.
        logger: Lightning logger of the run.
        diagnostics: Callback that runs the analyses, after all others.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    show_progress = cfg.trainer.get("enable_progress_bar", True)
    is_terminal = sys.stdout.isatty()
    trainer = instantiate.instantiate(
        cfg.trainer,
        "trainer",
        logger=logger,
        callbacks=[
            RunFolderCheck(run),
            ConfigurationCheck(experiment_identity.config_hash(cfg)),
            EpochAccuracy(),
            *_configured_callbacks(cfg),
            *_progress_callbacks(show_progress, is_terminal),
            diagnostics,
        ],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(run.path),
        enable_progress_bar=show_progress and is_terminal,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    lightning_internals.keep_signal_handlers(trainer)
    return trainer


def _progress_callbacks(show_progress: bool, is_terminal: bool) -> list[Callback]:
    if not show_progress:
        return []
    return [RichProgressBar()] if is_terminal else [PlainProgress()]


def _configured_callbacks(cfg: DictConfig) -> list[Callback]:
    """Return the callbacks of a configuration, early stopping before and checkpoints after the others."""
    callbacks = [instantiate.instantiate(node, f"callbacks.{name}") for name, node in cfg.callbacks.items()]
    # a checkpoint is written after a weight average has seen the step
    callbacks.sort(key=lambda callback: isinstance(callback, Checkpoints))
    early_stopping = [callback for callback in callbacks if isinstance(callback, EarlyStopping)]
    if early_stopping:  # an epoch is checked before it is saved
        callbacks.insert(0, EarlyChecks(early_stopping))
    if not any(isinstance(callback, Checkpoints) for callback in callbacks):
        callbacks.append(StopWithoutCheckpoint())
    return callbacks
