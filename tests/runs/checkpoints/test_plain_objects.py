"""Plain objects beside the weights of a checkpoint: NumPy's numbers, OmegaConf's nodes, paths and options are no obstacle."""

from __future__ import annotations

import argparse
import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from tests.fixtures.runs.weight_files import S, loaded_outputs, prefixed
from vitscope.runs.checkpoints import checkpoint_io
from vitscope.runs.checkpoints.plain_objects import NumberType, PlainObject, plain_number

NUMBERS = [
    np.float64(0.1), np.float32(0.25), np.float16(-2.0), np.int64(-3), np.uint8(200), np.bool_(True), np.str_("abc"),
    np.bytes_(b"abc"), np.complex64(1 + 2j), np.array(7, dtype=">i4")[()],
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: f"{number.dtype} {number}")
@pytest.mark.parametrize("is_archive", [True, False])
def test_numbers_become_numbers_of_python(number: Any, is_archive: bool, tmp_path: Path) -> None:
    content = {"state_dict": S, "metric": number}
    torch.save(content, tmp_path / "net.pth", _use_new_zipfile_serialization=is_archive)
    metric = checkpoint_io.read(tmp_path / "net.pth")["metric"]
    assert type(metric) is type(number.item())
    assert metric == number.item()


def test_numbers_of_earlier_versions_of_numpy(tmp_path: Path) -> None:
    torch.save({"state_dict": S, "metric": np.float64(0.5)}, tmp_path / "net.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "net.pth").read_bytes()
    (tmp_path / "net.pth").write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert checkpoint_io.read(tmp_path / "net.pth")["metric"] == 0.5


#: what training programs keep beside the weights
BESIDE = {
    "timm": {
        "args": argparse.Namespace(lr=np.float64(0.1), output=Path("out")),
        "metric": np.float64(71.2),
        "epoch": 3,
    },
    "Lightning": {
        "hyper_parameters": OmegaConf.create({"lr": 0.1, "sizes": [1, 2], "copy": "${lr}", "name": None}),
        "hparams_type": type(OmegaConf.create({})),
    },
    "history": {"history": collections.defaultdict(list, {"loss": [np.float32(1.0)]}), "weights": np.arange(5.0)},
}


@pytest.mark.parametrize("program", BESIDE)
def test_weights_are_read_beside_them(program: str, tmp_path: Path) -> None:
    torch.save({"state_dict": prefixed("module.", S)}, tmp_path / "weights.pth")
    torch.save({"state_dict": prefixed("module.", S), **BESIDE[program]}, tmp_path / "net.pth")
    assert torch.equal(loaded_outputs(tmp_path / "net.pth"), loaded_outputs(tmp_path / "weights.pth"))
    content = checkpoint_io.read(tmp_path / "net.pth")
    if program == "timm":
        assert content["args"].lr == 0.1
        assert type(content["args"].output) is PlainObject  # no path of pathlib's was built
    if program == "Lightning":
        assert type(content["hyper_parameters"]) is PlainObject
    if program == "history":
        assert content["history"] == {"loss": [1.0]}


@pytest.mark.parametrize(
    ("kind", "data"),
    [(NumberType("f8"), b"1234"), (NumberType("f8"), b""), (NumberType("U0"), b""), ("f8", b"12345678"),
     (NumberType("f8"), [1]), (NumberType("f9"), b"123456789")],
)  # fmt: skip
def test_bytes_that_are_no_number(kind: Any, data: Any) -> None:
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        plain_number(kind, data)


@pytest.mark.parametrize("code", ["O", "V8", "O8", "f8,O8", "", 5, None, "m8[ns]", "i8" * 50])
def test_types_that_are_no_number(code: Any) -> None:
    with pytest.raises(pickle.UnpicklingError, match="which is no number"):
        NumberType(code)
