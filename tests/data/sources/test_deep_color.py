"""Color of 16 bits a sample: files written byte by byte, each value compared with a scaling by 255/65535 in float64."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from vitscope.data.sources.image_decoding import read_image
from vitscope.runtime.errors import DataError

RNG = np.random.default_rng(0)
EDGES = np.array([0, 1, 128, 129, 255, 256, 257, 385, 386, 32639, 32767, 32768, 65279, 65407, 65408, 65535], np.uint16)
PNG_COLOR_TYPES = {3: 2, 4: 6, 2: 4}  # by the number of channels


def write_png(path: Path, samples: np.ndarray, *, hidden: tuple[int, ...] | None = None, exif: bytes = b"") -> None:
    """Write (h, w, channels) samples of 16 bits; ``hidden`` is the color that is transparent."""
    height, width, channels = samples.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, PNG_COLOR_TYPES[channels], 0, 0, 0)
    transparency = chunk(b"tRNS", struct.pack(">3H", *hidden)) if hidden else b""
    described = chunk(b"eXIf", exif) if exif else b""
    body = chunk(b"IHDR", header) + transparency + described + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def write_tiff(
    path: Path, samples: np.ndarray, order: str, *, extra: int | None = None, planes: int = 1, orientation: int = 1
) -> None:
    """Write (h, w, channels) samples of 16 bits without compression; ``extra`` says what a fourth one is."""
    height, width, channels = samples.shape
    stored = samples if planes == 1 else samples.transpose(2, 0, 1)
    data = stored.astype(f"{order}u2").tobytes()
    size = height * width * 2
    tail = 8 + len(data)  # of the values that do not fit into a tag: bits a sample, and the planes' places and sizes
    values = struct.pack(f"{order}{channels}H", *[16] * channels)
    places = struct.pack(f"{order}{channels}I", *(8 + i * size for i in range(channels)))
    sizes = struct.pack(f"{order}{channels}I", *[size] * channels)
    n = channels if planes == 2 else 1
    at = tail + len(values)
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, tail), (259, 3, 1, 1), (262, 3, 1, 2),
            (273, 4, n, 8 if n == 1 else at), (274, 3, 1, orientation), (277, 3, 1, channels), (278, 3, 1, height),
            (279, 4, n, len(data) if n == 1 else at + len(places)), (284, 3, 1, planes)]  # fmt: skip
    tags += [] if extra is None else [(338, 3, 1, extra)]
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, kind, count)
        + (struct.pack(f"{order}HH", value, 0) if kind == 3 and count == 1 else struct.pack(f"{order}I", value))
        for tag, kind, count, value in tags
    )
    begin = at + len(places) + len(sizes)
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", begin)
    end = struct.pack(f"{order}I", 0)
    path.write_bytes(header + data + values + places + sizes + struct.pack(f"{order}H", len(tags)) + entries + end)


def drawn(channels: int) -> np.ndarray:
    """Return (6, 16, channels) samples, the first row at the edges between bytes, the last channel of four in 0, half, full."""
    samples = RNG.integers(0, 65536, (6, 16, channels)).astype(np.uint16)
    samples[0, :, :3] = EDGES[:, None]
    if channels == 4:
        samples[..., 3] = RNG.choice(np.array([0, 32768, 65535], np.uint16), (6, 16))
    return samples


def shown(
    samples: np.ndarray, background: tuple[int, ...] = (255, 255, 255), low: float = 0, high: float = 65535
) -> np.ndarray:
    """Return the bytes of 16-bit samples over a background, computed in float64."""
    scaled = 255 * np.clip((samples[..., :3].astype(float) - low) / (high - low), 0, 1)
    alpha = samples[..., 3:].astype(float) / 65535 if samples.shape[2] == 4 else 1.0
    return scaled * alpha + np.array(background) * (1 - alpha)


def check(path: Path, expected: np.ndarray, **options: object) -> None:
    """Compare with the unrounded bytes: half a byte from rounding, and the rounding of float64."""
    image = read_image(path, **options)
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image).astype(float), expected, rtol=0, atol=0.5 + 1e-9)


@pytest.mark.parametrize("channels", [3, 4])
def test_png(tmp_path: Path, channels: int) -> None:
    samples = drawn(channels)
    write_png(tmp_path / "a.png", samples)
    check(tmp_path / "a.png", shown(samples))
    check(tmp_path / "a.png", shown(samples, (10, 20, 30)), background=(10, 20, 30))
    check(tmp_path / "a.png", shown(samples, low=1000, high=4095), pixel_range=(1000, 4095))


def test_hidden_color_of_a_png(tmp_path: Path) -> None:
    samples = np.array([[[1000, 2000, 3000], [1001, 2000, 3000]]], np.uint16)
    write_png(tmp_path / "a.png", samples, hidden=(1000, 2000, 3000))
    check(tmp_path / "a.png", np.array([[[255, 255, 255], samples[0, 1] / 257]]))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("channels", "extra"), [(3, None), (4, 2), (4, 0)])
def test_tiff(tmp_path: Path, order: str, channels: int, extra: int | None) -> None:
    """Little-endian and big-endian; a fourth channel of alpha (2) or of no stated meaning (0), which is left out."""
    samples = drawn(channels)
    write_tiff(tmp_path / "a.tif", samples, order, extra=extra)
    check(tmp_path / "a.tif", shown(samples if extra else samples[..., :3]))


def test_tiff_with_colors_multiplied_by_alpha(tmp_path: Path) -> None:
    samples = drawn(4)
    stored = samples.copy()
    stored[..., :3] = np.round(samples[..., :3] * (samples[..., 3:] / 65535))
    write_tiff(tmp_path / "a.tif", stored, "<", extra=1)
    check(tmp_path / "a.tif", shown(samples))


def test_orientation(tmp_path: Path) -> None:
    samples = drawn(3)
    exif = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0x0112, 3, 1, 4, 0)
    write_png(tmp_path / "a.png", samples[::-1], exif=exif)
    check(tmp_path / "a.png", shown(samples))
    write_tiff(tmp_path / "a.tif", samples[::-1], "<", orientation=4)  # stored upside down
    check(tmp_path / "a.tif", shown(samples))


def test_maximum_of_a_pgm_and_a_stated_range(tmp_path: Path) -> None:
    values = np.array([0, 100, 500, 700, 1023])
    (tmp_path / "a.pgm").write_bytes(b"P5 5 1 1023\n" + values.astype(">u2").tobytes())
    for options, low, high in (({}, 0, 1023), ({"pixel_range": (100, 700)}, 100, 700)):
        found = np.asarray(read_image(tmp_path / "a.pgm", **options))[0, :, 0]
        # Pillow rescales the samples to integers of 16 bits
        np.testing.assert_allclose(
            found, 255 * np.clip((values - low) / (high - low), 0, 1), atol=0.5 + 255 / 65535 * 2
        )
    (tmp_path / "a.ppm").write_bytes(b"P6 5 1 1023\n" + np.repeat(values, 3).astype(">u2").tobytes())
    np.testing.assert_allclose(np.asarray(read_image(tmp_path / "a.ppm"))[0, :, 0], 255 * values / 1023, atol=0.51)
    with pytest.raises(DataError, match=r"data\.pixel_range=\[0, 700\]: .*a\.ppm holds color of more than 8 bits"):
        read_image(tmp_path / "a.ppm", pixel_range=(0, 700))


def test_what_pillow_gives_no_access_to_is_refused(tmp_path: Path) -> None:
    write_png(tmp_path / "gray and alpha.png", drawn(4)[..., :2])
    write_tiff(tmp_path / "planes.tif", drawn(3), "<", planes=2)
    for name, kind in (("gray and alpha.png", "LA"), ("planes.tif", "a plane for each channel")):
        with pytest.raises(DataError, match=rf"{name} are stored in a way .*{kind}.*; save it as RGB or RGBA"):
            read_image(tmp_path / name)


def test_a_file_that_is_cut_short_is_one_line(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", drawn(3))
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:120])
    with pytest.raises(DataError, match=r"a\.png cannot be read as an image"):
        read_image(tmp_path / "a.png")
