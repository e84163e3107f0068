"""Networks in which a module, or a parameter, stands at several places: measured like their copies, and given back whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from vitscope.core.guard.substituted_call import substituted_call


class Shared(nn.Module):
    """One layer twice: ``module`` is the same object under two names, ``parameter`` is a weight of two layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        if kind == "module":
            self.second = self.first
        else:
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x.flatten(1)).tanh()))


@pytest.mark.parametrize("kind", ["module", "parameter"])
def test_every_place_is_substituted_and_the_model_is_given_back(kind: str) -> None:
    torch.manual_seed(0)
    model = Shared(kind).double()
    x, y = torch.randn(5, 1, 2, 2, dtype=torch.float64), torch.arange(5) % 3
    before = dict(model.named_parameters(remove_duplicate=False))
    doubled = {name: 2 * p.detach() for name, p in model.named_parameters()}
    output = substituted_call(model, doubled, x)
    assert all(p is before[name] for name, p in model.named_parameters(remove_duplicate=False))
    other = Shared(kind).double()
    other.load_state_dict({name: 2 * p for name, p in model.state_dict().items()})
    assert torch.equal(output, other(x))
    part = {"first.weight": doubled["first.weight"]}
    with torch.no_grad():
        expected = substituted_call(model, part, x)
        model.first.weight.mul_(2)
        assert torch.equal(model(x), expected)
        model.first.weight.div_(2)
    dense = np.linalg.eigvalsh(dense_hessian_of(model, x, y))
    probe = vs.Probe(model, [(x, y)])
    for product in ("reverse", "linearize"):
        top = vs.hessian_eigenvalues(probe, k=1, tol=1e-9, product=product).eigenvalues[0]
        np.testing.assert_allclose(top, dense[np.abs(dense).argmax()], rtol=1e-7)
    assert all(p is before[name] for name, p in model.named_parameters(remove_duplicate=False))


def dense_hessian_of(model: nn.Module, x: Tensor, y: Tensor) -> np.ndarray:
    """Return the Hessian of a copy in which the shared tensors are made from one vector, without `functional_call`'s ties."""
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def loss(flat: Tensor) -> Tensor:
        first, *rest = (part.view_as(p) for part, p in zip(flat.split(sizes), named.values()))
        point = dict(zip(named, (first, *rest)))
        hidden = torch.nn.functional.linear(x.flatten(1), point["first.weight"], point["first.bias"]).tanh()
        bias = point.get("second.bias", point["first.bias"])
        hidden = torch.nn.functional.linear(hidden, point["first.weight"], bias)
        return torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(hidden, point["head.weight"], point["head.bias"]), y
        )

    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    assert isinstance(hessian, Tensor)
    return hessian.numpy()
