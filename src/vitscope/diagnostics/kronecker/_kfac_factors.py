"""Kronecker factors of linear layers and convolutions through curvlinops, an optional package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitscope.core.losses.targets import hard_targets, labeled
from vitscope.core.probe import Probe
from vitscope.runtime import stop_flag

FISHERS = ("type-2", "mc", "empirical")
APPROXIMATIONS = ("expand", "reduce")


@dataclass(frozen=True)
class KroneckerFactors:
    """Eigenvalues of both factors of a layer, in descending order."""

    inputs: np.ndarray
    outputs: np.ndarray


def refuse_without_curvlinops() -> None:
    """Raise ValueError where curvlinops is not installed, or has no KFAC."""
    try:
        from curvlinops import KFACLinearOperator  # pyright: ignore[reportMissingImports]  an optional package
    except ImportError as error:
        raise ValueError(
            f"kronecker_factors needs curvlinops, which cannot be imported ({error}): pip install 'vitscope[kfac]'."
        ) from None
    if not hasattr(KFACLinearOperator, "compute_kronecker_factors"):
        raise ValueError(
            "kronecker_factors needs curvlinops 3.0, received a version without compute_kronecker_factors: pip install "
            "'vitscope[kfac]'."
        )


def covered_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers and convolutions by name whose weights are trained and which curvlinops takes."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and module.weight.requires_grad
        and (isinstance(module, nn.Linear) or (module.groups == 1 and module.padding_mode == "zeros"))
    }


def kronecker_factors_of(
    probe: Probe,
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    fisher: str,
    approximation: str,
    seed: int,
    *,
    with_eigenvalues: bool = True,
) -> dict[str, KroneckerFactors]:
    """Return the eigenvalues of the factors of the layers that a pass calls as modules, by name; none without eigenvalues."""
    from curvlinops import KFACLinearOperator  # pyright: ignore[reportMissingImports]  an optional package

    weights: list[Any] = [module.weight for module in layers.values()]
    operator = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        weights,
        _LabeledBatches(probe),
        check_deterministic=False,
        fisher_type=fisher,
        kfac_approx=approximation,
        seed=seed,
        num_data=sum(int(labeled(y).sum()) for _, y in probe.batches),
        num_per_example_loss_terms=1,
    )
    operator.compute_kronecker_factors()
    if not with_eigenvalues:
        return {}
    state = operator.state_dict()
    factors = {}
    for name in layers:
        inputs, outputs = state["input_covariances"].get(name), state["gradient_covariances"].get(name)
        if inputs is not None and outputs is not None:  # a layer whose weight is read past its module has none
            factors[name] = KroneckerFactors(_eigenvalues(inputs), _eigenvalues(outputs))
    return factors


class _LabeledBatches:
    """Images with a label and their classes, again and again."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.probe.iter_batches():
            stop_flag.check()
            counts = labeled(y)
            if bool(counts.any()):
                yield x[counts], hard_targets(y[counts])


def _eigenvalues(factor: Tensor) -> np.ndarray:
    if not bool(torch.isfinite(factor).all()):
        return np.full(len(factor), np.nan)
    return torch.linalg.eigvalsh(factor.detach().double()).flip(0).cpu().numpy()
