from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitscope import Probe
from vitscope.core.undefined_values import NullWarning
from vitscope.diagnostics.attention._geometry import geometry, geometry_of_tokens
from vitscope.diagnostics.attention.attention_distance import attention_distance
from vitscope.diagnostics.attention.attention_maps import attention_maps
from vitscope.diagnostics.attention.plot import attention_distance as draw
from vitscope.models import alternet, convit, convnet
from vitscope.models.structure.residual_units import units
from vitscope.runtime import progress


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "enabled", False)


def probe_of(model: nn.Module, n: int = 4, side: int = 16, size: int = 2) -> Probe:
    model = model.double()
    x = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.zeros(n, dtype=torch.long)
    return Probe(model, list(zip(x.split(size), y.split(size))))


def vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    wanted = {"num_classes": 3, "embed_dim": 12, "depth": 2, "num_heads": 3, **options}
    model = VisionTransformer(16, 4, **wanted)
    for p in model.parameters():  # a fresh model's weights are so small that all attention is nearly equal
        nn.init.normal_(p, std=0.3)
    return model


def uniform(model: nn.Module) -> nn.Module:
    """Make all scores equal: queries and keys are zero."""
    for module in model.modules():
        if isinstance(getattr(module, "qkv", None), nn.Linear):
            for p in module.qkv.parameters():
                nn.init.zeros_(p)
        for name in ("position_bias", "relative_position_bias_table"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                nn.init.zeros_(getattr(module, name))
    return model


def mean_distance(h: int, w: int, pitch: float) -> float:
    places = pitch * np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), -1).reshape(-1, 2)
    return float(np.mean([np.linalg.norm(a - b) for a in places for b in places]))


def test_equal_weights_look_over_the_whole_map() -> None:
    result = attention_distance(probe_of(uniform(vit())))
    assert result.units == ("blocks.0.attn", "blocks.1.attn")
    for i in range(2):
        np.testing.assert_allclose(result.distance[i], np.full(3, mean_distance(4, 4, 4.0)), rtol=1e-10)
        np.testing.assert_allclose(result.entropy[i], np.full(3, np.log(17)), rtol=1e-10)
        np.testing.assert_allclose(result.off_map[i], np.full(3, 1 / 17), rtol=1e-10)  # the class token
    np.testing.assert_allclose(result.uniform_distance, mean_distance(4, 4, 4.0), rtol=1e-12)
    assert result.n_keys.tolist() == [17, 17]
    scalars = result.scalars()
    assert scalars["distance_share"] == pytest.approx(1, rel=1e-10)
    assert scalars["entropy_share"] == pytest.approx(1, rel=1e-10)


@pytest.mark.parametrize("fused", [True, False])
def test_equals_an_explicit_computation_from_the_weights(fused: bool) -> None:
    model = vit(reg_tokens=2)
    probe = probe_of(model)
    attention: Any = model.get_submodule("blocks.1.attn")
    attention.fused_attn = fused
    result = attention_distance(probe)
    assert attention.fused_attn is fused
    seen: list[torch.Tensor] = []
    attention.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for x, _ in probe.batches:
            model.eval()(x)
    tokens = torch.cat(seen)  # (B, 3 + 16, 12): class, two registers, patches
    q, k, _ = attention.qkv(tokens).reshape(4, 19, 3, 3, 4).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / 2).softmax(-1).detach().numpy()  # (B, heads, 19, 19)
    places = 4.0 * np.stack(np.meshgrid(np.arange(4), np.arange(4), indexing="ij"), -1).reshape(-1, 2)
    far = np.linalg.norm(places[:, None] - places[None], axis=-1)
    patches = weights[:, :, 3:, 3:]
    expected = ((patches * far).sum(-1) / patches.sum(-1)).mean((0, 2))
    np.testing.assert_allclose(result.distance[1], expected, rtol=1e-9)
    grid_rows = weights[:, :, 3:]
    np.testing.assert_allclose(result.entropy[1], -(grid_rows * np.log(grid_rows)).sum(-1).mean((0, 2)), rtol=1e-9)
    np.testing.assert_allclose(result.off_map[1], grid_rows[..., :3].sum(-1).mean((0, 2)), rtol=1e-9)


