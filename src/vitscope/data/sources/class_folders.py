"""Find the split folders, the class folders and the image files below a root, and report what is left out.

Names are compared in Unicode normal form C: an accented name that was written on another system is the same class.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from vitscope.data.sources.image_decoding import EXTENSIONS
from vitscope.data.sources.notices import report_once
from vitscope.runtime.errors import DataError

#: Folder names of each split; capitals make no difference.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval"),
}

#: Names such as train_images, "test set" or val2017, which tell of a split but are none of its names.
_LIKE_A_SPLIT = re.compile(
    r"(.*[\W_])?(train|training|val|valid|validation|dev|test|testing|eval)([\W_\d].*)?", re.IGNORECASE
)

#: Folders that programs leave behind, besides those whose name starts with a dot.
_BY_PROGRAMS = {"__macosx", "__pycache__", "lost+found", "@eadir", "$recycle.bin", "system volume information"}


def split_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each split that `root` has.

    A folder with a split's name that holds images but no folders, beside other folders, is a class (`root/train` of a data
    set of vehicles).

    Raises:
        DataError: Two folders for one split, one folder for two, another layout, or a root that cannot be read.
    """
    folders = subfolders(root, root)
    named = {folder: split for folder in folders for split, names in SPLIT_NAMES.items() if folder.casefold() in names}
    others = [folder for folder in folders if folder not in named]
    if others:
        named = {folder: split for folder, split in named.items() if not _holds_only_files(folders[folder])}
    for split in SPLIT_NAMES:
        if len(same := [folder for folder in named if named[folder] == split]) > 1:
            raise DataError(
                "data.root", root, f"{' and '.join(same)} are both a {split} folder", "rename or merge them"
            )
    if not named:
        _refuse_other_layouts(folders, root)
    _refuse_shared_folders({split: folders[folder] for folder, split in named.items()}, root)
    if named and (unread := [folder for folder in folders if folder not in named]):
        report_once(
            f"data.root={root}: read as the splits {', '.join(sorted(named))}; folders beside them are not read: "
            f"{listed(unread)}"
        )
    return {split: folders[folder] for folder, split in named.items()}


def _refuse_other_layouts(folders: Mapping[str, Path], root: Path) -> None:
    """Refuse folders that are not classes: all named like splits, one that holds the splits, classes split inside."""
    fix = "name them train/, val/ and test/"
    if len(folders) > 1 and all(_LIKE_A_SPLIT.fullmatch(name) for name in folders):
        problem = f"its folders {listed(folders)} are named like splits, but are none of the names of one"
        raise DataError("data.root", root, problem, fix)
    for name, folder in folders.items():
        inner_splits = {
            split for inner in _names_below(folder) for split, names in SPLIT_NAMES.items() if inner in names
        }
        if len(inner_splits) > 1 and len(folders) == 1:
            raise DataError("data.root", root, f"the splits are in its folder {name}", f"set data.root={folder}")
        if len(inner_splits) > 1:
            problem = f"{name}/ holds folders named like splits ({', '.join(sorted(inner_splits))}), whose images would be mixed"
            raise DataError("data.root", root, problem, "put images in <root>/train/<class>/ and <root>/val/<class>/")


