"""Models whose loss is known in closed form, and a small real one, for tests of landscapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import vitscope as vs
from vitscope.core.objective import Objective


@dataclass(frozen=True)
class Squared(Objective):
    """Half the squared distance of the logits from one-hot targets: quadratic in the weights of a linear model."""

    def data_loss(self, logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        losses = 0.5 * (logits - nn.functional.one_hot(y, logits.shape[1])).square().sum(dim=1)
        return {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[reduction]


def batches(n: int = 12, shape: tuple[int, ...] = (6,), classes: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (n,), generator=generator)
    return list(zip(x.split([5, n - 5]), y.split([5, n - 5])))


def bowl(weight_decay: float = 0.0) -> vs.Probe:
    """Return a probe whose nll is exactly quadratic in the weights (4, 6)."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
    return vs.Probe(model, batches(), Squared(weight_decay=weight_decay))


def bowl_at(weights: Tensor) -> float:
    """Return the nll of `bowl` at weights (4, 6), by a direct formula."""
    x, y = (torch.cat(parts) for parts in zip(*batches()))
    return float(0.5 * (x @ weights.T - torch.eye(4, dtype=torch.float64)[y]).square().sum(dim=1).mean())


def real(weight_decay: float = 0.1) -> vs.Probe:
    """Return a probe of a small convolutional network with BatchNorm whose statistics are not the initial ones."""
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    ).double()
    data = batches(shape=(3, 6, 6))
    model(data[0][0])
    return vs.Probe(model, data, Objective(weight_decay=weight_decay))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