class Twice(nn.Module):
    """Attends twice an image, with the same weights: rows, then columns, as it were."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention
        self.fused_attn, self.num_heads, self.qkv = True, attention.num_heads, attention.qkv

    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        return self.attention(self.attention(x))


def test_a_module_that_attends_twice_an_image_is_left_out() -> None:
    model: Any = vit()
    listed = units(model)
    want = attention_distance(probe_of(model), units=listed)
    model.blocks[1].attn = Twice(model.blocks[1].attn)
    listed[2] = dataclasses.replace(listed[2], attention=model.blocks[1].attn)
    assert listed[2].name == "blocks.1.attn"
    with pytest.warns(NullWarning, match=r"blocks\.1\.attn \(its module computes attention several times per image"):
        found = attention_distance(probe_of(model), units=listed)
    assert found.units == ("blocks.0.attn",)
    assert found.n_images == want.n_images == 4
    np.testing.assert_array_equal(found.distance[0], want.distance[0])
    with pytest.raises(ValueError, match="modules compute attention several times per image"):
        attention_distance(probe_of(model), units=listed[2:3])


def test_windows_measure_inside_the_window_at_the_pitch_of_their_stage() -> None:
    model = SwinTransformer(
        img_size=16, patch_size=2, window_size=2, embed_dim=6, depths=(1, 1), num_heads=(2, 3), num_classes=3
    )
    result = attention_distance(probe_of(uniform(model)))
    for i, (heads, pitch) in enumerate(((2, 2.0), (3, 4.0))):
        np.testing.assert_allclose(result.distance[i], np.full(heads, mean_distance(2, 2, pitch)), rtol=1e-10)
        np.testing.assert_allclose(result.entropy[i], np.full(heads, np.log(4)), rtol=1e-10)
        np.testing.assert_array_equal(result.off_map[i], np.zeros(heads))
    assert result.n_heads.tolist() == [2, 3]


def test_padded_windows_leave_their_padding_out() -> None:
    model = alternet(num_classes=3, image_size=12, window_size=4, n_msa=(0, 1, 0, 0), pad=True)
    result = attention_distance(probe_of(uniform(model), side=12))  # a map of 6x6 in windows of 4: 4x4, 4x2, 2x4, 2x2
    parts = {(4, 4): 16, (4, 2): 8, (2, 4): 8, (2, 2): 4}  # queries in each
    expected = sum(n * mean_distance(h, w, 2.0) for (h, w), n in parts.items()) / 36
    np.testing.assert_allclose(result.distance[0], expected, rtol=1e-10)
    entropy = sum(n * np.log(n) for n in parts.values()) / 36
    np.testing.assert_allclose(result.entropy[0], entropy, rtol=1e-10)


def test_shifted_windows_measure_in_the_image() -> None:
    model = SwinTransformer(20, 4, num_classes=3, embed_dim=6, depths=(2,), num_heads=(2,), window_size=4)
    result = attention_distance(probe_of(uniform(model), side=20))
    # 5 rows rolled by 2 and padded: windows of rows 2, 3, 4, 0 and of row 1; timm's mask lets row 0 see rows 2 to 4
    grid = np.stack(np.meshgrid(np.arange(5), np.arange(5), indexing="ij"), -1).reshape(-1, 2)
    far = 4.0 * np.linalg.norm(grid[:, None] - grid[None], axis=-1)
    expected = []
    for window in (grid // 4, grid == 1):  # as cut, and rolled
        together = (window[:, None] == window[None]).all(-1)
        expected.append(((far * together).sum(1) / together.sum(1)).mean())
    np.testing.assert_allclose(result.distance, np.repeat(np.array(expected)[:, None], 2, 1), rtol=1e-10)
    np.testing.assert_allclose(result.uniform_distance, expected[0], rtol=1e-10)  # of windows that are not shifted


def test_keys_of_a_coarser_grid_are_at_the_centers_of_their_cells() -> None:
    """A pyramid's keys: queries on 4 x 4 cells of 4 pixels, keys on 2 x 2 cells of 8, and a key without a place."""
    queries = torch.tensor([[[row, column] for row in range(4) for column in range(4)]])
    keys = torch.tensor([[[-1, -1], *([row, column] for row in range(2) for column in range(2))]])
    unit = SimpleNamespace(queries=queries, keys=keys, query_grid=(4, 4), key_grid=(2, 2), image_size=(16, 16))
    found = geometry_of_tokens(unit)
    centers = [2.0, 6.0, 10.0, 14.0], [4.0, 12.0]
    expected = [
        [np.hypot(y - v, x - u) for v in centers[1] for u in centers[1]] for y in centers[0] for x in centers[0]
    ]
    np.testing.assert_allclose(found.distance[:, 1:], expected, rtol=1e-12)
    assert (found.distance[:, 0] == 0).all()
    assert found.keys.tolist() == [[False, True, True, True, True]]
    assert found.uniform == pytest.approx(np.mean(expected), rel=1e-12)


