from __future__ import annotations

import pytest
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo

from tests.fixtures.images.image_folders import module
from vitscope.data.sources import folder
from vitscope.runtime.errors import ConfigError, DataError


def names(images):
    return {path.rsplit("/", 3)[-3] + path.rsplit("/", 1)[-1] for path in images.paths}


def test_three_folders_are_the_splits(tmp_path, write_folder):
    write_folder(tmp_path, ("train", "val", "test"))
    for split in ("train", "val", "test"):
        images = folder.load(split, root=tmp_path)
        assert len(images) == 12
        assert all(name.startswith(split) for name in names(images))
        assert images.class_names == ("cat", "dog")


@pytest.mark.usefixtures("command_messages")
def test_val_is_the_validation_and_without_a_test_folder_the_test_split(tmp_path, write_folder, capsys):
    write_folder(tmp_path, ("train", "val"), per_class=10)
    train, val, test = (folder.load(split, root=tmp_path) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (20, 20, 20)
    assert all("/train/" in path for path in train.paths)
    assert val.paths == test.paths
    assert all("/val/" in path for path in val.paths)
    folder.load("test", root=tmp_path)
    assert capsys.readouterr().err.count("no test folder: the test split is the images of val/") == 1


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("Train", "Validation", "TEST"), ("training", "valid", "testing"), ("TRAIN", "dev", "eval")],
)
def test_split_folders_are_known_by_their_usual_names(tmp_path, write_folder, train, val, test):
    write_folder(tmp_path, (train, val, test))
    for split, name in (("train", train), ("val", val), ("test", test)):
        images = folder.load(split, root=tmp_path)
        assert len(images) == 12
        assert all(f"/{name}/" in path for path in images.paths)


def test_two_folders_for_one_split_are_refused(tmp_path, write_folder):
    write_folder(tmp_path, ("train", "val", "validation"))
    with pytest.raises(DataError, match="val and validation are both a val folder; rename or merge them"):
        folder.load("train", root=tmp_path)


@pytest.mark.usefixtures("command_messages")
def test_a_class_named_as_a_split(tmp_path, write_folder, capsys):
    write_folder(tmp_path, (".",), classes=("bus", "car", "train"))
    assert folder.load("train", root=tmp_path).class_names == ("bus", "car", "train")
    assert folder.load("test", root=tmp_path).class_names == ("bus", "car", "train")
    assert "the test split is held out of its classes" in capsys.readouterr().err


@pytest.mark.usefixtures("command_messages")
def test_folders_beside_the_splits_are_said(tmp_path, write_folder, capsys):
    write_folder(tmp_path, ("train", "extra"))
    folder.load("train", root=tmp_path)
    assert "read as the splits train; folders beside them are not read: extra" in capsys.readouterr().err


@pytest.mark.usefixtures("command_messages")
def test_classes_are_numbered_by_name_from_train(tmp_path, write_folder, capsys):
    write_folder(tmp_path, ("train",), classes=("ant", "bee", "cat", "dog"))
    write_folder(tmp_path, ("val",), classes=("bee", "dog"))
    val = folder.load("val", root=tmp_path)
    assert val.class_names == ("ant", "bee", "cat", "dog")
    assert {path.split("/")[-2]: label for path, label in zip(val.paths, val.labels.tolist())} == {"bee": 1, "dog": 3}
    assert "no image of 2 of the classes in" in capsys.readouterr().err
    data = module(tmp_path, num_classes=4)
    assert data.present_classes("val") == (1, 3)


@pytest.mark.parametrize(
    ("extra", "advice"),
    [("Dog", "rename it to dog"), ("dogs", r"did you mean dog\?"), ("zebra", "rename or remove it")],
)
def test_a_class_that_train_lacks_is_refused(tmp_path, write_folder, extra, advice):
    write_folder(tmp_path, ("train",))
    write_folder(tmp_path, ("val",), classes=("cat", extra))
    with pytest.raises(DataError, match=f"val/ has the class '{extra}', but .* are cat, dog; .*{advice}"):
        folder.load("val", root=tmp_path)


def test_a_list_of_classes_numbers_what_is_there(tmp_path, write_folder):
    write_folder(tmp_path, ("val",), classes=("cat", "dog"))
    images = folder.load("test", root=tmp_path, classes=["dog", "fox", "cat"])
    assert images.class_names == ("dog", "fox", "cat")
    assert images.labels.unique().tolist() == [0, 2]
    with pytest.raises(DataError, match=r"val/ has the class 'dog', but data\.source\.classes has cat, fox"):
        folder.load("test", root=tmp_path, classes=["cat", "fox"])
    with pytest.raises(ConfigError, match=r"data\.source\.classes=.*not a list of different names"):
        folder.load("test", root=tmp_path, classes=["cat", "cat"])


def test_hidden_folders_are_no_classes(tmp_path, write_folder):
    write_folder(tmp_path, ("train", ".git", "__MACOSX"))
    write_folder(tmp_path / "train", (".",), classes=(".ipynb_checkpoints", "__MACOSX", ".git"))
    assert folder.load("train", root=tmp_path).class_names == ("cat", "dog")


