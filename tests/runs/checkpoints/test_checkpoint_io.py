"""Checkpoints are whole or not there, and reading one never executes anything."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from vitscope.runs.checkpoints import checkpoint_io, checkpoint_manifest, checkpoint_weights
from vitscope.runtime import atomic_write
from vitscope.runtime.errors import CheckpointError, StorageError


def content(step: int = 1) -> dict:
    return {"epoch": 0, "global_step": step, "state_dict": OrderedDict(w=torch.full((5,), float(step))), "loops": {}}


def test_round_trip_and_manifest(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    checkpoint_io.write(content(3), path)
    assert torch.equal(checkpoint_io.read(path)["state_dict"]["w"], torch.full((5,), 3.0))
    entry = checkpoint_manifest.entries(tmp_path)["last.ckpt"]
    assert (entry["global_step"], entry["sha256"]) == (3, checkpoint_manifest.sha256(path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "manifest.json"]


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "missing"])
def test_damage_falls_back_to_the_newest_verified(tmp_path: Path, damage: str) -> None:
    checkpoint_io.write(content(1), tmp_path / "epoch-0000.ckpt")
    checkpoint_io.write(content(2), tmp_path / "last.ckpt")
    last = tmp_path / "last.ckpt"
    whole = last.read_bytes()
    if damage == "missing":
        last.unlink()
    else:
        flipped = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
        last.write_bytes({"truncate": whole[:-7], "empty": b"", "flip": flipped}[damage])
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged or missing"):
        assert checkpoint_io.newest(tmp_path).name == "epoch-0000.ckpt"
    with pytest.raises(CheckpointError):
        checkpoint_io.read(last)


def test_a_crash_between_file_and_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint_io.write(content(1), tmp_path / "epoch-0000.ckpt")
    monkeypatch.setattr(checkpoint_io, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint_io.write(content(2), tmp_path / "last.ckpt")
    assert checkpoint_io.newest(tmp_path).name == "epoch-0000.ckpt"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    checkpoint_io.write(content(1), path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        checkpoint_io.write(content(2), path)
    monkeypatch.undo()
    assert checkpoint_io.read(path)["global_step"] == 1
    assert checkpoint_io.newest(tmp_path) == path


def test_temporaries_of_dead_processes_are_swept(tmp_path: Path) -> None:
    stale, ours = tmp_path / ".last.ckpt.tmp-999999999", tmp_path / f".best.ckpt.tmp-{os.getpid()}"
    stale.write_bytes(b"x")
    ours.write_bytes(b"x")
    atomic_write.sweep(tmp_path)
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
            checkpoint_io.read(tmp_path / name)
    assert not flag.exists()
    assert all(os.environ[key] == value for key, value in environment.items())


@pytest.mark.parametrize("value", [OmegaConf.create({"a": 1}), np.float64(1.0), Path("x"), np.zeros(2), object()])
def test_what_could_not_be_read_back_is_rejected_when_saved(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.hyper_parameters\.x"):
        checkpoint_io.write({**content(), "hyper_parameters": {"x": value}}, tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists()


@settings(max_examples=int(os.environ.get("FUZZ", "40")), deadline=None)
@given(data=st.data())
def test_any_damage_is_seen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "last.ckpt"
    checkpoint_io.write(content(), path)
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
        assert torch.equal(checkpoint_io.read(path)["state_dict"]["w"], torch.ones(5))
        return
    with pytest.raises(CheckpointError):
        checkpoint_io.read(path)


def test_prefixes_of_others(tmp_path: Path) -> None:
    for key, prefix in (("state_dict", "model."), ("model", "module."), ("state_dict", "")):
        state = checkpoint_weights.model_state({key: {f"{prefix}conv.weight": torch.ones(1)}, "epoch": 3})
        assert list(state) == ["conv.weight"]


def stored_run(folder: Path) -> None:
    checkpoint_io.write(content(0), folder / "init.ckpt")
    checkpoint_io.write(content(2), folder / "last.ckpt", copies=["best.ckpt"])


def without_digest(folder: Path) -> None:
    """Write the manifest as earlier versions did."""
    (folder / "manifest.json").write_text(json.dumps(checkpoint_manifest.entries(folder), indent=1))


def test_manifest_that_is_no_json(tmp_path: Path) -> None:
    checkpoint_io.write(content(), tmp_path / "last.ckpt")
    (tmp_path / "manifest.json").write_text("{")
    for refused in (checkpoint_io.newest, checkpoint_manifest.entries, checkpoint_io.repair):
        with pytest.raises(CheckpointError, match=r"manifest\.json cannot be trusted \(no JSON\)"):
            refused(tmp_path)
    whole = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(CheckpointError, match="cannot be trusted"):
        checkpoint_io.write(content(2), tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == whole


@pytest.mark.parametrize("earlier_version", [False, True])
@pytest.mark.filterwarnings("ignore:checkpoint .* is damaged")
def test_no_flipped_bit_of_a_manifest_is_trusted(tmp_path: Path, earlier_version: bool) -> None:
    """Three bits of each byte of a manifest, and of one of an earlier version, which has no digest of itself."""
    checkpoint_io.write(content(0), tmp_path / "init.ckpt")
    checkpoint_io.write(content(2), tmp_path / "last.ckpt")
    if earlier_version:
        without_digest(tmp_path)
    assert checkpoint_io.newest(tmp_path).name == "last.ckpt"
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    accepted = []
    for place in range(len(whole)):
        for bit in (0, 2, 5):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                checkpoint_io.newest(tmp_path) if earlier_version else checkpoint_manifest.entries(tmp_path)
            except CheckpointError:
                continue
            accepted.append((place, bit))
    assert accepted == []


@pytest.mark.parametrize("earlier_version", [False, True])
def test_a_manifest_that_is_missing_or_misses_entries(tmp_path: Path, earlier_version: bool) -> None:
    stored_run(tmp_path)
    if earlier_version:
        without_digest(tmp_path)
    stored = json.loads((tmp_path / "manifest.json").read_text())
    for name in checkpoint_manifest.entries(tmp_path):
        (tmp_path / "manifest.json").write_text(json.dumps({k: v for k, v in stored.items() if k != name}, indent=1))
        with pytest.raises(CheckpointError, match="cannot be trusted"):
            checkpoint_io.newest(tmp_path)
    for text in ("{}", "", "null"):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match="cannot be trusted"):
            checkpoint_io.newest(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be trusted"):
        checkpoint_io.newest(tmp_path)


@pytest.mark.filterwarnings("ignore:checkpoint .* is damaged")
def test_damage_does_not_begin_again_at_step_0(tmp_path: Path) -> None:
    """Where only the initial weights are whole, the user has to ask for them."""
    stored_run(tmp_path)
    for name in ("last.ckpt", "best.ckpt"):
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"only init\.ckpt, at step 0, is left"):
        checkpoint_io.newest(tmp_path)


def test_a_checkpoint_is_verified_by_what_it_holds(tmp_path: Path) -> None:
    """Altered and saved again, in a folder with no manifest: the hash of the file says nothing, that of the content does."""
    checkpoint_io.write(content(3), tmp_path / "last.ckpt")
    (tmp_path / "manifest.json").unlink()
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    one_bit_off = OrderedDict(w=torch.full((5,), 3.0).nextafter(torch.ones(5)))
    altered = {"epoch": 1, "global_step": float("nan"), "loops": {"a": 0}, "state_dict": one_bit_off}
    for key, value in altered.items():
        torch.save({**stored, key: value}, tmp_path / "altered.ckpt")
        with pytest.raises(CheckpointError, match="its hash differs from the one in manifest.json"):
            checkpoint_io.read(tmp_path / "altered.ckpt")
    torch.save(stored, tmp_path / "again.ckpt")
    assert checkpoint_io.read(tmp_path / "again.ckpt")["global_step"] == 3


@contextlib.contextmanager
def stopped_at(call: int, raised: BaseException | None) -> Iterator[list[str]]:
    """At that call which reaches the disk: raise, or end the process as a kill does (None)."""
    calls: list[str] = []

    def watched(name: str, original):
        def deadly(*args, **kwargs):
            calls.append(name)
            if len(calls) == call:
                if raised is None:
                    os._exit(9)
                raise raised
            return original(*args, **kwargs)

        return deadly

    def opened(original):
        counted = watched("open", original)
        return lambda path, mode="r", *a, **k: (counted if set(mode) & set("wax") else original)(path, mode, *a, **k)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "fsync"):
            patch.setattr(os, name, watched(name, getattr(os, name)))
        patch.setattr(Path, "open", opened(Path.open))
        yield calls


def state_of(folder: Path) -> dict[str, int]:
    return {name: checkpoint_io.read(folder / name)["global_step"] for name in checkpoint_manifest.entries(folder)}


NAMES = ["last.ckpt", "best.ckpt", "epoch-0001.ckpt"]


def test_an_event_of_three_files_is_killed_at_every_write(tmp_path: Path) -> None:
    """All three files are of the epoch before or all are of the new one; after the next start nothing else is left."""
    with stopped_at(0, None) as calls:
        checkpoint_io.write(content(2), tmp_path / "count" / NAMES[0], copies=NAMES[1:])
    outcomes = []
    for at in range(1, len(calls) + 1):
        folder = tmp_path / str(at)
        stored_run(folder)
        if (child := os.fork()) == 0:
            with stopped_at(at, None):
                checkpoint_io.write(content(5), folder / NAMES[0], copies=NAMES[1:])
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        seen = state_of(folder)  # what a reader sees before the next start is verified too
        assert seen.keys() <= {"init.ckpt", *NAMES}
        checkpoint_io.repair(folder)
        state = state_of(folder)
        outcomes.append(state)
        assert sorted(file.name for file in folder.iterdir()) == sorted([*state, "manifest.json"])
        assert checkpoint_io.read(checkpoint_io.newest(folder))["global_step"] == state["last.ckpt"]
    before = {"init.ckpt": 0, "last.ckpt": 2, "best.ckpt": 2}
    after = {"init.ckpt": 0, **dict.fromkeys(NAMES, 5)}
    assert [state for state in outcomes if state not in (before, after)] == []
    assert before in outcomes
    assert after in outcomes


def test_a_disk_that_is_full_at_every_write_of_an_event(tmp_path: Path) -> None:
    with stopped_at(0, None) as calls:
        checkpoint_io.write(content(2), tmp_path / "count" / NAMES[0], copies=NAMES[1:])
    for at in range(1, len(calls) + 1):
        folder = tmp_path / str(at)
        stored_run(folder)
        with stopped_at(at, OSError(28, "No space left on device")), pytest.raises(StorageError, match="No space left"):
            checkpoint_io.write(content(5), folder / NAMES[0], copies=NAMES[1:])
        checkpoint_io.repair(folder)
        state = state_of(folder)
        assert state in ({"init.ckpt": 0, "last.ckpt": 2, "best.ckpt": 2}, {"init.ckpt": 0, **dict.fromkeys(NAMES, 5)})
        assert sorted(file.name for file in folder.iterdir()) == sorted([*state, "manifest.json"])


def test_only_temporaries_of_this_machine_are_swept(tmp_path: Path) -> None:
    ours = tmp_path / f".last.ckpt.tmp-{atomic_write.host_identity()}-999999999"
    others = tmp_path / ".last.ckpt.tmp-00000000-999999999"
    user = tmp_path / ".notes.tmp-x"
    for file in (ours, others, user):
        file.write_bytes(b"x")
    atomic_write.sweep(tmp_path)
    assert [file.exists() for file in (ours, others, user)] == [False, True, True]
