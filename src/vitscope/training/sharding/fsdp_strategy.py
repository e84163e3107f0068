"""FSDP2: weights, gradients and the optimizer's state are sharded over ranks; checkpoints are whole files as in other runs."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType, fully_shard
from torch.optim import Optimizer

from vitscope.core.sharding.sharded_parameters import is_sharded
from vitscope.linalg.curvature.recomputed_blocks import block_modules
from vitscope.runs.checkpoints import checkpoint_io


class Fsdp(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 with all ranks as data-parallel ones, whole checkpoints, and a timeout in seconds.

    Args:
        timeout_s: Seconds that a process waits for another one that died or hangs, before the job ends with exit code 7.
        **options: Keyword arguments of `ModelParallelStrategy`.
    """

    def __init__(self, timeout_s: float = 600.0, **options: Any) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=timedelta(seconds=timeout_s),
            **options,
        )

    def connect(self, model: LightningModule) -> None:
        """Shard the module's network in its hook ``configure_model``, which Lightning calls before it makes the optimizer.

        The hook is the object's alone: with one of the class, Lightning warns of sharding in every run that averages weights.
        """
        super().connect(model)
        network = model.model
        if isinstance(network, nn.Module):
            model.configure_model = lambda: None if is_sharded(network) else self.shard(network)

    def setup_environment(self) -> None:
        """Take all processes as data-parallel ones."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, network: nn.Module) -> None:
        """Shard a network's weights over all ranks: each unit of its structure for itself, then the rest.

        A network whose units are not known is sharded as one, so that all its weights are gathered at once in a pass.
        """
        mesh = self.device_mesh["data_parallel"]
        try:
            units = list(block_modules(network).values())
        except ValueError:
            units = []
        for unit in units:
            fully_shard(unit, mesh=mesh)
        fully_shard(network, mesh=mesh)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Make a step with the first process's buffers, such as running statistics, on all, as DDP does."""
        self._share_buffers()
        return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate with the first process's buffers on all."""
        self._share_buffers()
        return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate with the first process's buffers on all."""
        self._share_buffers()
        return super().test_step(*args, **kwargs)

    def _share_buffers(self) -> None:
        """Copy the first process's buffers to all: each saw other images, and their statistics would drift apart."""
        network = getattr(self.lightning_module, "model", None)
        if isinstance(network, nn.Module):
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, 0)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's whole state on rank 0; an optimizer without a state before its first step is left so.

        PyTorch's `get_optimizer_state_dict` makes a state by a step with gradients of zero. AdamW then counts one step too many,
        and its bias correction is another from the first step on.
        """
        if not optimizer.state:
            return optimizer.state_dict()
        return super().optimizer_state(optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write whole weights and states, which rank 0 has gathered, as any other strategy does."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a verified checkpoint on every rank and give each its shards; return all of it but weights and optimizers."""
        content = checkpoint_io.read(Path(self.broadcast(checkpoint_path)))
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, content.pop("state_dict"), options=options)
        states: list[Mapping[str, Any]] = content.get("optimizer_states", [])
        for optimizer, state in zip(self.optimizers, states):
            if state["state"]:
                self._load_optimizer(optimizer, state, options)
        return content

    def _load_optimizer(self, optimizer: Optimizer, state: Mapping[str, Any], options: StateDictOptions) -> None:
        """Give an optimizer its shards of a whole state, which numbers parameters; shards are found by name."""
        assert self.model is not None
        by_name = FullyShardedDataParallel.rekey_optim_state_dict(dict(state), OptimStateKeyType.PARAM_NAME, self.model)
        set_optimizer_state_dict(self.model, optimizer, by_name, options=options)
