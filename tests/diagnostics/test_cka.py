from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from vitscope import Probe, Tap
from vitscope.core.undefined_values import NullWarning
from vitscope.diagnostics.cka._blocks import block_structure, p_value
from vitscope.diagnostics.cka._hsic import gram, hsic
from vitscope.diagnostics.cka.cka import cka
from vitscope.diagnostics.cka.plot import cka as draw
from vitscope.diagnostics.cka.similarity import similarity
from vitscope.runtime import progress


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "enabled", False)


class Branches(nn.Module):
    """Hands the channels of its input to several named identities: representations of our own choice, (B, c, h, w)."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.parts = nn.ModuleDict({name: nn.Identity() for name in sizes})
        self.register_buffer("like", torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part, value in zip(self.parts.values(), x.split(list(self.sizes.values()), dim=1)):
            part(value)
        return x.mean((2, 3))


def probe_of(size: int = 64, **parts: torch.Tensor) -> Probe:
    model = Branches({name: value.shape[1] for name, value in parts.items()})
    taps = [Tap(name, "conv", i, i / 10, model.parts[name]) for i, name in enumerate(parts)]
    x = torch.cat(list(parts.values()), dim=1).double()
    y = torch.arange(len(x))
    return Probe(model, list(zip(x.split(size), y.split(size))), taps=taps)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hsic_equals_its_definition_as_a_u_statistic() -> None:
    x, z = normal(6, 3), normal(6, 4, seed=1)
    k, l = (x @ x.T).numpy(), (z @ z.T).numpy()
    # Song et al. (2012), eq. 4: the mean over all quadruples of different images
    total = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in itertools.permutations(range(6), 4)]
    value = hsic(gram(x)[None], gram(z)[None]).item()
    assert value == pytest.approx(np.mean(total), abs=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gram_part_by_part_equals_the_whole_in_float64(layout: torch.memory_format, dtype: torch.dtype) -> None:
    # 52,380 features around 50: several parts, one of them short
    x = (normal(7, 6, 90, 97) + 50.0).float().to(dtype).to(memory_format=layout)
    whole = x.double().flatten(1)
    whole = whole - whole.mean(dim=0)
    # sums of 5e4 products of about 1: in float64 only their order differs; float32 rounds the mean of 50 by 2e-6 and the sum over
    # a part of 4,681 by as much, at random
    close = {"rtol": 0.0, "atol": 52380 * (1e-12 if dtype == torch.float64 else 1e-6)}
    torch.testing.assert_close(gram(x), whole @ whole.T, **close)
    tokens = x.flatten(2).transpose(1, 2)[:, 1:]  # a view that begins after a prefix token, as of a ViT
    kept = tokens.double().flatten(1) - tokens.double().flatten(1).mean(dim=0)
    torch.testing.assert_close(gram(tokens.transpose(1, 2)), kept @ kept.T, **close)


def test_same_rotated_scaled_and_shifted_representations_are_one() -> None:
    x = normal(60, 5, 2, 3)
    rotation = torch.linalg.qr(normal(30, 30, seed=3))[0]
    rotated = (x.flatten(1) @ rotation).reshape(60, 5, 2, 3)
    result = cka(probe_of(20, x=x, rotated=rotated, scaled=-7.5 * x + 1000.0))
    np.testing.assert_allclose(result.similarity, np.ones((3, 3)), atol=1e-10)
    assert result.similarity.shape == (3, 3)
    assert result.n_batches == 3


def test_independent_noise_is_zero_in_expectation() -> None:
    values = [
        cka(probe_of(16, x=normal(64, 8, 1, 1, seed=2 * s), z=normal(64, 8, 1, 1, seed=2 * s + 1))).similarity[0, 1]
        for s in range(60)
    ]
    mean, error = np.mean(values), np.std(values, ddof=1) / np.sqrt(len(values))
    assert abs(mean) < 3 * error
    assert min(values) < 0  # not clipped


def test_batch_size_does_not_bias_the_estimate() -> None:
    """Against the population value: z = x + noise of equal variance in d channels has CKA 2 d^2 / sqrt(d^2 * 4 d^2)."""
    x, noise = normal(4096, 8, 1, 1), normal(4096, 8, 1, 1, seed=1)
    # linear CKA of Gaussians: ||C_xz||^2 / (||C_xx|| ||C_zz||) = d / (sqrt(d) * 2 sqrt(d))
    for size in (4, 16, 256):
        result = cka(probe_of(size, x=x, z=x + noise))
        assert result.similarity[0, 1] == pytest.approx(0.5, abs=max(3 * result.standard_error[0, 1], 0.01))
        assert result.standard_error[0, 1] < 0.03


def test_two_models_equal_the_block_of_one() -> None:
    x, z = normal(40, 5, 2, 2), normal(40, 6, 2, 2, seed=1)
    parts = {"x": x, "xx": x**2, "z": z + x[:, :1]}
    one, other = probe_of(20, **parts), probe_of(20, **parts)  # the same images, each model read at some of its taps
    whole = cka(one)
    between = cka(
        Probe(one.model, one.batches, taps=one.taps[:2]), other=Probe(other.model, other.batches, taps=other.taps[2:])
    )
    np.testing.assert_allclose(between.similarity, whole.similarity[:2, 2:], atol=1e-12)
    np.testing.assert_allclose(between.standard_error, whole.standard_error[:2, 2:], atol=1e-12)
    assert between.taps == ("x", "xx")
    assert between.other_taps == ("z",)
    assert between.block_structure is None


def test_two_models_of_one_architecture_are_not_one_model() -> None:
    """Their layers of the same name differ, and count in the mean; those of one model are equal to themselves."""
    x, z = normal(40, 5, 2, 2), normal(40, 5, 2, 2, seed=1)
    one, other = probe_of(20, a=x, b=x**2), probe_of(20, a=x, b=x**2)
    model = Branches({"a": 5, "b": 5})
    first = model.parts["a"].register_forward_hook(lambda module, args, value: value + 0.5 * z[: len(value)])
    other = Probe(
        model, other.batches, taps=[Tap(t.name, t.kind, t.stage, t.depth, model.parts[t.name]) for t in other.taps]
    )
    between, within = cka(one, other=other), cka(one)
    first.remove()
    assert between.taps == between.other_taps
    assert (between.is_within_model, within.is_within_model) == (False, True)
    assert between.scalars()["mean_similarity"] == pytest.approx(between.similarity.mean(), rel=1e-12)
    assert within.scalars()["mean_similarity"] == pytest.approx(within.similarity[0, 1], rel=1e-12)
    assert draw({"": between}).axes[0].get_ylabel() == "Layer of the other model"
    assert draw({"": within}).axes[0].get_ylabel() == "Layer"
    options = {"measure": "procrustes", "n_permutations": 0}
    by_rotation = similarity(one, other, **options)
    assert by_rotation.scalars()["procrustes"] == pytest.approx(by_rotation.similarity.mean(), rel=1e-12)
    assert similarity(one, **options).scalars()["procrustes"] == pytest.approx(
        similarity(one, **options).similarity[0, 1]
    )


def test_jackknife_equals_leaving_batches_out() -> None:
    x, z = normal(40, 3, 1, 1), normal(40, 3, 1, 1, seed=1)
    z = z + x
    parts = [torch.cat([t[: 8 * i], t[8 * i + 8 :]]) for t in (x, z) for i in range(5)]
    left_out = [cka(probe_of(8, x=a, z=b)).similarity[0, 1] for a, b in zip(parts[:5], parts[5:])]
    expected = np.sqrt(4 / 5 * np.square(np.subtract(left_out, np.mean(left_out))).sum())
    assert cka(probe_of(8, x=x, z=z)).standard_error[0, 1] == pytest.approx(expected, rel=1e-9)


def test_unequal_batches_weigh_by_their_images() -> None:
    x, z = normal(14, 3, 1, 1), normal(14, 3, 1, 1, seed=1)
    sums = []
    for part in (slice(0, 8), slice(8, 14)):
        grams = torch.stack([gram(x[part]), gram(z[part])])
        sums.append(len(x[part]) * hsic(grams, grams).numpy())
    total = np.sum(sums, axis=0)
    expected = total[0, 1] / np.sqrt(total[0, 0] * total[1, 1])
    assert cka(probe_of(8, x=x, z=z)).similarity[0, 1] == pytest.approx(expected, abs=1e-12)


def test_what_does_not_vary_or_is_not_finite_is_null_and_named() -> None:
    x = normal(12, 2, 2, 2)
    broken = x.clone()
    broken[3, 0, 0, 0] = float("nan")
    constant = torch.full_like(x, 0.1) * torch.linspace(1, 3, 4).reshape(2, 2)
    with pytest.warns(NullWarning, match=r"constant \(it does not vary.*broken \(its activations are not finite\)"):
        result = cka(probe_of(6, x=x, constant=constant, broken=broken))
    assert np.isfinite(result.similarity).tolist() == [[True, False, False], [False] * 3, [False] * 3]
    assert result.scalars() == {}


def test_too_few_images() -> None:
    x = normal(9, 2, 1, 1)
    with pytest.warns(NullWarning, match=r"1 batch\(es\) \(fewer than 4 images, left out\)"):
        assert cka(probe_of(6, x=x, z=x)).n_images == 6
    with pytest.raises(ValueError, match="batches of at least 4 images"):
        cka(probe_of(3, x=x))
    with pytest.raises(ValueError, match="at least 4 images in a batch, received 3"):
        hsic(gram(x[:3])[None], gram(x[:3])[None])


def test_other_images_are_refused() -> None:
    x = normal(12, 2, 1, 1)
    other = probe_of(6, x=x)
    other.batches = [(a, y + 1) for a, y in other.batches]
    with pytest.raises(ValueError, match="the same images in the same batches"):
        cka(probe_of(6, x=x), other=other)
    with pytest.raises(ValueError, match="the same images in the same batches"):
        cka(probe_of(6, x=x), other=probe_of(6, x=x[:6]))


def pictures(n: int = 6, side: int = 16) -> torch.Tensor:
    """Return images in [0, 1] that differ in coarse structure, as photographs do."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.interpolate(coarse, size=side, mode="bilinear")


