"""Attention by blocks: values, first and second derivatives of math attention, and no matrix of tokens in the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import vitscope as vs
from vitscope.linalg.curvature import blockwise_attention as module
from vitscope.linalg.curvature import curvature_operator
from vitscope.linalg.curvature.blockwise_attention import blockwise_attention
from vitscope.linalg.curvature.microbatch import Chunk, build_chunk

#: of biases and masks for 2 images, 3 heads, 5 queries and 7 keys
SHAPES = {
    "whole": (2, 3, 5, 7),
    "of heads": (1, 3, 5, 7),
    "of keys": (2, 1, 1, 7),
    "matrix": (5, 7),
    "one number": (1, 1),
}


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch):
    """Take any attention by blocks, and set how many entries of the matrix these have."""
    monkeypatch.setattr(module, "FEWEST_KEYS", 1)

    def set_entries(entries: int) -> None:
        monkeypatch.setattr(module, "CPU_ENTRIES", entries)

    return set_entries


def inputs(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def derivatives(attention, tensors: list[Tensor], mask: Tensor | None = None, **options) -> list[Tensor]:
    """Return the output, the first derivatives, and the second ones with random vectors by all inputs and the gradient."""
    q, k, v, *bias = tensors
    with sdpa_kernel(SDPBackend.MATH):
        out = attention(q, k, v, mask if mask is not None else (bias[0] if bias else None), **options)
        (g,) = inputs(tuple(out.shape), seed=1)
        first = torch.autograd.grad(out, tensors, g, create_graph=True)
        vectors = inputs(*(tuple(t.shape) for t in first), seed=2)
        second = torch.autograd.grad(first, [g, *tensors], vectors)
    return [out, *first, *second]


def assert_equal(received: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(received, expected, strict=True):
        assert a.shape == b.shape
        # some hundred products of numbers of size 1 each, in another order
        assert float((a - b).detach().abs().max()) < 1e-12 * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("entries", [1, 14, 35, 70, 10_000])  # a row, two rows, a head, two heads, all
@pytest.mark.parametrize("bias", [None, *SHAPES])
def test_derivatives_are_those_of_math_attention(blocks, entries: int, bias: str | None):
    blocks(entries)
    shapes = [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)]
    tensors = inputs(*shapes, *([SHAPES[bias]] if bias else []))
    assert_equal(derivatives(blockwise_attention, tensors), derivatives(F.scaled_dot_product_attention, tensors))


def test_masks_and_scale(blocks):
    blocks(35)
    tensors = inputs((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6))
    mask = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, 0, 2] = False  # nothing to attend to: 0
    cases: tuple[dict[str, Any], ...] = ({"mask": mask}, {"mask": mask, "scale": 0.3}, {"scale": 2.0})
    for options in cases:
        received = derivatives(blockwise_attention, tensors, **options)
        assert all(t.isfinite().all() for t in received)
        assert_equal(received, derivatives(F.scaled_dot_product_attention, tensors, **options))


def test_second_derivatives_are_those_of_differences(blocks):
    blocks(14)
    tensors = tuple(inputs((1, 2, 3, 2), (1, 2, 4, 2), (1, 2, 4, 2), (1, 2, 3, 4)))
    assert torch.autograd.gradcheck(blockwise_attention, tensors)
    assert torch.autograd.gradgradcheck(blockwise_attention, tensors)


def test_what_is_not_supported_is_left_to_pytorch():
    q, k, v = inputs((1, 1, 3, 2), (1, 1, 200, 2), (1, 1, 200, 2))
    assert blockwise_attention(q, k, v) is not NotImplemented
    assert blockwise_attention(q, k[:, :, :127], v[:, :, :127]) is NotImplemented
    assert blockwise_attention(q, k, v, dropout_p=0.1) is NotImplemented
    assert blockwise_attention(q, k, v, is_causal=True) is NotImplemented
    assert blockwise_attention(q.expand(1, 2, 3, 2), k, v, enable_gqa=True) is NotImplemented
    assert blockwise_attention(q, k, v, torch.zeros(3, 200)) is NotImplemented  # float32
    assert blockwise_attention(q[0], k[0], v[0]) is NotImplemented
    with torch.no_grad():
        assert blockwise_attention(q, k, v) is NotImplemented


def kept_bytes(keys_from: int, monkeypatch: pytest.MonkeyPatch) -> tuple[vs.HessianEigenvaluesResult, int, int]:
    """Return eigenvalues, the bytes that the graph of the gradient keeps, and the entries of its largest tensor."""
    monkeypatch.setattr(module, "FEWEST_KEYS", keys_from)
    torch.manual_seed(0)
    model = VisionTransformer(img_size=64, patch_size=4, num_classes=4, embed_dim=16, depth=2, num_heads=2).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)  # 257 tokens
    probe = vs.Probe(model, [(x, torch.tensor([1]))])
    storages: dict[int, int] = {}
    largest = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal largest
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        largest = max(largest, t.numel())
        return t

    def counted(*arguments: Any) -> Chunk:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return build_chunk(*arguments)

    monkeypatch.setattr(curvature_operator, "build_chunk", counted)  # the guard's own check of the model is left out
    result = vs.hessian_eigenvalues(probe, k=1, max_products=6, tol=1e-12)
    return result, sum(storages.values()), largest


@pytest.mark.filterwarnings("ignore")
def test_products_keep_no_matrix_of_tokens(monkeypatch: pytest.MonkeyPatch):
    by_math, math_bytes, math_largest = kept_bytes(10_000, monkeypatch)
    by_blocks, block_bytes, block_largest = kept_bytes(1, monkeypatch)
    assert by_blocks.eigenvalues[0] == pytest.approx(by_math.eigenvalues[0], rel=1e-12)
    assert math_largest >= 2 * 257 * 257
    assert block_largest < 257 * 257  # at most the MLP's 257 x 64, and weights
    assert block_bytes < math_bytes / 3
