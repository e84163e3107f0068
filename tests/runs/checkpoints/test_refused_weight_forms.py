"""Contents and files that hold no weights for the model, each refused in one line that says why."""

from __future__ import annotations

import functools
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import tv_tensors

from tests.fixtures.runs.weight_files import OTHER, WEIGHTS, S, loaded_outputs, network, prefixed
from vitscope import models
from vitscope.runs.checkpoints import checkpoint_io, checkpoint_weights
from vitscope.runtime.errors import CheckpointError


def with_entry(name: str, value: Any) -> dict[str, Any]:
    return {**S, name: value}


class OwnNetwork(nn.Linear):
    """A module of the user's."""


FIRST = re.escape(next(iter(S)))
#: contents that are refused, and the reason
REFUSED: dict[str, tuple[Any, str]] = {
    "arrays of NumPy": (
        {name: value.numpy() for name, value in S.items()},
        rf"{FIRST} is no tensor, but an array or a list \(and \d+ more\); save tensors",
    ),
    "tensors without values": (
        {"state_dict": {name: value.to("meta") for name, value in S.items()}},
        rf"{FIRST} is a tensor of the meta device, without values \(and \d+ more\)",
    ),
    "weights that are not finite": (
        {name: value * float("nan") if value.is_floating_point() else value for name, value in S.items()},
        rf"{FIRST} holds values that are not finite: training has diverged \(and \d+ more\); use an earlier checkpoint",
    ),
    "one weight that is infinite": (
        with_entry("5.bias", torch.full_like(S["5.bias"], float("-inf"))),
        "5.bias holds values that are not finite: training has diverged; use an earlier checkpoint",
    ),
    "one key missing under the prefixes of wrappers": (
        {"state_dict": prefixed("module._orig_mod.", {k: v for k, v in S.items() if k != "5.bias"})},
        "ckpt_path=[^:]*: 5.bias: the checkpoint lacks it; use the model it was made with",
    ),
    "a pickled network": (
        WEIGHTS,
        r"holds a pickled module \(torch\.nn\.\S+\), .*; save model\.state_dict\(\) instead",
    ),
    "a pickled module of the user's": (
        {"model": OwnNetwork(1, 1), "epoch": 1},
        r"holds a pickled module \(\S+OwnNetwork\).*save model.state_dict",
    ),
    "a tensor": (torch.ones(2), "holds a Tensor"),
    "a list": ([S], "holds a list"),
    "an empty dict": ({}, r"the checkpoint lacks it \(8 such: 0\.bias, 0\.weight, 1\.bias\)"),
    "one key missing": (
        {k: v for k, v in S.items() if k != "5.bias"},
        "5.bias: the checkpoint lacks it; use the model it was made with",
    ),
    "one key more": (with_entry("9.weight", torch.ones(1)), "9.weight: the model has no such weight; use the model"),
    "both": (
        {"state_dict": prefixed("x_", S)},
        r"0\.bias: the checkpoint lacks it \(8 such: 0\.bias, .*\), x_0\.bias: the model has no such weight \(9 such",
    ),
    "a key more under the prefix": (
        {"state_dict": {**prefixed("net.", S), "net.9.weight": torch.ones(1)}},
        r"net\.0\.bias: the model has no such weight",
    ),
    "another head": (
        network(1, 37).state_dict(),
        r"5\.weight has shape \(37, 4\) in the checkpoint, the model needs \(5, 4\); 5\.bias has shape \(37,\) .*: "
        r"it was made for 37 classes, the model is for 5; use the model it was made with \(data\.num_classes",
    ),
    "another width": (
        with_entry("0.weight", torch.ones(8, 3, 3, 3)),
        r"0\.weight has shape \(8, 3, 3, 3\) .*needs \(4, 3, 3, 3\)",
    ),
    "two networks": ({"student": S, "teacher": OTHER.state_dict()}, "student and teacher fit the model equally well"),
    "two prefixes": (
        {"state_dict": {**prefixed("a.", S), **prefixed("b.", OTHER.state_dict())}},
        r"under a\.\* and state_dict under b\.\* fit",
    ),
    "a tensor subclass": (
        with_entry("0.weight", tv_tensors.Image(torch.ones(3, 3, 3))),
        r"not a safe checkpoint \(it names torchvision\.",
    ),
    "an array of objects": (
        {"state_dict": S, "best": np.array([1, "a"], dtype=object)},
        r"not a safe checkpoint \(a NumPy value of type 'O8', which is no number\)",
    ),
    "a record that holds an address": (
        {"state_dict": S, "best": np.zeros(1, [("a", "O")])[0]},
        r"not a safe checkpoint \(a NumPy value of type 'V8', which is no number\)",
    ),
    "a function": (
        {"state_dict": S, "best": functools.partial(int, base=2)},
        r"not a safe checkpoint \(it names functools\.partial, which could execute",
    ),
    "complex": (
        with_entry("5.bias", torch.ones(5, dtype=torch.complex64)),
        r"5\.bias is of torch\.complex64, the model's is of torch\.float32",
    ),
    "quantized": (
        with_entry("5.bias", torch.ones(5, dtype=torch.int8)),
        r"5\.bias is of torch\.int8, the model's is of torch\.float32",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_a_form_is_refused_in_one_line(form: str, tmp_path: Path) -> None:
    content, reason = REFUSED[form]
    path = tmp_path / "net.pth"
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(content, path, **options)
        with pytest.raises(CheckpointError, match=reason) as refusal:
            loaded_outputs(path)
        assert "\n" not in str(refusal.value)
        assert str(refusal.value).startswith(f"ckpt_path={path}: ")
        assert refusal.value.exit_code == 4


def encrypted(path: Path) -> None:
    """Write a state dict whose archive says of every member that it is encrypted."""
    torch.save(S, path)
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(mark)
        while at >= 0:
            content[at + offset] |= 1
            at = content.find(mark, at + 4)
    path.write_bytes(content)


def of_other_archives(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no weights")


def in_a_tar(path: Path) -> None:
    torch.save(S, path.parent / "inner.pth")
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent / "inner.pth", "inner.pth")


def scripted(path: Path) -> None:
    with pytest.warns((FutureWarning, DeprecationWarning)):
        torch.jit.script(nn.Linear(2, 2)).save(path)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda path: None, "no such file"),
    "a folder": (lambda path: path.mkdir(), "a folder, not a file"),
    "zero bytes": (lambda path: path.touch(), "the file is empty"),
    "one byte": (lambda path: path.write_bytes(b"\x80"), "not a safe checkpoint"),
    "text": (lambda path: path.write_text("weights"), "not a safe checkpoint"),
    "a page": (lambda path: path.write_text("\n<!DOCTYPE html><html>"), "a page of HTML"),
    "a pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "git lfs pull",
    ),
    "another archive": (of_other_archives, "not a safe checkpoint"),
    "a tar archive": (in_a_tar, "not a safe checkpoint"),
    "encrypted": (encrypted, "an encrypted archive"),
    "TorchScript": (scripted, r"a TorchScript program.*save model\.state_dict\(\) instead"),
    "a cut safetensors header": (
        lambda path: path.write_bytes((20).to_bytes(8, "little") + b"{" + b" " * 30),
        "not a safe checkpoint",
    ),
    "a pickled module alone": (
        lambda path: path.write_bytes(pickle.dumps(WEIGHTS)),
        "not a safe checkpoint|holds a pickled module",
    ),
}