def resnet_probe(x: torch.Tensor, **changes: object) -> Probe:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    places = [Tap(str(i), "conv", i, float(i), model[i]) for i in (0, 1)]
    y = torch.zeros(len(x), dtype=torch.long)  # one class: the labels say nothing of the order
    return Probe(model, [(x, y)], taps=places)


def test_two_models_images_are_compared_in_their_order() -> None:
    x = pictures()
    with pytest.raises(
        ValueError, match=r"the same images in the same batches of both probes, received image 0.*image 5"
    ):
        cka(resnet_probe(x), other=resnet_probe(x.flip(0)))
    swapped = x[[0, 1, 3, 2, 4, 5]]
    with pytest.raises(ValueError, match=r"image 2 of a batch .*most like the other's image 3"):
        cka(resnet_probe(x), other=resnet_probe(swapped))
    with pytest.raises(ValueError, match="image 1 of a batch differs"):
        cka(resnet_probe(x), other=resnet_probe(torch.cat([x[:1], 1 - x[1:]])))


def test_each_model_may_have_its_own_preprocessing() -> None:
    x = pictures()
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    normalized = (x - mean) / std
    smaller = torch.nn.functional.interpolate(x, size=12, mode="bilinear", antialias=True)
    for other, relation in (
        (x.clone(), "equal"),
        (normalized, "equal but for each channel's normalization"),
        ((x - 0.5) / 0.5, "equal but for each channel's normalization"),
        (smaller, "recognized by thumbnails: other sizes, crops or interpolations"),
    ):
        found = cka(resnet_probe(x), other=resnet_probe(other))
        assert found.card is not None
        assert found.card.solver["images_of_other"] == relation
    with pytest.raises(ValueError, match="most like the other's image"):
        cka(resnet_probe(x), other=resnet_probe(smaller.flip(0)))
    with pytest.raises(ValueError, match="most like the other's image"):
        cka(resnet_probe(x), other=resnet_probe(normalized.roll(1, 0)))


