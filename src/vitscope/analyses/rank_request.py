"""Which processes an analysis runs in: one, those of torchrun or SLURM, or those that ``trainer=ddp`` asks for.

Of ``conf/trainer`` an analysis takes the devices, the number of nodes and the timeout; everything else is a training's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from vitscope.runtime.errors import ConfigError

#: seconds without progress after which a job ends, where no ``trainer`` was chosen: the value of ``conf/trainer/ddp.yaml``
DEFAULT_TIMEOUT = 600.0

#: keys of the trainer that an analysis uses
_KEYS = ("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy.timeout_s")
_DDP = "vitscope.training.ddp_strategy.Ddp"
_TASKS = "${oc.decode:${oc.env:SLURM_NTASKS_PER_NODE,1}}"


@dataclass(frozen=True)
class RankRequest:
    """The processes of an analysis.

    Attributes:
        n_ranks: Processes to start on this machine; 0 where a launcher has started them.
        timeout_s: Seconds without progress after which a job in which one process waits for another ends.
    """

    n_ranks: int
    timeout_s: float = DEFAULT_TIMEOUT


def launched_world_size() -> int:
    """Return the number of processes that a launcher started, this one among them; 1 without a launcher.

    torchrun sets ``RANK`` and ``WORLD_SIZE``; ``srun`` sets ``SLURM_PROCID`` and ``SLURM_STEP_NUM_TASKS``. A command in a batch
    script without ``srun`` is one process, whatever the number of tasks of the job.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _number("WORLD_SIZE")
    if "SLURM_PROCID" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        return _number("SLURM_STEP_NUM_TASKS")
    return 1


def take_request(cfg: DictConfig, overrides: Sequence[str] = ()) -> RankRequest | None:
    """Remove ``trainer`` from an analysis's configuration and return the processes that it asks for; None for one process.

    Args:
        cfg: The composed configuration; ``device`` is set to ``cpu`` with ``trainer.accelerator=cpu``.
        overrides: Overrides of the command line, to refuse settings of a training.

    Raises:
        ConfigError: A trainer of one process, a setting that only a training has, no number of processes for a CPU, a device
            that all processes would share, or ``trainer=slurm`` outside of ``srun``.
    """
    n_launched = launched_world_size()
    trainer = cfg.get("trainer")
    if "trainer" in cfg:
        with open_dict(cfg):
            del cfg["trainer"]
    if trainer is not None:
        request = _requested(cfg, trainer, overrides, n_launched)
    else:
        request = RankRequest(0) if n_launched > 1 else None
    if request is not None and str(cfg.device).startswith("cuda:"):
        reason = "all processes would share one GPU"
        raise ConfigError(
            "device", cfg.device, reason, "set device=cuda, and CUDA_VISIBLE_DEVICES for a choice of GPUs"
        )
    return request


def _requested(cfg: DictConfig, trainer: Any, overrides: Sequence[str], n_launched: int) -> RankRequest | None:
    _check(trainer, overrides)
    timeout = OmegaConf.select(trainer, "strategy.timeout_s")
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout < float("inf"):
        raise ConfigError("trainer.strategy.timeout_s", timeout, "not a positive number of seconds", "set it to 600")
    raw = OmegaConf.to_container(trainer, resolve=False)
    is_slurm = isinstance(raw, Mapping) and raw.get("devices") == _TASKS
    if trainer.get("accelerator") == "cpu":
        if str(cfg.device).startswith("cuda"):
            raise ConfigError("device", cfg.device, "trainer.accelerator=cpu asks for the CPU", "leave one of them out")
        cfg.device = "cpu"
    if n_launched > 1:
        _check_number(trainer, n_launched, is_slurm=is_slurm)
        return RankRequest(0, float(timeout))
    if is_slurm:
        if "SLURM_STEP_NUM_TASKS" not in os.environ:
            fix = "start it as srun python analyze.py ... trainer=slurm, or set trainer=ddp"
            raise ConfigError("trainer", "slurm", "srun did not start this process", fix)
        return None  # a step of one task
    if trainer.get("num_nodes", 1) != 1:
        fix = "start it with torchrun --nnodes=... or with srun and trainer=slurm"
        raise ConfigError("trainer.num_nodes", trainer.num_nodes, "analyze.py starts processes on one machine", fix)
    n_ranks = _number_to_start(trainer, str(cfg.device))
    return RankRequest(n_ranks, float(timeout)) if n_ranks > 1 else None


def _check(trainer: Any, overrides: Sequence[str]) -> None:
    if OmegaConf.select(trainer, "strategy._target_", default=None) != _DDP:
        reason = "an analysis takes trainer=ddp or trainer=slurm alone"
        fix = "leave it out; device=cpu or device=cuda says where analyze.py measures"
        raise ConfigError("trainer", None, reason, fix)
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key.startswith("trainer.") and key not in _KEYS:
            raise ConfigError(
                key, value, "a setting of a training", f"leave it out; an analysis takes {', '.join(_KEYS)}"
            )


def _check_number(trainer: Any, n_launched: int, *, is_slurm: bool) -> None:
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes", 1)
    is_number = isinstance(devices, int) and isinstance(nodes, int)
    if is_number and not is_slurm and devices * nodes != n_launched:
        reason = f"{n_launched} processes were started"
        raise ConfigError(
            "trainer.devices", devices, reason, f"set trainer.devices={n_launched // nodes}, or leave it out"
        )


def _number_to_start(trainer: Any, device: str) -> int:
    devices = trainer.get("devices")
    if isinstance(devices, int) and not isinstance(devices, bool) and devices >= 1:
        if device != "cpu" and trainer.get("accelerator") != "cpu":
            n_gpus = _gpus()
            if devices > n_gpus:
                raise ConfigError(
                    "trainer.devices", devices, f"there are {n_gpus} GPUs", f"set trainer.devices={n_gpus}"
                )
        return devices
    if devices not in ("auto", -1, "-1"):
        fix = "set it to 2, or to auto for all GPUs; CUDA_VISIBLE_DEVICES chooses GPUs"
        raise ConfigError("trainer.devices", devices, "not a number of processes", fix)
    if device == "cpu":
        raise ConfigError("trainer.devices", devices, "a CPU has no number of devices", "set trainer.devices=2")
    return _gpus()


def _gpus() -> int:
    """Return the number of GPUs.

    Raises:
        ConfigError: There is none.
    """
    import torch  # a process that only starts others on a CPU does not load it

    if not torch.cuda.is_available():
        fix = "set trainer.accelerator=cpu trainer.devices=2 for two processes on the CPU"
        raise ConfigError("trainer.accelerator", "gpu", "torch finds no GPU on this machine", fix)
    return torch.cuda.device_count()


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdigit():
        raise ConfigError(name, text, "not a number of processes", "unset it, or start with torchrun")
    return int(text)
