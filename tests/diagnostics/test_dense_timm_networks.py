"""Measures of curvature and gradients of small timm networks against dense matrices of `torch.func` in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

import vitscope as vs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::vitscope.core.undefined_values.NullWarning")]

N_CLASSES = 3


@dataclass(frozen=True)
class DenseNetwork:
    """A network with its dense matrices.

    Attributes:
        model: The network in float64 and eval mode.
        x: (n, 3, 16, 16) images.
        y: (n,) classes.
        hessian: (size, size) of the mean cross entropy.
        gradients: (n, size) of the loss of each image.
        jacobian: (n, C, size) of the logits.
        rows: Rows of each parameter in these.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    hessian: np.ndarray
    gradients: np.ndarray
    jacobian: np.ndarray
    rows: dict[str, slice]

    @property
    def probe(self) -> vs.Probe:
        """A probe with two batches of different sizes."""
        return vs.Probe(self.model, [(self.x[:5], self.y[:5]), (self.x[5:], self.y[5:])])


def _network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "vit":
        model: nn.Module = VisionTransformer(
            img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, mlp_ratio=2, num_classes=N_CLASSES
        )
    else:
        block: Any = BasicBlock  # timm's annotation wants an instance
        model = ResNet(
            block,
            layers=(1, 1, 1, 1),
            channels=(2, 4, 4, 4),
            num_classes=N_CLASSES,
            stem_type="deep",
            stem_width=2,
        )
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))  # class tokens and norms that are not at their initial values
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.3 * torch.rand_like(buffer))
    return model


