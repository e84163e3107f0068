"""`folder` and `imagenet`: images in one folder per class.

The folders of the splits are known by their names, capitals or not: `train` or `training`; `val`, `valid`, `validation` or
`dev`; `test`, `testing` or `eval`. Splits that have no folder of their own:

- `val`: a part of `train`, held out class by class.
- `test`: the images of the `val` folder where there is one (as ImageNet's), otherwise a part of `train`.
- without any of these folders the classes are directly in `root`, as if it were `train`; but where the classes are of a known
  list (`classes`), all of them are the test split, for that is how ImageNet-A and ImageNet-R come.

Each of these assumptions is printed once. There is one list of classes for all splits, compared by name: the
configured list, else the class folders of `train`, else those of `val`, else those of `test`. Only the folders that a split needs
are looked at, so `root/val` alone serves an evaluation.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from vitscope.data.sources.class_folders import class_folders, image_files, listed, split_folders
from vitscope.data.sources.file_images import FileImages
from vitscope.data.sources.notices import report_once
from vitscope.data.splits import hold_out, refuse_empty_validation
from vitscope.runtime.errors import ConfigError, DataError, nearest
from vitscope.runtime.value_ranges import Seed, ShareBelowOne

_LAYOUT = "put images in <root>/train/<class>/ and <root>/val/<class>/ (docs/data.md has other layouts)"
SPLITS = ("train", "val", "test")


def load(
    split: str,
    *,
    root: str | Path | None,
    split_seed: Seed = 0,
    val_share: ShareBelowOne = 0.1,
    test_share: ShareBelowOne = 0.2,
    classes: str | Sequence[str] | None = None,
) -> FileImages:
    """Return a split of a folder of images.

    Args:
        split: `train`, `val` or `test`.
        root: The folder.
        split_seed: Chooses held-out images.
        val_share: Share of each training class that is held out for validation, where there is no such folder.
        test_share: Share of each class that is held out for testing, where there is neither a test nor a validation folder.
        classes: None: the class folders of `train` (see above) in alphabetic order. A list of names: in the order of the labels.
            `imagenet-1k`: folders are WordNet ids and labels those of the 1000 classes. Of a list only some may be there
            (ImageNet-A, ImageNet-R).

    Raises:
        ConfigError: No root, or unknown classes.
        DataError: A root or split that is missing or empty, or a class that is not in the list.
    """
    root = _existing(root)
    if split not in SPLITS:
        raise DataError("data.root", root, f"there is no split {split!r}", "choose one of train, val, test")
    folders = split_folders(root)
    names = _class_list(classes)
    if not folders and names is not None:
        if split != "test":
            raise DataError("data.root", root, f"there is no train folder, which the {split} split needs", _LAYOUT)
        _report_assumption(
            root,
            f"no train, val or test folder: all of its images are the test split of {_name_of_class_list(classes)}",
        )
        return _images(root, root, names, classes, complete=False)
    source = _source(split, folders, root)
    if names is None:
        names = _names_of_folders(folders, root)
    images = _images(source, root, names, classes, complete=split == "train")
    if source != folders.get("train", root):
        return images
    return _held_out(
        images,
        split,
        test_share=0.0 if {"val", "test"} & set(folders) else test_share,
        val_share=0.0 if "val" in folders else val_share,
        seed=split_seed,
    )


def class_names(root: str | Path | None, classes: str | Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the names of the classes, in the order of their labels, without looking at images.

    Args:
        root: The folder.
        classes: That of `load`.

    Raises:
        ConfigError: No root, or unknown classes.
        DataError: A root that is missing, or has no class folders.
    """
    names = _class_list(classes)
    if names is not None:
        return names
    root = _existing(root)
    return _names_of_folders(split_folders(root), root)


def _existing(root: str | Path | None) -> Path:
    if root is None:
        raise ConfigError("data.root", None, "a folder of images is needed", "set data.root")
    if not Path(root).is_dir():
        raise DataError("data.root", root, "there is no such folder", _LAYOUT)
    return Path(root)


def _names_of_folders(folders: Mapping[str, Path], root: Path) -> tuple[str, ...]:
    reference = folders.get("train") or folders.get("val") or folders.get("test") or root
    names = tuple(class_folders(reference, root))
    if all(name.isdecimal() for name in names) and names != tuple(sorted(names, key=int)):
        number = next(i for i, (name, other) in enumerate(zip(names, sorted(names, key=int))) if name != other)
        _report_assumption(
            root,
            f"class folders are numbered in alphabetic order, as by torchvision's ImageFolder: label {number} is folder "
            f"{names[number]}; data.source.classes=[...] sets another order",
        )
    return names


