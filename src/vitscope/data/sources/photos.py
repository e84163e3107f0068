"""`photos`: gray 32x32 crops of 16 photographs; the class of a crop is its photograph.

The photographs are files of the scikit-image and scikit-learn wheels, so nothing is ever downloaded. Each is
cut in three vertical regions before anything else happens: train (left 55%), validation (next 15%) and test
(right 30%); no pixel of one region touches another. A region is made gray, scaled as if the photograph's short
side were 256, locally contrast-normalized and cropped; a crop has mean 0 and variance 1, so that neither
color nor brightness nor contrast tells the class.

`whole` (`data=photographs`) gives the 16 photographs as they are, in color, to models built for larger images: something to
measure on, not to train on.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter, uniform_filter

from vitscope.data import philox
from vitscope.data.sources.array_images import ArrayImages
from vitscope.data.sources.file_images import FileImages
from vitscope.runtime.errors import DataError
from vitscope.runtime.value_ranges import Seed

_SKIMAGE, _SKLEARN = "skimage.data", "sklearn.datasets.images"

#: Class name to (package, file); the order is the label.
PHOTOGRAPHS = {
    "astronaut": (_SKIMAGE, "astronaut.png"),
    "brick": (_SKIMAGE, "brick.png"),
    "camera": (_SKIMAGE, "camera.png"),
    "chelsea": (_SKIMAGE, "chelsea.png"),
    "china": (_SKLEARN, "china.jpg"),
    "coffee": (_SKIMAGE, "coffee.png"),
    "coins": (_SKIMAGE, "coins.png"),
    "grass": (_SKIMAGE, "grass.png"),
    "gravel": (_SKIMAGE, "gravel.png"),
    "hubble": (_SKIMAGE, "hubble_deep_field.jpg"),
    "ihc": (_SKIMAGE, "ihc.png"),
    "moon": (_SKIMAGE, "moon.png"),
    "motorcycle": (_SKIMAGE, "motorcycle_left.png"),
    "page": (_SKIMAGE, "page.png"),
    "rocket": (_SKIMAGE, "rocket.jpg"),
    "text": (_SKIMAGE, "text.png"),
}

#: Split to (first column, end column, crops a class): columns as shares of the width.
REGIONS = {"train": (0.0, 0.55, 512), "val": (0.55, 0.70, 32), "test": (0.70, 1.0, 64)}

SHORT_SIDE, CROP = 256, 32
WINDOW = 6.0  # standard deviation of the contrast window, in pixels
QUIET = 0.25  # share of positions, those with the least contrast, that are never cropped (empty sky)
LIMIT = 3.0  # standard deviations at which a crop is clipped
LEVELS = 42.0  # gray levels a standard deviation
_ROUNDS = 8  # of standardizing and clipping


def load(split: str, *, root: str | None = None, split_seed: Seed = 0) -> ArrayImages:
    """Return a split: 8192, 512 or 1024 gray crops in three equal channels.

    Args:
        split: `train`, `val` or `test`.
        root: Not used; the files come with the wheels.
        split_seed: Not used; the data set is always the same one.

    Raises:
        DataError: Unknown split, or a wheel without its images.
    """
    if split not in REGIONS:
        raise DataError("data", "photos", f"there is no split {split!r}", f"choose one of {', '.join(REGIONS)}")
    crops = np.concatenate([_crops(name, split) for name in PHOTOGRAPHS])
    gray = torch.from_numpy(crops)[:, None]  # (N, 1, 32, 32)
    labels = torch.arange(len(PHOTOGRAPHS)).repeat_interleave(REGIONS[split][2])
    return ArrayImages(gray.expand(-1, 3, -1, -1).contiguous(), labels, tuple(PHOTOGRAPHS))


def whole(split: str, *, root: str | None = None, split_seed: Seed = 0) -> FileImages:
    """Return the 16 photographs, uncut and in color, the label being the photograph.

    Args:
        split: `test`, the only one.
        root: Not used; the files come with the wheels.
        split_seed: Not used; the data set is always the same one.

    Raises:
        DataError: Another split, or a wheel without its images.
    """
    if split != "test":
        raise DataError(
            "data",
            "photographs",
            f"16 photographs have no {split} split",
            "measure on split=test; train on data=photos",
        )
    paths = tuple(_path(name) for name in PHOTOGRAPHS)
    return FileImages(paths, torch.arange(len(PHOTOGRAPHS)), tuple(PHOTOGRAPHS))


def _path(name: str) -> str:
    package, file = PHOTOGRAPHS[name]
    path = files(package) / file
    if not path.is_file():
        problem = f"{file} is missing from the installed {package.split('.')[0]}"
        raise DataError("data", "photographs", problem, "reinstall it from its wheel")
    return str(path)


def region_columns(width: int, split: str) -> tuple[int, int]:
    """Return the first and the end column of a split's region in a photograph `width` pixels wide."""
    first, end, _ = REGIONS[split]
    return round(first * width), round(end * width)


def _crops(name: str, split: str) -> NDArray[np.uint8]:
    region = _normalized_region(name, split)
    windows = np.lib.stride_tricks.sliding_window_view(region, (CROP, CROP))  # (rows, columns, 32, 32)
    half = CROP // 2
    mean, square = uniform_filter(region, CROP), uniform_filter(region**2, CROP)
    contrast = (square - mean**2)[half : half + windows.shape[0], half : half + windows.shape[1]]
    positions = np.flatnonzero(contrast >= np.quantile(contrast, QUIET))
    label = list(PHOTOGRAPHS).index(name)
    order = philox.permutation(len(positions), seed=label, stream=philox.PIXELS, epoch=list(REGIONS).index(split))
    rows, columns = np.unravel_index(positions[order[: REGIONS[split][2]]], contrast.shape)
    crops = windows[rows, columns].astype(np.float64)  # (n, 32, 32)
    for _ in range(_ROUNDS):  # clipped highlights would leave their class in the crop's contrast
        crops -= crops.mean((1, 2), keepdims=True)
        crops /= crops.std((1, 2), keepdims=True) + 1e-6
        crops = crops.clip(-LIMIT, LIMIT)
    return np.round(128 + LEVELS * crops).astype(np.uint8)


@cache
def _normalized_region(name: str, split: str) -> NDArray[np.float64]:
    """Return a region with local mean 0 and local variance 1: (x - m) / (s + 2 gray levels)."""
    photograph = _photograph(name)
    scale = SHORT_SIDE / min(photograph.size)
    first, end = region_columns(photograph.width, split)
    cut = photograph.crop((first, 0, end, photograph.height)).convert("L")
    size = (max(CROP, round(cut.width * scale)), round(cut.height * scale))
    gray = np.asarray(cut.resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
    centered = gray - gaussian_filter(gray, WINDOW)
    return centered / (np.sqrt(gaussian_filter(centered**2, WINDOW)) + 2.0)


def _photograph(name: str) -> Image.Image:
    package, file = PHOTOGRAPHS[name]
    try:
        with as_file(files(package) / file) as path, Image.open(path) as image:
            image.load()
            return image.copy()
    except OSError as error:
        problem = f"{file} is missing from the installed {package.split('.')[0]}"
        raise DataError("data", "photos", problem, "reinstall it from its wheel") from error
