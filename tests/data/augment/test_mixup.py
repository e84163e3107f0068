from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup

from tests.fixtures.networks.timm_versions import compares_mixed_images
from vitscope.data.augment.mixup import mix

STRONG = {"mixup": 1.0, "cutmix": 0.8, "switch_prob": 0.5, "label_smoothing": 0.1}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8) % 5


@compares_mixed_images
@pytest.mark.parametrize("options", [STRONG, {"mixup": 0.2}, {"cutmix": 1.0, "label_smoothing": 0.1}])
@pytest.mark.parametrize("step", range(6))
def test_equals_timm_on_the_same_random_state(batch, options, step):
    x, y = batch
    mixer = Mixup(
        options.get("mixup", 0.0),
        options.get("cutmix", 0.0),
        switch_prob=options.get("switch_prob", 0.5),
        label_smoothing=options.get("label_smoothing", 0.0),
        num_classes=5,
    )
    np.random.seed(np.random.SeedSequence((3, step)).generate_state(8))
    expected_x, expected_y = mixer(x.clone(), y)
    mixed, targets = mix(x, y, num_classes=5, seed=(3, step), **options)
    assert torch.equal(mixed, expected_x)
    assert torch.equal(targets, expected_y)


def test_odd_batches_mix_with_their_mirror_image(batch):
    x, y = batch[0][:7], batch[1][:7]
    mixed, targets = mix(x, y, num_classes=5, mixup=1.0, seed=(0,))
    lam = ((mixed[0] - x[6]).flatten() @ (x[0] - x[6]).flatten() / (x[0] - x[6]).square().sum()).item()
    assert 0 < lam < 1
    torch.testing.assert_close(mixed, lam * x + (1 - lam) * x.flip(0), rtol=0, atol=1e-5)  # lam solved in float32
    hot = torch.eye(5)[y]
    torch.testing.assert_close(targets, lam * hot + (1 - lam) * hot.flip(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[3], x[3], rtol=0, atol=1e-6)


def test_one_image_is_mixed_with_itself(batch):
    mixed, targets = mix(batch[0][:1], batch[1][:1], num_classes=5, seed=(0,), **STRONG)
    torch.testing.assert_close(mixed, batch[0][:1], rtol=0, atol=1e-6)
    assert targets.argmax(1).tolist() == batch[1][:1].tolist()


def test_targets_are_distributions_with_smoothing_inside(batch):
    _, targets = mix(*batch, num_classes=5, seed=(1,), **STRONG)
    torch.testing.assert_close(targets.sum(1), torch.ones(8), rtol=0, atol=1e-6)
    assert targets.min().item() == pytest.approx(0.1 / 5)
    unmixed, smoothed = mix(*batch, num_classes=5, label_smoothing=0.1, seed=(1,))
    assert torch.equal(unmixed, batch[0])
    torch.testing.assert_close(smoothed, 0.9 * torch.eye(5)[batch[1]] + 0.02, rtol=0, atol=1e-6)


def test_neither_the_input_nor_the_random_state_changes(batch):
    x = batch[0].clone()
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    mix(x, batch[1], num_classes=5, seed=(1,), **STRONG)
    assert np.random.rand() == expected
    assert torch.equal(x, batch[0])


def test_seeds_decide(batch):
    first, same, other = (mix(*batch, num_classes=5, mixup=1.0, seed=seed)[0] for seed in ((1, 2), (1, 2), (2, 1)))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("y", [torch.eye(5)[:4], torch.arange(3), torch.zeros(4)])
def test_targets_that_are_no_indices_are_refused(y):
    with pytest.raises(ValueError, match="Expected 4 class indices"):
        mix(torch.zeros(4, 3, 8, 8), y, num_classes=5, mixup=1.0, seed=(0,))