@pytest.fixture(scope="module", params=["vit", "resnet"])
def dense(request: pytest.FixtureRequest) -> DenseNetwork:
    model = _network(request.param)
    x, y = torch.randn(12, 3, 16, 16, dtype=torch.float64), torch.arange(12) % N_CLASSES
    named = {name: p.detach() for name, p in model.named_parameters()}
    ends = np.cumsum([0, *(p.numel() for p in named.values())])
    flat = torch.cat([p.reshape(-1) for p in named.values()])

    def logits(vector: Tensor, images: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in named.values()])
        point = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts)}
        return functional_call(model, point, (images,))

    def loss(vector: Tensor, images: Tensor, classes: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits(vector, images), classes)

    with sdpa_kernel(SDPBackend.MATH):
        hessian = jacrev(grad(loss), chunk_size=64)(flat, x, y)
        gradients = torch.stack([grad(loss)(flat, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
        jacobian = jacrev(logits)(flat, x)
    assert torch.allclose(hessian, hessian.T, rtol=0, atol=1e-12 * float(hessian.abs().max()))
    return DenseNetwork(
        model, x, y, hessian.numpy(), gradients.numpy(), jacobian.detach().numpy(),
        {name: slice(a, b) for name, a, b in zip(named, ends, ends[1:])},
    )  # fmt: skip


def _rounding(dense: DenseNetwork) -> float:
    """Return a bound of what two orders of float64 sums differ by: size times eps times the largest eigenvalue."""
    return len(dense.hessian) * np.finfo(float).eps * float(np.abs(np.linalg.eigvalsh(dense.hessian)).max())


def test_the_diagonal_is_that_of_the_dense_hessian(dense: DenseNetwork) -> None:
    result = vs.hessian_diagonal(dense.probe, method="exact")
    np.testing.assert_allclose(result.diagonal, dense.hessian.diagonal(), rtol=0, atol=_rounding(dense))


def test_the_gauss_newton_diagonal_is_that_of_jacobians(dense: DenseNetwork) -> None:
    p = dense.model(dense.x).softmax(1).detach().numpy()
    middle = np.einsum("ic,cd->icd", p, np.eye(N_CLASSES)) - np.einsum("ic,id->icd", p, p)
    expected = np.einsum("icp,icd,idp->p", dense.jacobian, middle, dense.jacobian) / len(p)
    result = vs.hessian_diagonal(dense.probe, method="exact", operator="ggn")
    np.testing.assert_allclose(result.diagonal, expected, rtol=0, atol=_rounding(dense))


def test_curvatures_along_singular_vectors_are_those_of_dense_blocks(dense: DenseNetwork) -> None:
    """A singular vector is known to rounding over its gap g, so that the curvature is off by 2 |H| eps |G| / g at most."""
    result = vs.curvature_exponents(dense.probe, n_singular_values=4)
    shapes = {name: p.shape for name, p in dense.model.named_parameters()}
    mean = dense.gradients.mean(0)
    n_compared = n_directions = 0
    for name, singular_values, curvatures in zip(result.layers, result.singular_values, result.curvatures):
        rows = dense.rows[name]
        matrix = mean[rows].reshape(shapes[name][0], -1)
        block = dense.hessian[rows, rows]
        size = float(np.linalg.norm(block, 2))
        u, expected, vh = np.linalg.svd(matrix, full_matrices=False)
        n_known = int(np.isfinite(singular_values).sum())
        n_directions += n_known
        rounding = max(matrix.shape) * 50 * np.finfo(float).eps * expected[0]
        np.testing.assert_allclose(singular_values[:n_known], expected[:n_known], rtol=0, atol=rounding)
        for k in range(n_known):
            gap = np.abs(expected[k] - np.delete(expected, k)).min() if len(expected) > 1 else expected[0]
            if gap < 1e-6 * expected[0] or expected[k] < 1e-6 * expected[0]:
                continue
            direction = np.outer(u[:, k], vh[k]).ravel()
            bound = 2 * size * rounding / min(gap, expected[k])
            assert curvatures[k] == pytest.approx(direction @ block @ direction, rel=0, abs=bound + _rounding(dense))
            n_compared += 1
    assert n_directions == result.n_products
    assert n_compared >= 0.8 * n_directions


@pytest.mark.filterwarnings("ignore:gradient_noise")
def test_moments_of_gradients_are_those_of_single_images(dense: DenseNetwork) -> None:
    g = dense.gradients
    n = len(g)
    result = vs.gradient_noise(dense.probe)
    gram = g @ g.T
    square = (gram.sum() - np.trace(gram)) / (n * (n - 1))
    trace = g.var(0, ddof=1).sum()
    # both are sums over n^2 inner products of equal sizes, whose rounding is at most size eps max |g|^2
    rounding = n * g.shape[1] * np.finfo(float).eps * gram.max()
    assert result.groups[0] == "all"
    assert result.trace_covariance[0] == pytest.approx(trace, rel=0, abs=rounding)
    assert result.gradient_square_norm[0] == pytest.approx(square, rel=0, abs=rounding)
    np.testing.assert_allclose(result.square_norms[0], gram.diagonal(), rtol=0, atol=rounding)
    assert result.m_coherence[0] == pytest.approx(gram.sum() / np.trace(gram), rel=n * rounding / np.trace(gram))


@pytest.mark.filterwarnings("ignore:the two halves of a block")  # two vectors tell spectra apart badly
def test_nodes_of_blocks_are_within_their_residuals_of_dense_eigenvalues(dense: DenseNetwork) -> None:
    result = vs.hessian_block_densities(dense.probe, n_vectors=2, n_steps=8, n_resamples=10)
    shapes = {name: p.numel() for name, p in dense.model.named_parameters()}
    assert sum(result.sizes) + result.n_uncovered == sum(shapes.values())
    n_compared = 0
    for block, size, nodes, residuals, trace in zip(
        result.blocks, result.sizes, result.nodes, result.residuals, result.trace
    ):
        members = [name for name in dense.rows if name.rpartition(".")[0] == block or name == block]
        rows = np.concatenate([np.arange(dense.rows[name].start, dense.rows[name].stop) for name in members])
        if len(rows) != size:
            continue  # a block of other parameters than one module's
        values = np.linalg.eigvalsh(dense.hessian[np.ix_(rows, rows)])
        known = np.isfinite(nodes)
        distance = np.abs(nodes[known][:, None] - values).min(1)
        assert (distance <= residuals[known] + _rounding(dense)).all(), block
        # tr = E z^T H z; with sign vectors its variance is 2 sum_{i != j} H_ij^2, over two vectors
        matrix = dense.hessian[np.ix_(rows, rows)]
        error = np.sqrt((2 * (matrix**2).sum() - 2 * (matrix.diagonal() ** 2).sum()) / 2)
        assert abs(trace - values.sum()) <= 5 * error + _rounding(dense), block
        n_compared += 1
    assert n_compared >= 5


def test_eigenvalues_and_overlaps_are_those_of_the_dense_hessian(dense: DenseNetwork) -> None:
    """Values are off by the residual squared over the gap; overlaps by twice the angle, which is the residual over the gap."""
    k, tol = 5, 1e-8
    result = vs.hessian_class_structure(dense.probe, k=k, tol=tol, n_splits=0, n_vectors=4)
    values, vectors = np.linalg.eigh(dense.hessian)
    values, vectors = values[::-1], vectors[:, ::-1]
    np.testing.assert_allclose(result.eigenvalues, values[:k], rtol=0, atol=tol * values[0])
    gradient = dense.gradients.mean(0)
    overlap = np.cumsum((vectors[:, :k].T @ gradient) ** 2) / (gradient @ gradient)
    gap = float(np.abs(np.diff(values[: k + 1])).min())
    np.testing.assert_allclose(result.gradient_overlap, overlap, rtol=0, atol=2 * k * tol * values[0] / gap)
    p = dense.model(dense.x).softmax(1).detach().numpy()
    middle = np.einsum("ic,cd->icd", p, np.eye(N_CLASSES)) - np.einsum("ic,id->icd", p, p)
    gauss_newton = np.einsum("icp,icd,idq->pq", dense.jacobian, middle, dense.jacobian) / len(p)
    expected = np.einsum("pk,pq,qk->k", vectors[:, :k], gauss_newton, vectors[:, :k])
    np.testing.assert_allclose(result.gauss_newton, expected, rtol=0, atol=2 * tol * values[0] ** 2 / gap)
    np.testing.assert_allclose(result.ggn_eigenvalues, np.linalg.eigvalsh(gauss_newton)[::-1][:k], rtol=0,
                               atol=tol * values[0])  # fmt: skip
