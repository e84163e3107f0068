"""Attention weights by explicit softmax of queries and keys, and the positions of the tokens, against their own computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tests.fixtures.networks.attention_networks import HEAD, HEADS, Attention, batch, built
from vitscope.models.structure.attention_units import AttentionUnit, attention_units, reading_attention_units
from vitscope.models.structure.attention_weights import reading_calls
from vitscope.runtime.errors import StructureError


def filled(model: nn.Module) -> Any:
    """Give a model large weights: attention of a new one is nearly equal everywhere."""
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.double().eval()


def images(side: int, n: int = 3) -> Tensor:
    return torch.rand(n, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def read(model: nn.Module, x: Tensor) -> tuple[list[AttentionUnit], dict[str, str], dict[str, Tensor]]:
    found, reasons = attention_units(model, x)
    weights: dict[str, Tensor] = {}
    with torch.no_grad():
        before = model(x)
    with torch.no_grad(), reading_attention_units(found, lambda i, unit, w: weights.update({unit.name: w.clone()})):
        after = model(x)
    assert torch.equal(before, after)
    return found, reasons, weights


def inputs_of(model: Any, x: Tensor, name: str) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


def heads(layer: Any, x: Tensor, n_parts: int, n_heads: int) -> Tensor:
    out = layer(x)
    return out.reshape(*x.shape[:2], n_parts, n_heads, -1).permute(2, 0, 3, 1, 4).detach()  # (parts, n, heads, L, d)


def indexed_grid(h: int, w: int) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), -1)  # (h, w, 2)


def windows(grid: np.ndarray, size: int) -> np.ndarray:
    h, w, _ = grid.shape
    return grid.reshape(h // size, size, w // size, size, 2).swapaxes(1, 2).reshape(-1, size * size, 2)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("prefix", [{}, {"reg_tokens": 3}])
def test_global_attention_with_prefix_tokens(fused: bool, prefix: dict[str, Any]) -> None:
    model = filled(VisionTransformer(16, 4, num_classes=3, embed_dim=12, depth=2, num_heads=3, **prefix))
    model.blocks[1].attn.fused_attn = fused
    x = images(16)
    found, reasons, weights = read(model, x)
    assert not reasons
    assert [unit.name for unit in found] == ["blocks.0.attn", "blocks.1.attn"]
    q, k, _ = heads(model.blocks[1].attn.qkv, inputs_of(model, x, "blocks.1.attn"), 3, 3)
    expected = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    torch.testing.assert_close(weights["blocks.1.attn"], expected, rtol=1e-12, atol=1e-14)
    n = 1 + prefix.get("reg_tokens", 0)
    cells = np.concatenate([np.full((n, 2), -1), indexed_grid(4, 4).reshape(-1, 2)])
    for side in (found[0].queries, found[0].keys):
        np.testing.assert_array_equal(side.numpy(), cells[None])
    assert found[0].query_grid == found[0].key_grid == (4, 4)


def test_shifted_windows_lie_where_the_map_was_rolled() -> None:
    model = filled(
        SwinTransformer(
            img_size=32, patch_size=4, window_size=4, embed_dim=6, depths=(2, 1), num_heads=(2, 3), num_classes=3
        )
    )
    x = images(32)
    found, reasons, weights = read(model, x)
    assert not reasons
    grid = indexed_grid(8, 8)
    for unit, places in zip(found, (grid, np.roll(grid, (-2, -2), (0, 1)), indexed_grid(4, 4))):
        np.testing.assert_array_equal(unit.queries.numpy(), windows(places, 4))
        np.testing.assert_array_equal(unit.keys.numpy(), windows(places, 4))
    block = model.layers[0].blocks[1]
    q, k, _ = heads(block.attn.qkv, inputs_of(model, x, "layers.0.blocks.1.attn"), 3, 2)
    scores = q @ k.transpose(-1, -2) * block.attn.scale + block.attn._get_rel_pos_bias().detach()
    scores = scores.unflatten(0, (3, 4)) + block.attn_mask[None, :, None]
    torch.testing.assert_close(weights[found[1].name], scores.softmax(-1).flatten(0, 1), rtol=1e-12, atol=1e-14)


def test_cosine_attention_of_swin_v2() -> None:
    model = filled(
        SwinTransformerV2(
            img_size=32, patch_size=4, window_size=4, embed_dim=6, depths=(2,), num_heads=(2,), num_classes=3
        )
    )
    x = images(32)
    found, reasons, weights = read(model, x)
    assert not reasons
    attention = model.layers[0].blocks[0].attn
    tokens = inputs_of(model, x, "layers.0.blocks.0.attn")
    bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias]).detach()
    qkv = nn.functional.linear(tokens, attention.qkv.weight, bias).reshape(*tokens.shape[:2], 3, 2, -1)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).detach()
    cosine = nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).transpose(-1, -2)
    scale = attention.logit_scale.clamp(max=np.log(100.0)).exp()
    table = attention.cpb_mlp(attention.relative_coords_table).view(-1, 2)[attention.relative_position_index.view(-1)]
    scores = cosine * scale + 16 * table.view(16, 16, 2).permute(2, 0, 1).sigmoid()
    torch.testing.assert_close(weights[found[0].name], scores.softmax(-1).detach(), rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(found[1].queries.numpy(), windows(np.roll(indexed_grid(8, 8), (-2, -2), (0, 1)), 4))


def test_windows_and_grids_of_maxvit() -> None:
    attention_options = MaxxVitTransformerCfg(dim_head=4, window_size=(4, 4), grid_size=(4, 4))
    cfg = MaxxVitCfg((8, 8), (1, 1), ("M", "M"), stem_width=8, transformer_cfg=attention_options)
    model = filled(MaxxVit(cfg, img_size=64, num_classes=3))
    x = images(64)
    found, reasons, weights = read(model, x)
    assert not reasons
    assert len(found) == 4
    size = found[0].query_grid[0]
    grid = indexed_grid(size, size)
    np.testing.assert_array_equal(found[0].queries.numpy(), windows(grid, 4))
    strided = grid.reshape(4, size // 4, 4, size // 4, 2).transpose(1, 3, 0, 2, 4).reshape(-1, 16, 2)
    np.testing.assert_array_equal(found[1].queries.numpy(), strided)
    np.testing.assert_array_equal(found[1].keys.numpy(), strided)
    attention: Any = found[1].module
    name = next(name for name, module in model.named_modules() if module is attention)
    tokens = inputs_of(model, x, name)
    n_heads = attention.num_heads
    qkv = attention.qkv(tokens.flatten(1, -2)).detach()
    if attention.head_first:
        q, k, _ = qkv.unflatten(-1, (n_heads, -1)).transpose(1, 2).chunk(3, dim=-1)
    else:
        q, k, _ = qkv.unflatten(-1, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) * attention.scale
    if attention.rel_pos is not None:
        scores = scores + attention.rel_pos.get_bias().detach()
    torch.testing.assert_close(weights[found[1].name], scores.softmax(-1), rtol=1e-12, atol=1e-14)


def test_keys_of_pvt_lie_on_a_coarser_grid() -> None:
    model = filled(
        PyramidVisionTransformerV2(
            embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), sr_ratios=(4, 2, 1, 1), num_classes=3
        )
    )
    x = images(64)
    found, reasons, weights = read(model, x)
    assert not reasons
    assert [(unit.query_grid, unit.key_grid) for unit in found] == [
        ((16, 16), (4, 4)), ((8, 8), (4, 4)), ((4, 4), (4, 4)), ((2, 2), (2, 2)),
    ]  # fmt: skip
    np.testing.assert_array_equal(found[1].queries[0].numpy(), indexed_grid(8, 8).reshape(-1, 2))
    np.testing.assert_array_equal(found[1].keys[0].numpy(), indexed_grid(4, 4).reshape(-1, 2))
    attention = model.stages[1].blocks[0].attn
    tokens = inputs_of(model, x, "stages.1.blocks.0.attn")
    reduced = attention.norm(attention.sr(tokens.transpose(1, 2).reshape(3, 8, 8, 8)).flatten(2).transpose(1, 2))
    q, k = heads(attention.q, tokens, 1, 2)[0], heads(attention.kv, reduced, 2, 2)[0]
    torch.testing.assert_close(
        weights[found[1].name], (q @ k.transpose(-1, -2) / 2).softmax(-1), rtol=1e-12, atol=1e-14
    )


def test_windows_of_torchvision_with_padding() -> None:
    model = filled(
        torchvision.models.SwinTransformer([4, 4], 6, [2], [2], [4, 4], num_classes=3, stochastic_depth_prob=0.0)
    )
    found, reasons, weights = read(model, images(24))  # a map of 6x6, padded to 8x8
    assert not reasons
    padded = np.full((8, 8, 2), -1)
    padded[:6, :6] = indexed_grid(6, 6)
    for unit, places in zip(found, (padded, np.roll(padded, (-2, -2), (0, 1)))):
        np.testing.assert_array_equal(unit.queries.numpy(), windows(places, 4))
        assert weights[unit.name].shape == (12, 2, 16, 16)


def test_encoder_of_torchvision_reads_one_call_of_several_heads() -> None:
    model = filled(
        torchvision.models.VisionTransformer(
            image_size=16, patch_size=4, num_layers=2, num_heads=3, hidden_dim=12, mlp_dim=12, num_classes=3
        )
    )
    x = images(16)
    found, reasons, weights = read(model, x)
    assert not reasons
    assert [unit.n_heads for unit in found] == [3, 3]
    attention = model.encoder.layers[1].self_attention
    tokens = inputs_of(model, x, "encoder.layers.encoder_layer_1.self_attention")
    _, expected = attention(tokens, tokens, tokens, need_weights=True, average_attn_weights=False)
    torch.testing.assert_close(weights[found[1].name], expected.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", ["matmul", "sdpa", "einsum", "transposed", "masked", "normalized", "shared"])
def test_forms_of_attention_and_their_product_with_the_values(form: str) -> None:
    layer = filled(Attention(form=form))
    tokens = torch.randn(2, 16, HEADS * HEAD, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    with torch.no_grad(), reading_calls({layer: "layer"}, lambda _, call: seen.append(call.weights())):
        expected = layer(tokens)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, HEADS, 16, dtype=torch.float64))
    out = seen[0] @ layer.heads(tokens)[2]
    torch.testing.assert_close(layer.proj(out.transpose(1, 2).reshape(tokens.shape)), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("model", ["vit", "maxvit", "torchvision"])
def test_explicit_outputs_can_be_differentiated_by_the_weights(model: str) -> None:
    if model == "vit":
        network = VisionTransformer(16, 4, num_classes=3, embed_dim=12, depth=2, num_heads=3)
    elif model == "maxvit":
        attention_options = MaxxVitTransformerCfg(dim_head=4, window_size=(2, 2), grid_size=(2, 2))
        cfg = MaxxVitCfg((8,), (1,), ("M",), stem_width=8, transformer_cfg=attention_options)
        network = MaxxVit(cfg, img_size=16, num_classes=3)
    else:
        network = torchvision.models.VisionTransformer(16, 4, 2, 3, 12, 12, num_classes=3)
    network, x = filled(network), images(16)
    found, _ = attention_units(network, x)
    weights: list[Tensor] = []
    with reading_attention_units(found, lambda i, unit, w: weights.append(w), explicit=True):
        logits = network(x)
    torch.testing.assert_close(logits, network(x), rtol=1e-11, atol=1e-13)
    gradients = torch.autograd.grad(logits.sum(), weights)
    assert all(bool((g != 0).any()) for g in gradients)
    assert [g.shape[-1] for g in gradients] == [unit.keys.shape[1] for unit in found]


def test_attention_that_cannot_be_read_is_named() -> None:
    x = images(32)
    _, reasons = attention_units(timm.create_model("cait_xxs24_224", img_size=32, depth=1).double(), x)
    assert reasons == {"blocks.0.attn": "its attention weights cannot be read"}  # heads are mixed after the softmax
    found, reasons = attention_units(timm.create_model("xcit_nano_12_p16_224", img_size=32, depth=1).double(), x)
    assert reasons == {"blocks.0.attn": "its queries and keys cannot be followed to positions of the image"}  # channels
    assert [unit.name for unit in found][-1] == "cls_attn_blocks.1.attn"
    assert attention_units(timm.create_model("resnet18").double(), x) == ([], {})


@pytest.mark.parametrize(
    "output",
    [
        lambda scores, v: scores.softmax(-2) @ v,
        lambda scores, v: scores.softmax(-1).mT @ v,
        lambda scores, v: torch.einsum("bhkq,bhkd->bhqd", scores.softmax(-1), v),
    ],
)
def test_a_softmax_over_queries_is_no_mean_of_values(output: Callable[[Tensor, Tensor], Tensor]) -> None:
    class OverQueries(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            return self.proj(output(1e-3 * q @ k.mT, v).transpose(1, 2).reshape(x.shape))  # nearly equal weights

    model = built(OverQueries())
    found, reasons = attention_units(model, batch()[0])
    assert found == []
    assert reasons == {"attn": "the softmax runs over other positions than those whose values are summed"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softmax_in_another_type_than_its_network_is_read(dtype: torch.dtype) -> None:
    """As in transformers, whose softmax is in float32 whatever the type of the network."""

    class Coarse(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            weights = (q @ k.mT).softmax(-1, dtype=dtype).to(v.dtype)
            return self.proj((weights @ v).transpose(1, 2).reshape(x.shape))

    found, reasons = attention_units(built(Coarse()), batch()[0])
    assert (len(found), reasons) == (1, {})


def test_rows_of_queries_on_an_axis_of_their_own_are_one_global_attention() -> None:
    class Rows(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            scores = torch.einsum("bnhwd,bnjd->bnhwj", q.unflatten(2, (4, 4)), k)  # (B, heads, 4, 4, 16)
            out = torch.einsum("bnhwj,bnjd->bnhwd", scores.softmax(-1), v)
            return self.proj(out.flatten(2, 3).transpose(1, 2).reshape(x.shape))

    x = batch()[0]
    results = [read(built(layer), x) for layer in (Rows(), Attention())]
    (rows,), (whole,) = (found for found, _, _ in results)
    assert (rows.n_windows, rows.n_joined) == (1, 4)
    assert torch.equal(rows.queries, whole.queries)
    assert torch.equal(rows.keys, whole.keys)
    model: Any = built(Rows())
    with torch.no_grad():
        q, k, _ = model.attn.heads(model.embed(x).flatten(2).mT)
    torch.testing.assert_close(results[0][2]["attn"], (q @ k.mT).softmax(-1), rtol=1e-12, atol=1e-14)


def test_heads_mixed_by_a_constant_are_not_taken_for_values() -> None:
    class MixedHeads(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            weights = torch.einsum("bhqk,hg->bgqk", (q @ k.mT).softmax(-1), torch.eye(HEADS).to(x).flip(0))
            return self.proj((weights @ v).transpose(1, 2).reshape(x.shape))

    layer, tokens = filled(MixedHeads()), torch.ones(2, 16, HEADS * HEAD, dtype=torch.float64)
    seen: list[Tensor] = []
    with torch.no_grad(), reading_calls({layer: "layer"}, lambda _, call: seen.append(call.weights())):
        layer(tokens)
    assert not seen


def test_images_of_another_size_are_refused() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, dynamic_img_size=True)
    found, _ = attention_units(model, torch.rand(1, 3, 32, 32))
    with (
        pytest.raises(StructureError, match="images of 32x32, 5 queries and 5 keys, received 10 queries"),
        reading_attention_units(found, lambda *_: None),
    ):
        model(torch.rand(1, 3, 48, 48))