def test_block_structure_matches_distances() -> None:
    stages = np.array([0, 0, 0, 1, 1, 1])
    distance = np.abs(np.subtract.outer(np.arange(6), np.arange(6)))
    decay = 1 - 0.1 * distance  # falls with distance alone: no blocks
    assert block_structure(decay, stages) == pytest.approx(0.0, abs=1e-12)
    blocks = decay + 0.2 * (stages[:, None] == stages)
    assert block_structure(blocks, stages) == pytest.approx(0.2, abs=1e-12)
    assert block_structure(blocks, np.zeros(6)) is None
    p = p_value(blocks, stages, 400, seed=0)
    assert p is not None
    assert 0.1 < p < 0.3  # one of five places for the boundary
    assert p_value(decay, stages, 20, seed=0) == 1.0
    assert p_value(blocks, stages, 0, seed=0) is None


def test_block_structure_equals_a_loop_over_pairs() -> None:
    similarity, stages = normal(15, 15).numpy(), np.repeat([0, 1, 2, 3], [2, 5, 4, 4])
    similarity = (similarity + similarity.T) / 2
    similarity[4, :] = similarity[:, 4] = np.nan  # a null representation is left out
    total, weights, each = 0.0, 0.0, []
    for distance in range(1, 15):
        pairs = [(i, i + distance) for i in range(15 - distance) if 4 not in (i, i + distance)]
        within, across = (
            [similarity[i, j] for i, j in pairs if bool(stages[i] == stages[j]) is same] for same in (True, False)
        )
        weight = min(len(within), len(across))
        total += weight * (np.mean(within) - np.mean(across)) if weight else 0.0
        weights += weight
        each.append(weight)
    assert each[:5] == [3, 5, 4, 1, 0]  # distances weigh differently
    assert block_structure(similarity, stages) == pytest.approx(total / weights, rel=1e-12)


