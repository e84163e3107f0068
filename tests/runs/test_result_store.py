"""Results, rows and journals survive what happens to disks and processes."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import vitscope as vs
from vitscope.runs import metrics_log, partial_results, result_store
from vitscope.runtime import atomic_write, safe_files
from vitscope.runtime.errors import StorageError


def measured() -> object:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    probe = vs.Probe(model, [(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))], about={"data": "toy"})
    return vs.hessian_max_eigenvalue_spectrum(probe, n_top=2)


def test_a_result_comes_back_equal(tmp_path: Path) -> None:
    result = measured()
    path = result_store.save(tmp_path, "end-12345678", result)
    back = result_store.load(path)
    assert type(back) is type(result)
    for name in vars(result):
        value, other = getattr(result, name), getattr(back, name)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, other)
        elif name != "card":
            assert value == other or (np.isnan(value) and np.isnan(other)), name
    assert back.card.data == "toy"
    mirror = json.loads((tmp_path / "end-12345678.json").read_text())
    assert mirror["measure"] == "hessian_max_eigenvalue_spectrum"
    assert mirror["card"]["n_images"] == 4


def test_damaged_results_are_named(tmp_path: Path) -> None:
    path = result_store.save(tmp_path, "end-0", measured())
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(StorageError, match="end-0"):
        result_store.load(path)


def test_only_our_types_are_built(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", __meta__=np.array(json.dumps({"type": "os:system", "fields": {}})))
    with pytest.raises(
        StorageError, match=r"not a vitscope measure's\); set VITSCOPE_TRUST=os if that package is your own$"
    ):
        result_store.load(tmp_path / "x.npz")


OWN_RESULT = """
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MeanResult:
    mean: np.ndarray

    def scalars(self):
        return {"mean": float(self.mean)}


def no_type(**fields):
    raise AssertionError("called")
"""


def test_a_type_of_a_trusted_package_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"lab_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN_RESULT)
    monkeypatch.syspath_prepend(tmp_path)
    result = importlib.import_module(name).MeanResult(np.array(2.5))
    file = result_store.save(tmp_path, "x", result)
    with pytest.raises(StorageError, match=f"set VITSCOPE_TRUST={name} if"):
        result_store.load(file)
    monkeypatch.setenv("VITSCOPE_TRUST", f"{name},other")
    loaded = result_store.load(file)
    assert type(loaded) is type(result)
    assert loaded.scalars() == {"mean": 2.5}
    np.savez(tmp_path / "y.npz", __meta__=np.array(json.dumps({"type": f"{name}:no_type", "fields": {}})))
    with pytest.raises(StorageError, match="not readable as a result"):
        result_store.load(tmp_path / "y.npz")


@dataclass(frozen=True)
class Odd:
    value: object

    def scalars(self) -> dict[str, float]:
        return {}


def test_what_cannot_be_read_back_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="received Tensor at value"):
        result_store.save(tmp_path, "x", Odd(torch.zeros(2)))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.json"
    atomic_write.write_atomically(target, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        atomic_write.write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_rows_outlive_a_kill(tmp_path: Path) -> None:
    rows = partial_results.PartialRows(tmp_path / "p")
    rows["0"] = {"nll": 0.1 + 0.2, "v": np.arange(3.0)}
    rows["1"] = {"nll": float("inf")}
    with (tmp_path / "p" / "rank-0.jsonl").open("a") as file:
        file.write('{"key": "2", "row": {"nl')  # killed here
    again = partial_results.PartialRows(tmp_path / "p", rank=0)
    assert set(again) == {"0", "1"}
    assert again["0"]["nll"] == 0.1 + 0.2
    np.testing.assert_array_equal(again["0"]["v"], np.arange(3.0))
    again["2"] = {"nll": 3.0}
    assert partial_results.PartialRows(tmp_path / "p")["2"] == {"nll": 3.0}
    again.discard()
    assert not (tmp_path / "p").exists()


def test_rows_that_another_process_deletes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes may measure the same: the one that finishes first deletes the rows."""
    partial_results.PartialRows(tmp_path / "p")["0"] = {"nll": 1.0}
    read_text = safe_files.read_text

    def deleted_before(path: Path) -> str:
        path.unlink()
        return read_text(path)

    monkeypatch.setattr(safe_files, "read_text", deleted_before)
    assert dict(partial_results.PartialRows(tmp_path / "p")) == {}


def test_journal(tmp_path: Path) -> None:
    book = metrics_log.Journal(tmp_path / "metrics.jsonl")
    book.append(1, 0, {"train/loss": 0.1 + 0.2, "bad": float("nan")})
    book.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "train')
    again = metrics_log.Journal(tmp_path / "metrics.jsonl")
    again.append(2, 0, {"train/loss": 2.0})
    again.append(2, 0, {"train/loss": 1.0})
    rows = metrics_log.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 2]
    assert rows[0]["train/loss"] == 0.1 + 0.2
    assert rows[0]["bad"] is None
    assert metrics_log.series(tmp_path / "metrics.jsonl")["train/loss"].tolist() == [0.1 + 0.2, 1.0]
