"""Small networks of the package's blocks and their dense Hessians."""

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
from vitscope.models.layers.attention import SelfAttention
from vitscope.models.layers.window_attention import WindowAttention

N, CLASSES, DECAY = 5, 3, 0.1


#: whole matrices of small networks of the same blocks, and those of one to two hundred parameters of full-sized ones
SMALL = ("small convnet", "small vit", "small alternet")


SUBSETS = {
    "convnet": ["bn1.bias", "layer1.0.bn2.weight", "fc.bias"],
    "vit": ["blocks.0.norm1.weight", "head.bias"],
    "alternet": ["stages.*.attn.position_bias", "stages.0.1.norm2.weight", "fc.bias"],
}


#: attention and convolutions of the small AlterNet are those of the other two
EITHER = [*SMALL[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in (SMALL[2], *SUBSETS))]


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
        """Return the dense Hessian of the loss (size, size)."""
        matrix = self.hessian_products(objective, torch.eye(len(self.flat), dtype=self.flat.dtype))
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-11)
        return matrix

    def hessian_products(self, objective: vs.Objective, vectors: Tensor) -> np.ndarray:
        """Return the products of the loss's Hessian with ``vectors (n, size)``."""

        def loss(flat: Tensor) -> Tensor:
            return objective.data_loss(self.logits(flat), self.y)

        return second_derivatives(loss, self.flat, vectors)

    def l2_products(self, objective: vs.Objective, vectors: Tensor) -> np.ndarray:
        """By differentiating the term itself twice, where the package has it in closed form."""
        return second_derivatives(lambda flat: objective.l2_term(self.point(flat)), self.flat, vectors)


def second_derivatives(loss: Callable[[Tensor], Tensor], flat: Tensor, vectors: Tensor) -> np.ndarray:
    """Forward over reverse, where the package's products are reverse over reverse; exact through LayerNorm."""
    gradient = torch.func.grad(loss)
    products = torch.func.vmap(lambda v: torch.func.jvp(gradient, (flat,), (v,))[1], chunk_size=64)
    return products(vectors).detach().numpy()


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


def outer(residuals: np.ndarray) -> np.ndarray:
    return np.einsum("bc,bd->bcd", residuals, residuals)
