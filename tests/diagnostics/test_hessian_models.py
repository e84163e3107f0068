"""Curvature of the package's own models, of timm's ResNet-18 and of ViT-Ti in float64, by other ways of differentiating.

The models have up to 11 million parameters, so dense matrices are those of some hundred parameters of several kinds, and the
products over all parameters are compared with the forward derivative of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import vitscope as vs
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.models.alternet import AlterNet, MSABlock, _conv_block
from vitscope.models.attention import SelfAttention
from vitscope.models.window_attention import WindowAttention

N, CLASSES, DECAY = 5, 3, 0.1

#: whole matrices of small networks of the same blocks, and those of one to two hundred parameters of full-sized ones
SMALL = ("small convnet", "small vit", "small alternet")
SUBSETS = {
    "convnet": ["bn1.bias", "layer1.0.bn2.weight", "fc.bias"],
    "vit": ["blocks.0.norm1.weight", "head.bias"],
    "alternet": ["stages.*.attn.position_bias", "stages.0.1.norm2.weight", "fc.bias"],
}
EITHER = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in SUBSETS)]


def small_convnet() -> nn.Module:
    """timm's ResNet as `vs.models.convnet` makes it, of single blocks."""
    model = ResNet(
        BasicBlock, layers=(1, 1, 1, 1), channels=(4, 4, 5, 5), num_classes=CLASSES, stem_type="deep", stem_width=2
    )
    model.maxpool = nn.Identity()
    return model


def small_vit() -> nn.Module:
    """timm's vision transformer with the attention of `vs.models.vit`."""
    model = VisionTransformer(
        img_size=8, patch_size=4, num_classes=CLASSES, embed_dim=6, depth=1, num_heads=2, mlp_ratio=2
    )
    model.blocks[0].attn = SelfAttention(6, 2, 2, qkv_bias=True)
    return model


def small_alternet() -> nn.Module:
    """`vs.models.alternet`'s blocks: a convolution and an attention block in either stage."""
    stages = [
        nn.Sequential(block(3, 3), MSABlock(3, 3, mixing=attention(3, 3), width=3)),
        nn.Sequential(block(3, 4, 2), MSABlock(4, 4, mixing=attention(4, 4), width=4)),
    ]
    return AlterNet(nn.Conv2d(3, 3, 3, padding=1, bias=False), stages, 4, CLASSES)


def block(width: int, out: int, stride: int = 1) -> nn.Module:
    return _conv_block(width, out, stride, 1, 0.0)


def attention(width: int, out: int) -> nn.Module:
    return WindowAttention(width, out, heads=2, dim_head=2, window_size=2)


@cache
def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = {
        "small convnet": small_convnet,
        "small vit": small_vit,
        "small alternet": small_alternet,
        "convnet": lambda: vs.models.convnet(depth=18, num_classes=CLASSES, image_size=8),
        "vit": lambda: vs.models.vit(
            num_classes=CLASSES, image_size=8, patch_size=4, depth=2, heads=2, dim_head=4
        ),
        "alternet": lambda: vs.models.alternet(
            depth=18, num_classes=CLASSES, image_size=16, window_size=4, n_msa=(0, 1, 1, 0), dim_head=4
        ),
        "resnet18": lambda: timm.create_model("resnet18", num_classes=CLASSES),
        "vit_tiny": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, img_size=32),
    }[name]().double().eval()  # fmt: skip
    with torch.no_grad():  # tokens near zero and norms at one are special points
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if tensor.ndim <= 1:
                tensor.add_(0.3 * torch.rand_like(tensor))
            elif "token" in key or "pos" in key:
                tensor.copy_(0.3 * torch.randn_like(tensor))
    return model


