"""`hf`: image classification data sets in the format of Hugging Face `datasets`, from the Hub, a folder or a parquet file.

A data set has one column of images (feature `Image`) and one of classes (feature `ClassLabel`). Its own splits can be measured by
their names (`probe.split=validation`). The splits that a training needs are, as in `vitscope.data.sources.folder`:

- `train`: the split of that name, or the only one, where its name is none of these.
- `val`: `val`, `valid`, `validation` or `dev`; where there is none, a part of `train`, held out class by class.
- `test`: `test`, `testing` or `eval`; where there is none, the validation split, otherwise a part of `train`.

Images are decoded by `vitscope.data.sources.image_decoding`, as those of files are: orientation, transparency and samples of more
than 8 bits follow the same rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from vitscope.data.augment.augment import Recipe
from vitscope.data.sources.class_folders import SPLIT_NAMES, listed
from vitscope.data.sources.file_images import FileImages
from vitscope.data.sources.image_decoding import read_image
from vitscope.data.sources.notices import report_once
from vitscope.data.splits import hold_out, refuse_empty_validation
from vitscope.runtime.errors import ConfigError, DataError, first_line, nearest
from vitscope.runtime.value_ranges import Seed, ShareBelowOne


@dataclass(frozen=True)
class TableImages(FileImages):
    """A split in a table.

    Attributes:
        paths: Name of each image, for errors.
        labels: Class of each image, int64 `(N,)`.
        class_names: Name of each class.
        table: A `datasets.Dataset` whose images are not decoded.
        column: The table's column of images.
        rows: Row of each image, `(N,)`.
    """

    table: Any = None
    column: str = "image"
    rows: np.ndarray = field(default_factory=lambda: np.arange(0))

    def select(self, indices: ArrayLike) -> TableImages:
        """Return the images at `indices`, in that order."""
        places = np.asarray(indices)
        paths = tuple(self.paths[place] for place in places)
        return replace(self, paths=paths, labels=self.labels[torch.from_numpy(places)], rows=self.rows[places])

    def image(self, index: int, recipe: Recipe) -> Any:
        """Return the image at an index in mode RGB."""
        stored = self.table[int(self.rows[index])][self.column]
        path, content = stored.get("path"), stored.get("bytes")
        if content is None and not path:
            raise DataError("data.name", None, f"{self.paths[index]} holds no image", "remove the row")
        return read_image(
            path if content is None else self.paths[index],
            background=recipe.background,
            pixel_range=recipe.pixel_range,
            key="data.name",
            content=content,
        )


def load(
    split: str,
    *,
    root: str | Path | None = None,
    split_seed: Seed = 0,
    name: str,
    subset: str | None = None,
    version: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    val_share: ShareBelowOne = 0.1,
    test_share: ShareBelowOne = 0.2,
) -> TableImages:
    """Return a split of a data set.

    Args:
        split: `train`, `val` or `test` (see this module), or a split of the data set by its own name.
        root: Folder of the cache of `datasets`; None for its own default.
        split_seed: Chooses held-out images.
        name: Id on the Hub (`owner/name`), a local folder, or a parquet file.
        subset: Configuration of the data set, where it has several.
        version: Commit, tag or branch on the Hub.
        image_column: Column of images; None for the only one with the feature `Image`.
        label_column: Column of classes; None for the only one with the feature `ClassLabel`.
        val_share: Share of each training class that is held out for validation, where there is no such split.
        test_share: Share of each class that is held out for testing, where there is neither a test nor a validation split.

    Raises:
        ConfigError: `datasets` is not installed, or a column that there is not.
        DataError: A data set or split that cannot be read, or images without a label.
    """
    tables = _tables(str(name), subset, version, None if root is None else str(root))
    named = {
        key: next((split_name for split_name in names if split_name in tables), None)
        for key, names in SPLIT_NAMES.items()
    }
    if len(tables) == 1 and not any(named.values()):
        named["train"] = next(iter(tables))
    if split not in SPLIT_NAMES or (named[split] is None and split in tables):
        if split not in tables:
            raise DataError("probe.split", split, f"{name} has no such split", nearest(split, (*SPLIT_NAMES, *tables)))
        return _images(tables[split], split, name, image_column, label_column)
    source = named[split]
    if source is None and split == "test" and named["val"] is not None:
        source = named["val"]
        report_once(
            f"data.name={name}: no test split: the test split is {source}, which the val split is too; metrics of a "
            "checkpoint that was chosen on it are optimistic"
        )
    if source is not None and source != named["train"]:
        return _images(tables[source], source, name, image_column, label_column)
    if named["train"] is None:
        raise DataError("data.name", name, f"there is no train split, which {split} needs", f"it has {listed(tables)}")
    if source is None:
        report_once(f"data.name={name}: no {split} split: it is held out of {named['train']}")
    images = _images(tables[named["train"]], named["train"], name, image_column, label_column)
    if named["val"] is not None:
        val_share = 0.0
    if named["val"] is not None or named["test"] is not None:
        test_share = 0.0
    return _held_out(images, split, test_share, val_share, split_seed)


def class_names(
    name: str,
    root: str | Path | None = None,
    subset: str | None = None,
    version: str | None = None,
    label_column: str | None = None,
) -> tuple[str, ...]:
    """Return the names of the classes, in the order of their labels.

    Args:
        name: That of `load`.
        root: That of `load`.
        subset: That of `load`.
        version: That of `load`.
        label_column: That of `load`.

    Raises:
        ConfigError: `datasets` is not installed, or there is no column of classes.
        DataError: The data set cannot be read.
    """
    tables = _tables(str(name), subset, version, None if root is None else str(root))
    table = next(iter(tables.values()))
    return tuple(table.features[_column(table, label_column, "ClassLabel", "label_column", name)].names)


def _held_out(images: TableImages, split: str, test_share: float, val_share: float, seed: int) -> TableImages:
    refuse_empty_validation(split, val_share)
    labels = images.labels.numpy()
    rest, test = np.arange(len(labels)), np.arange(0)
    if test_share:
        rest, test = hold_out(labels, test_share, seed=0)  # the same test images for every seed
    train, val = rest, np.arange(0)
    if val_share:
        train_places, val_places = hold_out(labels[rest], val_share, seed=seed)
        train, val = rest[train_places], rest[val_places]
    return images.select({"train": train, "val": val, "test": test}[split])


def _images(table: Any, split: str, path: str, image_column: str | None, label_column: str | None) -> TableImages:
    column = _column(table, image_column, "Image", "image_column", path)
    label = _column(table, label_column, "ClassLabel", "label_column", path)
    labels = np.asarray(table.with_format("numpy", columns=[label])[label][:], dtype=np.int64)
    if len(labels) and labels.min() < 0:
        n = int((labels < 0).sum())
        problem = f"{n} of {len(labels)} images of its split {split} have no label (-1)"
        raise DataError("data.name", path, problem, "choose another split: probe.split=")
    import datasets  # pyright: ignore[reportMissingImports]  an optional dependency

    undecoded = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    names = tuple(f"{path} {split} row {row}" for row in range(len(table)))
    return TableImages(
        names, torch.from_numpy(labels), tuple(table.features[label].names), undecoded, column, np.arange(len(table))
    )


def _column(table: Any, stated: str | None, feature: str, key: str, path: str) -> str:
    """Return the column with a feature: the stated one, else the only one.

    Raises:
        ConfigError: It has another feature, or there is none or more than one.
    """
    columns = {name: type(kind).__name__ for name, kind in table.features.items()}
    if stated is not None:
        if columns.get(stated) == feature:
            return stated
        reason = f"{path} has no column of that name" if stated not in columns else f"it holds {columns[stated]} values"
        raise ConfigError(f"data.source.{key}", stated, f"{reason}, not {feature}", f"its columns: {_shown(columns)}")
    matching_names = [name for name, kind in columns.items() if kind == feature]
    if len(matching_names) != 1:
        count, fix = "no column", "cast it with datasets (cast_column) and save it again"
        if matching_names:
            count, fix = f"{len(matching_names)} columns", f"name one: data.source.{key}="
        raise ConfigError(f"data.source.{key}", None, f"{path} has {count} of {feature} ({_shown(columns)})", fix)
    return matching_names[0]


def _shown(columns: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {kind}" for name, kind in columns.items())


@lru_cache(maxsize=4)
def _tables(path: str, subset: str | None, revision: str | None, cache: str | None) -> dict[str, Any]:
    """Return the splits of a data set by their own names."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]  an optional dependency
    except ImportError:
        fix = "pip install 'vitscope[hf]'"
        raise ConfigError("data", "hf", "needs the package datasets, which is not installed", fix) from None
    options: dict[str, Any] = {"cache_dir": cache}
    try:
        if Path(path).is_file():
            tables = datasets.load_dataset("parquet", data_files={"train": path}, **options)
        else:
            tables = datasets.load_dataset(path, subset, revision=revision, **options)
    except Exception as error:  # of the Hub, of files, of the cache
        fix = "name an id on the Hub, a folder or a parquet file; without a network what the cache holds"
        raise DataError("data.name", path, f"cannot be read ({first_line(error)})", fix) from error
    return dict(tables)
