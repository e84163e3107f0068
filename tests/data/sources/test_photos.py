from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vitscope.data import DataModule
from vitscope.data.sources import photos
from vitscope.runtime.errors import DataError


@pytest.fixture(scope="module")
def splits():
    return {split: photos.load(split) for split in photos.REGIONS}


def test_sizes_and_balance(splits):
    for split, size in (("train", 8192), ("val", 512), ("test", 1024)):
        images = splits[split]
        assert images.images.shape == (size, 3, 32, 32)
        assert images.images.dtype == torch.uint8
        assert torch.equal(images.labels.bincount(), torch.full((16,), size // 16))
    assert len(splits["train"].class_names) == 16


def test_regions_share_no_pixel():
    for name in photos.PHOTOGRAPHS:
        width = photos._photograph(name).width
        columns = [set(range(*photos.region_columns(width, split))) for split in photos.REGIONS]
        assert set().union(*columns) == set(range(width))
        assert sum(map(len, columns)) == width


def test_a_region_is_computed_from_its_own_pixels_alone(monkeypatch):
    from PIL import Image

    photograph = photos._photograph("astronaut")
    first, end = photos.region_columns(photograph.width, "val")
    masked = Image.new(photograph.mode, photograph.size, (255, 0, 255))
    masked.paste(photograph.crop((first, 0, end, photograph.height)), (first, 0))
    expected = photos._normalized_region("astronaut", "val")
    monkeypatch.setattr(photos, "_photograph", lambda name: masked)
    np.testing.assert_array_equal(photos._normalized_region.__wrapped__("astronaut", "val"), expected)


def test_crops_are_distinct_and_the_same_every_time(splits):
    for split, images in splits.items():
        flat = images.images[:, 0].flatten(1).numpy()
        assert len(np.unique(flat, axis=0)) == len(flat)
        assert torch.equal(photos.load(split, split_seed=5).images, images.images)


def test_channels_are_equal_and_crops_standardized(splits):
    images = splits["test"].images
    assert (images == images[:, :1]).all()
    crops = images[:, 0].double()
    # the last clipping and the rounding to bytes move both a little
    assert (crops.mean((1, 2)) - 128).abs().max() < 1
    assert (crops.std((1, 2)) / photos.LEVELS - 1).abs().max() < 0.03


def test_neither_brightness_nor_contrast_nor_color_tells_the_class(splits):
    def statistics(images):
        pixels = images.images.double().flatten(2)
        return torch.cat((pixels.mean(2), pixels.std(2)), dim=1).numpy()  # (N, 6)

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    classifier.fit(statistics(splits["train"]), splits["train"].labels.numpy())
    accuracy = classifier.score(statistics(splits["test"]), splits["test"].labels.numpy())
    assert accuracy < 0.2  # chance is 0.0625; the few crops that still are clipped leave a trace


def test_an_unknown_split_is_refused():
    with pytest.raises(DataError, match=r"data=photos: there is no split 'dev'; choose one of train, val, test"):
        photos.load("dev")


def test_a_wheel_without_its_image_is_named(monkeypatch):
    monkeypatch.setitem(photos.PHOTOGRAPHS, "brick", ("skimage.data", "no_such.png"))
    with pytest.raises(DataError, match=r"no_such\.png is missing from the installed skimage; reinstall"):
        photos._photograph("brick")


def test_no_photograph_is_downloaded(monkeypatch):
    import socket

    def refuse(*arguments, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in photos.PHOTOGRAPHS:
        assert min(photos._photograph(name).size) > 100


def test_whole_photographs_are_the_files_in_color():
    images = photos.whole("test")
    assert images.class_names == tuple(photos.PHOTOGRAPHS)
    data = DataModule(photos.whole, name="photographs", image_size=224, batch_size=16)
    x, y = data.probe_batches("test", n_images=4, batch_size=4)[0]
    assert x.shape == (4, 3, 224, 224)
    assert y.unique().numel() == 4
    assert any(not torch.equal(image[0], image[1]) for image in x)
    for split in ("train", "val"):
        with pytest.raises(DataError, match=f"16 photographs have no {split} split; measure on split=test"):
            photos.whole(split)