def data_of(name: str, n: int = N, soft: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Return two batches, of all but two and of two images."""
    size = {"alternet": 16, "resnet18": 32, "vit_tiny": 32}.get(name, 8)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64)
    logits = torch.randn(n, CLASSES, generator=generator, dtype=torch.float64)
    y = (2 * logits).softmax(1) if soft else logits.argmax(1)
    return list(zip(x.split([n - 2, 2]), y.split([n - 2, 2])))


class Part:
    """The logits on all images as a function of some parameters in one flat vector."""

    def __init__(self, name: str, soft: bool = False) -> None:
        self.model = model_of(name)
        self.x, self.y = (torch.cat(parts) for parts in zip(*data_of(name, soft=soft)))
        with curvatures(vs.Probe(self.model, [(self.x, self.y)]), parameters=SUBSETS.get(name)) as made:
            self.named = {key: p.detach().clone() for key, p in made.parameters.items()}
        self.flat = torch.cat([p.reshape(-1) for p in self.named.values()])

    def point(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([p.numel() for p in self.named.values()])
        return {key: part.view_as(p) for (key, p), part in zip(self.named.items(), parts)}

    def logits(self, flat: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(self.model, self.point(flat), (self.x,))

    def hessian(self, objective: vs.Objective) -> np.ndarray:
        def loss(flat: Tensor) -> Tensor:
            return objective.data_loss(self.logits(flat), self.y)

        return second_derivative(loss, self.flat)

    def l2_hessian(self, objective: vs.Objective) -> np.ndarray:
        """By differentiating the term itself twice, where the package has it in closed form."""
        return second_derivative(lambda flat: objective.l2_term(self.point(flat)), self.flat)


def second_derivative(loss: Callable[[Tensor], Tensor], flat: Tensor) -> np.ndarray:
    """Forward over reverse, where the package's products are reverse over reverse; exact through LayerNorm."""
    gradient = torch.func.grad(loss)
    columns = torch.func.vmap(lambda e: torch.func.jvp(gradient, (flat,), (e,))[1], chunk_size=64)
    matrix = columns(torch.eye(len(flat), dtype=flat.dtype))
    assert torch.allclose(matrix, matrix.T, atol=1e-11)
    return matrix.detach().numpy()


def rows(
    name: str, vectors: Tensor, soft: bool = False, objective: vs.Objective | None = None, **options
) -> np.ndarray:
    """Return the package's products with ``vectors (n, size)``, on two batches of different size."""
    probe = vs.Probe(model_of(name), data_of(name, soft=soft), objective)
    with curvatures(probe, parameters=SUBSETS.get(name), **options) as made:
        operator = made.mean()
        return torch.stack([operator(v) for v in vectors]).numpy()


def directions(size: int, n: int = 3) -> Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    # float64: sums of millions of terms in another order
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * np.abs(expected).max())


@pytest.mark.filterwarnings("ignore:l2='sum_norm':UserWarning")
@pytest.mark.parametrize("name", EITHER)
def test_hessian_of_some_parameters(name: str):
    part = Part(name)
    v = directions(len(part.flat))
    plain = part.hessian(vs.Objective())
    scale = {key: 0.5 + p.abs() for key, p in part.named.items()}
    assert_close(rows(name, v), v.numpy() @ plain)
    for l2 in ("half_sq", "sum_norm", "adamw"):
        objective = vs.Objective(weight_decay=DECAY, l2=l2, decay_scale=scale if l2 == "adamw" else None)
        assert_close(rows(name, v, objective=objective), v.numpy() @ (plain + part.l2_hessian(objective)))


@pytest.mark.parametrize("name", EITHER)
def test_hessian_with_soft_labels(name: str):
    part = Part(name, soft=True)
    v = directions(len(part.flat))
    assert_close(rows(name, v, soft=True), v.numpy() @ part.hessian(vs.Objective()))
    # the cross entropy is linear in its targets: smoothing class indices is their mixture with uniform ones
    data = [(x, 0.8 * nn.functional.one_hot(y, CLASSES).double() + 0.2 / CLASSES) for x, y in data_of(name)]
    with curvatures(vs.Probe(part.model, data), parameters=SUBSETS.get(name)) as made:
        operator = made.mean()
        mixed = torch.stack([operator(u) for u in v]).numpy()
    assert_close(rows(name, v, objective=vs.Objective(label_smoothing=0.2)), mixed)