@pytest.mark.parametrize("padding", ["masked", "zero"])
def test_local_attention_stays_in_its_kernel(padding: str) -> None:
    model = convit(num_classes=3, image_size=16, patch_size=4, kernel_size=3, depth=1, padding=padding)
    result = attention_distance(probe_of(uniform(model)))
    grid = np.stack(np.meshgrid(np.arange(4), np.arange(4), indexing="ij"), -1).reshape(-1, 2)
    near = np.abs(grid[:, None] - grid[None]).max(-1) <= 1
    far = 4.0 * np.linalg.norm(grid[:, None] - grid[None], axis=-1)
    expected = ((far * near).sum(1) / near.sum(1)).mean()
    np.testing.assert_allclose(result.distance[0], np.full(3, expected), rtol=1e-9)
    share = 0.0 if padding == "masked" else (1 - near.sum(1) / 9).mean()
    np.testing.assert_allclose(result.off_map[0], np.full(3, share), atol=1e-9)


def test_batch_size_does_not_matter_and_intervals_are_over_images() -> None:
    a, b = (attention_distance(probe_of(vit(), n=130, size=size)) for size in (130, 50))
    np.testing.assert_allclose(a.distance, b.distance, rtol=1e-10)
    np.testing.assert_allclose(a.entropy_half_width, b.entropy_half_width, rtol=1e-5)
    assert a.n_images == b.n_images == 130
    assert (np.array(a.distance_half_width) > 0).all()


def test_a_single_token_has_no_distance() -> None:
    model = VisionTransformer(8, 8, num_classes=3, embed_dim=12, depth=1, num_heads=3)
    with pytest.warns(NullWarning, match=r"blocks.0.attn \(a single token has no distance\)"):
        result = attention_distance(probe_of(model, side=8))
    assert result.distance[0].tolist() == [0.0, 0.0, 0.0]
    assert np.isnan(result.scalars()["distance_share"])
    assert result.scalars()["entropy_share"] > 0  # between itself and the class token


def test_models_without_attention_that_can_be_read() -> None:
    with pytest.raises(ValueError, match="attention whose weights can be read, received none in ResNet"):
        attention_distance(probe_of(convnet(num_classes=3)))
    model = timm.create_model("mixer_s32_224", img_size=32, num_classes=3)
    with pytest.raises(ValueError, match="received none in MlpMixer"):
        attention_distance(probe_of(model, side=32))


def test_geometry_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="attention maps of 17 queries, received 16 queries and 16 keys"):
        geometry(16, 16, 1, grid=(4, 4), window=None, n_prefix=1, image=(8, 8))
    with pytest.raises(ValueError, match=r"4 windows of \(2, 2\) in a map of \(4, 4\), received 3"):
        geometry(4, 4, 3, grid=(4, 4), window=(2, 2), n_prefix=0, image=(8, 8))


def test_plot_shows_every_head() -> None:
    result = attention_distance(probe_of(vit()))
    figure = draw({"a": result, "b": result})
    points = np.asarray(figure.axes[0].lines[0].get_ydata())
    np.testing.assert_allclose(points, np.concatenate(result.distance))
    assert len(figure.axes[0].lines) == 6


def test_attention_of_torchs_module_is_led_to_the_measure_that_reads_it() -> None:
    model = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=10)
    probe = Probe(model, [(torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))])
    unit = r"encoder\.layers\.encoder_layer_0\.self_attention and 1 more units cannot be told apart here"
    with pytest.raises(
        ValueError, match=rf"received none in VisionTransformer; heads of {unit}, and vs\.attention_maps"
    ):
        attention_distance(probe)
    assert attention_maps(probe).scalars()["entropy_share"] > 0
