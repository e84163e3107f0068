"""Curvature and landscape measures of tiny timm networks against programs that were written from the documentation alone.

The programs know the network, the images and docs/definitions.md, and call nothing of the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import vitscope as vs

N_CLASSES = 4


def _tiny_vit(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=4, depth=1, num_heads=2, mlp_ratio=2, num_classes=N_CLASSES
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def _batches(sizes: tuple[int, ...] = (4, 4, 2)) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(n, 1, 8, 8, dtype=torch.float64), torch.randint(N_CLASSES, (n,))) for n in sizes]


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors.values()])


def _loss_at(model: nn.Module, flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
    named = dict(model.named_parameters())
    parts = flat.split([p.numel() for p in named.values()])
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        z = functional_call(model, {k: part.view_as(p) for (k, p), part in zip(named.items(), parts)}, (x,))
    return (z.logsumexp(1) - z[torch.arange(len(y)), y]).mean()


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    w = _flat(dict(model.named_parameters())).requires_grad_()
    return torch.autograd.grad(_loss_at(model, w, x, y), w)[0]


def _dense_hessian(model: nn.Module, x: Tensor, y: Tensor) -> np.ndarray:
    w = _flat(dict(model.named_parameters())).requires_grad_()
    (g,) = torch.autograd.grad(_loss_at(model, w, x, y), w, create_graph=True)
    (rows,) = torch.autograd.grad(g, w, torch.eye(len(w), dtype=w.dtype), is_grads_batched=True)
    return (0.5 * (rows + rows.T)).numpy()


def _is_filter(model: nn.Module, name: str, p: Tensor) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return p.ndim > 1 and isinstance(owner, (nn.Linear, nn.Conv2d))


def test_class_structure_is_the_double_sum_over_images_and_labels():
    model, batches, wd = _tiny_vit(), _batches(), 0.03
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    n, classes = len(y), range(N_CLASSES)
    p = model(x).detach().softmax(1)
    # the gradient that image i would have with the label c: one backward pass for each pair
    d = torch.stack(
        [torch.stack([_gradient(model, x[i : i + 1], torch.tensor([c])) for c in classes]) for i in range(n)]
    )
    w = p / n
    gauss_newton = torch.einsum("ic,icp,icq->pq", w, d, d).numpy()
    parts = np.zeros((3, *gauss_newton.shape))
    for c in classes:
        own = y == c
        if not own.any():
            continue
        weight = w[own].sum(0)
        cross = torch.einsum("ic,icp->cp", w[own], d[own]) / weight[:, None]
        others = [k for k in classes if k != c]
        total = weight[others].sum()
        mean = (weight[others, None] * cross[others]).sum(0) / total
        parts[0] += (total * torch.outer(mean, mean)).numpy()
        parts[1] += sum((weight[k] * torch.outer(cross[k] - mean, cross[k] - mean)).numpy() for k in others)
        parts[2] += (weight[c] * torch.outer(cross[c], cross[c])).numpy()
    within = gauss_newton - parts.sum(0)

    result = vs.hessian_class_structure(
        vs.Probe(model, batches, vs.Objective(weight_decay=wd)), k=4, tol=1e-6, max_products=1000, n_splits=0
    )
    values, vectors = np.linalg.eigh(_dense_hessian(model, x, y) + wd * np.eye(len(gauss_newton)))
    values, vectors = values[::-1][:4], vectors[:, ::-1][:, :4]
    # an eigenvalue errs by at most the tolerance; a quotient of another matrix by about its root, as the vector does
    np.testing.assert_allclose(result.eigenvalues, values, rtol=1e-6)
    expected = [np.diag(vectors.T @ part @ vectors) for part in (*parts, within)]
    np.testing.assert_allclose(result.part_values, expected, atol=2e-3 * values[0])
    np.testing.assert_allclose(result.part_traces[:3], [np.trace(part) for part in parts], rtol=1e-9)
    # Hutchinson's error with 20 vectors: below five standard errors
    assert abs(result.part_traces[3] - np.trace(within)) < 5 * result.within_standard_error


OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], float, float]] = {
    # class, options, limit times the rate, and the next step's bias correction (step 4), from docs/definitions.md section 3
    "heavy ball": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}, 2 * 1.9 / 0.8, 1.0),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, 2 * 1.9 / 2.8, 1.0),
    "adam": (torch.optim.Adam, {"weight_decay": 0.1}, 2 * 1.9 / 0.1, 1 - 0.9**4),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}, 2 * 1.9 / 0.1, 1 - 0.9**4),
    "nadam": (torch.optim.NAdam, {}, 2 * 1.9 / (1.9 - 2 * 0.9 * 0.9 * (1 - 0.5 * 0.96 ** (4 * 4e-3))), 1.0),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5}, 2 * 1.5, 1.0),
    "adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1}, 2 * (1 + 3 * 0.1), 1.0),
}


def _preconditioner(optimizer: torch.optim.Optimizer, model: nn.Module, lr: float) -> np.ndarray:
    states = [optimizer.state[p] for p in model.parameters()]
    kind = type(optimizer)
    if kind is torch.optim.SGD:
        return np.ones(sum(p.numel() for p in model.parameters()))
    if kind is torch.optim.RMSprop:
        return torch.cat([s["square_avg"].sqrt().flatten() + 1e-8 for s in states]).numpy()
    if kind is torch.optim.Adagrad:
        return torch.cat([s["sum"].sqrt().flatten() + 1e-10 for s in states]).numpy()
    scale = torch.cat([(s["exp_avg_sq"] / (1 - 0.999**3)).sqrt().flatten() + 1e-8 for s in states]).numpy()
    return scale * (1 - lr * 0.1 / 2) if kind is torch.optim.AdamW else scale


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharpness_and_limit_of_an_optimizer_of_torch(name: str):
    kind, options, limit, correction = OPTIMIZERS[name]
    lr, model, batches = 1e-4, _tiny_vit(), _batches()
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    optimizer = kind(model.parameters(), lr=lr, **options)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    hessian = _dense_hessian(model, x, y)
    if kind is not torch.optim.AdamW:
        hessian += options.get("weight_decay", 0.0) * np.eye(len(hessian))
    root = np.sqrt(_preconditioner(optimizer, model, lr))
    expected = np.linalg.eigvalsh(hessian / root[:, None] / root)[-1]

    probe = vs.Probe(model, batches)
    result = vs.preconditioned_sharpness(probe, optimizer=optimizer, tol=1e-4, max_products=1000)
    # the error of an eigenvalue is at most tol, relative to the largest magnitude
    np.testing.assert_allclose(result.eigenvalues[0], expected, rtol=1e-4)
    np.testing.assert_allclose(result.threshold, limit / lr, rtol=1e-12)
    series = vs.edge_of_stability(probe, optimizer=optimizer, k=1, step=3, tol=1e-4, max_products=1000)
    np.testing.assert_allclose(series.sharpness[0], expected, rtol=1e-4)
    np.testing.assert_allclose(series.eigenvalues[0, 0], np.linalg.eigvalsh(hessian)[-1], rtol=1e-4)
    np.testing.assert_allclose(series.limit[0], limit * correction / lr, rtol=1e-12)


def test_adaptive_worst_cases_of_small_radii_are_dual_norms_of_the_gradient():
    """Max ``g d`` over ``||d / c||_p <= rho`` is rho times the dual norm of ``c g``; tensors without filters have ``c = |w|``."""
    model, batches = _tiny_vit(), _batches((5, 5))
    scales: dict[str, list[Tensor]] = {"elementwise": [], "filter": []}
    for name, p in model.named_parameters():
        w = p.detach()
        scales["elementwise"].append(w.abs().flatten())
        root_mean_square = w.flatten(1).square().mean(1).sqrt() if _is_filter(model, name, w) else None
        scales["filter"].append(
            w.abs().flatten() if root_mean_square is None else root_mean_square.repeat_interleave(w[0].numel())
        )
    gradients = [_gradient(model, x, y) for x, y in batches]
    rho = {"l2": 1e-4, "linf": 1e-6}
    expected = [
        np.mean([rho[ball] * float((torch.cat(scales[kind]) * g).norm(p=2 if ball == "l2" else 1)) for g in gradients])
        for kind in scales
        for ball in rho
    ]
    result = vs.sharpness(
        vs.Probe(model, batches), radii=[0.1], n_pairs=1, n_steps=0, m_images=5, ascent_steps=10,
        adaptive=[f"{kind}_{ball}" for kind in scales for ball in rho], l2_radii=[rho["l2"]], linf_radii=[rho["linf"]],
    )  # fmt: skip
    # the curvature adds rho / 2 |H| times |c|^2 to the slope: 1e-3 bounds it, and the wrong scale of class token and
    # position table (their root mean square) is off by 5e-3 in the Linf ball
    np.testing.assert_allclose(result.adaptive_rise, expected, rtol=1e-3)


def test_the_plane_of_a_trajectory_in_float64_states_small_distances():
    model, batches = _tiny_vit(), _batches()
    end = _flat(dict(model.named_parameters())).numpy()
    size = len(end)
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(size, 3)))[0].T
    # three differences that leave the plane of two by 1e-4 of their length
    differences = np.array([[3.0, 0.0, 0.0], [1.0, 1.0, 3e-4], [0.5, 1.0, -3e-4]]) @ q
    named, checkpoints = dict(model.named_parameters()), []
    for number, row in enumerate(differences):
        parts = torch.from_numpy(end + row).split([p.numel() for p in named.values()])
        checkpoints.append((f"step {number}", {k: part.view_as(p) for (k, p), part in zip(named.items(), parts)}))
    result = vs.trajectory(vs.Probe(model, batches), checkpoints=checkpoints)
    axes = np.linalg.svd(differences, full_matrices=False)[2][:2]
    off = differences - differences @ axes.T @ axes
    lengths = np.linalg.norm(differences, axis=1)
    expected = np.linalg.norm(off, axis=1) / lengths
    assert expected.max() > 1e-4  # the numbers that were zero
    # squares are differences of numbers of order 1: an error of some eps, 1e-14, of a square of 1e-8
    np.testing.assert_allclose(result.projection_error, expected, atol=1e-8)
    np.testing.assert_allclose(np.abs(result.coordinates), np.abs(differences @ axes.T), rtol=1e-9, atol=1e-12)