def _names_below(folder: Path) -> list[str]:
    try:
        return [entry.name.casefold() for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:  # said where its images are listed
        return []


def _refuse_shared_folders(splits: Mapping[str, Path], root: Path) -> None:
    """Refuse a split that is, by a link, the folder of another one or lies in it."""
    real = {split: folder.resolve() for split, folder in splits.items()}
    for one, folder in real.items():
        for other, other_folder in real.items():
            if one != other and (folder == other_folder or other_folder in folder.parents):
                problem = f"the {one} folder is a link to the {other} folder or into it, so that they share images"
                raise DataError("data.root", root, problem, "give each split images of its own, or remove the link")


def class_folders(folder: Path, root: Path, key: str = "data.root") -> dict[str, Path]:
    """Return the class folders in `folder` by name, sorted; hidden folders are no classes.

    Raises:
        DataError: No class folder, names that differ by case or Unicode form only, or a folder that cannot be read.
    """
    classes = subfolders(folder, root, key)
    if not classes:
        n_loose_images = sum(is_image(entry.name) for entry in os.scandir(folder))
        problem = f"there is no class folder in {folder}" + (
            f" ({n_loose_images} images lie in it directly)" if n_loose_images else ""
        )
        raise DataError(key, root, problem, "put images in <root>/train/<class>/ and <root>/val/<class>/")
    by_case: dict[str, str] = {}
    for name in classes:
        if (other := by_case.setdefault(name.casefold(), name)) != name:
            problem = f"the class folders {other} and {name} of {folder} differ by capitals only"
            raise DataError(key, root, problem, "merge them, or give them different names")
    return classes


def subfolders(folder: Path, root: Path, key: str = "data.root") -> dict[str, Path]:
    """Return the folders in `folder` by name in Unicode normal form C, sorted, without hidden ones; links are followed."""
    folders: dict[str, Path] = {}
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise DataError(key, root, f"cannot be read ({error})", "check the folder's permissions") from error
    for name in names:
        if is_hidden(name):
            continue
        normalized_name = unicodedata.normalize("NFC", name)
        if normalized_name in folders:
            problem = f"two folders of {folder} are named {normalized_name} in different Unicode forms"
            raise DataError(key, root, problem, "merge them")
        folders[normalized_name] = folder / name
    return dict(sorted(folders.items()))


def image_files(classes: Mapping[str, Path], folder: Path, root: Path, key: str = "data.root") -> dict[str, list[str]]:
    """Return the image files of each class, also those in folders below it, in alphabetic order.

    Files that are not read are counted by extension in one notice.

    Raises:
        DataError: A folder that cannot be read.
    """
    files: dict[str, list[str]] = {}
    skipped: Counter[str] = Counter()
    for name, place in classes.items():
        files[name] = []
        for path in _files(place, root, key):
            if os.path.basename(path).startswith("._"):  # of macOS: attributes, no image
                skipped["._*"] += 1
            elif is_image(path):
                files[name].append(path)
            else:
                skipped[os.path.splitext(path)[1].lower() or "no extension"] += 1
    if skipped:
        kinds = ", ".join(f"{n} {kind}" for kind, n in skipped.most_common(8))
        read = " ".join(EXTENSIONS)
        report_once(f"{folder}: {skipped.total()} files are not read as images: {kinds} (read are {read})")
    return files


def is_hidden(name: str) -> bool:
    """Tell whether a folder is hidden or left behind by a program (.ipynb_checkpoints, .git, __MACOSX)."""
    return name.startswith(".") or name.casefold() in _BY_PROGRAMS


def is_image(name: str) -> bool:
    """Tell whether a file's extension is one of the image formats that are read."""
    return name.lower().endswith(EXTENSIONS)


def listed(names: Iterable[str], limit: int = 5) -> str:
    """Return the first names and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _files(folder: Path, root: Path, key: str) -> list[str]:
    """Return every file below a class folder, links followed, each real folder once along a path."""

    def refuse(error: OSError) -> None:
        raise DataError(key, root, f"cannot be read ({error})", "check the folder's permissions") from error

    visited: set[str] = set()
    paths_by_folder = []
    for current, child_folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real_path = os.path.realpath(current)
        if real_path in visited:  # a link back to a folder above
            child_folders.clear()
            continue
        visited.add(real_path)
        child_folders[:] = [name for name in child_folders if not is_hidden(name)]
        paths_by_folder.append((current, sorted(os.path.join(current, name) for name in names)))
    return [path for _, paths in sorted(paths_by_folder) for path in paths]


def _holds_only_files(folder: Path) -> bool:
    entries = list(os.scandir(folder))
    return any(is_image(entry.name) for entry in entries) and not any(entry.is_dir() for entry in entries)