@pytest.mark.parametrize("form", FILES)
def test_a_file_is_refused_in_one_line(form: str, tmp_path: Path) -> None:
    write, reason = FILES[form]
    path = tmp_path / "net.pth"
    write(path)
    with pytest.raises(CheckpointError, match=reason) as refusal:
        checkpoint_io.read(path)
    assert "\n" not in str(refusal.value)


def test_a_link_to_nothing_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "net.pth").symlink_to(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint_io.read(tmp_path / "net.pth")


def test_weights_for_images_of_another_size_name_the_size() -> None:
    made, other = (models.vit(size="tiny", depth=1, patch_size=4, image_size=size, num_classes=3) for size in (16, 24))
    with pytest.raises(
        CheckpointError,
        match=r"pos_embed has shape \(1, 17, 192\) in the checkpoint, the model needs \(1, 37, 192\): it was made for another "
        r"number of positions; use the image size and the patch size it was made with \(data\.image_size, ",
    ):
        checkpoint_weights.load_weights(other, made.state_dict(), Path("vit.pth"))
    narrow = models.vit(size="small", depth=1, patch_size=4, image_size=24, num_classes=3)
    with pytest.raises(CheckpointError, match="use the model it was made with"):
        checkpoint_weights.load_weights(narrow, made.state_dict(), Path("vit.pth"))
