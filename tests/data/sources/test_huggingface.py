"""Data sets of Hugging Face: a local parquet file and folder with an Image and a ClassLabel column."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitscope.config import cross_checks
from vitscope.data import DataModule
from vitscope.data.sources import folder, huggingface
from vitscope.runtime.errors import ConfigError, DataError

NAMES = ("ant", "bee", "cat")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return the module ``datasets`` with a cache of this test."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    huggingface._tables.cache_clear()
    return datasets


def pictures(n: int, seed: int = 0) -> list[Image.Image]:
    """Return images of different sizes; the first one is gray, the second transparent."""
    rng = np.random.default_rng(seed)
    made = [Image.fromarray(rng.integers(0, 256, (20 + i % 3, 24, 3), dtype=np.uint8)) for i in range(n)]
    return [made[0].convert("L"), made[1].convert("RGBA"), *made[2:]]


def bytes_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def table(datasets: Any, images: list[Image.Image], labels: list[int], **columns: str) -> Any:
    image, label = columns.get("image", "image"), columns.get("label", "label")
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=list(NAMES))})
    content = [{"bytes": bytes_of(picture), "path": None} for picture in images]
    return datasets.Dataset.from_dict({image: content, label: labels}, features=features)


def module_of(path: Path, tmp_path: Path, **source: Any) -> DataModule:
    def load(split: str, **options: Any) -> Any:
        return huggingface.load(split, name=str(path), **{**options, **source})

    return DataModule(load, name=str(path), num_classes=3, image_size=16, batch_size=4, root=str(tmp_path / "cache"))


def test_a_parquet_file_gives_the_pixels_of_a_folder_of_the_same_images(library: Any, tmp_path: Path) -> None:
    images = pictures(30)
    labels = [i % 3 for i in range(30)]
    table(library, images, labels).to_parquet(tmp_path / "set.parquet")
    for i, (image, label) in enumerate(zip(images, labels)):
        path = tmp_path / "folder" / NAMES[label] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes_of(image))
    data = module_of(tmp_path / "set.parquet", tmp_path)
    files = DataModule(
        folder.load, name="folder", num_classes=3, image_size=16, batch_size=4, root=str(tmp_path / "folder")
    )
    for split in ("train", "val", "test"):
        ours = data.probe_batches(split, batch_size=100)[0]
        theirs = files.probe_batches(split, batch_size=100)[0]
        assert data.split(split).class_names == NAMES
        by_label = [
            sorted((int(y), x.numpy().tobytes()) for x, y in zip(*batch, strict=True)) for batch in (ours, theirs)
        ]
        assert len(ours[0]) == len(theirs[0])
        if split == "train":  # the held-out images depend on the order, which is by class in a folder
            assert len(by_label[0]) == len(data.split("train"))
    everything = [
        sorted(
            x.numpy().tobytes()
            for split in ("train", "val", "test")
            for x in each.probe_batches(split, batch_size=100)[0][0]
        )
        for each in (data, files)
    ]
    assert everything[0] == everything[1]  # each image once over the splits, bit for bit


def test_splits_of_their_own_are_taken_and_measured_by_name(library: Any, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for number, (name, n) in enumerate({"train": 12, "validation": 6}.items()):
        table(library, pictures(n, number), [i % 3 for i in range(n)]).to_parquet(tmp_path / "set" / f"{name}.parquet")
    data = module_of(tmp_path / "set", tmp_path)
    assert [len(data.split(s)) for s in ("train", "val", "test", "validation")] == [12, 6, 6, 6]
    assert torch.equal(data.probe_batches("val")[0][0], data.probe_batches("validation")[0][0])
    with pytest.raises(DataError, match="probe.split=validatoin: .* has no such split; did you mean validation"):
        data.split("validatoin")


def test_the_only_split_is_what_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """ImageNet-R has a test split alone, which was taken for the training images and left no test image."""
    monkeypatch.setattr(huggingface, "_images", lambda table, *_: table)
    for own_name, same_images in (("test", ["test"]), ("validation", ["val", "test"])):
        monkeypatch.setattr(huggingface, "_tables", lambda *_, own_name=own_name: {own_name: "its images"})
        for split in ("train", "val", "test"):
            if split in same_images:
                assert huggingface.load(split, name="owner/set") == "its images"
                continue
            with pytest.raises(DataError, match=f"there is no train split, which {split} needs; it has {own_name}"):
                huggingface.load(split, name="owner/set")


def test_columns_are_found_by_their_feature_or_named(library: Any, tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    table(library, pictures(6), [0, 1, 2] * 2, image="img", label="fine").to_parquet(path)
    assert len(module_of(path, tmp_path).split("train")) + len(module_of(path, tmp_path).split("test")) < 7
    assert huggingface.class_names(str(path)) == NAMES
    with pytest.raises(
        ConfigError, match=r"data.source.image_column=fine: it holds ClassLabel values, not Image; its columns"
    ):
        module_of(path, tmp_path, image_column="fine").split("train")
    with pytest.raises(ConfigError, match=r"data.source.label_column=x: .* no column of that name"):
        module_of(path, tmp_path, label_column="x").split("train")
    library.Dataset.from_dict({"img": [1], "n": [2]}).to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(
        ConfigError, match=r"data.source.image_column: .* has no column of Image \(img: Value, n: Value\)"
    ):
        module_of(tmp_path / "numbers.parquet", tmp_path).split("train")


def test_images_without_a_label_and_files_that_are_none(library: Any, tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    table(library, pictures(3), [0, -1, 1]).to_parquet(path)
    with pytest.raises(DataError, match="1 of 3 images of its split train have no label"):
        module_of(path, tmp_path).split("train")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="data.name=.*bad.parquet: cannot be read"):
        module_of(tmp_path / "bad.parquet", tmp_path).split("train")


def test_the_number_of_classes_is_that_of_the_column(library: Any, tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    path = tmp_path / "set.parquet"
    table(library, pictures(6), [0, 1, 2] * 2).to_parquet(path)
    source = {"_target_": "vitscope.data.sources.huggingface.load", "name": str(path)}
    cfg = OmegaConf.create({"data": {"name": str(path), "num_classes": None, "source": source}, "model": {}})
    cross_checks.settle_class_counts(cfg)
    assert cfg.data.num_classes == 3


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    huggingface._tables.cache_clear()
    with pytest.raises(ConfigError, match=r"data=hf: needs the package datasets.*pip install 'vitscope\[hf\]'"):
        huggingface.load("train", name="mnist")
