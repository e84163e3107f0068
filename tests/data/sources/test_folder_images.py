"""Images of folders: batches, resizing, damage and a model's own preprocessing."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from tests.fixtures.images.image_folders import module
from vitscope.data import DataModule
from vitscope.data.augment.augment import Recipe
from vitscope.data.philox import AUGMENT, Key
from vitscope.data.sources import file_images, folder
from vitscope.data.sources.file_images import model_recipe
from vitscope.runtime.errors import ConfigError, DataError


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


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_threads_decode_the_same_pixels_in_the_same_order(tmp_path, write_folder, crop_mode, monkeypatch):
    images = folder.load("train", root=write_folder(tmp_path, ("train",)))
    recipe = Recipe(image_size=16, crop_mode=crop_mode)
    key = Key(np.array([5, 0, 3, 3, 7, 1]), 0, AUGMENT, 0)
    batches = []
    for n_threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
        batches.append(images.batch(key, recipe))
    transform = create_transform(
        16, mean=recipe.mean, std=recipe.std, interpolation="bilinear", crop_pct=0.875, crop_mode=crop_mode
    )
    expected = torch.stack([transform(images.image(int(i), recipe)) for i in key.indices])
    for x, y in batches:
        assert torch.equal(x, expected)
        assert torch.equal(y, images.labels[key.indices])
    Path(images.paths[3]).write_bytes(b"damaged")
    with pytest.raises(DataError, match=Path(images.paths[3]).name):
        images.batch(key, recipe)


def test_workers_change_nothing(tmp_path, write_folder):
    write_folder(tmp_path, ("train",))
    alone, two = (list(module(tmp_path, augment="crop_flip", num_workers=n).train_dataloader()) for n in (0, 2))
    for (x, y), (x2, y2) in zip(alone, two, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


def test_evaluation_resizes_and_crops_the_center(tmp_path):
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
    with pytest.raises(DataError, match="there is no class folder in"):
        folder.load("train", root=tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"there is no image in the class folders of .*train \(cat\)"):
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


def preprocessings():
    """Return one pretrained configuration of timm for each way of preprocessing."""
    import timm

    ways = {}
    for name in timm.list_pretrained():
        config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        size = config["input_size"]
        if size[0] == 3 and size[1] == size[2]:
            ways.setdefault(
                (config["crop_mode"], config["crop_pct"], config["interpolation"], size, config["mean"], config["std"]),
                name,
            )
    return ways


def test_every_preprocessing_of_timms_pretrained_models(tmp_path):
    import timm

    rng = np.random.default_rng(0)
    (tmp_path / "val" / "cat").mkdir(parents=True)
    small = rng.integers(0, 256, (7, 11, 3), dtype=np.uint8)
    Image.fromarray(small).resize((110, 70)).save(tmp_path / "val/cat/a.png")
    images = folder.load("test", root=tmp_path)
    image = Image.open(tmp_path / "val/cat/a.png").convert("RGB")
    ways = preprocessings()
    assert {mode for mode, *_ in ways} - {"border"} == {"center", "squash"}  # older releases of timm have no border
    key = Key(np.array([0]), 0, AUGMENT, 0)
    for way, name in ways.items():
        model = torch.nn.Identity()
        model.pretrained_cfg = timm.get_pretrained_cfg(name).to_dict()
        expected = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)(image)
        recipe = model_recipe(model, Recipe())
        x, _ = images.batch(key, recipe.plain())
        assert torch.equal(x[0], expected), (way, name)


def test_a_model_of_images_that_are_not_square_is_refused():
    model = torch.nn.Identity()
    model.pretrained_cfg = {"input_size": (3, 64, 48)}
    with pytest.raises(ConfigError, match=r"data\.transform=model: Identity was trained on images of 3x64x48"):
        model_recipe(model, Recipe())


def test_images_in_memory_refuse_a_models_crop():
    data = DataModule(transform="model")
    model = torch.nn.Identity()
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    with pytest.raises(ConfigError, match=r"data\.transform=model: the images of photos are in memory"):
        data.adapt_to(model)
        data.split("test")


@pytest.mark.parametrize(("flip", "erasing"), [(True, 0.0), (False, 0.25)])
def test_files_are_flipped_and_erased_as_often_as_the_recipe_says(flip: bool, erasing: float) -> None:
    transform = file_images._transform(Recipe(augment="crop_flip", flip=flip, random_erasing=erasing))
    steps = {type(step).__name__: step for step in transform.transforms}
    assert getattr(steps.get("RandomHorizontalFlip"), "p", 0.0) == 0.5 * flip
    assert getattr(steps.get("RandomErasing"), "probability", 0.0) == erasing
