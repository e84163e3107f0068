"""Principal components of patch features: scikit-learn's, constructed foregrounds and rotations, sharing, errors."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from sklearn.decomposition import PCA
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitscope as vs
from vitscope.core.undefined_values import NullWarning
from vitscope.diagnostics.patch_pca._components import principal_components, rotation_to
from vitscope.linalg.feature_moments import FeatureMoments

pytestmark = pytest.mark.filterwarnings("ignore::vitscope.core.undefined_values.NullWarning")


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probe_of(x: Tensor, batch: int = 4, model: nn.Module | None = None) -> vs.Probe:
    """Return a probe whose features are the images themselves, or those of a model."""
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(batch)]
    if model is not None:
        return vs.Probe(model, batches)
    net = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(x[0].numel(), 2)).double()
    return vs.Probe(net, batches, taps=[vs.Tap("features", "conv", 1, 1.0, net[0])])


def vectors_of(x: Tensor) -> np.ndarray:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).numpy()


def mixed(n: int, channels: int = 6, size: int = 5) -> Tensor:
    return torch.einsum("nchw,cd->ndhw", normal(n, channels, size, size), normal(channels, channels, seed=1)) + 3


def test_components_are_those_of_scikit_learn() -> None:
    x = mixed(13)
    result = vs.patch_pca(probe_of(x), images=5)
    reference = PCA(3).fit(vectors_of(x))
    np.testing.assert_allclose(result.explained_variance, reference.explained_variance_, rtol=1e-10)
    np.testing.assert_allclose(result.explained_variance_ratio, reference.explained_variance_ratio_, rtol=1e-10)
    signs = np.sign((result.components[0] * reference.components_).sum(axis=1))
    np.testing.assert_allclose(result.components[0], signs[:, None] * reference.components_, atol=1e-9)
    assert (np.take_along_axis(result.components[0], np.abs(result.components[0]).argmax(1)[:, None], 1) > 0).all()
    scores = signs * reference.transform(vectors_of(x[:5])).reshape(5, 5, 5, 3)
    np.testing.assert_allclose(result.scores[0], scores, atol=1e-9)
    low, high = np.quantile(scores.reshape(-1, 3), [0.01, 0.99], axis=0)
    np.testing.assert_allclose(result.colors, np.clip((scores - low) / (high - low), 0, 1), atol=1e-9)
    np.testing.assert_array_equal(result.n_vectors, [13 * 25])
    for batch in (1, 13):  # the images' groups and order of sums differ, nothing else
        other = vs.patch_pca(probe_of(x, batch), images=5)
        np.testing.assert_allclose(other.colors, result.colors, atol=1e-9)
        np.testing.assert_allclose(other.variances, result.variances, rtol=1e-12)


def test_tokens_of_a_transformer_without_its_prefix() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch14_reg4_dinov2", img_size=56, depth=2, embed_dim=32, num_heads=2, num_classes=3
    ).eval()
    x = torch.randn(6, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    result = vs.patch_pca(probe_of(x, 3, model), images=2)
    tokens: list[Tensor] = []
    handle = model.get_submodule("blocks.1").register_forward_hook(lambda *args: tokens.append(args[2]))
    with torch.no_grad():
        model(x)
    handle.remove()
    reference = PCA(3).fit(tokens[0][:, 5:].double().reshape(-1, 32).numpy())
    assert result.colors.shape == (2, 4, 4, 3)
    np.testing.assert_allclose(
        result.explained_variance, reference.explained_variance_, rtol=1e-4
    )  # features in float32
    assert result.images.shape == (2, 56, 56, 3)
    assert (result.colors >= 0).all()
    assert (result.colors <= 1).all()


def test_the_foreground_is_the_side_away_from_the_border() -> None:
    x = 0.3 * mixed(12, size=7)
    inside = torch.zeros(7, 7, dtype=torch.bool)
    inside[2:5, 2:5] = True
    for shift in (40.0, -40.0):  # whichever sign the axis has
        shifted = x + shift * inside
        result = vs.patch_pca(probe_of(shifted), images=3, foreground=0.0)
        np.testing.assert_array_equal(result.foreground_masks[0], inside.expand(3, 7, 7))
        np.testing.assert_allclose(result.foreground_share, [9 / 49])
        reference = PCA(3).fit(vectors_of(shifted[:, :, 2:5, 2:5]))
        np.testing.assert_allclose(result.explained_variance, reference.explained_variance_, rtol=1e-8)
        assert (result.colors[:, ~inside.numpy()] == 0).all()
    with pytest.warns(NullWarning, match="null for features .fewer than two feature vectors"):
        empty = vs.patch_pca(probe_of(x), foreground=50.0)
    assert np.isnan(empty.explained_variance).all()
    small = mixed(12, size=2)
    with pytest.raises(ValueError, match=r"at least 3x3 positions for a foreground, received 2x2 at features"):
        vs.patch_pca(probe_of(small), foreground=0.0)


def test_a_reference_undoes_a_rotation() -> None:
    x = mixed(8)
    turning = nn.Conv2d(6, 6, 1, bias=False).double()
    with torch.no_grad():
        turning.weight.copy_(-torch.linalg.qr(normal(6, 6, seed=2)).Q[:, :, None, None])
    net = nn.Sequential(turning, nn.Flatten(), nn.Linear(150, 2)).double()
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(4)]
    turned = vs.Probe(net, batches, taps=[vs.Tap("features", "conv", 1, 1.0, turning)])
    reference = vs.patch_pca(probe_of(x))
    result = vs.patch_pca(turned, reference=reference)
    np.testing.assert_allclose(result.colors, reference.colors, atol=1e-9)
    np.testing.assert_allclose(result.alignment_r2, [1])
    np.testing.assert_allclose(result.variances, reference.variances)
    assert vs.plot({"model": reference, "turned": result}).axes


def test_rotations_are_found_on_grids_of_different_sizes() -> None:
    goal = normal(3, 4, 4, 3).numpy()
    turn = np.linalg.qr(normal(3, 3, seed=3).numpy())[0]
    scores = 2 * np.kron(goal @ turn.T, np.ones((1, 2, 2, 1)))  # on a grid of 8 x 8, twice as long
    mask, goal_mask = np.ones(scores.shape[:3], bool), np.ones(goal.shape[:3], bool)
    rotation, r2 = rotation_to(scores, mask, goal, goal_mask)
    np.testing.assert_allclose(rotation, turn, atol=1e-12)
    assert r2 == pytest.approx(1)
    assert rotation_to(normal(3, 4, 4, 3, seed=5).numpy(), goal_mask, goal, goal_mask)[1] < 0.5


def test_variances_without_a_group_are_those_of_the_other_vectors_in_the_plane() -> None:
    """Groups of different sizes and means; the axes are those of all vectors, turned to the best of their plane."""
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(n, 6)) * [3, 2, 1.5, 1, 0.5, 0.2] + rng.normal(size=6) for n in (12, 30, 7, 21)]
    groups = [FeatureMoments() for _ in rows]
    for group, vectors in zip(groups, rows):
        group.add(torch.from_numpy(vectors))
    found = principal_components(groups, 6)
    everything = np.concatenate(rows)
    values, vectors = np.linalg.eigh(np.cov(everything.T))
    np.testing.assert_allclose(found.variance, values[::-1][:3], rtol=1e-10)
    np.testing.assert_allclose(found.ratio, values[::-1][:3] / values.sum(), rtol=1e-10)
    np.testing.assert_allclose(np.abs(found.axes @ vectors[:, ::-1][:, :3]), np.eye(3), atol=1e-8)
    for skipped in range(4):
        rest = np.concatenate([part for number, part in enumerate(rows) if number != skipped])
        covariance = np.cov(rest.T)
        inside = np.linalg.eigvalsh(found.axes @ covariance @ found.axes.T)[::-1]
        np.testing.assert_allclose(found.variance_without[skipped], inside, rtol=1e-10)
        np.testing.assert_allclose(found.ratio_without[skipped], inside / np.trace(covariance), rtol=1e-10)


def test_intervals_hold_the_true_variance() -> None:
    held = []
    scale = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)[:, None, None]
    for seed in range(40):
        result = vs.patch_pca(probe_of(scale * normal(128, 4, 2, 2, seed=seed), 64), images=1)
        held.append(np.abs(result.explained_variance - [9, 4, 1]) <= result.explained_variance_half_width)
    assert 0.85 <= np.mean(held) <= 1.0  # 120 intervals of 95 %: 0.85 has a chance below 1e-4
    few = vs.patch_pca(probe_of(normal(100, 4, 2, 2), 50), images=1)
    assert np.isnan(few.explained_variance_half_width).all()


def test_the_pass_is_shared_and_the_result_is_that_of_its_own_pass() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=4, num_classes=3, embed_dim=16, depth=2, num_heads=2)
    probe = probe_of(torch.randn(6, 3, 16, 16), 3, model)
    passes: list[int] = []
    alone = vs.patch_pca(probe, taps="all", images=4)
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    shared = vs.one_pass(probe, {"patch_pca": {"taps": "all", "images": 4}, "feature_map_variance": {}})
    handle.remove()
    assert len(passes) == 2
    assert shared["patch_pca"] == alone
    assert alone.taps == tuple(tap.name for tap in probe.taps)
    last = vs.patch_pca(probe, images=4)
    np.testing.assert_array_equal(alone.colors, last.colors)
    with pytest.raises(ValueError, match="Expected a measure of the feature maps of one pass"):
        vs.one_pass(probe, {"patch_pca": {"foreground": 0.0}})


def test_few_channels_and_constant_features() -> None:
    result = vs.patch_pca(probe_of(mixed(4, channels=2)))
    np.testing.assert_array_equal(result.explained_variance[2:], [0])
    assert (result.colors[..., 2] == 0.5).all()
    with pytest.warns(NullWarning, match="null for features .its features do not vary"):
        constant = vs.patch_pca(probe_of(torch.ones(4, 3, 2, 2, dtype=torch.float64)))
    assert np.isnan(constant.colors).all()
    assert np.isnan(list(constant.scalars().values())).all()


def test_wrong_options_and_references_are_refused(tmp_path: Path) -> None:
    probe = probe_of(mixed(6))
    result = vs.patch_pca(probe, images=2)
    for options, message in (
        ({"images": 0}, "Expected images of at least 1, received 0"),
        ({"taps": ["conv9"]}, "Expected taps to be stages, last, all or names among features, received 'conv9'"),
        ({"reference": result}, "Expected a reference of the same images, received 2 images beside 6"),
        (
            {"reference": vs.tap_table(probe).save(tmp_path / "taps")},
            "Expected reference to be a saved result of patch_pca",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            vs.patch_pca(probe, **options)
    other = vs.patch_pca(probe_of(mixed(6).flip(0)), images=2)
    with pytest.raises(ValueError, match="received 2 images beside 2, which differ"):
        vs.patch_pca(probe, images=2, reference=other)
    path = result.save(tmp_path / "pca")
    aligned = vs.patch_pca(probe, images=2, reference=path)
    np.testing.assert_allclose(aligned.alignment, [np.eye(3)], atol=1e-9)
    np.testing.assert_allclose(aligned.alignment_r2, [1])


def test_the_figure_has_the_images_above_their_colors() -> None:
    results = {f"model {i}": vs.patch_pca(probe_of(mixed(6) * (1 + i)), images=3) for i in range(2)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = vs.plot(results)
    assert len(figure.axes) == 9
    np.testing.assert_array_equal(np.asarray(figure.axes[1].images[0].get_array()), results["model 0"].images[1])
    np.testing.assert_array_equal(np.asarray(figure.axes[4].images[0].get_array()), results["model 0"].colors[1])
    with pytest.raises(ValueError, match="Expected images of at least 1, received 0"):
        vs.plot(results, images=0)
