"""Moments of the noise of the gradient with the Hessian, from random signs of the images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitscope.core.losses.targets import labeled
from vitscope.diagnostics.gradient_noise._gradient_sums import with_label
from vitscope.linalg.curvature.operator_factory import Curvatures
from vitscope.linalg.krylov_basis import dot
from vitscope.runtime import distributed
from vitscope.runtime.progress import track


@dataclass(frozen=True)
class HessianMoments:
    trace: float = float("nan")
    error: float = float("nan")
    curvature: float = float("nan")

    @property
    def noise_scale(self) -> float:
        return self.trace / self.curvature if self.trace > 0 and self.curvature > 0 else float("nan")


def hessian_moments(operators: Curvatures, mean: Tensor, n: int, n_vectors: int) -> HessianMoments:
    """Return estimates of ``tr(H Sigma)`` and ``G^T H G``.

    For independent random signs s, ``xi = sum_i s_i (g_i - g)`` has ``E xi xi^T = (n - 1) Sigma``: a backward pass of the losses
    weighted by ``s_i - mean s`` gives xi.
    """
    if n_vectors == 0:
        return HessianMoments()
    hessian = operators.mean()
    values = []
    for number in track(range(n_vectors), "noise and Hessian"):
        xi = _weighted_gradient(operators, n, np.random.default_rng((operators.options.seed, number)))
        values.append(dot(xi, hessian.data_product(xi)) / (n - 1))
    trace = float(np.mean(values))
    gradient = mean.to(hessian.dtype)
    curvature = dot(gradient, hessian.data_product(gradient)) - trace / n
    error = float(np.std(values, ddof=1) / np.sqrt(n_vectors)) if n_vectors > 1 else float("nan")
    return HessianMoments(trace, error, curvature)


def _weighted_gradient(operators: Curvatures, n: int, rng: np.random.Generator) -> Tensor:
    """Return the sum over images of ``(s_i - mean s) g_i`` ``(size,)``; signs are alike on all ranks."""
    probe, signs = operators.probe, torch.from_numpy(rng.integers(0, 2, n) * 2.0 - 1.0)
    signs -= signs.mean()
    counts = [int(labeled(y).sum()) for _, y in probe.batches]
    starts = np.cumsum([0, *counts])
    total = torch.zeros(sum(p.numel() for p in operators.parameters.values()), dtype=torch.float64, device=probe.device)
    with distributed.failing_together():
        for index, (x, y) in probe.local_batches():
            x, y = with_label(x, y)
            step = operators.options.micro_batch or max(1, len(y))
            for a in range(0, len(y), step):
                weights = signs[starts[index] + a : starts[index] + min(a + step, len(y))].to(probe.device, probe.dtype)
                losses = probe.objective.data_loss(operators.model(x[a : a + step]), y[a : a + step], "none")
                gradient = torch.autograd.grad(
                    (weights * losses).sum(), list(operators.parameters.values()), materialize_grads=True
                )
                total += torch.cat([g.reshape(-1) for g in gradient]).double()
    return distributed.all_reduce_sum(total).to(probe.dtype)
