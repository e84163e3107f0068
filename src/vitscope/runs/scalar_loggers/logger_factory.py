"""Start the loggers beside W&B that a configuration chooses, each with the configuration of the run where it takes one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger

from vitscope.runs.run_dir import Run
from vitscope.runs.scalar_loggers.trackio_logger import TrackioLogger
from vitscope.runs.wandb_mirror import flattened
from vitscope.runtime import safe_files

#: address of MLflow's server: from the environment alone, since a run's configuration may be a stranger's
MLFLOW_ADDRESS = "MLFLOW_TRACKING_URI"
#: fact in ``provenance.json`` by which a resumed run continues the same run of MLflow
MLFLOW_RUN = "mlflow_run_id"


def start_logger(name: str, options: Mapping[str, Any], cfg: DictConfig, run: Run) -> Logger:
    """Return a logger that takes rows.

    Args:
        name: ``csv``, ``tensorboard``, ``mlflow`` or ``trackio``.
        options: The logger's keys in the configuration.
        cfg: Configuration of the run, which the logger shows without secrets; `csv` has it in ``config.yaml`` beside it.
        run: Run folder.
    """
    starts = {"csv": _csv, "tensorboard": _tensorboard, "mlflow": _mlflow, "trackio": _trackio}
    return starts[name](options, cfg, run)


def _csv(options: Mapping[str, Any], cfg: DictConfig, run: Run) -> Logger:
    folder = run.path / "csv"
    safe_files.refuse_links(folder)
    return CSVLogger(run.path, name=folder.name, **options)


def _tensorboard(options: Mapping[str, Any], cfg: DictConfig, run: Run) -> Logger:
    folder = run.path / "tensorboard"
    safe_files.refuse_links(folder)
    logger = TensorBoardLogger(run.path, name=folder.name, version="", default_hp_metric=False, **options)
    logger.log_hyperparams(flattened(cfg))
    return logger


def _mlflow(options: Mapping[str, Any], cfg: DictConfig, run: Run) -> Logger:
    address = os.environ.get(MLFLOW_ADDRESS) or f"sqlite:///{Path(str(cfg.paths.runs)).absolute()}/mlflow.db"
    tags = {"vitscope.tags": ",".join(cfg.get("tags") or []), "vitscope.name": cfg.get("name") or ""}
    logger = MLFlowLogger(
        run_name=run.id,
        tracking_uri=address,
        tags={key: value for key, value in tags.items() if value},
        run_id=run.provenance().get(MLFLOW_RUN),
        **options,
    )
    is_new = MLFLOW_RUN not in run.provenance()
    run.note(**{MLFLOW_RUN: logger.run_id})
    if is_new:  # its values cannot change
        logger.log_hyperparams(flattened(cfg))
    return logger


def _trackio(options: Mapping[str, Any], cfg: DictConfig, run: Run) -> Logger:
    logger = TrackioLogger(options["project"], run.id, cfg.get("name"))
    logger.log_hyperparams(flattened(cfg))
    return logger
