from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir

from vitscope.config import factories, loading
from vitscope.data import DataModule, philox
from vitscope.data.augment.mixup import mix
from vitscope.data.probe_batches import ProbeBatches
from vitscope.data.sources import digits, shapes
from vitscope.data.sources.array_images import ArrayImages
from vitscope.runtime import distributed
from vitscope.runtime.errors import ConfigError, DataError

STRONG = {
    "augment": "rand-m9-n2-mstd1.0",
    "random_erasing": 0.25,
    "mixup": 1.0,
    "cutmix": 0.8,
    "switch_prob": 0.5,
    "label_smoothing": 0.1,
}


def small(split, *, root=None, split_seed=0):
    """60 train, 12 val and 15 test images of 8x8 pixels, three classes; pixel (0, 0) of the first channel is the index."""
    n = {"train": 60, "val": 12, "test": 15}[split]
    pixels = np.random.default_rng(n).integers(0, 256, (n, 3, 8, 8), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.arange(n)
    return ArrayImages(torch.from_numpy(pixels), torch.arange(n) % 3, ("a", "b", "c"))


def module(**options):
    arguments = {"name": "small", "num_classes": 3, "image_size": 8, "batch_size": 8, "eval_batch_size": 8, **options}
    return DataModule(small, **arguments)


def indices(data, x):
    """Read back which images a batch holds."""
    return (x[:, 0, 0, 0] * data.std[0] + data.mean[0]).mul(255).round().long().tolist()


def test_loaders_give_normalised_images_and_indices():
    data = module()
    data.setup()
    x, y = next(iter(data.train_dataloader()))
    assert x.dtype == torch.float32
    assert x.shape == (8, 3, 8, 8)
    assert y.dtype == torch.int64
    chosen = indices(data, x)
    raw = data.split("train").images[chosen].double() / 255
    restored = x.double() * torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)
    torch.testing.assert_close(restored, raw, rtol=0, atol=1e-6)  # float32 rounding
    assert y.tolist() == [index % 3 for index in chosen]


def test_an_epoch_has_each_image_once_and_the_next_another_order():
    data = module()
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        epochs.append(list(itertools.chain(*(indices(data, x) for x, _ in loader))))
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(60))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_is_never_augmented_and_its_order_the_same_each_epoch(split):
    data = module(**STRONG)
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    x = torch.cat([x for x, _ in loader])
    plain = torch.cat([x for x, _ in module().eval_dataloader(split)])
    assert indices(data, plain) == list(range(len(data.split(split))))
    order = indices(data, x)
    assert sorted(order) == list(range(len(data.split(split))))
    assert torch.equal(x, plain[order])
    loader.batch_sampler.set_epoch(1)
    assert torch.equal(x, torch.cat([x for x, _ in loader]))


def test_the_first_batch_of_an_evaluation_stands_for_all_classes():
    with initialize_config_dir(str(loading.folder()), version_base="1.3"):
        data = factories.data(compose("train", overrides=["data=photos"]))
    data.setup("test")
    for loader in (data.val_dataloader(), data.test_dataloader()):  # of splits that lie class by class
        _, y = next(iter(loader))
        assert len(y) == 256
        assert len(y.unique()) == 16


def test_workers_batch_size_and_seed_of_the_order_do_not_change_an_image():
    def images(**options):
        data = module(**STRONG, **options)
        loader = data.train_dataloader()
        loader.batch_sampler.set_epoch(2)
        drawn = np.concatenate([draw.indices for draw in loader.batch_sampler])
        return torch.cat([x for x, _ in loader])[np.argsort(drawn)]

    reference = images()
    for options in ({"num_workers": 2}, {"batch_size": 1}, {"batch_size": 60}, {"batch_size": 7}):
        assert torch.equal(images(**options), reference), options
    assert not torch.equal(images(seed=1), reference)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_resuming_gives_the_rest_of_the_epoch(workers, when):
    data = module(**STRONG)
    loader = data.train_dataloader()
    loader.batch_sampler.set_epoch(1)
    expected = [x for x, _ in loader][3:]
    resumed = module(**STRONG, num_workers=workers)
    if when == "before":
        resumed.resume_at(1, 3)
        loader = resumed.train_dataloader()
    else:
        loader = resumed.train_dataloader()
        resumed.resume_at(1, 3)
    assert len(loader) == 8
    for x, wanted in zip([x for x, _ in loader], expected, strict=True):
        assert torch.equal(x, wanted)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore:.*does not have many workers")
def test_lightning_sets_the_epoch_and_keeps_our_sampler(tmp_path):
    seen = []

    class Recorder(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            seen.append((self.current_epoch, indices(data, batch[0])))
            return self.layer(torch.zeros(1, 1)).sum()

        def validation_step(self, batch, batch_idx):
            return None  # validation moves the loaders; nothing is measured

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    data = module(num_workers=min(2, (os.cpu_count() or 1)))
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Recorder(), datamodule=data)
    sampler = module().train_dataloader().batch_sampler
    expected = [(epoch, sampler.batch(epoch, index).indices.tolist()) for epoch in range(2) for index in range(8)]
    assert seen == expected


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_evaluate_each_image_once(monkeypatch, world):
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    seen, lengths = [], set()
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        data = module(eval_batch_size=2)
        loader = data.test_dataloader()
        seen += itertools.chain(*(indices(data, x) for x, _ in loader))
        lengths.add(len(loader))
    assert sorted(seen) == list(range(15))
    assert len(lengths) == 1


