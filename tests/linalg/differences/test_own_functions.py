"""Second derivatives through a network's own autograd functions are compared with differences of gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.networks.activated import Activated, activated
from vitscope.core.sharding.sharded_parameters import LocalShard
from vitscope.linalg.differences import own_functions
from vitscope.linalg.differences.second_derivative_errors import NotTwiceDifferentiableError


class Swish(torch.autograd.Function):
    """x sigmoid(x), whose backward pass can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x.sigmoid() * (1 + x * (1 - x.sigmoid()))


class DetachedSwish(Swish):
    """The same with a backward pass that takes its input for a constant."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x = ctx.saved_tensors[0].detach()
        return g * x.sigmoid() * (1 + x * (1 - x.sigmoid()))


@pytest.mark.parametrize("product", ["reverse", "difference"])
def test_functions_with_a_wrong_second_derivative(product: str) -> None:
    exact = vs.hessian_eigenvalues(activated(nn.functional.silu), k=2, tol=1e-6).eigenvalues
    right = vs.hessian_eigenvalues(activated(Swish.apply), k=2, tol=1e-6, product=product).eigenvalues
    np.testing.assert_allclose(right, exact, rtol=1e-6)
    if product == "reverse":
        text = r"DetachedSwish differ by .*%.*; set product='difference'"
        with pytest.raises(NotTwiceDifferentiableError, match=text):
            vs.hessian_eigenvalues(activated(DetachedSwish.apply), k=1)
        with pytest.raises(NotTwiceDifferentiableError, match=text):  # once more: it has not passed the check
            vs.hessian_trace(activated(DetachedSwish.apply), n_vectors=1)
    else:
        wrong = vs.hessian_eigenvalues(activated(DetachedSwish.apply), k=2, tol=1e-6, product=product)
        np.testing.assert_allclose(wrong.eigenvalues, exact, rtol=1e-6)


class Kinked(Activated):
    """The network with a ReLU before its own activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(nn.functional.relu(self.first(x.flatten(1)))))


def test_kinks_in_float32_hinder_the_comparison_in_that_network_alone(caplog: pytest.LogCaptureFixture) -> None:
    """A class that could not be compared in one network is compared in the next, which shows its fault."""
    torch.manual_seed(0)
    kinked = vs.Probe(Kinked(LateSwish.apply), [(torch.randn(8, 1, 5, 5), torch.randint(3, (8,)))])
    for _ in range(2):
        assert np.isfinite(vs.hessian_eigenvalues(kinked, k=1).eigenvalues).all()
    (notice,) = [r.getMessage() for r in caplog.records if "LateSwish are not checked" in r.getMessage()]
    assert "the network has kinks (relu" in notice
    with pytest.raises(NotTwiceDifferentiableError, match="LateSwish differ by"):
        vs.hessian_eigenvalues(activated(LateSwish.apply), k=1)


class LateSwish(DetachedSwish):
    """A class of this test alone, for a class is compared once in a process."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_in_half_precision_are_compared_in_float32(dtype: torch.dtype) -> None:
    assert vs.hessian_eigenvalues(activated(Swish.apply, dtype), k=1).card.dtype == "float32"
    with pytest.raises(NotTwiceDifferentiableError, match="DetachedSwish differ by"):
        vs.hessian_eigenvalues(activated(DetachedSwish.apply, dtype), k=1)


def test_weights_in_shards_are_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    """Forward passes at other weights would be a matter of all ranks, which do not all come here."""
    probe = activated(DetachedSwish.apply)
    ((x, y),) = probe.batches
    shards = {name: LocalShard(p.detach()) for name, p in probe.model.named_parameters()}
    loss = nn.functional.cross_entropy(torch.func.functional_call(probe.model, shards, (x,)), y)

    def product(v: Any) -> Any:
        raise AssertionError("no product is taken")

    own_functions.refuse_wrong_functions(probe.model, shards, x, loss, lambda outputs: loss, product)
    assert "DetachedSwish are not checked: weights in shards over ranks" in caplog.text
