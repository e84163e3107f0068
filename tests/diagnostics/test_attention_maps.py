"""Attention maps against explicit softmaxes of queries and keys, and rollouts against closed forms and a loop of their own."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.networks.attention_probes import filled, images, probe_of, vit
from vitscope.core.undefined_values import NullWarning
from vitscope.diagnostics.attention._rollout import Rollout
from vitscope.models import convnet
from vitscope.models.structure import attention_weights
from vitscope.runtime import progress

pytestmark = pytest.mark.filterwarnings("ignore:.*the intervals.*:vitscope.core.undefined_values.NullWarning")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "enabled", False)


def inputs_of(model: Any, x: Tensor, name: str) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


def attention_of(model: Any, x: Tensor, name: str) -> Tensor:
    """Return softmax(q k' / sqrt(d)) of a global attention of timm's ViT, (B, heads, n, n)."""
    module, tokens = model.get_submodule(name), inputs_of(model, x, name)
    q, k, _ = module.qkv(tokens).reshape(*tokens.shape[:2], 3, module.num_heads, -1).permute(2, 0, 3, 1, 4).detach()
    return (q @ k.transpose(-1, -2) * module.scale).softmax(-1)


def test_maps_of_the_class_token_and_its_numbers_equal_an_explicit_computation() -> None:
    model, x = filled(vit(reg_tokens=2)), images(16)
    result = vs.attention_maps(probe_of(model, x), images=3, mass=0.6)
    assert (result.query, result.n_images, result.units) == ("class", 4, ("blocks.0.attn", "blocks.1.attn"))
    for layer, name in enumerate(result.units):
        weights = attention_of(model, x, name).numpy()  # class, two registers, 16 patches
        expected = weights[:, :, 0, 3:].reshape(4, 3, 4, 4)
        np.testing.assert_allclose(result.maps[layer], expected[:3], rtol=1e-10)
        np.testing.assert_allclose(result.prefix_attention[layer], weights[:3, :, 0, :3], rtol=1e-10)
        patches = weights[:, :, 3:]
        np.testing.assert_allclose(result.sink_share[layer], patches[..., :3].sum(-1).mean((0, 2)), rtol=1e-10)
        entropy = -(patches * np.log(patches)).sum(-1).mean((0, 2))
        np.testing.assert_allclose(result.entropy[layer], entropy, rtol=1e-10)
        iou = [[_iou(a, b) for a in image for b in image] for image in expected]
        np.testing.assert_allclose(result.head_iou_pairs[layer], np.mean(iou, 0).reshape(3, 3), rtol=1e-10)
        others = ~np.eye(3, dtype=bool)
        np.testing.assert_allclose(result.head_iou[layer], np.mean(iou, 0).reshape(3, 3)[others].mean(), rtol=1e-10)
    means = [attention_of(model, x, name).numpy()[:, :, 0, 3:].mean(1) for name in result.units]
    between = np.mean([_iou(a, b) for a, b in zip(*means)])
    np.testing.assert_allclose(result.layer_iou, [[1, between], [between, 1]], rtol=1e-10)
    assert result.scalars()["layer_iou"] == pytest.approx(between)


def _iou(a: np.ndarray, b: np.ndarray, mass: float = 0.6) -> float:
    masks = []
    for values in (a.ravel(), b.ravel()):
        order = np.argsort(-values)
        n = 1 + np.searchsorted(np.cumsum(values[order]), mass * values.sum())
        masks.append(set(order[:n].tolist()))
    return len(masks[0] & masks[1]) / len(masks[0] | masks[1])


def test_mean_and_pixel_queries_and_chosen_layers_and_heads() -> None:
    model, x = filled(vit()), images(16)
    weights = attention_of(model, x, "blocks.1.attn").numpy()
    mean = vs.attention_maps(probe_of(model, x), query="mean", layers=[-1], heads=[2], gradient=False)
    assert mean.units == ("blocks.1.attn",)
    np.testing.assert_allclose(mean.maps[0, :, 0].reshape(4, 16), weights[:, 2, 1:, 1:].mean(1), rtol=1e-10)
    pixel = vs.attention_maps(probe_of(model, x), query=(9, 4), layers=["blocks.1.attn"], gradient=False)
    assert pixel.query == "9, 4"
    np.testing.assert_allclose(pixel.maps[0].reshape(4, 3, 16), weights[:, :, 1 + 2 * 4 + 1, 1:], rtol=1e-10)


def test_shifted_windows_are_put_back_in_place() -> None:
    options: Any = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 6, "depths": (2,)}
    model, x = filled(SwinTransformer(num_heads=(2,), num_classes=3, **options)), images(32)
    with pytest.warns(NullWarning, match=r"rollout \(layers.0.blocks.0.attn attends in windows\)"):
        result = vs.attention_maps(probe_of(model, x))
    assert (result.rollout, result.gradient_rollout, result.query) == (None, None, "mean")
    assert np.isnan(result.sink_share).all()
    block, name = model.layers[0].blocks[1], "layers.0.blocks.1.attn"
    tokens = inputs_of(model, x, name)  # (4 * 4, 16, 6)
    q, k, _ = block.attn.qkv(tokens).reshape(16, 16, 3, 2, 3).permute(2, 0, 3, 1, 4).detach()
    scores = q @ k.transpose(-1, -2) * block.attn.scale + block.attn._get_rel_pos_bias().detach()
    weights = (scores.unflatten(0, (4, 4)) + block.attn_mask[None, :, None]).softmax(-1).numpy()
    full = np.zeros((4, 2, 64, 64))  # image, head, query, key by row * 8 + column
    for window in range(4):
        corner = 4 * (window // 2), 4 * (window % 2)
        cells = [((corner[0] + i // 4 + 2) % 8) * 8 + (corner[1] + i % 4 + 2) % 8 for i in range(16)]
        full[:, :, np.array(cells)[:, None], cells] = weights[:, window]
    np.testing.assert_allclose(result.maps[1].reshape(4, 2, 64), full.mean(2), rtol=1e-9)
    pixel = vs.attention_maps(probe_of(model, x), query=[0, 31])  # the corner's window spans all four corners
    np.testing.assert_allclose(pixel.maps[1].reshape(4, 2, 64), full[:, :, 7], rtol=1e-9, atol=1e-30)


@pytest.mark.filterwarnings("ignore:BatchNorm:UserWarning")  # random weights, new statistics
def test_grid_attention_of_maxvit_looks_at_strided_positions() -> None:
    attention_options = MaxxVitTransformerCfg(dim_head=4, window_size=(2, 2), grid_size=(2, 2))
    cfg = MaxxVitCfg((8,), (1,), ("M",), stem_width=8, transformer_cfg=attention_options)
    model, x = filled(MaxxVit(cfg, img_size=16, num_classes=3)), images(16)
    result = vs.attention_maps(probe_of(model, x), query=(0, 5))  # position (0, 1) of 4 x 4
    assert result.maps[0].shape[2:] == (4, 4)
    assert set(map(tuple, np.argwhere(result.maps[0][0, 0]))) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert set(map(tuple, np.argwhere(result.maps[1][0, 0]))) == {(0, 1), (0, 3), (2, 1), (2, 3)}
    module = model.stages[0].blocks[0].attn_grid.attn
    tokens = inputs_of(model, x, "stages.0.blocks.0.attn_grid.attn").flatten(1, -2)  # (4 * 4, 4, 8)
    qkv = module.qkv(tokens).detach()
    q, k, _ = qkv.unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, dim=-1)
    if not module.head_first:
        q, k, _ = qkv.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    bias = module.rel_pos.get_bias().detach() if module.rel_pos is not None else 0
    weights = (q @ k.transpose(-1, -2) * module.scale + bias).softmax(-1).unflatten(0, (4, 4)).numpy()
    # the second of the four grids, whose first token is the query
    np.testing.assert_allclose(result.maps[1][:, :, ::2, 1::2].reshape(4, 2, 4), weights[:, 1, :, 0], rtol=1e-9)


def test_keys_of_pvt_keep_their_coarser_grid() -> None:
    options: Any = {"embed_dims": (8,) * 4, "depths": (1,) * 4, "num_heads": (1, 2, 2, 2), "sr_ratios": (4, 2, 1, 1)}
    model, x = filled(PyramidVisionTransformerV2(num_classes=3, **options)), images(64)
    result = vs.attention_maps(probe_of(model, x), query="mean")
    assert [layer.shape for layer in result.maps] == [(4, 1, 4, 4), (4, 2, 4, 4), (4, 2, 4, 4), (4, 2, 2, 2)]
    module, name = model.stages[1].blocks[0].attn, "stages.1.blocks.0.attn"
    tokens = inputs_of(model, x, name)
    reduced = module.norm(module.sr(tokens.transpose(1, 2).reshape(4, 8, 8, 8)).flatten(2).transpose(1, 2))
    q = module.q(tokens).reshape(4, 64, 2, 4).transpose(1, 2).detach()
    k = module.kv(reduced).reshape(4, 16, 2, 2, 4).permute(2, 0, 3, 1, 4)[0].detach()
    weights = (q @ k.transpose(-1, -2) / 2).softmax(-1).mean(2).numpy()
    np.testing.assert_allclose(result.maps[1].reshape(4, 2, 16), weights, rtol=1e-9)
    assert np.isnan(result.head_iou[0])


def test_rollout_of_uniform_attention() -> None:
    model = filled(vit(depth=3))
    for block in model.blocks:
        for p in block.attn.qkv.parameters():
            nn.init.zeros_(p)  # equal scores
    result = vs.attention_maps(probe_of(model, images(16)))
    assert result.rollout is not None
    # (0.5 / n J + 0.5 I)^L = (1 - 0.5^L) / n J + 0.5^L I, of n = 17 tokens and L = 3 layers
    np.testing.assert_allclose(result.rollout, np.full((4, 4, 4), (1 - 0.5**3) / 17), rtol=1e-12)
    np.testing.assert_allclose(result.maps, np.full((3, 4, 3, 4, 4), 1 / 17), rtol=1e-12)
    pixel = vs.attention_maps(probe_of(model, images(16)), query=(5, 5), gradient=False).rollout
    expected = np.full((4, 4), (1 - 0.5**3) / 17)
    expected[1, 1] += 0.5**3
    np.testing.assert_allclose(pixel, np.stack([expected] * 4), rtol=1e-12)


def test_rollout_of_identity_attention() -> None:
    model = filled(vit(embed_dim=24, num_heads=1), std=0.0)
    with torch.no_grad():
        model.pos_embed[0, :, :17] = torch.eye(17)
        for block in model.blocks:
            block.norm1.weight.fill_(1.0)
            block.attn.qkv.weight[:48] = 20 * torch.eye(24).repeat(2, 1)  # queries and keys are the token itself
    result = vs.attention_maps(probe_of(model, images(16)), query=(5, 9), gradient=False)
    expected = np.zeros((4, 4, 4))
    expected[:, 1, 2] = 1
    np.testing.assert_allclose(result.rollout, expected, atol=1e-12)
    rollout = Rollout()
    for _ in range(3):
        rollout.follow(torch.eye(5, dtype=torch.float64).expand(2, 3, 5, 5))
    assert rollout.product is not None
    assert torch.equal(rollout.product, torch.eye(5, dtype=torch.float64).expand(2, 5, 5))


def explicit_relevance(model: Any, x: Tensor, index: int | None) -> tuple[np.ndarray, list[int]]:
    """Run a ViT layer by layer with explicit attention, image by image, and follow gradients of one logit."""
    relevances, classes = [], []
    for image in x[:, None]:
        tokens, maps = model._pos_embed(model.patch_embed(image)), []
        for block in model.blocks:
            y = block.norm1(tokens)
            q, k, v = block.attn.qkv(y).reshape(1, 17, 3, 3, 4).permute(2, 0, 3, 1, 4)
            maps.append((q @ k.transpose(-1, -2) / 2).softmax(-1))
            tokens = tokens + block.attn.proj((maps[-1] @ v).transpose(1, 2).reshape(1, 17, 12))
            tokens = tokens + block.mlp(block.norm2(tokens))
        logits = model.forward_head(model.norm(tokens))[0]
        classes.append(int(logits.argmax()) if index is None else index)
        gradients = torch.autograd.grad(logits[classes[-1]], maps)
        total = torch.eye(17, dtype=torch.float64)
        for gradient, weights in zip(gradients, maps):
            total = total + (gradient * weights).clamp(min=0).mean(1)[0] @ total
        relevances.append((total - torch.eye(17))[0, 1:].detach().numpy().reshape(4, 4))
    return np.stack(relevances), classes


@pytest.mark.parametrize("index", [None, 1])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_rollout_equals_a_loop_with_explicit_attention(index: int | None, frozen: bool) -> None:
    model, x = filled(vit()), images(16)
    expected, classes = explicit_relevance(model, x, index)
    model.requires_grad_(not frozen)
    result = vs.attention_maps(probe_of(model, x, size=3), class_index=index)
    assert result.classes.tolist() == classes
    np.testing.assert_allclose(result.gradient_rollout, expected, rtol=1e-9, atol=1e-15)
    assert all(p.grad is None for p in model.parameters())


def test_batches_do_not_matter_and_intervals_are_over_images() -> None:
    model, x = filled(vit(depth=1)), images(16, n=130)
    one, other = (vs.attention_maps(probe_of(model, x, size=size), images=9) for size in (130, 4))
    for name in ("maps", "rollout", "gradient_rollout", "sink_share", "head_iou", "layer_iou", "images"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-15, err_msg=name)
    assert one.maps.shape == (1, 9, 3, 4, 4)
    assert (one.sink_share_half_width > 0).all()
    np.testing.assert_allclose(one.head_iou_half_width, other.head_iou_half_width, rtol=1e-6)


def test_a_shared_pass_gives_the_same_bits_and_the_model_back() -> None:
    model, x = filled(vit()), images(16)
    probe = probe_of(model, x)
    state = copy.deepcopy(model.state_dict())
    shared = vs.one_pass(probe, {"attention_maps": {"images": 2}, "feature_map_variance": {}})
    assert shared["attention_maps"] == vs.attention_maps(probe, images=2)
    assert shared["feature_map_variance"] == vs.feature_map_variance(probe)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert vs.attention_maps(probe, images=0).maps.shape == (2, 0, 3, 4, 4)


def test_images_are_shown_as_pixels() -> None:
    model, x = filled(vit(depth=1)), images(16)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.1, 0.3]
    result = vs.attention_maps(probe_of(model, x, mean=mean, std=std), images=2)
    expected = np.clip(x.permute(0, 2, 3, 1).numpy() * std + mean, 0, 1) * 255
    np.testing.assert_array_equal(result.images, expected[:2].round().astype(np.uint8))
    unknown = vs.attention_maps(probe_of(model, x), images=1).images
    assert (unknown.min(), unknown.max()) == (0, 255)


@pytest.mark.parametrize("options", [{}, {"layers": [0], "query": (1, 1)}])
def test_a_network_without_attention_has_no_layers(options: dict[str, Any]) -> None:
    for model in (convnet(num_classes=3), timm.create_model("test_convnext")):
        with pytest.warns(NullWarning, match=r"attention_maps: null for attention \(the network has none\)"):
            result = vs.attention_maps(probe_of(model.double(), images(32)), images=2, **options)
        assert (result.units, len(result.maps), result.rollout, result.scalars()) == ((), 0, None, {})
        assert (result.layer_iou.shape, result.images.shape, result.n_images) == ((0, 0), (2, 32, 32, 3), 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [2]}, r"numbers below 2 or names such as 'blocks.1.attn', received 2; pass layers=\[1\]"),
        ({"layers": []}, "at least one layer"),
        ({"heads": [3]}, r"heads in 0 .. 2 of 'blocks.0.attn', received 3; pass heads=\[0\]"),
        ({"heads": []}, "at least one head"),
        ({"query": "token"}, "'auto', 'class', 'mean' or the row and column of a pixel, received 'token'"),
        ({"query": (16, 0)}, r"a pixel of images of 16x16, received \[16, 0\]; pass query=\[8, 8\]"),
        ({"class_index": 3}, "class_index in 0 .. 2, received 3"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vs.attention_maps(probe_of(filled(vit()), images(16)), **options)


def test_a_class_token_that_is_not_there() -> None:
    model = filled(vit(class_token=False, global_pool="avg", reg_tokens=1))
    with pytest.raises(ValueError, match="a class token for query='class', received 'blocks.0.attn' without one"):
        vs.attention_maps(probe_of(model, images(16)), query="class")
    assert vs.attention_maps(probe_of(model, images(16))).query == "mean"  # a register is no class token


def test_measures_of_one_pass_share_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = probe_of(filled(vit()), images(16))
    alone = vs.attention_maps(probe, gradient=False)
    computed: list[torch.Size] = []
    original = attention_weights.attention_weights

    def counted(*args: Any, **options: Any) -> Tensor:
        computed.append(original(*args, **options).shape)
        return original(*args, **options)

    monkeypatch.setattr(attention_weights, "attention_weights", counted)
    shared = vs.one_pass(probe, {"attention_maps": {"gradient": False}, "token_norms": {}})
    assert computed == [torch.Size((2, 3, 17, 17))] * 4  # two layers in two batches
    assert shared["attention_maps"] == alone
    assert shared["token_norms"].attention_units == ("blocks.0.attn", "blocks.1.attn")
