"""One whole training, killed before each change of its files and started again: everything as without the kill."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas  # noqa: F401  each child would import it
import pytest
import sklearn.datasets  # noqa: F401  each child would import it
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from tests.fixtures.programs.commands import TINY
from tests.fixtures.programs.kills import in_child, snapshots
from vitscope.cli import exit_codes
from vitscope.config import loading
from vitscope.runs import metrics_log, result_store
from vitscope.runs.checkpoints import checkpoint_io, checkpoint_manifest
from vitscope.training import training_run

torch.set_num_threads(1)
TRAINING = [
    *TINY, "data=digits", "data.batch_size=8", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1", "trainer.max_epochs=2", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false", "objective=strong", "model.drop_path=0.2", "callbacks.checkpoint.snapshots=log",
    "analysis=[fourier]", "analysis.fourier.probe.n_images=8", "analysis.fourier.when.start=true",
    "analysis.fourier.when.every_n_epochs=1", "ckpt_path=auto",
]  # fmt: skip

#: with an average of the weights, which is what is validated, tested and measured, and with checks for an early end
AVERAGED = ["callbacks=[checkpoint,lr_monitor,ema,early_stopping]"]


@functools.cache
def composed(*arguments: str) -> DictConfig:
    """Return what the command composes, once for all of its starts."""
    with initialize_config_dir(str(loading.folder()), version_base="1.3"):
        return compose("train", [*TRAINING, *arguments])


def trained(root: Path, *arguments: str) -> int:
    """Run the command that made the runs of a folder; return its exit code."""
    cfg = composed(*arguments).copy()
    cfg.paths.runs = str(root)
    return exit_codes.run_command(lambda: training_run.train(cfg))


def finished_run(root: Path) -> Path:
    """Return the newest finished run."""
    facts = {file.parent: json.loads(file.read_text()) for file in root.glob("*/provenance.json")}
    return max((run for run, known in facts.items() if known["status"] == "finished"), key=lambda run: run.name)


def state(run: Path) -> dict[str, Any]:
    """Return all that a run says: files, weights and optimizer, rows, results, provenance."""
    rows = [
        {key: value for key, value in row.items() if key != "time"} for row in metrics_log.read(run / "metrics.jsonl")
    ]
    known = json.loads((run / "provenance.json").read_text())
    stored = {str(file.relative_to(run)): result_store.load(file) for file in sorted(run.glob("results/*/*.npz"))}
    return {
        "files": sorted(str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()),
        "manifest": {
            name: (entry["epoch"], entry["global_step"])
            for name, entry in checkpoint_manifest.entries(run / "checkpoints").items()
        },
        "checkpoints": {file.name: checkpoint_io.read(file) for file in sorted(run.glob("checkpoints/*.ckpt"))},
        "rows": {json.dumps(row, sort_keys=True) for row in rows},  # steps after the last checkpoint are written twice
        "results": stored,
        "readable": {str(file.relative_to(run)): json.loads(file.read_text()) for file in run.glob("results/*/*.json")},
        "status": (known["status"], known["exit_code"], sorted(known)),
    }


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Return where two trees of containers, arrays, results and numbers differ in any bit."""
    if hasattr(one, "__dataclass_fields__"):
        one, other = vars(one), vars(other)
    if isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        return [line for key in one for line in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [line for i, pair in enumerate(zip(one, other)) for line in differences(*pair, f"{path}.{i}")]
    if isinstance(one, torch.Tensor | np.ndarray) and isinstance(other, type(one)):
        equal = np.array_equal(np.asarray(one), np.asarray(other), equal_nan=np.asarray(one).dtype.kind == "f")
    else:
        equal = one == other or (one != one and other != other)
    return [] if equal else [f"{path}: {str(one)[:300]} != {str(other)[:300]}"]


@pytest.fixture(autouse=True)
def own_run_folders(small_figures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITSCOPE_RUN_DIR", raising=False)


def differences_after_kills(folder: Path, *arguments: str, first: int = 0, step: int = 1) -> list[str]:
    """Train once, copying the runs before changes of them; start again from each copy and compare with the training."""
    root = folder / "runs"
    root.mkdir()
    copies = snapshots(root, folder / "copies", lambda: trained(root, *arguments), first=first, step=step)
    expected = state(finished_run(root))
    found = []
    for copy in copies:
        found += [f"{copy.name}: {line}" for line in differences_after_start(copy, root, expected, *arguments)]
    assert len(copies) > 2
    return found


def differences_after_start(copy: Path, root: Path, expected: Mapping[str, Any], *arguments: str) -> list[str]:
    """Start again from a copy of the runs, at their own place; return where the finished run is not as expected."""
    shutil.rmtree(root)
    shutil.copytree(copy, root)
    code = in_child(lambda: trained(root, *arguments))
    return differences(expected, state(finished_run(root))) if code == 0 else [f"exit code {code}"]


@pytest.mark.slow  # four seconds; the next test stops at each write
def test_a_training_is_killed_at_some_writes(tmp_path: Path) -> None:
    assert differences_after_kills(tmp_path, *AVERAGED, first=40, step=80) == []


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "step"), [([], 1), (AVERAGED, 5)], ids=["plain", "averaged"])
def test_a_training_is_killed_at_every_write(tmp_path: Path, arguments: list[str], step: int) -> None:
    """Every write, or every fifth one where an average is trained beside the weights."""
    assert differences_after_kills(tmp_path, *arguments, step=step) == []


@pytest.mark.slow
def test_a_training_is_killed_twice(tmp_path: Path) -> None:
    """The second kill comes at the writes of the start after the first one, which repairs what that left."""
    root = tmp_path / "runs"
    root.mkdir()
    firsts = snapshots(root, tmp_path / "first", lambda: trained(root), first=15, step=29)
    expected = state(finished_run(root))
    found = []
    for copy in firsts:
        shutil.rmtree(root)
        shutil.copytree(copy, root)
        seconds = snapshots(root, tmp_path / f"second-{copy.name}", lambda: trained(root), first=2, step=13)
        for second in seconds:
            lines = differences_after_start(second, root, expected)
            found += [f"{copy.name}, then {second.name}: {line}" for line in lines]
    assert len(firsts) > 2
    assert found == []
