"""Blocks that are computed again in every product: the same products, and a graph that keeps their inputs alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitscope as vs
from vitscope.linalg.curvature import curvature_operator
from vitscope.linalg.curvature.microbatch import Chunk, build_chunk
from vitscope.linalg.curvature.operator_factory import curvatures
from vitscope.linalg.curvature.recomputed_blocks import block_modules, recomputed_blocks


def vit(depth: int = 2) -> nn.Module:
    return VisionTransformer(img_size=16, patch_size=4, num_classes=4, embed_dim=16, depth=depth, num_heads=2)


def resnet() -> nn.Module:
    return timm.create_model("resnet18", layers=[1, 1, 1, 1], num_classes=4, channels=(4, 4, 8, 8))


def probe_of(build: Callable[[], nn.Module]) -> vs.Probe:
    torch.manual_seed(0)
    model = build().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return vs.Probe(model, [(torch.randn(4, 3, 16, 16).double(), torch.arange(4))], vs.Objective(weight_decay=0.1))


@pytest.mark.parametrize("operator", ["hessian", "ggn", "fisher_mc"])
@pytest.mark.parametrize("build", [vit, resnet])
@pytest.mark.filterwarnings("ignore:BatchNorm:UserWarning")  # random weights, new statistics
def test_products_are_the_same(build: Callable[[], nn.Module], operator: str):
    probe = probe_of(build)
    products = {}
    forwards = {name: vars(module).get("forward") for name, module in probe.model.named_modules()}
    for checkpoint_blocks in (False, True):
        with curvatures(probe, operator=operator, checkpoint_blocks=checkpoint_blocks) as operators:
            mean = operators.mean()
            v = torch.randn(mean.size, generator=torch.Generator().manual_seed(1)).double()
            products[checkpoint_blocks] = [mean(v), mean(v.flip(0)), mean.gradient()]
    for a, b in zip(products[True], products[False]):
        assert float((a - b).abs().max()) < 1e-11 * float(b.abs().max())  # sums in another order, float64
    assert forwards == {name: vars(module).get("forward") for name, module in probe.model.named_modules()}


def test_blocks_are_those_of_the_structure():
    assert list(block_modules(vit())) == ["blocks.0", "blocks.1"]
    assert list(block_modules(resnet())) == ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    with pytest.raises(ValueError, match="Sequential has no block that vitscope knows"):
        block_modules(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), torch.zeros(1, 3))


class SavedTensor:
    """A tensor that a graph keeps as long as this object lives."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(options: Mapping[str, Any], depth: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the bytes that the graph of a gradient of a ViT keeps once it is built, parameters left out."""
    live: weakref.WeakSet[SavedTensor] = weakref.WeakSet()
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> SavedTensor:
        saved = SavedTensor(t)
        live.add(saved)
        return saved

    def counted(*arguments: Any) -> Chunk:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            chunk = build_chunk(*arguments)
        gc.collect()
        storages = [saved.tensor.untyped_storage() for saved in live]
        sizes.update({storage.data_ptr(): storage.nbytes() for storage in storages})
        return chunk

    monkeypatch.setattr(curvature_operator, "build_chunk", counted)
    probe = probe_of(lambda: vit(depth))
    parameters = {p.untyped_storage().data_ptr() for p in probe.model.parameters()}
    vs.hessian_trace(probe, n_vectors=1, **options)
    return sum(n for place, n in sizes.items() if place not in parameters)


@pytest.mark.filterwarnings("ignore")
def test_a_block_more_keeps_its_input_and_its_gradient_more(monkeypatch: pytest.MonkeyPatch):
    """4 images of 17 tokens of width 16 in float64 are 8,704 bytes: a block keeps two of them."""
    with monkeypatch.context() as patch:
        recomputed = [kept_bytes({"checkpoint_blocks": True}, depth, patch) for depth in (2, 4)]
    with monkeypatch.context() as patch:
        whole = [kept_bytes({}, depth, patch) for depth in (2, 4)]
    a_map = 4 * 17 * 16 * 8
    assert 2 * a_map <= recomputed[1] - recomputed[0] <= 2 * 3 * a_map
    assert whole[1] - whole[0] > 10 * (recomputed[1] - recomputed[0])