@pytest.mark.parametrize("name", EITHER)
def test_gauss_newton_and_fisher_of_some_parameters(name: str):
    part = Part(name)
    v = directions(len(part.flat)).numpy()
    jacobian = torch.autograd.functional.jacobian(part.logits, part.flat).numpy()  # (N, C, size)
    p = part.logits(part.flat).softmax(1).detach().numpy()
    drawn = [int((np.cumsum(row) <= np.random.default_rng((0, i)).random()).sum()) for i, row in enumerate(p)]
    inner = {
        "ggn": np.einsum("bc,cd->bcd", p, np.eye(CLASSES)) - np.einsum("bc,bd->bcd", p, p),
        "fisher_empirical": outer(p - np.eye(CLASSES)[part.y]),
        "fisher_mc": outer(p - np.eye(CLASSES)[drawn]),
    }
    for kind, middle in inner.items():
        dense = np.einsum("bci,bcd,bdj->ij", jacobian, middle, jacobian) / N
        assert_close(rows(name, torch.from_numpy(v), operator=kind), v @ dense)


def outer(residuals: np.ndarray) -> np.ndarray:
    return np.einsum("bc,bd->bcd", residuals, residuals)


@pytest.mark.parametrize(
    "name", ["vit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("convnet", "alternet"))]
)
def test_products_over_all_parameters_are_the_forward_derivative_of_the_gradient(name: str):
    model, data = model_of(name), data_of(name)
    x, y = (torch.cat(parts) for parts in zip(*data))
    point = {key: p.detach() for key, p in model.named_parameters()}
    objective = vs.Objective(weight_decay=DECAY)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return objective.data_loss(functional_call(model, parameters, (x,)), y) + objective.l2_term(parameters)

    with curvatures(vs.Probe(model, data, objective)) as made:
        operator = made.mean()
        v, other = directions(operator.size, 2)
        tangent = dict(zip(point, operator.split(v)))
        _, expected = torch.func.jvp(torch.func.grad(loss), (point,), (tangent,))
        found = operator(v)
        assert_close(found.numpy(), torch.cat([expected[key].reshape(-1) for key in point]).numpy())
        # symmetric: <u, H v> = <v, H u>, relative to the lengths
        assert abs(float(other @ found - v @ operator(other))) < 1e-11 * float(other.norm() * found.norm())


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny"])
def test_top_eigenvalue_of_timm_models(name: str):
    model = model_of(name)
    x, y = data_of(name, n=4)[0]
    result = vs.hessian_eigenvalues(vs.Probe(model, [(x, y)]), k=1, eigenvectors=True)
    assert result.converged.all()
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    with sdpa_kernel(SDPBackend.MATH):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)

    def product(v: Tensor) -> Tensor:
        along = sum((g * part.view_as(g)).sum() for g, part in zip(gradient, v.split(sizes)))
        return torch.cat([h.reshape(-1) for h in torch.autograd.grad(along, parameters, retain_graph=True)])

    v = torch.from_numpy(result.eigenvectors[0])
    value, residual = float(v @ product(v)), float((product(v) - result.eigenvalues[0] * v).norm())
    assert result.eigenvalues[0] == pytest.approx(value, rel=1e-11)  # a Rayleigh quotient, float64
    assert result.residuals[0] == pytest.approx(residual, rel=1e-6)
    # power iteration by the other product from there: the value may not move by more than the tolerance
    for _ in range(20):
        v = product(v)
        v /= v.norm()
    assert result.eigenvalues[0] == pytest.approx(float(v @ product(v)), rel=1e-3)
