"""No symbolic link inside of a run folder is followed, for reading, appending, replacing or sweeping; it is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from omegaconf import OmegaConf

from tests.fixtures.runs.report_runs import spectrum, write_run
from vitscope.plotting.api import save_figure
from vitscope.runs import partial_results, result_store, run_end, wandb_mirror
from vitscope.runs.checkpoints import checkpoint_io, checkpoint_manifest
from vitscope.runs.metrics_log import Journal, read
from vitscope.runs.run_dir import Run
from vitscope.runtime import atomic_write, safe_files
from vitscope.runtime.errors import VitscopeError


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return write_run(tmp_path / "runs", "vit", measured={"hessian": spectrum()})


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Make a folder of somebody else's files, one of them with the name of a dead process's temporary file."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("victim", ".last.ckpt.tmp-999999999", "rank-0.jsonl", "manifest.json"):
        (folder / name).write_text("{}\n")
    torch.save({"state_dict": {}}, folder / "last.ckpt")
    return folder


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors() -> dict:
    return {"epoch": 0, "state_dict": {"w": torch.zeros(2)}}


def save_result(run: Run) -> None:
    result_store.save(run.results / "hessian", "end-00000000", spectrum())


def start_mirror(run: Run) -> None:
    wandb_mirror.start(OmegaConf.create({"logger": {"project": "x"}}), run, "train")


#: (where the link is, what it leads to in `elsewhere`, what then is done)
CASES: list[tuple[str, str, Callable[[Run], object]]] = [
    ("metrics.jsonl", "victim", lambda run: Journal(run.journal).append(1, 0, {"a": 1.0})),
    ("metrics.jsonl", "absent", lambda run: Journal(run.journal).append(1, 0, {"a": 1.0})),
    ("metrics.jsonl", "victim", lambda run: read(run.journal)),
    ("log.txt", "victim", lambda run: safe_files.append_text(run.log, "x")),
    ("provenance.json", "victim", lambda run: run.provenance()),
    ("provenance.json", "victim", lambda run: run.note(a=1)),
    ("config.yaml", "victim", lambda run: run.config()),
    ("checkpoints", "", lambda run: checkpoint_io.sweep(run.checkpoints)),
    ("checkpoints", "", lambda run: checkpoint_io.write(tensors(), run.checkpoints / "last.ckpt")),
    ("checkpoints", "", lambda run: checkpoint_io.read(run.checkpoints / "last.ckpt")),
    ("checkpoints", "", lambda run: checkpoint_manifest.entries(run.checkpoints)),
    ("checkpoints", "", lambda run: checkpoint_io.AtomicCheckpointIO().remove_checkpoint(run.checkpoints / "last.ckpt")),
    ("checkpoints/last.ckpt", "last.ckpt", lambda run: checkpoint_io.read(run.checkpoints / "last.ckpt")),
    ("checkpoints/manifest.json", "manifest.json", lambda run: checkpoint_manifest.entries(run.checkpoints)),
    ("results", "", save_result),
    ("results/hessian", "", save_result),
    ("results/hessian/.partial-x", "", lambda run: partial_results.PartialRows(run.results / "hessian" / ".partial-x").discard()),
    ("results/hessian/x.npz", "victim", lambda run: result_store.load(run.results / "hessian" / "x.npz")),
    ("figures", "", lambda run: save_figure(plt.figure(), run.figures / "victim", formats=("png",))),
    ("figures/x.png", "victim", lambda run: save_figure(plt.figure(), run.figures / "x", formats=("png",))),
    ("wandb", "", start_mirror),
]  # fmt: skip


@pytest.mark.parametrize(("name", "target", "act"), CASES)
def test_a_link_is_refused_by_name(
    name: str, target: str, act: Callable[[Run], object], run: Run, elsewhere: Path
) -> None:
    path = run.path / name
    if path.exists():
        path.rename(run.path.parent.parent / "moved")
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(elsewhere / target)
    before = state(elsewhere)
    with pytest.raises(VitscopeError, match=r"symbolic link") as caught:
        act(run)
    assert str(path) in str(caught.value)
    assert state(elsewhere) == before


def test_a_temporary_name_that_is_a_link_is_not_written_through(run: Run, elsewhere: Path) -> None:
    before = state(elsewhere)
    for name in (f".x.json.tmp-{os.getpid()}", f".last.ckpt.tmp-{os.getpid()}"):
        for folder in (run.path, run.checkpoints):
            folder.mkdir(exist_ok=True)
            (folder / name).symlink_to(elsewhere / "victim")
    atomic_write.write_atomically(run.path / "x.json", b"{}")
    checkpoint_io.write(tensors(), run.checkpoints / "last.ckpt")
    assert state(elsewhere) == before
    assert (run.path / "x.json").read_bytes() == b"{}"


def test_a_traceback_does_not_go_through_a_link(run: Run, elsewhere: Path) -> None:
    run.log.symlink_to(elsewhere / "victim")
    run_end.log_tracebacks_to(run)
    before = state(elsewhere)
    run_end.log_traceback("traceback")
    assert state(elsewhere) == before


def test_a_run_folder_reached_by_a_link_is_used(run: Run, tmp_path: Path) -> None:
    """Folders of runs lie on other disks: links above a run folder, and to it, are the user's."""
    (tmp_path / "short").symlink_to(run.path)
    short = Run(tmp_path / "short")
    Journal(short.journal).append(4, 4, {"a": 1.0})
    checkpoint_io.write(tensors(), short.checkpoints / "last.ckpt")
    assert read(run.journal)[-1]["a"] == 1.0
    assert checkpoint_io.verified(run.checkpoints / "last.ckpt")


def test_no_pipe_is_waited_for(run: Run) -> None:
    run.journal.unlink()
    os.mkfifo(run.journal)
    with pytest.raises(VitscopeError):
        Journal(run.journal).append(1, 0, {"a": 1.0})