def test_fraction_is_per_class_and_leaves_evaluation_whole():
    data = module(fraction=0.25)
    assert data.split("train").labels.bincount().tolist() == [5, 5, 5]
    assert len(data.split("val")) == 12
    assert torch.equal(data.split("train").images, module(fraction=0.25, seed=3).split("train").images)
    other = module(fraction=0.25, split_seed=3).split("train").images
    assert not torch.equal(data.split("train").images, other)


def test_random_labels_permute_the_training_labels_only():
    data, plain = module(random_labels=True), module()
    assert torch.equal(data.split("train").images, plain.split("train").images)
    assert data.split("train").labels.bincount().tolist() == [20, 20, 20]
    assert not torch.equal(data.split("train").labels, plain.split("train").labels)
    assert torch.equal(data.split("val").labels, plain.split("val").labels)


def test_images_in_memory_are_resized_to_the_models_size():
    data = DataModule(digits.load, name="digits", num_classes=10, image_size=16)
    assert data.split("val").images.shape[2:] == (16, 16)
    assert next(iter(data.val_dataloader()))[0].shape[2:] == (16, 16)


def test_the_cue_conflict_split_has_a_loader():
    data = DataModule(shapes.load, name="shapes", num_classes=8)
    y = torch.cat([y for _, y in data.eval_dataloader("cue_conflict")])
    assert torch.equal(y, data.split("cue_conflict").labels)
    assert (data.split("cue_conflict").attributes["texture"] != y).all()


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


def test_describe_states_what_was_done_to_the_images():
    data = module(**STRONG, fraction=0.5, random_labels=True, seed=3)
    facts = data.describe("train", augment=True)
    assert facts["data"] == "small, 0.5 of each class, random labels"
    assert facts["split"] == "train"
    assert facts["seed"] == 3
    for part in ("rand-m9-n2-mstd1.0", "erasing 0.25", "mixup 1", "cutmix 0.8", "switch 0.5", "smoothing 0.1"):
        assert part in facts["augmentation"]
    assert data.describe("test")["augmentation"] == "none"
    assert data.describe("test")["data"] == "small"  # whole, and with its true labels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size=0: not an integer of at least 1"),
        ({"eval_batch_size": 2.5}, r"data\.eval_batch_size=2\.5"),
        ({"num_workers": -1}, r"data\.num_workers=-1"),
        ({"seed": -1}, r"data\.seed=-1"),
        ({"image_size": 0}, r"data\.image_size=0"),
        ({"fraction": 0.0}, r"data\.fraction=0\.0: not in \(0, 1\]"),
        ({"fraction": float("nan")}, r"data\.fraction=nan"),
        ({"transform": "timm"}, r"data\.transform=timm: unknown transform; choose null or model"),
        ({"augment": "strong"}, r"objective\.augment=strong"),
        ({"mixup": -0.1}, r"objective\.mixup=-0\.1: not in \[0, inf\)"),
        ({"switch_prob": 1.5}, r"objective\.switch_prob=1\.5: not in \[0, 1\]"),
        ({"random_erasing": float("nan")}, r"objective\.random_erasing=nan"),
        ({"std": (0.2, 0.0, 0.2)}, r"data\.std=\(0\.2, 0\.0, 0\.2\): not three positive numbers"),
        ({"mean": (0.2, 0.2)}, r"data\.mean=\(0\.2, 0\.2\): not three finite numbers"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        module(**options)


def test_the_number_of_classes_is_checked_against_the_data():
    with pytest.raises(ConfigError, match=r"data\.num_classes=5: small has 3 classes; set it to 3"):
        module(num_classes=5).setup()


def test_labels_out_of_range_and_empty_splits_are_refused():
    def broken(split, *, root=None, split_seed=0):
        images = small(split)
        return images.relabelled(images.labels + 1) if split == "train" else images.select(np.arange(0))

    data = DataModule(broken, name="broken", root="there", num_classes=3)
    with pytest.raises(DataError, match=r"data\.num_classes=3: the train split of broken has labels from 1 to 3"):
        data.split("train")
    with pytest.raises(DataError, match=r"data\.root=there: the val split of broken is empty"):
        data.split("val")


def test_no_step_at_all_is_refused():
    with pytest.raises(
        DataError, match=r"data\.batch_size=64: small train has 60 images and drop_last leaves no batch"
    ):
        module(batch_size=64, drop_last=True).train_dataloader()


def test_another_objectives_augmentation_gives_its_images_whatever_the_run_was_trained_with() -> None:
    from vitscope.config import factories

    strong, weak = factories.named_objective("strong"), factories.named_objective("weak")
    modules = {}
    for name, own in (("strong", strong), ("weak", weak)):
        arguments = {key: value for key, value in own.items() if key not in ("weight_decay", "l2")}
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
