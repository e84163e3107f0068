"""Checks of a split that was read: it has images, the configured number of classes, and labels in their range."""

from __future__ import annotations

from vitscope.data.sources.array_images import ArrayImages
from vitscope.data.sources.class_folders import listed
from vitscope.data.sources.file_images import FileImages
from vitscope.runtime.errors import ConfigError, DataError


def check_split(
    images: ArrayImages | FileImages, split: str, *, name: str | None, root: str | None, num_classes: int
) -> None:
    """Check that a split can be trained and evaluated on.

    Args:
        images: The split's images and labels.
        split: The split's name.
        name: Name of the data set, for errors.
        root: Folder of the data set, for errors.
        num_classes: Configured number of classes.

    Raises:
        ConfigError: The data set has another number of classes.
        DataError: The split is empty, or has a label outside of 0 to num_classes - 1.
    """
    if len(images) == 0:
        raise DataError("data.root", root, f"the {split} split of {name} is empty", "put images there")
    if len(images.class_names) != num_classes:
        names = images.class_names
        problem, fix = f"{name} has {len(names)} classes", f"set it to {len(names)}"
        if isinstance(images, FileImages):
            problem += f" ({listed(names)})"
            fix += ", or name all classes in data.source.classes=[...] if some have no folder here"
        raise ConfigError("data.num_classes", num_classes, problem, fix)
    low, high = int(images.labels.min()), int(images.labels.max())
    if low < 0 or high >= num_classes:
        problem = f"the {split} split of {name} has labels from {low} to {high}"
        raise DataError("data.num_classes", num_classes, problem, "labels are 0 to num_classes - 1")
