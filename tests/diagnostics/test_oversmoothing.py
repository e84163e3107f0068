"""Oversmoothing: constructed tokens and attention, and explicit forward passes of timm's ViT and Swin in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.oracles.result_checks import check_result
from vitscope.core.undefined_values import NullWarning
from vitscope.diagnostics.tokens._attention_collapse import (
    AttentionCollapse,
    layer_cosines,
    normalized_mutual_information,
)
from vitscope.diagnostics.tokens._smoothness import mean_cosine, rank1_residual
from vitscope.models.structure.attention_units import attention_units, reading_attention_units

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fewer than 128 images"),
    pytest.mark.filterwarnings("ignore:oversmoothing. null for similarity of some layers"),
]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probe_of(model: nn.Module, *batches: Tensor) -> vs.Probe:
    return vs.Probe(model, [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches])


@pytest.mark.parametrize(
    ("tokens", "cosine", "residual"),
    [
        ([[1.0, 2.0]] * 5, 1.0, 0.0),  # equal tokens
        ([[1.0, 0.0], [-1.0, 0.0]], -1.0, 1.0),  # opposite tokens have the mean 0
        ([[3.0, 0.0], [0.0, 5.0]], 0.0, None),
        (np.eye(4).tolist(), 0.0, np.sqrt(3 / 4)),  # |X|^2 = n, n |m|^2 = 1
        ([[1.0, 0.0], [2.0, 0.0], [7.0, 0.0]], 1.0, np.sqrt(1 - 3 * (10 / 3) ** 2 / 54)),
    ],
)
def test_constructed_tokens(tokens: list, cosine: float, residual: float | None) -> None:
    x = torch.tensor(tokens, dtype=torch.float64).T[None]  # (1, C, n)
    assert float(mean_cosine(x)[0]) == pytest.approx(cosine, abs=1e-14)
    if residual is not None:
        assert float(rank1_residual(x, "frobenius")[0]) == pytest.approx(residual, abs=1e-14)


def test_composite_norm_of_a_constructed_matrix() -> None:
    tokens = torch.tensor([[4.0, 0.0], [0.0, 2.0]], dtype=torch.float64)  # one token a row; the mean is (2, 1)
    # residual [[2, -1], [-2, 1]]: sums over tokens 4 and 2, over channels 3 and 3; of X 4 and 2, and 4 and 2
    expected = np.sqrt(4 * 3) / np.sqrt(4 * 4)
    assert float(rank1_residual(tokens.T[None], "composite")[0]) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_tokens_against_all_pairs_and_a_subtracted_mean(layout: str) -> None:
    x = noise(3, 6, 20) + noise(3, 6, 1, seed=1)
    if layout == "channels last":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    tokens = x.transpose(1, 2).numpy()
    unit = tokens / np.linalg.norm(tokens, axis=2, keepdims=True)
    pairs = unit @ unit.transpose(0, 2, 1)
    np.testing.assert_allclose(mean_cosine(x), [pair[~np.eye(20, dtype=bool)].mean() for pair in pairs], rtol=1e-12)
    residual = tokens - tokens.mean(axis=1, keepdims=True)
    for norm, order in (("frobenius", None), ("composite", (1, np.inf))):
        size = [
            np.sqrt(np.prod([np.linalg.norm(m, o) for o in order])) if order else np.linalg.norm(m)
            for m in (*residual, *tokens)
        ]
        expected = np.array(size[:3]) / size[3:]
        np.testing.assert_allclose(rank1_residual(x, norm), expected, rtol=1e-12)


def test_collapsed_tokens_keep_their_residual_in_single_precision() -> None:
    x = (1.0 + 1e-4 * noise(2, 8, 50)).float()
    tokens = x.double()
    expected = (tokens - tokens.mean(2, keepdim=True)).flatten(1).norm(dim=1) / tokens.flatten(1).norm(dim=1)
    torch.testing.assert_close(rank1_residual(x, "frobenius"), expected, rtol=1e-5, atol=0)  # the mean is float32's


def test_tokens_that_are_zero_have_no_direction() -> None:
    x = noise(1, 3, 6)
    x[:, :, 4:] = 0.0
    assert float(mean_cosine(x)[0]) == pytest.approx(float(mean_cosine(x[:, :, :4])[0]), rel=1e-12)
    x[:, :, 1:] = 0.0
    assert bool(mean_cosine(x).isnan().all())


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (torch.eye(6, dtype=torch.float64), 1.0),
        (torch.full((6, 6), 1 / 6, dtype=torch.float64), 0.0),
        (torch.eye(6, dtype=torch.float64)[torch.zeros(6, dtype=torch.long)], 0.0),  # all attend to the first
        (torch.eye(6, dtype=torch.float64)[torch.randperm(6, generator=torch.Generator().manual_seed(0))], 1.0),
        # pairs of queries share two keys: I = ln 3, H(q) = H(k) = ln 6
        (torch.block_diag(*[torch.full((2, 2), 0.5, dtype=torch.float64)] * 3), np.log(3) / np.log(6)),
    ],
)
def test_mutual_information_of_constructed_attention(p: Tensor, expected: float) -> None:
    assert float(normalized_mutual_information(p, torch.tensor(6))) == pytest.approx(expected, abs=1e-12)


def test_mutual_information_is_that_of_a_sample_of_hard_attention() -> None:
    keys = np.random.default_rng(0).integers(0, 5, 40)
    p = torch.eye(5, dtype=torch.float64)[torch.from_numpy(keys)]  # (40 queries, 5 keys)
    expected = sklearn.metrics.normalized_mutual_info_score(np.arange(40), keys, average_method="geometric")
    assert float(normalized_mutual_information(p, torch.tensor(40))) == pytest.approx(expected, rel=1e-12)


def windows(queries: Tensor, n_heads: int) -> AttentionCollapse:
    unit = SimpleNamespace(n_windows=len(queries), queries=queries, keys=queries, n_heads=n_heads)
    return AttentionCollapse(unit)


def test_padding_and_prefix_tokens_are_left_out_and_rows_sum_to_one_again() -> None:
    cells = torch.tensor([[[-1, -1], [0, 0], [0, 1], [1, 0]]])
    inner = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]], dtype=torch.float64)
    weights = torch.full((1, 2, 4, 4), 0.25, dtype=torch.float64)
    weights[0, 0, 1:, 1:] = 0.5 * inner
    weights[0, 1, 1:, 1:] = 0.7 * inner
    collapse = windows(cells, 2)
    flat = collapse.add(weights)
    torch.testing.assert_close(flat, inner.flatten()[None])
    expected = float(normalized_mutual_information(inner, torch.tensor(3)))
    assert collapse.nmi.state()[1][0] == pytest.approx(expected, rel=1e-12)
    assert collapse.head_similarity.state()[1][0] == pytest.approx(1.0)
    nan = float("nan")
    padded = torch.tensor([[[0, 0], [0, 1], [1, 0]], [[1, 1], [-1, -1], [-1, -1]]])
    second = torch.full((3, 3), nan, dtype=torch.float64)
    second[0] = torch.tensor([0.2, 0.4, 0.4])
    collapse = windows(padded, 1)
    flat = collapse.add(torch.stack((inner, second))[:, None])
    # the window with a single query has no mutual information
    assert collapse.nmi.state()[1][0] == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(flat[0, 9:], torch.tensor([1.0] + [0.0] * 8, dtype=torch.float64))
    assert np.isnan(collapse.head_similarity.state()[1][0])  # one head


@pytest.mark.parametrize("share", [0.5, 1e-4])
def test_information_beside_a_class_token_that_takes_most_attention(share: float) -> None:
    n = 50
    cells = torch.tensor([[[-1, -1], *([i // 10, i % 10] for i in range(n))]])
    logits = 3 * noise(2, 3, n + 1, n + 1)
    logits[..., 0] = logits[..., 1:].logsumexp(-1) + np.log((1 - share) / share)
    weights = logits.softmax(-1).float()
    expected = weights.double()[:, :, 1:, 1:]
    expected = expected / expected.sum(-1, keepdim=True)
    collapse = windows(cells, 3)
    collapse.add(weights)
    nmi = normalized_mutual_information(expected, torch.tensor(n))  # (2 images, 3 heads)
    # Entropies H of the positions alone come from terms of all, of which they are share * (H - ln share): a rounding of their
    # sums, of less than 10 eps in all, is one of H - ln share. They are at most ln n, and H(k) is divided by.
    of_keys = torch.special.entr(expected.mean(2)).sum(-1)
    error = 10 * torch.finfo(torch.float32).eps * 2 * (np.log(n) - np.log(share)) / (np.log(n) * of_keys).sqrt()
    assert bool((torch.from_numpy(collapse.head_nmi.state()[1][0]) / 2 - nmi.mean(0)).abs().le(error.amax(0)).all())


def test_heads_and_layers_with_known_cosines() -> None:
    identity, uniform = torch.eye(4, dtype=torch.float64), torch.full((4, 4), 0.25, dtype=torch.float64)
    cells = torch.tensor([[[0, 0], [0, 1], [1, 0], [1, 1]]])
    collapse = windows(cells, 2)
    mixed = collapse.add(torch.stack((identity, uniform))[None])
    assert collapse.head_similarity.state()[1][0] == pytest.approx(0.5)  # 1 / (2 * 1)
    other = windows(cells, 1).add(identity[None, None])
    found = layer_cosines({0: mixed, 1: other, 2: other}, [[0, 1], [2]], 3)[0]
    mean = (identity + uniform) / 2
    cosine = float((mean * identity).sum() / mean.norm() / 2)
    expected = [[1.0, cosine, np.nan], [cosine, 1.0, np.nan], [np.nan, np.nan, 1.0]]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def explicit(block: Any, x: Tensor) -> Tensor:
    """Return softmax(q k' / sqrt(d)) of a block of timm's ViT, (B, heads, tokens, tokens)."""
    q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)


def test_a_vit_against_an_explicit_forward_pass(tmp_path) -> None:
    torch.manual_seed(0)
    model = vs.models.vit(patch_size=8, depth=2, reg_tokens=2, image_size=(16, 24), num_classes=3).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    x = noise(5, 3, 16, 24)
    result = check_result(vs.oversmoothing(probe_of(model, x[:3], x[3:])), tmp_path)
    with torch.no_grad():
        states = [model.norm_pre(model._pos_embed(model.patch_embed(x)))]
        attention = []
        for block in model.blocks:
            attention.append(explicit(block, states[-1])[:, :, 3:, 3:])
            states.append(states[-1] + block.ls1(block.attn(block.norm1(states[-1]))))
            states.append(states[-1] + block.ls2(block.mlp(block.norm2(states[-1]))))
    for index, state in enumerate(states):
        tokens = state[:, 3:]
        unit = nn.functional.normalize(tokens, dim=2)
        pairs = (unit @ unit.transpose(1, 2))[:, ~torch.eye(6, dtype=torch.bool)]
        assert result.cosine[index] == pytest.approx(float(pairs.mean()), rel=1e-10)
        residual = (tokens - tokens.mean(1, keepdim=True)).flatten(1).norm(dim=1) / tokens.flatten(1).norm(dim=1)
        assert result.rank1_residual[index] == pytest.approx(float(residual.mean()), rel=1e-10)
    flat = []
    for index, weights in enumerate(attention):
        p = (weights / weights.sum(-1, keepdim=True)).numpy()
        joint = p / 6
        keys = joint.sum(axis=2)  # (B, heads, keys)
        information = (joint * np.log(joint / (keys[:, :, None] / 6))).sum((2, 3))
        nmi = information / np.sqrt(np.log(6) * -(keys * np.log(keys)).sum(2))
        np.testing.assert_allclose(result.head_nmi[index], nmi.mean(0), rtol=1e-10)
        assert result.nmi[index] == pytest.approx(nmi.mean(), rel=1e-10)
        vectors = p.reshape(5, 3, 36)
        vectors = vectors / np.linalg.norm(vectors, axis=2, keepdims=True)
        cosines = vectors @ vectors.transpose(0, 2, 1)
        assert result.head_similarity[index] == pytest.approx((cosines.sum((1, 2)) - 3).mean() / 6, rel=1e-10)
        flat.append(p.mean(1).reshape(5, 36))
    pair = (flat[0] * flat[1]).sum(1) / np.linalg.norm(flat[0], axis=1) / np.linalg.norm(flat[1], axis=1)
    np.testing.assert_allclose(result.layer_similarity, [[1, pair.mean()], [pair.mean(), 1]], rtol=1e-10)
    scalars = result.scalars()
    assert scalars["cosine_last"] == result.cosine[-1]
    assert scalars["nmi_mean"] == pytest.approx(result.nmi.mean())


def test_windows_of_a_swin_are_measured_one_by_one() -> None:
    torch.manual_seed(0)
    model = (
        SwinTransformer(
            img_size=32, patch_size=4, embed_dim=8, depths=(2,), num_heads=(2,), window_size=4, num_classes=2
        )
        .double()
        .eval()
    )
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    x = noise(3, 3, 32, 32)
    result = vs.oversmoothing(probe_of(model, x))
    units, _ = attention_units(model, x)
    weights: dict[str, Tensor] = {}
    with torch.no_grad(), reading_attention_units(units, lambda i, unit, w: weights.update({unit.name: w.clone()})):
        model(x)
    for index, unit in enumerate(units):
        p = weights[unit.name]  # (3 * 4 windows, 2 heads, 16, 16), zero between parts of a shifted window
        keys = p.mean(2)
        information = torch.special.entr(keys).sum(-1) - torch.special.entr(p).sum((2, 3)) / 16
        nmi = information / (np.log(16) * torch.special.entr(keys).sum(-1)).sqrt()
        assert result.nmi[index] == pytest.approx(float(nmi.mean()), rel=1e-10)
    assert np.isnan(result.layer_similarity[0, 1])  # the windows of the second are shifted


def test_a_convnet_has_tokens_and_no_attention() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3).eval()
    with pytest.warns(
        NullWarning, match=r"null for attention \(the network has none\); layer4.0, layer4.1 \(1x1 map\)"
    ):
        result = vs.oversmoothing(probe_of(model, noise(3, 3, 32, 32).float()))
    assert np.isfinite(result.cosine[:-2]).all()
    assert np.isnan([result.cosine[-2:], result.rank1_residual[-2:]]).all()
    assert result.attention_units == ()
    assert result.layer_similarity.shape == (0, 0)
    assert result.scalars()["cosine_last"] == result.cosine[-3]
    assert [ax.get_ylabel().replace("\n", " ") for ax in vs.plot(result).axes] == [
        "Mean cosine of tokens",
        "Rank-1 residual",
    ]
    with pytest.raises(ValueError, match="Expected a result with attention"):
        vs.plot(result, view="layers")


def test_attention_of_a_class_token_alone_has_no_similarity() -> None:
    torch.manual_seed(0)
    model = timm.create_model("cait_xxs24_224", img_size=32, depth=1, embed_dim=12, num_heads=3).eval()
    reason = r"attention of blocks_token_only.0.attn, attention of blocks_token_only.1.attn \(no query or no key with a position"
    with pytest.warns(NullWarning, match=reason):
        result = vs.oversmoothing(probe_of(model, noise(3, 3, 32, 32).float()))
    assert len(result.attention_units) == 2
    assert np.isnan(result.nmi).all()
    assert np.isnan(result.head_similarity).all()
    assert np.isnan(result.layer_similarity).all()
    assert np.isfinite(result.cosine).all()


def test_intervals_a_shared_pass_and_the_figure() -> None:
    torch.manual_seed(0)
    model = vs.models.vit(patch_size=8, depth=2, image_size=16, num_classes=3)
    x = noise(140, 3, 16, 16).float()
    probe = probe_of(model, x[:100], x[100:])
    shared = vs.one_pass(probe, {"token_norms": {}, "oversmoothing": {"norm": "composite"}})
    result = shared["oversmoothing"]
    assert result == vs.oversmoothing(probe, norm="composite")
    assert result.norm == "composite"
    for half_width in (result.cosine_half_width, result.rank1_residual_half_width, result.nmi_half_width):
        assert (half_width > 0).all()
    assert (result.head_similarity_half_width > 0).all()
    assert result.layer_similarity_half_width[0, 1] > 0
    figure = vs.plot(result)
    np.testing.assert_array_equal(figure.axes[0].get_lines()[0].get_ydata(), result.cosine)
    np.testing.assert_array_equal(figure.axes[2].get_lines()[0].get_ydata(), result.nmi)
    matrices = vs.plot({"a": result, "b": result}, view="layers")
    np.testing.assert_array_equal(matrices.axes[1].images[0].get_array(), result.layer_similarity)
    with pytest.raises(ValueError, match="depth, layers, received 'x'"):
        vs.plot(result, view="x")


def test_activations_that_are_not_finite_are_null_and_options_are_checked() -> None:
    torch.manual_seed(0)
    model = vs.models.vit(patch_size=8, depth=1, image_size=16, num_classes=3)
    x = noise(3, 3, 16, 16).float()
    with pytest.raises(ValueError, match="frobenius, composite, received 'spectral'"):
        vs.oversmoothing(probe_of(model, x), norm="spectral")
    x[1] = torch.nan
    with pytest.warns(NullWarning, match=r"zero or not finite\); mutual information of blocks.0.attn \(weights"):
        result = vs.oversmoothing(probe_of(model, x))
    assert np.isnan([result.cosine, result.rank1_residual]).all()
    assert np.isnan(result.nmi).all()
    assert np.isnan(result.scalars()["cosine_last"])
