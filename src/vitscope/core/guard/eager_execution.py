"""Run models uncompiled, without wrappers for several devices, and with activation checkpoints that can be differentiated.

Inside a compiled graph no hook is called and no second derivative exists; ``nn.DataParallel`` cannot be called with other
parameters, and ``DistributedDataParallel`` exchanges buffers in every pass, which ranks with unequal shares would wait for.
Reentrant activation checkpoints (``torch.utils.checkpoint``, ``use_reentrant=True``) refuse ``torch.autograd.grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.utils import checkpoint

from vitscope.runtime.torch_internals import is_compiler_loaded, uncompiled


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile(model)``, ``nn.DataParallel`` and ``DistributedDataParallel``; any other itself.

    It has the same weights. The wrappers may stand around each other in any order.
    """
    while True:
        model = uncompiled(model)
        if not isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            return model
        model = cast(nn.Module, model.module)


@contextmanager
def eager_execution(model: nn.Module) -> Iterator[None]:
    """Run everything uncompiled that ``torch.compile`` or ``module.compile()`` compiled, whole models, parts and methods.

    Activation checkpoints are made without reentering autograd, whatever the model asks for.

    Raises:
        ValueError: The model has a part made by ``torch.jit``, whose Python code is gone.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"Expected modules of Python code, received {name or 'a model'!r} made by torch.jit.script or torch.jit.trace, "
                "whose parts cannot be observed: pass the nn.Module that it was made from."
            )
    with _differentiable_checkpoints():
        if not is_compiler_loaded():
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield


class _PlainCheckpoint:
    """What ``torch.utils.checkpoint`` calls for a reentrant checkpoint: the same values, recomputed by hooks of saved tensors."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


@contextmanager
def _differentiable_checkpoints() -> Iterator[None]:
    """Make reentrant activation checkpoints as others are."""
    original_function = checkpoint.CheckpointFunction
    cast(Any, checkpoint).CheckpointFunction = _PlainCheckpoint
    try:
        yield
    finally:
        cast(Any, checkpoint).CheckpointFunction = original_function
