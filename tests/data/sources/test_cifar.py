from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from vitscope.data.sources import cifar
from vitscope.runtime.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """The published addresses lead nowhere, quickly, also on a machine with a network."""
    for published in (CIFAR10, CIFAR100):
        monkeypatch.setattr(published, "url", "http://127.0.0.1:9/nothing.tar.gz")


@pytest.mark.parametrize(("variant", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_validation_is_a_stratified_part_of_train_and_never_the_test_set(tmp_path, write_cifar, variant, classes):
    sums = write_cifar(tmp_path, variant)
    train, val, test = (
        cifar.load(split, root=tmp_path, variant=variant, checksums=sums) for split in ("train", "val", "test")
    )
    assert (len(train), len(val), len(test)) == (9 * classes, classes, 2 * classes)
    assert torch.equal(val.labels.bincount(), torch.ones(classes, dtype=torch.int64))
    assert train.class_names[3] == "class 3"
    rows = [{image.numpy().tobytes() for image in split.images} for split in (train, val, test)]
    assert not rows[0] & rows[1]
    assert not (rows[0] | rows[1]) & rows[2]
    other = cifar.load("val", root=tmp_path, variant=variant, checksums=sums, split_seed=1)
    assert {image.numpy().tobytes() for image in other.images} != rows[1]
    assert {image.numpy().tobytes() for image in other.images} < rows[0] | rows[1]


def test_pixels_and_labels_are_those_of_the_file(tmp_path, write_cifar):
    import pickle

    sums = write_cifar(tmp_path)
    test = cifar.load("test", root=tmp_path, checksums=sums)
    content = pickle.loads((tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes())
    # CIFAR stores 1024 red, 1024 green, 1024 blue bytes an image, row by row
    np.testing.assert_array_equal(test.images.numpy(), content["data"].reshape(-1, 3, 32, 32))
    assert test.labels.tolist() == content["labels"]


def test_an_archive_is_unpacked_without_a_network(tmp_path, write_cifar):
    sums = write_cifar(tmp_path, archive=True)
    assert len(cifar.load("train", root=tmp_path, checksums=sums)) == 90
    assert (tmp_path / "cifar-10-batches-py").is_dir()


def test_missing_files_without_a_network_are_one_line(tmp_path):
    with pytest.raises(DataError) as caught:
        cifar.load("train", root=tmp_path / "new", variant="cifar100")
    text = str(caught.value)
    assert text.startswith(f"data.root={tmp_path / 'new'}: no cifar-100-python.tar.gz there and no network")
    assert "put cifar-100-python.tar.gz" in text
    assert "cifar-100-python there" in text
    assert "\n" not in text


def test_files_that_are_not_the_published_ones_are_named(tmp_path, write_cifar):
    sums = write_cifar(tmp_path)
    text = r"cifar-10-batches-py there differ from the published files and no network to download it \(data_batch_1, .*batches"
    with pytest.raises(DataError, match=text) as error:
        cifar.load("test", root=tmp_path)
    named = re.search(r"set 'data\.source\.checksums=\{(.*)\}'$", str(error.value))
    assert named is not None
    assert dict(item.split(": ") for item in named[1].split(", ")) == sums
    assert len(cifar.load("test", root=tmp_path, checksums=sums)) == 20


def test_a_changed_file_is_noticed(tmp_path, write_cifar):
    sums = write_cifar(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"differ from the published files .* \(data_batch_2 of cifar-10-batches-py differ\)"
    ):
        cifar.load("test", root=tmp_path, checksums=sums)
    path.unlink()
    with pytest.raises(
        DataError, match=r"\(data_batch_2 of cifar-10-batches-py missing or not readable\); put (?!.*checksums)"
    ):
        cifar.load("test", root=tmp_path, checksums=sums)


def test_an_archive_of_other_files_is_noticed(tmp_path, write_cifar):
    sums = write_cifar(tmp_path, archive=True)
    sums["data_batch_1"] = "0" * 32
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz there does not hold the expected files"):
        cifar.load("test", root=tmp_path, checksums=sums)


def test_a_root_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match=r"data\.root=.*file: cannot be used"):
        cifar.load("train", root=tmp_path / "file")


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.source\.variant=cifar1000: unknown; choose one of cifar10, cifar100"):
        cifar.load("train", root=tmp_path, variant="cifar1000")
    with pytest.raises(ConfigError, match=r"data\.root: cifar10 needs a folder"):
        cifar.load("train", root=None)
    with pytest.raises(DataError, match="there is no split 'dev'"):
        cifar.load("dev", root=tmp_path)
    with pytest.raises(ConfigError, match=r"data\.source\.checksums=batch_9: no such file"):
        cifar.load("train", root=tmp_path, checksums={"batch_9": ""})


class Evil:
    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return os.mkdir, (self.flag,)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("archive", [False, True])
def test_checksums_of_ones_own_do_not_vouch_for_what_a_file_does(tmp_path, write_cifar, name, archive):
    """A configuration may bring its own checksums: the files are still read as arrays and lists, and nothing else."""
    sums = write_cifar(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    (folder / name).write_bytes(pickle.dumps({"data": Evil(tmp_path / "executed"), "labels": []}))
    sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    if archive:
        packed = tmp_path / "cifar-10-python.tar.gz"
        with tarfile.open(packed, "w:gz") as tar:
            tar.add(folder, folder.name)
        sums[packed.name] = hashlib.md5(packed.read_bytes()).hexdigest()
        shutil.rmtree(folder)
    for split in ("train", "test"):
        with pytest.raises(DataError, match="not a file of CIFAR's format"):
            cifar.load(split, root=tmp_path, checksums=sums)
    assert not (tmp_path / "executed").exists()


def test_an_archive_does_not_write_outside_of_its_folder(tmp_path, write_cifar):
    root = tmp_path / "root"
    sums = write_cifar(root, archive=True)
    packed = root / "cifar-10-python.tar.gz"
    (tmp_path / "x").write_text("x")
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(tmp_path / "x", "../escaped")
    sums[packed.name] = hashlib.md5(packed.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=r"cannot be used"):
        cifar.load("train", root=root, checksums=sums)
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("variant", ["cifar10", "cifar100"])
def test_pickles_whose_keys_are_bytes_are_one_line(tmp_path, write_cifar, variant):
    write_cifar(tmp_path, variant)
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    sums = {}
    for path in folder.iterdir():
        content = {key.encode(): value for key, value in pickle.loads(path.read_bytes()).items()}
        path.write_bytes(pickle.dumps(content))
        sums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=r"data\.root=.*not of CIFAR's format \(no key '\w+'.*decode the keys") as error:
        cifar.load("train", root=tmp_path, variant=variant, checksums=sums)
    assert error.value.exit_code == 3


def test_a_share_of_zero_holds_no_image_out(tmp_path, write_cifar):
    """It once held one image of each class out, and trained on the rest."""
    options = {"root": tmp_path, "checksums": write_cifar(tmp_path)}
    sizes = [len(cifar.load(split, val_share=0.1, **options)) for split in ("train", "val")]
    assert sizes == [90, 10]
    assert len(cifar.load("train", val_share=0.0, **options)) == 100
    with pytest.raises(ConfigError) as caught:
        cifar.load("val", val_share=0.0, **options)
    assert str(caught.value) == (
        "data.source.val_share=0.0: no image is held out for validation, which a training and val/ metrics need; "
        "set 0.1; with 0, analyze.py measures train and test images"
    )
