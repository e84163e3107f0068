"""The published data sets on disk: CIFAR-10-C and CIFAR-100-C arrays, ImageNet-C folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitscope.data.sources.class_folders import class_folders, image_files, listed, subfolders
from vitscope.data.sources.image_decoding import read_image
from vitscope.runtime.errors import DataError

KEY = "analysis.corruption.root"


@dataclass(frozen=True)
class Arrays:
    """``<type>.npy`` of (5 n, h, w, 3) uint8, severities one after the other, and ``labels.npy`` of 5 n (or n) labels."""

    root: Path
    n_images: int | None

    def read(self, name: str, severity: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield ``(pixels (B, h, w, 3) uint8, labels (B,))``."""
        pixels = _load(self.root / f"{name}.npy", mmap=True)
        labels = _load(self.root / "labels.npy")
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8 or len(pixels) % 5:
            what = f"{name}.npy holds {pixels.dtype} {pixels.shape}, not uint8 (5 n, height, width, 3)"
            raise DataError(KEY, self.root, what, "unpack CIFAR-10-C or CIFAR-100-C again")
        n = len(pixels) // 5
        if len(labels) not in (n, 5 * n):
            what = f"labels.npy holds {len(labels)} labels for {n} images per severity"
            raise DataError(KEY, self.root, what, "unpack it again")
        for part in _spread(n, self.n_images, batch_size):
            yield np.asarray(pixels[(severity - 1) * n + part]), np.asarray(labels[part]).astype(np.int64)


@dataclass(frozen=True)
class Folders:
    """``<type>/<severity>/<class>/<image>``, with or without a folder such as ``blur`` around the types.

    Attributes:
        root: The folder that holds the types.
        n_images: Images a condition, spread evenly; None for all.
        classes: The names that number the labels, the same for every type and severity.
    """

    root: Path
    n_images: int | None
    classes: tuple[str, ...]

    def read(self, name: str, severity: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield ``(pixels (B, h, w, 3) uint8, labels (B,))``, images sorted by class and name."""
        folder = _type_folder(self.root, name) / str(severity)
        if not folder.is_dir():
            raise DataError(
                KEY, self.root, f"there is no {folder.relative_to(self.root)}", "unpack all five severities"
            )
        present = class_folders(folder, self.root, KEY)
        index = {name: i for i, name in enumerate(self.classes)}
        if unknown := [name for name in present if name not in index]:
            what = f"{folder.relative_to(self.root)} has the class {unknown[0]!r}, the data has {listed(self.classes)}"
            raise DataError(KEY, self.root, what, "give its class folders the names of the data's classes")
        by_class = image_files(present, folder, self.root, KEY)
        files = [(Path(path), index[name]) for name in present for path in by_class[name]]
        if not files:
            raise DataError(KEY, self.root, f"there is no image in {folder.relative_to(self.root)}", "unpack it again")
        for part in _spread(len(files), self.n_images, batch_size):
            pixels = [_image(files[i][0]) for i in part]
            if len({p.shape for p in pixels}) > 1:
                raise DataError(
                    KEY, self.root, f"images of several sizes in {folder}", "use the published 224x224 crops"
                )
            yield np.stack(pixels), np.array([files[i][1] for i in part])


def archive(
    root: str | Path, types: Sequence[str], n_images: int | None, classes: Sequence[str] | None = None
) -> Arrays | Folders:
    """Return the published data set at ``root``, its layout recognized.

    Args:
        root: The folder that holds the types.
        types: Types of corruption to read; all of them must be there.
        n_images: Number of images of a condition, spread evenly over the data set; None for all.
        classes: Names of the class folders in the order of the model's outputs; sorted folder names without.

    Raises:
        DataError: No such folder, or types that are missing.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(KEY, root, "there is no such folder", "download the data set, or set it to null to generate")
    arrays = any(root.glob("*.npy"))
    available = [t for t in types if (root / f"{t}.npy").is_file() or (not arrays and _type_folder(root, t).is_dir())]
    if missing := [t for t in types if t not in available]:
        what = f"{', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''} missing"
        raise DataError(
            KEY, root, what, "unpack all of it, or name the types that are there in analysis.corruption.types"
        )
    if arrays:
        return Arrays(root, n_images)
    return Folders(root, n_images, tuple(classes) if classes else _classes(root, types))


def _classes(root: Path, types: Sequence[str]) -> tuple[str, ...]:
    """Return the names of all class folders under any type and severity, so that all conditions number them alike."""
    names: set[str] = set()
    for name in types:
        for severity in subfolders(_type_folder(root, name), root, KEY).values():
            names |= set(subfolders(severity, root, KEY))
    return tuple(sorted(names))


def _type_folder(root: Path, name: str) -> Path:
    places = [root / name, *(folder / name for folder in subfolders(root, root, KEY).values())]
    return next((folder for folder in places if folder.is_dir()), root / name)


def _load(path: Path, mmap: bool = False) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(KEY, path.parent, f"{path.name} cannot be read", "unpack it again") from error


def _spread(n: int, n_images: int | None, batch_size: int) -> Iterator[np.ndarray]:
    positions = np.arange(n) if n_images is None or n_images >= n else np.arange(n_images) * n // n_images
    yield from (positions[i : i + batch_size] for i in range(0, len(positions), batch_size))


def _image(path: Path) -> np.ndarray:
    return np.asarray(read_image(path, key=KEY))
