from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir

from tests.fixtures.images.small_data import STRONG, indices, module, small
from vitscope.config import factories, loading
from vitscope.data import DataModule
from vitscope.data.sources import digits, shapes
from vitscope.runtime import distributed
from vitscope.runtime.errors import ConfigError, DataError


def test_loaders_give_normalized_images_and_indices():
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


def test_masks_of_objects_follow_the_images_and_are_left_out_where_pixels_move():
    data = DataModule(shapes.load, name="shapes", num_classes=8, image_size=64, augment="crop_flip")
    batches = data.probe_batches(split="test", augment=False, n_images=24, batch_size=16, seed=3)
    masks = batches.attributes["object_mask"]
    assert (masks.dtype, masks.shape) == (torch.bool, (24, 64, 64))
    x = torch.cat([x for x, _ in batches])
    differs = (x - x[:, :, :1, :1]).abs().amax(1) > 0.05
    assert (masks & ~differs).float().sum() < 0.05 * masks.sum()  # a texture may have the background's color somewhere
    assert not (
        differs & ~torch.nn.functional.max_pool2d(masks.float(), 7, 1, 3).bool()
    ).any()  # 3 pixels: blurred by resizing
    augmented = data.probe_batches(split="test", augment=True, n_images=24, batch_size=16, seed=3).attributes
    assert set(augmented) == {"shape", "texture"}


def test_the_cue_conflict_split_has_a_loader():
    data = DataModule(shapes.load, name="shapes", num_classes=8)
    y = torch.cat([y for _, y in data.eval_dataloader("cue_conflict")])
    assert torch.equal(y, data.split("cue_conflict").labels)
    assert (data.split("cue_conflict").attributes["texture"] != y).all()


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
        return images.relabeled(images.labels + 1) if split == "train" else images.select(np.arange(0))

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
