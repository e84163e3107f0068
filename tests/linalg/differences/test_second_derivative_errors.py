"""Products by differences of networks that cannot be differentiated twice, or whose second derivative has kinks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

import vitscope as vs
from tests.fixtures.networks.activated import activated
from vitscope.linalg.differences.second_derivative_errors import NotTwiceDifferentiableError


class Softsign(torch.autograd.Function):
    """x / (1 + |x|), whose backward pass autograd may not differentiate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x / (1 + x.abs())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g / (1 + x.abs()).square()


def test_functions_that_are_differentiable_once() -> None:
    with pytest.raises(NotTwiceDifferentiableError, match=r"twice.*once_differentiable\); set product='difference'"):
        vs.hessian_eigenvalues(activated(Softsign.apply), k=1)
    differences = vs.hessian_eigenvalues(activated(Softsign.apply), k=2, product="difference", tol=1e-6)
    exact = vs.hessian_eigenvalues(activated(nn.functional.softsign), k=2, tol=1e-6)
    np.testing.assert_allclose(differences.eigenvalues, exact.eigenvalues, rtol=1e-6)


class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(5, 8), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(x[:, 0])).reshape(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # the model's own choice, inside of the guard's
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(out.transpose(1, 2).flatten(2).mean(1))


def test_attention_that_is_fused_alone() -> None:
    torch.manual_seed(0)
    model = FusedAttention().double()
    x, y = torch.randn(6, 1, 5, 5, dtype=torch.float64), torch.randint(3, (6,))
    with pytest.raises(NotTwiceDifferentiableError, match=r"flash.*set product='difference'"):
        vs.hessian_eigenvalues(vs.Probe(model, [(x, y)]), k=1)
    differences = vs.hessian_eigenvalues(vs.Probe(model, [(x, y)]), k=1, product="difference", tol=1e-6)
    model.forward = lambda x: unfused(model, x)
    exact = vs.hessian_eigenvalues(vs.Probe(model, [(x, y)]), k=1, tol=1e-6)
    np.testing.assert_allclose(differences.eigenvalues, exact.eigenvalues, rtol=1e-6)


def unfused(model: FusedAttention, x: Tensor) -> Tensor:
    q, k, v = model.qkv(model.embed(x[:, 0])).reshape(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
    out = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
    return model.head(out.transpose(1, 2).flatten(2).mean(1))


class AdaptedLayer(nn.Module):
    """A frozen weight of eight bits with a trainable adapter of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-127, 128, (6, 25), dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.full((), 1 / 127, dtype=torch.float64))
        self.down, self.up = nn.Linear(25, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(torch.tanh(x @ (self.weight * self.scale).T + self.up(self.down(x))))


def test_adapters_of_quantized_weights() -> None:
    torch.manual_seed(0)
    model = AdaptedLayer().double()
    x, y = torch.randn(8, 1, 5, 5, dtype=torch.float64), torch.randint(3, (8,))
    with pytest.raises(ValueError, match="'weight' of AdaptedLayer.*frozen integers beside trainable.*'difference'"):
        vs.hessian_eigenvalues(vs.Probe(model, [(x, y)]), k=1)
    differences = vs.hessian_eigenvalues(vs.Probe(model, [(x, y)]), k=2, product="difference", tol=1e-6)
    model.weight = nn.Parameter(model.weight.double(), requires_grad=False)
    exact = vs.hessian_eigenvalues(vs.Probe(model, [(x, y)]), k=2, tol=1e-6)
    np.testing.assert_allclose(differences.eigenvalues, exact.eigenvalues, rtol=1e-6)


def kinked() -> vs.Probe:
    torch.manual_seed(0)
    model = ResNet(BasicBlock, layers=(1, 1, 1, 1), channels=(4, 4, 8, 8), num_classes=3).double()
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    return vs.Probe(model, [(x, torch.randint(3, (8,)))])


def test_kinks_need_float64() -> None:
    with pytest.raises(ValueError, match=r"network with kinks \(relu, max_pool2d\), received 'float32'"):
        vs.hessian_eigenvalues(kinked(), k=1, product="difference", dtype="float32")
    differences = vs.hessian_eigenvalues(kinked(), k=1, product="difference", tol=1e-4)
    exact = vs.hessian_eigenvalues(kinked(), k=1, tol=1e-4)
    np.testing.assert_allclose(differences.eigenvalues, exact.eigenvalues, rtol=1e-6)
