"""Sharpness-aware minimization (Foret et al. 2021, arXiv 2010.01412) around any optimizer: two passes per step.

The paper under study trained nothing with it (docs/definitions.md section 11). Neither torch nor timm has an implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import AdamW, Optimizer

from vitscope.runtime.torch_internals import BatchNormBase
from vitscope.runtime.value_ranges import NonNegativeFloat


class SAM(Optimizer):
    """Moves by the gradient at ``w + rho g / ||g||``, g being the gradient at w, with the steps of another optimizer.

    ``||g||`` is taken over all parameters together, as in the paper's equation 2 with p = 2. Clipping by norm changes the
    length of g, not the direction of the ascent. Under several processes g is the gradient of the whole batch, averaged
    before the ascent, so that the result is that of one process (the authors' own code ascends on each device apart).

    Its state and parameter groups are the other optimizer's: schedules and checkpoints see nothing else.

    Args:
        params: Parameters to train.
        base: Function of parameters, ``lr`` and ``weight_decay`` that returns the optimizer that makes the steps.
        rho: Radius of the ascent in weight space; 0 gives the base optimizer. The default is that of the paper.
        lr: Learning rate of the base optimizer.
        weight_decay: Weight decay of the base optimizer; the ascent is on the loss alone.

    Attributes:
        perturbed: Whether the weights are those at the end of the ascent, during the second pass.

    Raises:
        ValueError: A negative or infinite ``rho``.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        base: Callable[..., Optimizer] = AdamW,
        rho: float = 0.05,
        lr: float = 1e-3,
        weight_decay: NonNegativeFloat = 0.0,
    ) -> None:
        if not 0 <= rho < float("inf"):
            raise ValueError(f"Expected rho to be finite and at least 0, received {rho!r}.")
        params = list(params)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.base = base(params, lr=lr, weight_decay=weight_decay)
        self.rho = rho
        self.perturbed = False
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state, self.defaults = self.base.param_groups, self.base.state, self.base.defaults

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; return the loss of the first pass, at w.

        Args:
            closure: Function that clears the gradients, computes the loss on the step's batch and differentiates it.

        Raises:
            ValueError: No closure, without which there is no second pass.
        """
        if closure is None:
            raise ValueError("Expected a closure that computes the loss again, received None.")
        with torch.enable_grad():
            loss = closure()
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        weights = [p.detach().clone() for p in trained]  # w + e - e differs from w by rounding
        _ascend(trained, self.rho)
        self.perturbed = True
        try:
            with torch.enable_grad():
                closure()
        finally:
            self.perturbed = False
            for p, weight in zip(trained, weights):
                p.copy_(weight)
        self.base.step()
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state of the base optimizer, which this optimizer shares."""
        self.base.load_state_dict(dict(state_dict))
        self._share()


def _ascend(trained: list[nn.Parameter], rho: float) -> None:
    gradients: list[Tensor] = [p.grad for p in trained if p.grad is not None]
    norm = get_total_norm(gradients)
    if rho == 0 or norm == 0:  # no direction to ascend in
        return
    for p, g in zip(trained, gradients):
        p.add_(g * (rho / norm).to(g.device))


@contextmanager
def still_statistics(network: nn.Module, still: bool = True) -> Iterator[None]:
    """Keep BatchNorm's running statistics unchanged, while batches are normalized by their own statistics.

    Args:
        network: Model containing the BatchNorm layers.
        still: If False, do nothing.
    """
    layers = [m for m in network.modules() if isinstance(m, BatchNormBase) and m.track_running_stats] if still else []
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