def test_of_a_model_with_stages() -> None:
    from vitscope.models import alternet

    model = alternet(num_classes=4, image_size=8, window_size=2, n_msa=(0, 0, 1, 0))
    x = normal(8, 3, 8, 8).float()
    result = cka(Probe(model, [(x, torch.zeros(8, dtype=torch.long))]))
    assert len(result.taps) == 9
    np.testing.assert_allclose(np.diagonal(result.similarity), 1, atol=1e-12)
    np.testing.assert_allclose(result.similarity, result.similarity.T, atol=1e-12)
    assert result.block_structure is not None
    assert np.isnan(result.standard_error).all()


def test_a_model_whose_blocks_are_in_one_stage_has_no_block_structure() -> None:
    from vitscope.models import vit

    x = normal(8, 3, 8, 8).float()
    result = cka(
        Probe(vit(depth=3, width=16, heads=2, num_classes=4, image_size=8, patch_size=4), [(x, torch.zeros(8).long())])
    )
    assert set(result.stages) == {0, 1}  # the stem counts as stage 0
    assert (result.block_structure, result.block_structure_p) == (None, None)


def test_plot_has_a_panel_a_result() -> None:
    x = normal(12, 2, 2, 2)
    result = cka(probe_of(6, x=x, z=x**2))
    figure = draw({"a": result, "b": result, "c": result, "d": result})
    assert len(figure.axes) == 4 + 1
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), result.similarity.T)
