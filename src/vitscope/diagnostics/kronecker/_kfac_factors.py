"""Kronecker factors of linear layers and convolutions through curvlinops, an optional package."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscope.core.batches.batch_inputs import Inputs
from vitscope.core.losses.targets import hard_targets, labeled
from vitscope.core.probe import Probe
from vitscope.runtime import stop_flag

Fisher = Literal["type-2", "mc", "empirical"]
FISHERS: tuple[str, ...] = get_args(Fisher)
Approximation = Literal["expand", "reduce"]
APPROXIMATIONS: tuple[str, ...] = get_args(Approximation)


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


def covered_layers(model: nn.Module, images: Inputs) -> dict[str, nn.Module]:
    """Return the layers by name whose factors curvlinops computes rightly.

    These are linear layers and convolutions with PyTorch's own forward pass and a trained weight of their own, which a pass calls
    once. Left out are convolutions in groups, with other padding than zeros, or that pad their input themselves; weights that
    are made before each pass (weight norm, pruning); and weights that several modules have or that a pass uses several times.

    Args:
        model: The guarded model.
        images: A few images, which pass through the model once.
    """
    owners = Counter(
        id(p) for m in model.modules() for _, p in m.named_parameters(recurse=False, remove_duplicate=False)
    )
    layers = {
        name: module
        for name, module in model.named_modules()
        if _is_plain(module) and module.weight.requires_grad and owners[id(module.weight)] == 1
    }
    calls: Counter[str] = Counter()
    with ExitStack() as stack:
        for name, module in layers.items():
            hook = module.register_forward_hook(lambda *_, name=name: calls.update([name]))
            stack.callback(hook.remove)
        with torch.no_grad():
            model(images)
    return {name: module for name, module in layers.items() if calls[name] == 1}


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Tell whether a module is a linear layer or a convolution that does no more than PyTorch's."""
    own_parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    if "weight" not in own_parameters or "forward" in vars(module):
        return False
    if isinstance(module, nn.Conv2d):
        kind = type(module)
        is_own_pass = kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward
        return is_own_pass and module.groups == 1 and module.padding_mode == "zeros"
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


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
        _criterion(probe, fisher),
        weights,
        _LabeledBatches(probe, soft=fisher == "empirical"),
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


def _criterion(probe: Probe, fisher: str) -> nn.CrossEntropyLoss:
    """Return the loss whose gradients make B: of the empirical Fisher matrix with the objective's targets.

    The other two do not depend on targets: the loss's Hessian in the outputs is that of the softmax, from which labels are drawn.
    """
    if fisher != "empirical":
        return nn.CrossEntropyLoss()
    criterion = nn.CrossEntropyLoss(label_smoothing=probe.objective.label_smoothing)

    def forward(outputs: Tensor, y: Tensor) -> Tensor:
        # curvlinops flattens soft targets (B, K)
        targets = y.reshape(outputs.shape).to(outputs.dtype) if y.numel() == outputs.numel() else y
        return F.cross_entropy(outputs, targets, label_smoothing=criterion.label_smoothing)

    vars(criterion)["forward"] = forward  # no subclass: curvlinops tells losses by their class itself
    return criterion


class _LabeledBatches:
    """Images with a label and their targets, again and again.

    Args:
        probe: The batches.
        soft: Whether soft targets stay; else their most probable class takes their place.
    """

    def __init__(self, probe: Probe, soft: bool) -> None:
        self.probe, self.soft = probe, soft

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.probe.iter_batches():
            stop_flag.check()
            counts = labeled(y)
            if bool(counts.any()):
                yield x[counts], y[counts] if self.soft else hard_targets(y[counts])


def _eigenvalues(factor: Tensor) -> np.ndarray:
    if not bool(torch.isfinite(factor).all()):
        return np.full(len(factor), np.nan)
    return torch.linalg.eigvalsh(factor.detach().double()).flip(0).cpu().numpy()
