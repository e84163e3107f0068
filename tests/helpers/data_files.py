"""Small data sets in the real formats, written when a test asks for them."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def _pickled(path: Path, content: dict[str, object]) -> str:
    path.write_bytes(pickle.dumps(content, protocol=2))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def write_cifar() -> Callable[..., dict[str, str]]:
    """Writes CIFAR's pickles (or their archive) with `per_class` training images; returns their checksums."""

    def write(root: Path, variant: str = "cifar10", per_class: int = 10, *, archive: bool = False) -> dict[str, str]:
        rng = np.random.default_rng(0)
        ten = variant == "cifar10"
        folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
        folder.mkdir(parents=True)
        classes = 10 if ten else 100
        parts = 5 if ten else 1
        key = "labels" if ten else "fine_labels"
        labels = np.tile(np.arange(classes), per_class)
        sums = {}
        for part in range(parts):
            mine = labels[part::parts].tolist()
            pixels = rng.integers(0, 256, (len(mine), 3072), dtype=np.uint8)
            name = f"data_batch_{part + 1}" if ten else "train"
            sums[name] = _pickled(folder / name, {"data": pixels, key: mine})
        pixels = rng.integers(0, 256, (2 * classes, 3072), dtype=np.uint8)
        test = {"data": pixels, key: [*range(classes), *range(classes)]}
        sums["test_batch" if ten else "test"] = _pickled(folder / ("test_batch" if ten else "test"), test)
        names = [f"class {index}" for index in range(classes)]
        meta, names_key = ("batches.meta", "label_names") if ten else ("meta", "fine_label_names")
        sums[meta] = _pickled(folder / meta, {names_key: names})
        if archive:
            path = root / ("cifar-10-python.tar.gz" if ten else "cifar-100-python.tar.gz")
            with tarfile.open(path, "w:gz") as tar:
                tar.add(folder, folder.name)
            sums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        return sums

    return write


@pytest.fixture
def write_folder() -> Callable[..., Path]:
    """Writes `per_class` JPEG files of noise for each class of each given split."""

    def write(
        root: Path, splits: tuple[str, ...], classes: tuple[str, ...] = ("cat", "dog"), per_class: int = 6
    ) -> Path:
        rng = np.random.default_rng(1)
        for split in splits:
            for name in classes:
                folder = root / split / name
                folder.mkdir(parents=True)
                for index in range(per_class):
                    pixels = rng.integers(0, 256, (40, 48 + index, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{split}{index}.jpg")
        return root

    return write