def test_links_nested_folders_and_accents(tmp_path, write_folder):
    write_folder(tmp_path / "store", ("x",), classes=("real",))
    write_folder(tmp_path / "data", ("train",), classes=("a/deep/er", "cafe\u0301"))
    (tmp_path / "data/train/link").symlink_to(tmp_path / "store/x/real")
    (tmp_path / "data/train/a/loop").symlink_to(tmp_path / "data/train/a")
    write_folder(tmp_path / "data", ("val",), classes=("caf\u00e9",))
    train, val = (folder.load(split, root=tmp_path / "data", val_share=0) for split in ("train", "val"))
    assert train.class_names == ("a", "caf\u00e9", "link")
    assert train.labels.bincount().tolist() == [6, 6, 6]
    assert val.labels.unique().tolist() == [1]


def test_class_folders_that_differ_by_capitals_are_refused(tmp_path, write_folder):
    write_folder(tmp_path, ("train",), classes=("Cat", "cat"))
    with pytest.raises(DataError, match="the class folders Cat and cat of .* differ by capitals only; merge them"):
        folder.load("train", root=tmp_path)


def test_a_training_class_without_images_is_refused(tmp_path, write_folder):
    write_folder(tmp_path, ("train", "val"))
    (tmp_path / "train/eel").mkdir()
    with pytest.raises(DataError, match="no image of 1 of the classes in .*train: eel; put images there"):
        folder.load("train", root=tmp_path)
    assert folder.load("val", root=tmp_path).class_names == ("cat", "dog", "eel")


def test_one_class_only(tmp_path, write_folder):
    write_folder(tmp_path, ("train", "val"), classes=("cat",))
    assert module(tmp_path, num_classes=1).split("val").labels.tolist() == [0] * 6


def test_another_number_of_classes_names_the_key(tmp_path, write_folder):
    write_folder(tmp_path, ("val",))
    with pytest.raises(ConfigError, match=r"data\.num_classes=10: folder has 2 classes \(cat, dog\); set it to 2, or "
                                          r"name all classes in data\.source\.classes"):  # fmt: skip
        module(tmp_path, num_classes=10).split("test")


@pytest.mark.parametrize("layout", ["train", "."])
def test_without_other_folders_both_are_held_out_of_the_images(tmp_path, write_folder, layout):
    write_folder(tmp_path, (layout,), per_class=10)
    splits = [folder.load(split, root=tmp_path) for split in ("train", "val", "test")]
    assert [len(images) for images in splits] == [14, 2, 4]
    assert len({path for images in splits for path in images.paths}) == 20


def test_an_evaluation_needs_no_training_images(tmp_path, write_folder):
    write_folder(tmp_path, ("val",))
    assert len(folder.load("test", root=tmp_path)) == 12
    assert len(folder.load("val", root=tmp_path)) == 12
    with pytest.raises(DataError, match="there is no train folder, which the train split needs"):
        folder.load("train", root=tmp_path)


def test_wordnet_folders_get_the_labels_of_the_1000_classes(tmp_path, write_folder):
    wnids = ImageNetInfo("imagenet-1k").label_names()
    write_folder(tmp_path, ("val",), classes=(wnids[7], wnids[990]))
    images = folder.load("test", root=tmp_path, classes="imagenet-1k")
    assert images.labels.unique().tolist() == [7, 990]
    assert len(images.class_names) == 1000
    write_folder(tmp_path, ("val",), classes=("tabby",))
    with pytest.raises(DataError, match="'tabby' is not a class of imagenet-1k"):
        folder.load("test", root=tmp_path, classes="imagenet-1k")


def test_wordnet_folders_alone_are_a_test_split_as_a_whole(tmp_path, write_folder):
    wnids = ImageNetInfo("imagenet-1k").label_names()
    write_folder(tmp_path, (".",), classes=(wnids[7], wnids[990]))
    assert len(folder.load("test", root=tmp_path, classes="imagenet-1k")) == 12
    for split in ("train", "val"):
        with pytest.raises(DataError, match=f"there is no train folder, which the {split} split needs"):
            folder.load(split, root=tmp_path, classes="imagenet-1k")


@pytest.mark.parametrize(("places", "message"), [
    (["images/train/cat", "images/val/cat"], r"the splits are in its folder images; set data\.root=.*images"),
    (["train_images/cat", "val_images/cat"], r"train_images, val_images are named like splits"),
    (["train2017/cat", "val2017/cat"], r"train2017, val2017 are named like splits"),
    (["test set/cat", "train set/cat"], r"test set, train set are named like splits"),
    (["cat/train", "cat/val", "dog/train", "dog/val"], r"cat/ holds folders named like splits \(train, val\), .* mixed"),
])  # fmt: skip
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_layouts_that_are_no_classes_are_refused(tmp_path, split, places, message):
    """Images of one split would be mixed with those of another, and the splits would be the classes."""
    for place in places:
        (tmp_path / place).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (4, 4)).save(tmp_path / place / f"{index}.png")
    with pytest.raises(DataError, match=message):
        folder.load(split, root=tmp_path)


@pytest.mark.parametrize("below", ["", "cat"])
def test_a_split_that_is_a_link_to_another_is_refused(tmp_path, write_folder, below):
    write_folder(tmp_path, ("train",))
    (tmp_path / "val").symlink_to(tmp_path / "train" / below)
    with pytest.raises(DataError, match=r"the \w+ folder is a link to the \w+ folder or into it"):
        folder.load("val", root=tmp_path)


def test_a_class_named_like_a_split_beside_others_is_a_class(tmp_path, write_folder):
    for name in ("training shoes", "dog"):
        (tmp_path / name).mkdir()
        for index in range(10):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{index}.png")
    assert folder.load("train", root=tmp_path).class_names == ("dog", "training shoes")
