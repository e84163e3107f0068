"""Decoding of image files against values that are known from how each file was written."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch import nn

from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.data import DataModule
from vitscope.data.augment.augment import Recipe
from vitscope.data.sources import folder
from vitscope.data.sources.image_decoding import EXTENSIONS, read_image
from vitscope.runtime.errors import ConfigError, DataError

RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 0, 257, ..., 65535: exactly the bytes 0 to 255


def pixels(path: Path, **options: object) -> np.ndarray:
    image = read_image(path, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bit_gray_has_full_scale(tmp_path: Path, name: str) -> None:
    Image.fromarray(RAMP).save(tmp_path / name)
    np.testing.assert_array_equal(pixels(tmp_path / name), gray(np.arange(256).reshape(16, 16)))


def test_big_endian_sixteen_bit_tiff(tmp_path: Path) -> None:
    data = RAMP.astype(">u2").tobytes()
    tags = [
        (256, 3, 16),
        (257, 3, 16),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, 16),
        (279, 4, 512),
    ]
    entries = b"".join(
        struct.pack(">HHI", tag, kind, 1) + (struct.pack(">HH", v, 0) if kind == 3 else struct.pack(">I", v))
        for tag, kind, v in tags
    )
    header = struct.pack(">2sHI", b"MM", 42, 8 + len(data))
    (tmp_path / "a.tif").write_bytes(header + data + struct.pack(">H", len(tags)) + entries + struct.pack(">I", 0))
    np.testing.assert_array_equal(pixels(tmp_path / "a.tif"), gray(np.arange(256).reshape(16, 16)))


def test_a_stated_range_replaces_full_scale(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1000, 3000, 4095]], np.uint16)).save(tmp_path / "a.png")
    found = pixels(tmp_path / "a.png", pixel_range=(500, 4000))[..., 0]
    np.testing.assert_array_equal(found, [[0, round(255 * 500 / 3500), round(255 * 2500 / 3500), 255]])


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_samples_without_a_scale_need_a_range(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.array([[0, 50, 100]], dtype)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"data\.pixel_range: the samples of .*a\.tif are .*; set data\.pixel_range=\["):
        read_image(tmp_path / "a.tif")
    found = pixels(tmp_path / "a.tif", pixel_range=(0, 100))
    np.testing.assert_array_equal(found, gray(np.array([[0, 128, 255]])))  # 127.5 rounds to the even 128


def test_not_finite_samples_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif has samples that are not finite"):
        read_image(tmp_path / "a.tif", pixel_range=(0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_exif(tmp_path: Path, orientation: int) -> None:
    rng = np.random.default_rng(orientation)
    upright = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    turn = {  # how a camera stores an upright image under each orientation
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a), 7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: np.rot90(a, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(turn(upright))).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), upright)


def test_hidden_colors_do_not_show(tmp_path: Path) -> None:
    rgba = np.array([[[200, 10, 30, 0], [200, 10, 30, 255], [0, 0, 0, 51]]], np.uint8)
    Image.fromarray(rgba, "RGBA").save(tmp_path / "rgba.png")
    expected = [[[255, 255, 255], [200, 10, 30], [204, 204, 204]]]  # 255 * (1 - 51/255) = 204
    np.testing.assert_array_equal(pixels(tmp_path / "rgba.png"), expected)
    np.testing.assert_array_equal(pixels(tmp_path / "rgba.png", background=(0, 10, 20))[0, 0], [0, 10, 20])
    Image.fromarray(np.array([[[90, 0], [90, 255]]], np.uint8), "LA").save(tmp_path / "la.png")
    np.testing.assert_array_equal(pixels(tmp_path / "la.png")[0], [[255] * 3, [90] * 3])


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_transparent_entry_of_a_palette(tmp_path: Path, name: str) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / name, transparency=1)
    np.testing.assert_array_equal(pixels(tmp_path / name)[0], [[255, 0, 0], [255, 255, 255], [0, 0, 255]])


def test_transparent_gray_value(tmp_path: Path) -> None:
    Image.fromarray(np.array([[7, 90]], np.uint8)).save(tmp_path / "a.png", transparency=7)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png")[0], [[255] * 3, [90] * 3])


def test_color_models(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "one.png")
    np.testing.assert_array_equal(pixels(tmp_path / "one.png")[0], [[255] * 3, [0] * 3])
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "cmyk.tif")
    np.testing.assert_array_equal(pixels(tmp_path / "cmyk.tif")[0, 0], [0, 255, 255])  # cyan
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(pixels(tmp_path / "cmyk.jpg").astype(int) - [0, 255, 255]).max() <= 4  # JPEG rounds its transform
    Image.new("RGB", (8, 8), (200, 30, 60)).convert("YCbCr").save(tmp_path / "ycc.jpg", quality=100)
    assert np.abs(pixels(tmp_path / "ycc.jpg").astype(int) - [200, 30, 60]).max() <= 4


@pytest.mark.parametrize("name", [".gif", ".jfif", ".avif", ".webp", ".bmp", ".tif", ".JPG", ".jpe", ".pbm"])
def test_every_extension_is_an_image_of_its_class(tmp_path: Path, name: str) -> None:
    place = tmp_path / "val" / "cat"
    place.mkdir(parents=True)
    image = Image.new("1" if name == ".pbm" else "RGB", (9, 9), 1)
    image.save(place / f"a{name}", format={".jfif": "JPEG", ".jpe": "JPEG", ".pbm": "PPM"}.get(name))
    images = folder.load("test", root=tmp_path)
    assert len(images) == 1
    assert read_image(images.paths[0]).size == (9, 9)
    assert name.lower() in EXTENSIONS


@pytest.mark.usefixtures("command_messages")
def test_other_files_are_counted_in_one_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "val" / "cat"
    (place / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("a.png", ".ipynb_checkpoints/a.png", "._a.png"):
        Image.new("RGB", (4, 4)).save(place / name)
    for name in ("a.heic", "b.heic", "notes.txt"):
        (place / name).write_bytes(b"x")
    for _ in range(2):
        assert len(folder.load("test", root=tmp_path)) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "not read as images" in line]
    assert len(lines) == 1
    assert "4 files are not read as images: 2 .heic, 1 ._*, 1 .txt (read are .jpg" in lines[0]


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_no_other_decoder_is_started_by_a_files_content(tmp_path: Path, name: str) -> None:
    calls = []

    class Plugin(ImageFile.ImageFile):
        format = "TRAP"

        def _open(self) -> None:
            calls.append(1)
            raise SyntaxError("not mine")

    Image.init()
    Image.register_open("TRAP", Plugin, lambda start: True)
    try:
        (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n")
        with pytest.raises(DataError, match=f"{name} cannot be read as an image"):
            read_image(tmp_path / name)
    finally:
        Image.ID.remove("TRAP")
        del Image.OPEN["TRAP"]
    assert not calls


def test_too_many_pixels_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)  # an error from twice as many
    with pytest.raises(DataError, match=r"a\.png has more pixels than Pillow's limit") as caught:
        read_image(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("command_messages")
def test_first_frame_is_used_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels(tmp_path / "a.gif")[0, 0], [255, 0, 0])
    assert "a.gif: the first of its 2 frames is used" in capsys.readouterr().err
    Image.new("RGB", (4, 4)).save(tmp_path / "b.gif")
    read_image(tmp_path / "b.gif")
    assert not capsys.readouterr().err


def test_background_and_range_reach_the_batches(tmp_path: Path) -> None:
    (tmp_path / "val" / "cat").mkdir(parents=True)
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "val" / "cat" / "a.png")
    Image.fromarray(np.full((8, 8), 0.25, np.float32)).save(tmp_path / "val" / "cat" / "b.tif")
    data = DataModule(
        folder.load, name="folder", root=str(tmp_path), num_classes=1, image_size=8, mean=(0, 0, 0), std=(1, 1, 1),
        background=[0, 255, 0], pixel_range=[0.0, 0.5],
    )  # fmt: skip
    x, _ = next(iter(data.eval_dataloader("test")))
    np.testing.assert_allclose(x[0, :, 0, 0], [0, 1, 0])
    np.testing.assert_allclose(x[1, :, 0, 0], 128 / 255, rtol=1e-6)  # 127.5 rounds to the even 128
    # what changed the pixels is on the card, and compared
    batches = [(x, torch.zeros(len(x), dtype=torch.long))]
    other = Probe(nn.Flatten(), batches, about=DataModule(folder.load, name="folder", num_classes=1).describe("test"))
    card = Probe(nn.Flatten(), batches, about=data.describe("test")).card()
    assert card.preprocessing == "background 0, 255, 0; samples from 0 to 0.5"
    assert other.card().preprocessing == ObjectiveCard().preprocessing == "default"
    assert other.card().differences(card) == ["preprocessing"]


@pytest.mark.parametrize(
    ("crop_mode", "said"), [("center", "default"), ("squash", "squash crop"), ("border", "border crop")]
)
def test_the_crop_of_a_models_own_preprocessing_is_on_the_card(crop_mode: str, said: str) -> None:
    model = nn.Conv2d(3, 1, 1)
    model.pretrained_cfg = {
        "input_size": (3, 32, 32), "crop_pct": 1.0, "crop_mode": crop_mode, "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
    }  # fmt: skip
    data = DataModule(folder.load, name="folder", num_classes=1, transform="model")
    data.adapt_to(model)
    assert data.describe("test")["preprocessing"] == said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": (0, 0)}, r"data\.background=\[0, 0\]: not three integers"),
        ({"background": (0, 0, 256)}, r"data\.background=\[0, 0, 256\]"),
        ({"pixel_range": (1.0, 0.0)}, r"data\.pixel_range=\[1\.0, 0\.0\]: not two finite numbers"),
        ({"crop_mode": "middle"}, r"data\.crop_mode=middle: unknown crop; choose center, squash or border"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**options)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png is not a regular file"):
        read_image(tmp_path / "a.png")


def test_signed_bytes_are_refused(tmp_path: Path) -> None:
    """Pillow reads -1 as 255."""
    Image.new("L", (2, 2), 200).save(tmp_path / "a.tif", tiffinfo={339: 2})
    with pytest.raises(DataError, match=r"a\.tif are signed 8-bit integers"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_gray_of_16_bits_is_rounded_to_the_nearest_of_8(tmp_path: Path, ending: str) -> None:
    samples = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(samples).save(tmp_path / f"gray.{ending}")
    read = np.asarray(read_image(tmp_path / f"gray.{ending}"))
    # 255 / 65535 = 1 / 257, and no sample lies between two bytes, since 257 is odd
    np.testing.assert_array_equal(read, np.repeat((samples.astype(int) + 128)[..., None] // 257, 3, axis=2))
