from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo

from vitscope.data import DataModule, folder
from vitscope.data.augment import Recipe
from vitscope.data.counter import AUGMENT, Key
from vitscope.errors import ConfigError, DataError


def names(images):
    return {path.rsplit("/", 3)[-3] + path.rsplit("/", 1)[-1] for path in images.paths}


def module(root, **options):
    arguments = {"name": "folder", "num_classes": 2, "image_size": 16, "batch_size": 4, **options}
    return DataModule(folder.load, root=str(root), **arguments)


def test_three_folders_are_the_splits(tmp_path, write_folder):
    write_folder(tmp_path, ("train", "val", "test"))
    for split in ("train", "val", "test"):
        images = folder.load(split, root=tmp_path)
        assert len(images) == 12
        assert all(name.startswith(split) for name in names(images))
        assert images.class_names == ("cat", "dog")


def test_imagenets_val_is_the_test_split_and_validation_is_held_out_of_train(tmp_path, write_folder):
    write_folder(tmp_path, ("train", "val"), per_class=10)
    train, val, test = (folder.load(split, root=tmp_path) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (18, 2, 20)
    assert val.labels.tolist() == [0, 1]
    assert not set(train.paths) & set(val.paths)
    assert all("/train/" in path for path in (*train.paths, *val.paths))
    assert all("/val/" in path for path in test.paths)


@pytest.mark.parametrize("layout", ["train", "."])
def test_without_other_folders_both_are_held_out_of_the_images(tmp_path, write_folder, layout):
    write_folder(tmp_path, (layout,), per_class=10)
    splits = [folder.load(split, root=tmp_path) for split in ("train", "val", "test")]
    assert [len(images) for images in splits] == [14, 2, 4]
    assert len({path for images in splits for path in images.paths}) == 20


def test_an_evaluation_needs_no_training_images(tmp_path, write_folder):
    write_folder(tmp_path, ("val",))
    assert len(folder.load("test", root=tmp_path)) == 12
    with pytest.raises(DataError, match="there is no train folder, which the val split needs"):
        folder.load("val", root=tmp_path)


def test_wordnet_folders_get_the_labels_of_the_1000_classes(tmp_path, write_folder):
    wnids = ImageNetInfo("imagenet-1k").label_names()
    write_folder(tmp_path, ("val",), classes=(wnids[7], wnids[990]))
    images = folder.load("test", root=tmp_path, classes="imagenet-1k")
    assert images.labels.unique().tolist() == [7, 990]
    assert len(images.class_names) == 1000
    write_folder(tmp_path, ("val",), classes=("tabby",))
    with pytest.raises(DataError, match="'tabby' is not a class of imagenet-1k"):
        folder.load("test", root=tmp_path, classes="imagenet-1k")


def test_wordnet_folders_alone_are_a_test_split_as_a_whole(tmp_path, write_folder):
    wnids = ImageNetInfo("imagenet-1k").label_names()
    write_folder(tmp_path, (".",), classes=(wnids[7], wnids[990]))
    assert len(folder.load("test", root=tmp_path, classes="imagenet-1k")) == 12
    for split in ("train", "val"):
        with pytest.raises(DataError, match=f"there is no train folder, which the {split} split needs"):
            folder.load(split, root=tmp_path, classes="imagenet-1k")


def test_batches_are_a_function_of_seed_epoch_and_index(tmp_path, write_folder):
    images = folder.load("train", root=write_folder(tmp_path, ("train",)))
    recipe = Recipe(augment="rand-m9-n2-mstd0.5", image_size=16, random_erasing=0.5)

    def batch(indices, epoch=0, seed=0):
        return images.batch(Key(np.asarray(indices), epoch, AUGMENT, seed), recipe)[0]

    every = batch(range(8), epoch=1)
    assert every.shape == (8, 3, 16, 16)
    for index in (5, 2):
        assert torch.equal(batch([index], epoch=1)[0], every[index])
    assert not torch.equal(batch([5], epoch=2)[0], every[5])
    assert not torch.equal(batch([5], epoch=1, seed=1)[0], every[5])


def test_global_random_states_are_left_alone(tmp_path, write_folder):
    images = folder.load("train", root=write_folder(tmp_path, ("train",)))
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    images.batch(Key(np.arange(4), 0, AUGMENT, 0), Recipe(augment="rand-m9-n2-mstd0.5", image_size=16))
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


def test_workers_change_nothing(tmp_path, write_folder):
    write_folder(tmp_path, ("train",))
    alone, two = (list(module(tmp_path, augment="crop_flip", num_workers=n).train_dataloader()) for n in (0, 2))
    for (x, y), (x2, y2) in zip(alone, two, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


def test_evaluation_resizes_and_crops_the_centre(tmp_path):
    (tmp_path / "val" / "cat").mkdir(parents=True)
    pixels = np.full((64, 64, 3), 255, dtype=np.uint8)
    pixels[:, :8] = pixels[:, -8:] = pixels[:8] = pixels[-8:] = 0  # a frame that crop_pct 0.5 cuts off
    Image.fromarray(pixels).save(tmp_path / "val" / "cat" / "a.png")
    images = folder.load("test", root=tmp_path)
    recipe = Recipe(image_size=16, crop_pct=0.5, mean=(0.5,) * 3, std=(0.25,) * 3)
    x, _ = images.batch(Key(np.array([0]), 0, AUGMENT, 0), recipe)
    assert torch.equal(x, torch.full((1, 3, 16, 16), 2.0))  # (1 - 0.5) / 0.25


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "empty", "no image"])
def test_an_unreadable_image_is_one_line_with_its_path(tmp_path, write_folder, workers, damage):
    write_folder(tmp_path, ("train",))
    bad = tmp_path / "train" / "dog" / "train3.jpg"
    content = {"truncated": bad.read_bytes()[:-300], "empty": b"", "no image": b"hello"}[damage]
    bad.write_bytes(content)
    data = module(tmp_path, num_workers=workers)
    loaders = [data.eval_dataloader(split) for split in ("train", "val", "test")]
    with pytest.raises(DataError) as caught:
        list(itertools.chain(*loaders))
    for loader in loaders:
        loader.stop_workers()
    assert str(bad) in str(caught.value)
    assert str(caught.value).startswith("data.root: ")
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.root=.*none: there is no such folder; put images in"):
        folder.load("train", root=tmp_path / "none")
    with pytest.raises(DataError, match="Couldn't find any class folder"):
        folder.load("train", root=tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="Found no valid file for the classes cat"):
        folder.load("train", root=tmp_path)
    with pytest.raises(ConfigError, match=r"data\.root: a folder of images is needed"):
        folder.load("train", root=None)


def test_the_models_own_preprocessing(tmp_path, write_folder):
    import timm

    write_folder(tmp_path, ("val",))
    model = timm.create_model("resnet10t.c3_in1k")  # 176 pixels in training, crop 0.875, bicubic
    data = module(tmp_path, transform="model")
    data.adapt_to(model)
    config = timm.data.resolve_model_data_config(model)
    assert data.image_size == config["input_size"][-1] == 176
    assert (data.mean, data.std) == (config["mean"], config["std"])
    expected = timm.data.create_transform(**config, is_training=False)
    images = data.split("test")
    x, _ = next(iter(data.eval_dataloader("test")))
    with Image.open(images.paths[0]) as image:
        assert torch.equal(x[0], expected(image.convert("RGB")))


def test_a_model_without_a_record_is_refused(tmp_path, write_folder):
    data = module(write_folder(tmp_path, ("val",)), transform="model")
    with pytest.raises(ConfigError, match=r"data\.transform=model: Linear does not say how"):
        data.adapt_to(torch.nn.Linear(2, 2))
    plain = module(tmp_path)
    plain.adapt_to(torch.nn.Linear(2, 2))
    assert plain.image_size == 16
