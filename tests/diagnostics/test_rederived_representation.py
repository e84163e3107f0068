"""Measures of feature maps and attention, derived again from docs/definitions.md by programs of NumPy alone.

The networks are timm's ViT with a class and register tokens on an image that is not square, and a Swin whose shifted windows do
not divide its map, in float64: 1e-9 is far above what sums of at most 1e4 products round to.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy import stats
from scipy.optimize import brentq
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.oracles.explicit_passes import ExplicitPass, pixel_distances, swin_pass, vit_pass
from vitscope.config import model_facts
from vitscope.diagnostics.frequency_noise import _bands as bands

pytestmark = pytest.mark.filterwarnings("ignore::vitscope.core.undefined_values.NullWarning")

RTOL = 1e-9


def random_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter normal entries that keep activations near 1, so that no unit is close to doing nothing."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        draw = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.data = draw * (1.3 / p[0].numel() ** 0.5) if p.ndim > 1 else p.data + 0.3 * draw
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var = 0.5 + torch.rand(module.num_features, generator=generator, dtype=torch.float64)
    return model.double().eval()


def vit(seed: int = 0) -> Any:
    model = VisionTransformer((24, 16), 4, num_classes=5, embed_dim=16, depth=2, num_heads=2, reg_tokens=3)
    return random_weights(model, seed)


def swin(seed: int = 0) -> Any:
    # a map of 5 x 7 in windows of 4: rolled by 2, then padded to 8 x 8
    model = SwinTransformer((20, 28), 4, num_classes=5, embed_dim=8, depths=(2,), num_heads=(2,), window_size=4)
    return random_weights(model, seed)


def resnet(seed: int = 0) -> Any:
    return random_weights(ResNet(BasicBlock, (1, 2, 1, 1), num_classes=5, channels=(8, 8, 12, 16)), seed)


def images_of(*size: int, n: int = 13, seed: int = 1) -> Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probe_of(model: nn.Module, x: Tensor, y: Tensor | None = None, size: int = 8) -> vs.Probe:
    """Return a probe in batches of 8, of which the last is smaller."""
    labels = torch.arange(len(x)) % 5 if y is None else y
    return vs.Probe(model, list(zip(x.split(size), labels.split(size))))


NETWORKS = {"vit": (vit, vit_pass, (24, 16)), "swin": (swin, swin_pass, (20, 28))}


def explicit(name: str, seed: int = 0) -> tuple[Any, Tensor, ExplicitPass]:
    build, run, size = NETWORKS[name]
    model, x = build(seed), images_of(*size)
    with torch.no_grad():
        shown = run(model, x)
        assert_allclose(shown.logits, model(x), rtol=1e-8, atol=1e-10)
    return model, x, shown


@pytest.mark.parametrize("name", NETWORKS)
def test_attention_of_explicit_passes(name: str) -> None:
    model, x, shown = explicit(name)
    grid = shown.maps["stem"].shape[2:]
    probe = probe_of(model, x)
    distance, maps = vs.attention_distance(probe), vs.attention_maps(probe, images=2, query="mean", gradient=False)
    tokens = vs.token_norms(probe, positions=None)
    smooth = vs.oversmoothing(probe)
    assert distance.units == maps.units == smooth.attention_units == tuple(shown.attention)
    for i, (unit, places) in enumerate(shown.places.items()):
        weights, on_map = shown.attention[unit].numpy(), places.numpy() >= 0
        n_keys = weights.shape[-1]
        far = pixel_distances(places, (grid[0], grid[1]), (x.shape[2], x.shape[3]))
        on_keys = weights * on_map[:, None, None]  # (B, n_windows, heads, queries, keys)
        share = on_keys.sum(-1)
        rows = {
            "distance": (on_keys * far[:, None]).sum(-1) / np.maximum(share, 1e-300),  # padding may see padding alone
            "entropy": -(weights * np.log(np.maximum(weights, 1e-300))).sum(-1),
            "off_map": 1 - share,
        }
        # (B, heads, queries on the map), windows in a row
        means = {key: np.moveaxis(value, 2, 1)[:, :, on_map].mean((0, 2)) for key, value in rows.items()}
        for key, value in means.items():
            assert_allclose(getattr(distance, key)[i], value, rtol=RTOL, atol=1e-12)
        assert_allclose(maps.entropy[i], means["entropy"], rtol=RTOL)
        received = np.zeros((len(x), grid[0] * grid[1]))
        drawn = np.zeros((len(x), weights.shape[2], grid[0] * grid[1]))
        for window in range(len(places)):
            cells, inside = places[window][on_map[window]].numpy(), weights[:, window][..., on_map[window]]
            # prefix tokens are queries of what a token receives; padding is not, nor are they queries on the map
            queries = on_map[window] if name == "swin" else slice(None)
            received[:, cells] = inside[:, :, queries].mean((1, 2)) * n_keys
            drawn[..., cells] += inside[:, :, on_map[window]].sum(2) / on_map.sum()
        assert_allclose(tokens.attention_received[i], received, rtol=1e-6)  # kept in float32
        assert_allclose(maps.maps[i], drawn[:2].reshape(2, -1, *grid), rtol=RTOL)
        normalized = [
            part / part.sum(-1, keepdims=True)
            for window in range(len(places))
            for part in [weights[:, window][:, :, on_map[window]][..., on_map[window]]]
        ]
        information = []
        for part in normalized:  # (B, heads, n, n)
            keys, n = part.mean(2), part.shape[2]
            if n > 1:
                mutual = stats.entropy(keys, axis=-1) - stats.entropy(part, axis=-1).mean(-1)
                information.append(mutual / np.sqrt(np.log(n) * stats.entropy(keys, axis=-1)))
        assert_allclose(smooth.head_nmi[i], np.mean(information, axis=(0, 1)), rtol=1e-8)
        vectors = np.concatenate([part.reshape(*part.shape[:2], -1) for part in normalized], axis=-1)
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        cosines = [(vectors[:, a] * vectors[:, b]).sum(-1) for a, b in combinations(range(vectors.shape[1]), 2)]
        assert smooth.head_similarity[i] == pytest.approx(np.mean(cosines), rel=RTOL)


def rings_of(maps: np.ndarray) -> np.ndarray:
    """Return mean log amplitudes over channels in rings of maps (B, C, h, w), (B, n_rings)."""
    h, w = maps.shape[2:]
    radius = np.hypot(2 * np.fft.fftfreq(h)[:, None], 2 * np.fft.fftfreq(w))
    ring = np.round(radius * min(h, w) / 2).astype(int)
    ring[(ring == 0) & (radius > 0)] = 1
    logs = np.log(np.abs(np.fft.fft2(maps)) + 1e-6)
    return np.stack([logs[..., ring == r].mean((1, 2)) for r in range(min(h, w) // 2 + 1)], axis=1)


@pytest.mark.parametrize("name", NETWORKS)
def test_branch_transfer_of_explicit_branches(name: str) -> None:
    model, x, shown = explicit(name)
    untrained, _, before = explicit(name, seed=5)
    result = vs.branch_transfer(probe_of(model, x), initial=untrained, n_resamples=2)
    assert result.units == tuple(shown.branches)
    for i, unit in enumerate(result.units):
        transfer, initial = (
            rings_of(branch.numpy()) - rings_of(source.numpy())
            for source, branch in (shown.branches[unit], before.branches[unit])
        )
        assert_allclose(result.transfer[i], (transfer - initial).mean(0), rtol=RTOL, atol=1e-11)
        n = max(1, (transfer.shape[1] - 1) // 3)
        contrast = [t[:, -n:].mean(1) - t[:, 1 : 1 + n].mean(1) for t in (transfer, initial)]
        assert result.contrast[i] == pytest.approx((contrast[0] - contrast[1]).mean(), rel=1e-8, abs=1e-11)


@pytest.mark.parametrize("name", NETWORKS)
def test_norms_and_components_of_explicit_maps(name: str) -> None:
    model, x, shown = explicit(name)
    probe = probe_of(model, x)
    norms = vs.token_norms(probe, positions=None)
    colors = vs.patch_pca(probe, taps="all", images=3, foreground=0.5)
    assert norms.taps == colors.taps == tuple(shown.maps)
    for i, maps in enumerate(shown.maps.values()):
        features = maps.permute(0, 2, 3, 1).numpy()  # (B, h, w, C)
        logs = np.log(np.linalg.norm(features, axis=-1)).ravel()
        deviation = 1.4826 * np.median(np.abs(logs - np.median(logs)))
        threshold = np.exp(np.median(logs) + max(5 * deviation, np.log(2)))
        assert norms.artefact_threshold[i] == pytest.approx(threshold, rel=1e-6)  # norms are kept in float32
        skewness, kurtosis, n = stats.skew(logs, bias=False), stats.kurtosis(logs, bias=False), len(logs)
        coefficient = (skewness**2 + 1) / (kurtosis + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3)))
        assert norms.bimodality[i] == pytest.approx(coefficient, rel=1e-5)
        flat = features.reshape(-1, features.shape[-1])
        values, vectors = np.linalg.eigh(np.cov(flat.T))
        scores = (features - flat.mean(0)) @ vectors[:, -1]
        border = np.ones(scores.shape[1:], dtype=bool)
        border[1:-1, 1:-1] = False
        scores = scores if scores[:, border].mean() < scores.mean() else -scores
        mask = scores > 0.5 * np.sqrt(values[-1])
        np.testing.assert_array_equal(colors.foreground_masks[i], mask[:3])
        assert_allclose(colors.variances[i], np.linalg.eigvalsh(np.cov(features[mask].T))[:-4:-1], rtol=1e-8)


@pytest.mark.parametrize("contribution", ["squared", "positive"])
def test_receptive_field_of_an_uneven_image(contribution: str) -> None:
    model, x = resnet(), images_of(40, 56, n=3).requires_grad_(True)
    result = vs.effective_receptive_field(
        probe_of(model, x.detach(), size=2), taps=["layer2.1"], contribution=contribution
    )
    state = model.maxpool(model.act1(model.bn1(model.conv1(x))))
    maps = model.layer2(model.layer1(state))
    h, w = maps.shape[2:]
    maps = maps if contribution == "squared" else maps.relu()
    (gradient,) = torch.autograd.grad(maps[:, :, h // 2, w // 2].sum(), x)
    shares = (gradient.square() if contribution == "squared" else gradient.relu()).sum((0, 1)).numpy()
    shares /= shares.sum()
    assert_allclose(result.field[0], shares, rtol=1e-8, atol=1e-15)
    rows, columns = np.mgrid[:40, :56]
    center = [np.round(2 * (shares * side).sum()) / 2 for side in (rows, columns)]
    for metric, levels, found in (
        (np.hypot, result.radius_shares, [result.radius_50[0], result.radius_90[0], result.radius_99[0]]),
        (np.maximum, result.area_shares, result.area_ratio[0]),
    ):
        far = metric(np.abs(rows - center[0]), np.abs(columns - center[1]))
        known = np.unique(np.round(far, 9))
        held = np.array([shares[far <= d + 1e-8].sum() for d in known])
        sizes = known if metric is np.hypot else np.array([(far <= d + 1e-8).mean() for d in known])
        ends = ([0.0] if known[0] > 0 or metric is np.maximum else []), held
        expected = np.interp(levels, np.concatenate(ends), np.concatenate([np.zeros(len(ends[0])), sizes]))
        assert_allclose(found, expected, rtol=1e-8)


def test_neural_collapse_and_logit_lens_of_a_class_token_and_of_patches() -> None:
    model = vit()
    x, y = images_of(24, 16, n=48), torch.arange(48) % 5
    x = x + images_of(24, 16, n=5, seed=9)[y]  # classes that can be told apart
    result = vs.depth_probes(probe_of(model, x[32:], y[32:]), train=probe_of(model, x[:32], y[:32]), n_neighbors=5)
    with torch.no_grad():
        shown, labels = vit_pass(model, x), y.numpy()
        decisions = shown.logits.argmax(1).numpy()
    for i, maps in enumerate(shown.maps.values()):
        features = maps.mean((2, 3)).numpy()
        train, test = features[:32], features[32:]
        means = np.stack([train[labels[:32] == c].mean(0) for c in range(5)])
        centered = means - means.mean(0)
        within = train - means[labels[:32]]
        between = np.linalg.pinv(centered.T @ centered / 5, rcond=1e-10)
        assert result.nc1[i] == pytest.approx(np.trace(within.T @ within / 32 @ between) / 5, rel=1e-7)
        sizes = np.linalg.norm(centered, axis=1)
        cosines = (centered @ centered.T / np.outer(sizes, sizes))[np.triu_indices(5, 1)]
        assert result.nc2[i] == pytest.approx(np.abs(cosines + 1 / 4).mean(), rel=1e-8)
        assert result.nc2_equinorm[i] == pytest.approx(sizes.std() / sizes.mean(), rel=1e-8)
        nearest = np.linalg.norm(train[:, None] - means, axis=-1).argmin(1)
        assert result.nc4[i] == pytest.approx((nearest != decisions[:32]).mean())
        far = np.sort(np.linalg.norm(test[:, None] - test, axis=-1), axis=1)
        ratios, m = np.sort(np.log(far[:, 2] / far[:, 1])), int(0.9 * 16)
        dimension = (m - 1) / (ratios[:m].sum() + (16 - m) * ratios[m - 1])
        assert result.intrinsic_dimension[i] == pytest.approx(dimension, rel=1e-8)


def test_floating_point_operations_of_padded_windows() -> None:
    model = swin()
    products = [3 * 4 * 4 * 8 * 35]  # multiply-adds: patches of 4 x 4 pixels at 35 positions
    for _ in range(2):  # 4 windows of 16 positions, padding included, in the attention; 35 positions in the MLP
        products += [64 * 8 * 24, 2 * 4 * 16 * 16 * 8, 64 * 8 * 8, 2 * 35 * 8 * 32]
    assert model_facts.count(swin(), (3, 20, 28)).flops == 2 * (sum(products) + 8 * 5)
    shares = vs.structure(model)
    assert sum(p.numel() for p in model.parameters()) == model_facts.count(swin(), (3, 20, 28)).parameters
    assert "msa 804" in str(shares)  # of each: norm 16, qkv 216, proj 72, 49 biases a head of 2


def test_expected_rms_of_the_released_band_noise() -> None:
    """The table in docs/definitions.md, section 6."""
    table = [0.110, 0.190, 0.136, 0.267, 0.174, 0.326, 0.360, 0.223, 0.406]
    frequencies = np.arange(-16, 16)
    for i, expected in enumerate(table):
        f = (i + 1) / 10
        outer, inner = (int((f + s) * 16 + 1e-9) for s in (0.05, -0.05))
        squares = [(frequencies >= -side) & (frequencies < side) for side in (outer, inner)]
        ring = np.outer(squares[0], squares[0]) & ~np.outer(squares[1], squares[1])
        # white noise of power 1: the real part keeps all of a bin whose mirror image is in the ring, and half of another
        mirrored = np.roll(ring[::-1, ::-1], 1, axis=(0, 1))
        rms = np.sqrt((0.5 * ring + 0.5 * (ring & mirrored)).mean())
        assert rms == pytest.approx(expected, abs=0.0006)
        assert bands.official_rms(bands.official_mask(32, 32, f, 0.05)) == pytest.approx(rms, rel=1e-12)


def folded_mean(mean: float, variance: float) -> float:
    return float(stats.foldnorm.mean(abs(mean) / variance**0.5, scale=variance**0.5)) if variance > 0 else abs(mean)


def test_debiased_calibration_error_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    logits = 1.5 * rng.normal(size=(120, 4))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([rng.choice(4, p=0.6 * row + 0.1) for row in p])
    probe = vs.Probe(nn.Flatten(), [(torch.from_numpy(logits)[:, :, None, None], torch.from_numpy(labels))])
    result = vs.calibration(probe)
    confidence, correct = p.max(1), (p.argmax(1) == labels).astype(float)
    w, g, v = [], [], []
    for i in range(10):
        inside = (confidence > i / 10) & (confidence <= (i + 1) / 10)
        if inside.any():
            gap, sure = confidence[inside] - correct[inside], confidence[inside]
            w, g = [*w, inside.mean()], [*g, gap.mean()]
            v = [*v, (((gap - gap.mean()) ** 2).sum() + (sure * (1 - sure)).mean()) / inside.sum() ** 2]
    weight, gaps, variance = np.array(w), np.array(g), np.array(v)
    common = weight @ gaps
    spread = max(0.0, weight @ ((gaps - common) ** 2 - variance))
    trust = spread / (spread + variance)
    shape = np.array([folded_mean(common + t * (d - common), t * s) for t, d, s in zip(trust, gaps, variance)])
    shape /= weight @ shape

    def excess(error: float) -> float:
        sizes = [folded_mean(error * h, s) for h, s in zip(shape, variance)]
        return float(weight @ sizes - weight @ np.abs(gaps))

    assert excess(0.0) < 0
    assert result.ece_debiased == pytest.approx(brentq(excess, 0, 1), abs=1e-8)
