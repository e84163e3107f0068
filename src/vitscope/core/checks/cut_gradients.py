"""Search for ways from the weights to the loss that autograd does not see, as through ``detach()`` or ``no_grad``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitscope.core.batches.batch_inputs import Inputs
from vitscope.core.guard.pass_comparison import output_tensors
from vitscope.core.objective import Objective
from vitscope.core.sharding.sharded_parameters import LocalShard

#: changes of the loss, as shares of it, over which its slope is measured
_CHANGES = (1e-2, 1e-3)
#: largest step as a share of the weights' length: behind it the loss is another one, as with a gradient of rounding
_LONGEST_STEP = 1e-2
#: largest difference of slopes that finite steps and rounding to float32 explain
_LARGEST_GAP = 2e-3


class CutValues(TorchFunctionMode):
    """Note the modules in which values that have a gradient are used without it, until the context is left.

    Args:
        model: The network that runs inside.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: dict[str, None] = {}
        self._running: list[str] = []
        self._hooks = ExitStack()
        for path, module in model.named_modules():
            name = path or type(model).__name__
            # hooks of others, which read what a module returns, are no part of it
            enter = module.register_forward_pre_hook(lambda _, __, name=name: self._running.append(name))
            leave = module.register_forward_hook(lambda *_: self._leave(), prepend=True, always_call=True)
            self._hooks.callback(enter.remove)
            self._hooks.callback(leave.remove)

    def _leave(self) -> None:
        if self._running:  # not where a hook before ours raised an error
            self._running.pop()

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else ""
        is_cut = name in ("detach", "detach_") or attribute == "data" or not (attribute or torch.is_grad_enabled())
        if self._running and is_cut and any(t.requires_grad for t in output_tensors((args, kwargs or {}))):
            self.names[self._running[-1]] = None
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def slope_gap(model: nn.Module, x: Inputs, y: Tensor, objective: Objective, gradient: Tensor) -> float:
    """Return how much the loss's slope along its gradient differs from the gradient's length, as a share of the larger one.

    The slope is a central difference. The gap is zero up to errors of the step where the gradient is that of the loss, and zero
    where no slope can be told: in half precision, with weights in shards over ranks, and where the loss changes too little. The
    weights are given back as they were.

    Args:
        model: The model inside a guard, in eval mode.
        x: Images (B, C, H, W), or the inputs of a batch.
        y: Their targets.
        objective: The objective whose data term is differentiated.
        gradient: Gradient of the data term with respect to all parameters that require gradients, as one vector.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if any(isinstance(p, LocalShard) for p in model.parameters()):
        return 0.0  # a forward pass is a matter of all ranks, and steps differ among them
    length = float(gradient.double().norm())
    output = model(x)
    loss = abs(float(objective.data_loss(output, y)))
    tensors = [*parameters, *output_tensors(output)]
    is_coarse = any(t.is_floating_point() and torch.finfo(t.dtype).bits < 32 for t in tensors)
    if is_coarse or not (0 < length < float("inf") and 0 < loss < float("inf")):
        return 0.0
    longest_step = _LONGEST_STEP * float(torch.stack([p.double().norm() for p in parameters]).norm())
    steps = [change * loss / length for change in _CHANGES]  # along which the loss changes by these shares of it
    original_values = [p.detach().clone() for p in parameters]
    parts = gradient.split([p.numel() for p in parameters])

    def loss_after(step: float) -> float:
        for p, value, part in zip(parameters, original_values, parts):
            p.copy_(value.add(part.view_as(p), alpha=step / length))
        return float(objective.data_loss(model(x), y))

    gaps = []
    try:
        for step in steps:
            if step > longest_step:
                continue
            slope = (loss_after(step) - loss_after(-step)) / (2 * step)
            gaps.append(abs(slope - length) / max(abs(slope), length))
    finally:
        for p, value in zip(parameters, original_values):
            p.copy_(value)
    return min(gaps, default=0.0)


def is_large_gap(gap: float) -> bool:
    """Whether slopes differ by more than finite steps explain."""
    return gap > _LARGEST_GAP
