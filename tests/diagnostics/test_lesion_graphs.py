"""Lesions of models that are no chain of blocks, and of compiled ones, against a copy whose branch returns zeros."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.crossvit import CrossVit
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitscope import Probe
from vitscope.diagnostics.lesion.lesion import lesion
from vitscope.models.structure.residual_structure import Read
from vitscope.models.structure.residual_units import Unit, known_units, units
from vitscope.runtime import progress


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "enabled", False)


class SmallViT(VisionTransformer):
    """A transformer of three blocks for 8x8 images."""

    def __init__(self, **options: Any) -> None:
        super().__init__(8, 4, num_classes=5, embed_dim=12, depth=3, num_heads=3, mlp_ratio=2, **options)


class ReadsEveryLayer(SmallViT):
    def forward(self, x: Tensor) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        total = torch.zeros_like(x)
        for block in self.blocks:
            x = block(x)
            total = total + x
        return self.head(self.norm(total)[:, 0])


class RunsABlockTwice(SmallViT):
    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        for block in (*self.blocks, self.blocks[0]):
            x = block(x)
        return self.norm(x)


class ParallelBranches(SmallViT):
    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        return self.norm(self.blocks[2](self.blocks[0](x) + self.blocks[1](x)))


class ByKeyword(SmallViT):
    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            x = block(x=x)
        return self.norm(x)


class WithExtraArguments(SmallViT):
    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:  # a mask that is computed from the stream, also of blocks that a cached pass skips
            x = block(x, (x @ x.mT)[:, None].tanh())
        return self.norm(x)


class TupleBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        branch = self.mlp(self.norm(x))
        return x + branch, branch.mean()


class TupleBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(TupleBlock(12) for _ in range(3)), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).unflatten(2, (4, 16)).mean(3)  # (B, 3, 4)
        x = x.flatten(1)
        scale = 0.0
        for block in self.blocks:
            x, mean = block(x)
            scale = scale + mean
        return self.head(x) * scale

    def own_units(self) -> list[Unit]:
        return [
            Unit(f"blocks.{i}", "mlp", 1, i / 2, block, Read(block.norm), Read(block.mlp))
            for i, block in enumerate(self.blocks)
        ]


def prepared(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model.double().eval()


def batches(side: int = 8, n_batches: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(2, 3, side, side, generator=generator, dtype=torch.float64),
            torch.randint(0, 5, (2,), generator=generator),
        )
        for _ in range(n_batches)
    ]


def nll(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(x), y, reduction="none") for x, y in data]
    return float(torch.cat(losses).mean())


def oracle(model: nn.Module, unit: Unit, data: list[tuple[Tensor, Tensor]]) -> float:
    """The change by a deep copy in which the branch's module returns zeros, every pass whole."""
    name = next(name for name, module in model.named_modules() if module is unit.branch_out.module)
    changed = copy.deepcopy(model)
    module = changed.get_submodule(name)
    run = module.forward
    module.forward = lambda *args, **options: 0 * run(*args, **options)
    return nll(changed, data) - nll(model, data)


MODELS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "head reads every layer": (ReadsEveryLayer, 8, "changes the logits of a full pass by up to"),
    "a block runs twice": (RunsABlockTwice, 8, "runs 2 times in one pass"),
    "parallel branches": (ParallelBranches, 8, "changes the logits"),
    "called by keyword": (ByKeyword, 8, "does not have one tensor as its first argument"),
    "extra arguments": (WithExtraArguments, 8, "changes the logits"),
    "blocks return tuples": (TupleBlocks, 8, "fails"),
    "one chain": (SmallViT, 8, ""),
}


@pytest.mark.parametrize("name", MODELS)
def test_lesions_equal_full_passes_whatever_the_graph(name: str) -> None:
    make, side, expected = MODELS[name]
    model, data = prepared(make()), batches(side)
    own = model.own_units() if isinstance(model, TupleBlocks) else units(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = lesion(Probe(model, data), removals=(), units=own)
    notices = [str(w.message) for w in caught if "full passes instead" in str(w.message)]
    assert len(notices) == bool(expected)
    assert all(expected in notice for notice in notices)
    for i, unit in enumerate(own):
        # the same float64 sums in the same order, but for the mean's
        assert result.nll_change[i] == pytest.approx(oracle(model, unit, data), abs=1e-12)
    assert (result.nll_change != 0).all()


def crossvit() -> nn.Module:
    return CrossVit(
        32, (1.0, 1.0), patch_size=(8, 16), num_classes=5, embed_dim=(12, 24), depth=((1, 2, 0), (1, 1, 0)),
        num_heads=(3, 3), mlp_ratio=(2.0, 2.0, 1.0),
    )  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(crossvit, id="crossvit"),
        pytest.param(lambda: timm.create_model("mobilevit_xxs", num_classes=5), id="mobilevit", marks=pytest.mark.slow),
        pytest.param(lambda: timm.create_model("hrnet_w18_small", num_classes=5), id="hrnet", marks=pytest.mark.slow),
        pytest.param(lambda: timm.create_model("vit_tiny_r_s16_p8_224", num_classes=5, img_size=32), id="hybrid"),
    ],
)
def test_lesions_of_timm_models_that_are_no_chain(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    data, found = batches(32, 2), known_units(model)  # that of crossvit between its branches is not known
    few = [found[i] for i in (0, len(found) // 2, -1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = lesion(Probe(model, data), removals=(), units=few)
    for i, unit in enumerate(few):
        assert result.nll_change[i] == pytest.approx(oracle(model, unit, data), abs=1e-12)


def compiled_root(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_block(model: nn.Module) -> nn.Module:
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    return model


def compiled_part_in_place(model: nn.Module) -> nn.Module:
    model.blocks.compile(backend="eager")
    model.blocks[2].compile(backend="eager")
    return model


def compiled_method(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


COMPILATIONS = (compiled_root, compiled_in_place, compiled_block, compiled_part_in_place, compiled_method)


@pytest.mark.parametrize("compiled", COMPILATIONS)
def test_lesions_of_a_compiled_model_are_those_of_the_model(compiled: Callable[[nn.Module], nn.Module]) -> None:
    plain = prepared(SmallViT())
    expected = lesion(Probe(plain, batches()))
    model = compiled(copy.deepcopy(plain))
    with torch.no_grad():
        model(batches()[0][0])  # a graph exists before the measure
    result = lesion(Probe(model, batches()))
    np.testing.assert_array_equal(result.nll_change, expected.nll_change)
    assert (result.nll_change != 0).all()


def test_a_unit_that_does_not_run_is_refused() -> None:
    model = prepared(SmallViT())
    unused = Block(12, 3).double()
    model.add_module("unused", unused)
    found = units(model)
    assert found[-1].name == "unused.mlp"
    with pytest.raises(ValueError, match=r"branch of unit 'unused.attn' to run .* pass units="):
        lesion(Probe(model, batches()))