def _source(split: str, folders: Mapping[str, Path], root: Path) -> Path:
    """Return the folder that a split's images are read from; it is said where that is not the split's own."""
    if split in folders:
        return folders[split]
    if split == "test" and "val" in folders:
        val_folder_name = folders["val"].name
        _report_assumption(
            root,
            f"no test folder: the test split is the images of {val_folder_name}/, which the val split has too; "
            "metrics of a checkpoint that was chosen on them are optimistic",
        )
        return folders["val"]
    if not folders:
        if split != "train":
            _report_assumption(root, f"no train, val or test folder: the {split} split is held out of its classes")
        return root
    if "train" not in folders:
        raise DataError("data.root", root, f"there is no train folder, which the {split} split needs", _LAYOUT)
    _report_assumption(root, f"no {split} folder: the {split} split is held out of {folders['train'].name}/")
    return folders["train"]


def _report_assumption(root: Path, what: str) -> None:
    report_once(f"data.root={root}: {what}")


def _held_out(images: FileImages, split: str, *, test_share: float, val_share: float, seed: int) -> FileImages:
    refuse_empty_validation(split, val_share)
    labels = images.labels.numpy()
    rest, test = np.arange(len(labels)), np.arange(0)
    if test_share:
        rest, test = hold_out(labels, test_share, seed=0)  # the same test images for every seed
    train, val = np.arange(len(rest)), np.arange(0)
    if val_share:
        train, val = hold_out(labels[rest], val_share, seed=seed)
    return images.select({"train": rest[train], "val": rest[val], "test": test}[split])


def _images(
    folder: Path, root: Path, names: tuple[str, ...], classes: str | Sequence[str] | None, *, complete: bool
) -> FileImages:
    """Return the images of a folder, labeled by their class's place in `names`.

    Args:
        folder: Folder of class folders.
        root: The folder that errors name.
        names: The classes of all splits.
        classes: The configured classes, which errors name.
        complete: Whether a class without an image is an error; otherwise it is a notice.
    """
    present = class_folders(folder, root)
    number = {name: index for index, name in enumerate(names)}
    if unknown := [name for name in present if name not in number]:
        raise DataError("data.root", root, *_unknown_class(unknown, names, folder, classes))
    files = image_files(present, folder, root)
    if not any(files.values()):
        problem = f"there is no image in the class folders of {folder} ({listed(present)})"
        raise DataError("data.root", root, problem, _LAYOUT)
    if classes is None and (classes_without_images := [name for name in names if not files.get(name)]):
        _report_empty_classes(classes_without_images, folder, root, complete)
    paths = tuple(path for name in present for path in files[name])
    labels = [number[name] for name in present for _ in files[name]]
    return FileImages(paths, torch.tensor(labels, dtype=torch.int64), names)


def _report_empty_classes(lacking: Sequence[str], folder: Path, root: Path, complete: bool) -> None:
    problem = f"no image of {len(lacking)} of the classes in {folder}: {listed(lacking)}"
    if complete:
        raise DataError("data.root", root, problem, "put images there, or remove the empty folders")
    report_once(f"data.root={root}: {problem}; labels keep their numbers, metrics are over the others")


def _unknown_class(
    unknown: Sequence[str], names: tuple[str, ...], folder: Path, classes: str | Sequence[str] | None
) -> tuple[str, str]:
    if isinstance(classes, str):
        return f"{unknown[0]!r} is not a class of {classes}", "set data.source.classes=null"
    folded = {name.casefold(): name for name in names}
    fix = "rename or remove it"
    if (same := folded.get(unknown[0].casefold())) is not None:
        fix = f"rename it to {same}"
    elif len(names) <= 40:
        fix = f"rename or remove it ({nearest(unknown[0], names)})"
    where = "data.source.classes has" if classes is not None else "the class folders of train/ (the class list) are"
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    return f"{folder.name}/ has the class {unknown[0]!r}{more}, but {where} {listed(names)}", fix


def _name_of_class_list(classes: str | Sequence[str] | None) -> str:
    return classes if isinstance(classes, str) else "data.source.classes"


def _class_list(classes: str | Sequence[str] | None) -> tuple[str, ...] | None:
    from timm.data.imagenet_info import ImageNetInfo

    if classes is None:
        return None
    if not isinstance(classes, str):
        names = tuple(unicodedata.normalize("NFC", str(name)) for name in classes)
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                "data.source.classes", list(names), "not a list of different names", "name each class once"
            )
        return names
    if classes != "imagenet-1k":
        fix = "choose null, imagenet-1k or a list of class names"
        raise ConfigError("data.source.classes", classes, "unknown classes", fix)
    return tuple(ImageNetInfo("imagenet-1k").label_names())
