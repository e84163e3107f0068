"""`folder` and `imagenet`: images in one folder a class.

Layouts, found by what is there:

- `root/train`, `root/val`, `root/test`: the splits as they are.
- `root/train`, `root/val` (ImageNet): `val` is the test split; validation is a held-out part of `train`.
- `root/train`: test and validation are held-out parts of it.
- classes directly in `root`: as `root/train`; but where they are of a known list (`classes`), all of them are the test
  split, for that is how ImageNet-A and ImageNet-R come.

Only the folders that a split needs are looked at, so `root/val` alone serves an evaluation.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import ImageFolder

from vitscope.data.files import FileImages
from vitscope.data.subset import hold_out
from vitscope.errors import ConfigError, DataError

_LAYOUT = "put images in <root>/train/<class>/ and <root>/val/<class>/ (see data/folder.py for the layouts)"


def load(
    split: str,
    *,
    root: str | Path | None,
    split_seed: int = 0,
    val_share: float = 0.1,
    test_share: float = 0.2,
    classes: str | None = None,
) -> FileImages:
    """Return a split of a folder of images.

    Args:
        split: `train`, `val` or `test`.
        root: The folder.
        split_seed: Chooses held-out images.
        val_share: Share of each training class that is held out for validation, where there is no such folder.
        test_share: Share of each class that is held out for testing, where there is no such folder.
        classes: None: the class folders in alphabetic order. `imagenet-1k`: folders are WordNet ids and labels
            those of the 1000 classes, also where only some of them are there (ImageNet-A, ImageNet-R).

    Raises:
        ConfigError: No root, or unknown classes.
        DataError: A root or split that is missing or empty, or train and test folders of different classes.
    """
    if root is None:
        raise ConfigError("data.root", None, "a folder of images is needed", "set data.root")
    root = Path(root)
    if not root.is_dir():
        raise DataError("data.root", root, "there is no such folder", _LAYOUT)
    has = {name: (root / name).is_dir() for name in ("train", "val", "test")}
    own_val, own_test = has["val"] and has["test"], has["val"] or has["test"]
    if split == "test" and classes is not None and not any(has.values()):
        return _read(root, root, classes)
    if split == "test" and own_test:
        return _read(root / ("test" if has["test"] else "val"), root, classes)
    if split == "val" and own_val:
        return _read(root / "val", root, classes)
    if split not in ("train", "val", "test"):
        raise DataError("data.root", root, f"there is no split {split!r}", "choose one of train, val, test")
    if (own_test or classes is not None) and not has["train"]:
        raise DataError("data.root", root, f"there is no train folder, which the {split} split needs", _LAYOUT)
    return _held_out(
        _read(root / "train" if has["train"] else root, root, classes),
        split,
        test_share=0.0 if own_test else test_share,
        val_share=0.0 if own_val else val_share,
        seed=split_seed,
    )


def _held_out(images: FileImages, split: str, *, test_share: float, val_share: float, seed: int) -> FileImages:
    labels = images.labels.numpy()
    rest, test = np.arange(len(labels)), np.arange(0)
    if test_share:
        rest, test = hold_out(labels, test_share, seed=0)  # the same test images for every seed
    kept, val = np.arange(len(rest)), np.arange(0)
    if val_share:
        kept, val = hold_out(labels[rest], val_share, seed=seed)
    return images.select({"train": rest[kept], "val": rest[val], "test": test}[split])


def _read(folder: Path, root: Path, classes: str | None) -> FileImages:
    try:
        found = ImageFolder(folder)
    except FileNotFoundError as error:  # no class folder, or one without an image
        raise DataError("data.root", root, " ".join(str(error).split()), _LAYOUT) from error
    except OSError as error:
        raise DataError("data.root", root, f"cannot be read ({error})", "check the folder's permissions") from error
    names = tuple(found.classes) if classes is None else _class_names(classes)
    number = {name: index for index, name in enumerate(names)}
    if unknown := [name for name in found.classes if name not in number]:
        raise DataError(
            "data.root", root, f"{unknown[0]!r} is not a class of {classes}", "set data.source.classes=null"
        )
    renumbered = np.array([number[name] for name in found.classes])
    labels = renumbered[np.array([label for _, label in found.samples])]
    return FileImages(tuple(path for path, _ in found.samples), torch.from_numpy(labels), names)


def _class_names(classes: str) -> tuple[str, ...]:
    from timm.data.imagenet_info import ImageNetInfo

    if classes != "imagenet-1k":
        raise ConfigError("data.source.classes", classes, "unknown classes", "choose null or imagenet-1k")
    return tuple(ImageNetInfo("imagenet-1k").label_names())
