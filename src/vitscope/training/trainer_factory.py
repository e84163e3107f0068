"""Trainer and Lightning module of a configuration."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

from omegaconf import DictConfig

from vitscope.config import experiment_identity, instantiate, loading
from vitscope.runs.checkpoint_io import AtomicCheckpointIO
from vitscope.runs.run_dir import Run
from vitscope.training.checkpoint_callback import Checkpoints
from vitscope.training.diagnostics_callback import DiagnosticCallback
from vitscope.training.early_stopping import EarlyChecks
from vitscope.training.lightning_module import Classifier
from vitscope.training.progress_callbacks import EpochAccuracy, PlainProgress
from vitscope.training.stop_callbacks import HeldFolder, SameConfiguration, StopsWithoutSaving


def build_module(cfg: DictConfig, network: Any, data: Any) -> Classifier:
    """Return the Lightning module that trains ``network`` with the optimizer, schedule and objective of a configuration."""
    optimizer = loading.plain(cfg.optimizer)
    lr_schedule = optimizer.pop("schedule", {})
    return Classifier(
        network,
        num_classes=data.num_classes,
        optimizer=instantiate.instantiate({**optimizer, "_partial_": True}, "optimizer"),
        lr_schedule=lr_schedule,
        label_smoothing=float(cfg.objective.label_smoothing),
        mix=data.mixed if data.mixes else None,
        seed=int(cfg.seed),
        compile=bool(cfg.compile),
        channels_last=bool(cfg.get("channels_last", False)),
    )


def build_trainer(cfg: DictConfig, run: Run, logger: Any, diagnostics: DiagnosticCallback) -> Any:
    """Return Lightning's Trainer with the callbacks of a configuration, in the order that checks, saves and diagnostics need."""
    from pytorch_lightning.callbacks import EarlyStopping, RichProgressBar

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # the loaders are ours, in memory, and know their position; Lightning's advice on workers and samplers does not apply
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 on torch 2.14
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings(
        "ignore", message=".*The number of training batches .* is smaller than the logging interval.*"
    )
    warnings.filterwarnings("ignore", message=".*You're resuming from a checkpoint that ended before the epoch ended.*")
    shown = cfg.trainer.get("enable_progress_bar", True)
    bar = [] if not shown else [RichProgressBar() if sys.stdout.isatty() else PlainProgress()]
    own = [instantiate.instantiate(node, f"callbacks.{name}") for name, node in cfg.callbacks.items()]
    own.sort(
        key=lambda callback: isinstance(callback, Checkpoints)
    )  # a stop is saved after an average has seen the step
    stoppings = [callback for callback in own if isinstance(callback, EarlyStopping)]
    if stoppings:  # an epoch is checked before it is saved
        own.insert(0, EarlyChecks(stoppings))
    if not any(isinstance(callback, Checkpoints) for callback in own):
        own.append(StopsWithoutSaving())
    trainer = instantiate.instantiate(
        cfg.trainer,
        "trainer",
        logger=logger,
        callbacks=[
            HeldFolder(run),
            SameConfiguration(experiment_identity.config_hash(cfg)),
            EpochAccuracy(),
            *own,
            *bar,
            diagnostics,
        ],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(run.path),
        enable_progress_bar=shown and sys.stdout.isatty(),
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    # Lightning would put its SIGTERM handler before ours, broadcast from inside it and end with exit code 0
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer
