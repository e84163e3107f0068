"""Small models and their dense Hessians in float64, by `torch.autograd.functional`, independent of the package's products."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


class SmallConvNet(nn.Module):
    def __init__(self, n_classes=3):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3 * 9, n_classes)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.conv(x))).flatten(1))


class SmallTransformer(nn.Module):
    def __init__(self, n_classes=3):
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.norm = nn.LayerNorm(6)
        self.qkv = nn.Linear(6, 18)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, n_classes)

    def forward(self, x):
        z = self.embed(x[:, 0])  # (B, 5, 6): rows of the image are tokens
        q, k, v = self.qkv(self.norm(z)).chunk(3, dim=-1)
        z = z + self.drop(torch.nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])
        return self.head(z.mean(1))


def make(kind="conv", n=12, soft=False, seed=0):
    """Return a model in float64 with all parameters random, and images (n, 1, 5, 5) with targets."""
    torch.manual_seed(seed)
    model = (SmallConvNet() if kind == "conv" else SmallTransformer()).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        if isinstance(model.norm, nn.BatchNorm2d):  # as after a training, and not those of a new layer
            model.norm.running_mean.copy_(torch.tensor([0.1, -0.2, 0.05]))
    x = torch.randn(n, 1, 5, 5, dtype=torch.float64)
    y = torch.randint(3, (n,))
    return model.eval(), x, torch.softmax(2 * torch.randn(n, 3, dtype=torch.float64), 1) if soft else y


def dense_hessian(model, x, y, objective):
    """Return the Hessian (size, size) of the whole objective on (x, y)."""
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def loss(flat):
        parts = flat.split(sizes)
        point = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts)}
        with sdpa_kernel(SDPBackend.MATH):
            return objective.data_loss(functional_call(model, point, (x,)), y) + objective.l2_term(point)

    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
    hessian = torch.autograd.functional.hessian(loss, flat, vectorize=True)
    assert torch.allclose(hessian, hessian.T, atol=1e-10)
    return hessian.numpy()


def logit_jacobian(model, x):
    """Return the Jacobian (B, C, size) of the logits in the parameters."""
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def logits(flat):
        point = {name: part.view_as(p) for (name, p), part in zip(named.items(), flat.split(sizes))}
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(model, point, (x,))

    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
    return torch.autograd.functional.jacobian(logits, flat, vectorize=True)


def by_magnitude(values, k):
    return np.array(sorted(values, key=lambda v: -abs(v))[:k])