def test_measures_take_it_and_refuse_what_it_does_not_do():
    probe = probe_of(vit)
    expected = vs.hessian_eigenvalues(probe, k=2, tol=1e-8)
    received = vs.hessian_eigenvalues(probe, k=2, tol=1e-8, checkpoint_blocks=True)
    np.testing.assert_allclose(received.eigenvalues, expected.eigenvalues, rtol=1e-10)
    assert received.card is not None
    assert expected.card is not None
    assert received.card.differences(expected.card) == []
    with pytest.raises(ValueError, match="Expected product='reverse' with checkpoint_blocks, received 'linearize'"):
        vs.hessian_eigenvalues(probe, product="linearize", checkpoint_blocks=True)
    with pytest.raises(ValueError, match="Expected whole parameters with checkpoint_blocks, received parts"):
        vs.hessian_eigenvalues(probe, k=1, parameters="part:q", checkpoint_blocks=True)


class Residual(nn.Module):
    """A residual block of two layers and a norm that stands at two places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = self.norm2 = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, width)`` for ``x (B, width)``."""
        return x + self.fc2(self.norm2(self.fc1(self.norm1(x)).tanh()))


class OfPair(Residual):
    """The same of a pair, whose second entry scales the branch."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        """Return ``(B, width)`` for a pair of tensors ``(B, width)``."""
        x, scale = pair
        return x + self.fc2(self.fc1(self.norm1(x)).tanh()) * scale


class OfAnotherWeight(Residual):
    """The same with a weight that is no parameter of the block."""

    def __init__(self, width: int, others: list[nn.Parameter]) -> None:
        super().__init__(width)
        self.others = others

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, width)`` for ``x (B, width)``."""
        return x + self.fc2(self.fc1(self.norm1(x)).tanh()) * self.others[0]


class InPlace(Residual):
    """The same with an activation that overwrites the block's input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, width)`` for ``x (B, width)``."""
        return self.fc2(self.fc1(self.norm1(x.relu_()))) + x


class Network(nn.Module):
    """A block between two layers."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3 * 16 * 16, 6), nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.rand(6))
        self.block = OfAnotherWeight(6, [self.scale]) if kind is OfAnotherWeight else kind(6)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, 4)``."""
        x = self.first(x.flatten(1))
        return self.head(self.block((x, x.sin() * self.scale) if isinstance(self.block, OfPair) else x) * self.scale)


def products_of_block(kind: type[nn.Module], recomputes: bool) -> tuple[nn.Module, list[Tensor]]:
    probe = probe_of(lambda: Network(kind))
    ((x, y),) = probe.batches
    probe = vs.Probe(
        probe.model, [(x[:2], y[:2]), (x[2:], y[2:])], probe.objective
    )  # whose graphs are made one after the other
    modules = {"block": probe.model.block} if recomputes else {}
    with curvatures(probe) as operators, recomputed_blocks(modules):
        mean = operators.mean()
        v = torch.randn(mean.size, generator=torch.Generator().manual_seed(1)).double()
        return probe.model, [mean(v), mean(v.flip(0)), mean.gradient()]


@pytest.mark.parametrize("kind", [Residual, OfPair])
def test_products_with_blocks_of_other_forms_are_the_same(kind: type[nn.Module]):
    _, expected = products_of_block(kind, recomputes=False)
    model, received = products_of_block(kind, recomputes=True)
    for a, b in zip(received, expected):
        assert float((a - b).abs().max()) < 1e-11 * float(b.abs().max())  # sums in another order, float64
    assert type(model.block.norm1.weight) is nn.Parameter  # the model's own, no copy of it


def test_blocks_whose_derivatives_would_be_wrong_are_refused():
    with pytest.raises(ValueError, match=r"received 'block', which reads another weight of shape \(6,\): set"):
        products_of_block(OfAnotherWeight, recomputes=True)
    with pytest.raises(ValueError, match="received 'block', which changes one in place: set checkpoint_blocks=False"):
        products_of_block(InPlace, recomputes=True)
