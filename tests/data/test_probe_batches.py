"""Frozen batches of a data module for diagnostics."""

from __future__ import annotations

import pytest
import torch

from tests.fixtures.images.small_data import STRONG, indices, module
from vitscope.config import factories
from vitscope.data import philox
from vitscope.data.augment.mixup import mix
from vitscope.data.probe_batches import ProbeBatches
from vitscope.runtime.errors import ConfigError


class TestProbeBatches:
    def test_the_whole_split_in_order(self):
        data = module(**STRONG)
        batches = data.probe_batches("val", batch_size=5)
        assert [len(x) for x, _ in batches] == [5, 5, 2]
        assert indices(data, torch.cat([x for x, _ in batches])) == list(range(12))
        assert all(y.ndim == 1 for _, y in batches)

    def test_every_pass_and_every_order_of_reading_is_identical(self):
        batches = module(**STRONG).probe_batches("train", augment=True, n_images=40, batch_size=16, seed=4)
        first = list(batches)
        for index in (2, 0, 1):
            x, y = batches[index]
            assert torch.equal(x, first[index][0])
            assert torch.equal(y, first[index][1])
        again = module(**STRONG).probe_batches("train", augment=True, n_images=40, batch_size=16, seed=4)
        assert torch.equal(again[2][0], first[2][0])
        other = module(**STRONG).probe_batches("train", augment=True, n_images=40, batch_size=16, seed=5)
        assert not torch.equal(other[2][0], first[2][0])

    def test_a_batch_is_a_function_of_seed_and_number_not_of_how_many_follow(self):
        data = module(**STRONG)
        few, many = (data.probe_batches("train", augment=True, n_images=n, batch_size=8) for n in (16, 48))
        assert torch.equal(few[1][0], many[1][0])
        assert torch.equal(few[1][1], many[1][1])

    def test_mixing_is_timms_batch_mode_on_the_augmented_images(self):
        data = module(**STRONG)
        plain = data.probe_batches("train", augment=True, n_images=30, batch_size=15, seed=2, mix=False)
        mixed = data.probe_batches("train", augment=True, n_images=30, batch_size=15, seed=2)
        options = {key: STRONG[key] for key in ("mixup", "cutmix", "switch_prob", "label_smoothing")}
        for b, ((x, y), (soft_x, soft_y)) in enumerate(zip(plain, mixed)):
            expected_x, expected_y = mix(x, y, num_classes=3, seed=(2, philox.PROBE, b), **options)
            assert torch.equal(soft_x, expected_x)
            assert torch.equal(soft_y, expected_y)
            assert soft_y.shape == (15, 3)

    def test_targets_of_cutmix_without_images_are_those_of_the_batches(self):
        options = {"augment": "crop_flip", "mixup": 0.0, "cutmix": 1.0}
        batches = module(**options).probe_batches("train", augment=True, n_images=40, batch_size=8, seed=2)
        mixed = 0
        for (_, y), alone in zip(batches, batches.target_batches(), strict=True):
            assert torch.equal(alone, y)  # the share of a box follows from the size of the image
            mixed += bool((y.max(1).values < 1).any())
        assert mixed > 1

    def test_images_are_distinct(self):
        data = module()
        batches = data.probe_batches("train", n_images=32, batch_size=8)
        assert len(set(indices(data, torch.cat([x for x, _ in batches])))) == 32

    def test_changing_a_batch_in_place_does_not_change_the_next_pass(self):
        batches = module().probe_batches("val", batch_size=4)
        before = batches[0][0].clone()
        batches[0][0].zero_()
        assert torch.equal(batches[0][0], before)

    def test_large_probes_are_built_again_each_time(self):
        built = []
        batches = ProbeBatches(lambda b: built.append(b) or (torch.full((2,), b), torch.zeros(2)), 3, 6, 2**40)
        for _ in range(2):
            assert [x[0].item() for x, _ in batches] == [0, 1, 2]
        assert built == [0, 1, 2] * 2

    def test_more_images_than_there_are_is_said(self):
        data = module()
        with pytest.warns(UserWarning, match=r"probe\.n_images=64: the split of small has 12 images; using all"):
            batches = data.probe_batches("val", n_images=64)
        assert batches.n_images == 12

    def test_behaves_as_a_sequence(self):
        batches = module().probe_batches("val", batch_size=5)
        assert len(batches) == 3
        assert torch.equal(batches[-1][0], batches[2][0])
        assert len(batches[1:]) == 2
        with pytest.raises(IndexError, match=r"Expected a batch in 0\.\.2, received 3"):
            batches[3]

    @pytest.mark.parametrize("key", ["n_images", "batch_size"])
    def test_sizes_below_one_are_refused(self, key):
        with pytest.raises(ConfigError, match=rf"probe\.{key}=0: not an integer of at least 1"):
            module().probe_batches("val", **{key: 0})


def test_another_objectives_augmentation_gives_its_images_whatever_the_run_was_trained_with() -> None:

    strong, weak = factories.named_objective("strong"), factories.named_objective("weak")
    modules = {}
    for name, own in (("strong", strong), ("weak", weak)):
        arguments = {key: value for key, value in own.items() if key not in ("weight_decay", "l2", "loss")}
        modules[name] = module(**arguments)
    lent = modules["weak"].augmented_as(strong)
    for (x, y), (own_x, own_y) in zip(
        lent.probe_batches(augment=True, n_images=8, batch_size=4),
        modules["strong"].probe_batches(augment=True, n_images=8, batch_size=4),
        strict=True,
    ):
        assert torch.equal(x, own_x)
        assert torch.equal(y, own_y)
        assert y.shape == (4, 3)  # mixed
    assert lent.describe("train", True) == modules["strong"].describe("train", True)
    assert not modules["weak"].mixes
    (_, y), *_ = modules["weak"].probe_batches(augment=True, n_images=8, batch_size=4)
    assert y.ndim == 1
    with pytest.raises(ConfigError, match="did you mean strong"):
        factories.named_objective("stong")
