"""Checkpoints are whole or not there, and reading one never executes anything."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from vitscope import checkpoint
from vitscope.errors import CheckpointError, StorageError


def content(step: int = 1) -> dict:
    return {"epoch": 0, "global_step": step, "state_dict": OrderedDict(w=torch.full((5,), float(step))), "loops": {}}


def test_round_trip_and_manifest(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    checkpoint.write(content(3), path)
    assert torch.equal(checkpoint.read(path)["state_dict"]["w"], torch.full((5,), 3.0))
    entry = checkpoint.manifest(tmp_path)["last.ckpt"]
    assert (entry["global_step"], entry["sha256"]) == (3, checkpoint.sha256(path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "manifest.json"]


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "missing"])
def test_damage_falls_back_to_the_newest_verified(tmp_path: Path, damage: str) -> None:
    checkpoint.write(content(1), tmp_path / "epoch-0000.ckpt")
    checkpoint.write(content(2), tmp_path / "last.ckpt")
    last = tmp_path / "last.ckpt"
    whole = last.read_bytes()
    if damage == "missing":
        last.unlink()
    else:
        flipped = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
        last.write_bytes({"truncate": whole[:-7], "empty": b"", "flip": flipped}[damage])
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged or missing"):
        assert checkpoint.newest(tmp_path).name == "epoch-0000.ckpt"
    with pytest.raises(CheckpointError):
        checkpoint.read(last)


def test_a_crash_between_file_and_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write(content(1), tmp_path / "epoch-0000.ckpt")
    monkeypatch.setattr(checkpoint, "_write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(content(2), tmp_path / "last.ckpt")
    assert checkpoint.newest(tmp_path).name == "epoch-0000.ckpt"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    checkpoint.write(content(1), path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        checkpoint.write(content(2), path)
    monkeypatch.undo()
    assert checkpoint.read(path)["global_step"] == 1
    assert checkpoint.newest(tmp_path) == path


def test_temporaries_of_dead_processes_are_swept(tmp_path: Path) -> None:
    stale, ours = tmp_path / ".last.ckpt.tmp-999999999", tmp_path / f".best.ckpt.tmp-{os.getpid()}"
    stale.write_bytes(b"x")
    ours.write_bytes(b"x")
    checkpoint.sweep(tmp_path)
    assert not stale.exists()
    assert ours.exists()


class Evil:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self):
        return (os.mkdir, (str(self.flag),))


@pytest.mark.parametrize("place", ["state_dict", "hyper_parameters", "callbacks", "top"])
@pytest.mark.parametrize("environment", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}])
def test_code_is_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, environment: dict) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    flag = tmp_path / "executed"
    evil = content()
    if place == "top":
        evil = Evil(flag)
    else:
        evil[place] = {"x": Evil(flag)}
    torch.save(evil, tmp_path / "evil.ckpt")
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(evil, protocol=2))
    for name in ("evil.ckpt", "raw.ckpt"):
        with pytest.raises(CheckpointError, match="not a safe checkpoint"):
            checkpoint.read(tmp_path / name)
    assert not flag.exists()
    assert all(os.environ[key] == value for key, value in environment.items())


@pytest.mark.parametrize("value", [OmegaConf.create({"a": 1}), np.float64(1.0), Path("x"), np.zeros(2), object()])
def test_what_could_not_be_read_back_is_rejected_when_saved(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.hyper_parameters\.x"):
        checkpoint.write({**content(), "hyper_parameters": {"x": value}}, tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists()


@settings(max_examples=int(os.environ.get("FUZZ", "40")), deadline=None)
@given(data=st.data())
def test_any_damage_is_seen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "last.ckpt"
    checkpoint.write(content(), path)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    change = data.draw(st.sampled_from(["truncate", "flip", "splice", "none"]))
    at = min(cut, len(whole) - 1)
    damaged = {
        "truncate": whole[:cut],
        "flip": whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :],
        "splice": whole[:cut] + whole[cut // 2 :],
        "none": whole,
    }[change]
    path.write_bytes(damaged)
    if damaged == whole:
        assert torch.equal(checkpoint.read(path)["state_dict"]["w"], torch.ones(5))
        return
    with pytest.raises(CheckpointError):
        checkpoint.read(path)


def test_prefixes_of_others(tmp_path: Path) -> None:
    for key, prefix in (("state_dict", "model."), ("model", "module."), ("state_dict", "")):
        state = checkpoint.model_state({key: {f"{prefix}conv.weight": torch.ones(1)}, "epoch": 3})
        assert list(state) == ["conv.weight"]


def test_manifest_that_is_no_json(tmp_path: Path) -> None:
    checkpoint.write(content(), tmp_path / "last.ckpt")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="no verified checkpoint"):
        checkpoint.newest(tmp_path)
    assert json.loads("{}") == checkpoint.manifest(tmp_path)
