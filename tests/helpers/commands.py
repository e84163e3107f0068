"""Commands run in this process, on a tiny ViT, digits or photographs, and a few images."""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure
from omegaconf import DictConfig

from vitscope.analyses import outputs
from vitscope.cli import analyze, exit_codes, train
from vitscope.config import loading, model_facts
from vitscope.data.sources import photos
from vitscope.runtime.logging import command_logging

TINY = [
    "model=vit",
    "model.depth=1",
    "model.patch_size=8",
    "logger=none",
    "data.batch_size=16",
    "data.eval_batch_size=64",
]

_count_model = model_facts.of_model
_facts_of_models: dict[str, dict[str, Any]] = {}


def facts_of_model(cfg: DictConfig) -> dict[str, Any]:
    """Return what a run records of its model, counted once a process: it is built and run a second time for that."""
    key = loading.digest([loading.plain(cfg.model), loading.plain(cfg.get("data") or {})], 64)
    if key not in _facts_of_models:
        _facts_of_models[key] = _count_model(cfg)
    return dict(_facts_of_models[key])


#: one cheap analysis
FOURIER = ["analysis=[fourier]", "analysis.fourier.probe.n_images=8"]

#: the crops of a split are the same for every command of this process
CACHED_CROPS = cache(photos._crops)


def small_figure(_: object) -> Figure:
    """Return a figure in place of a result's, whose drawing takes longer than a training of four steps."""
    return Figure(figsize=(0.2, 0.2))


@pytest.fixture
def command_messages() -> Iterator[None]:
    """Print log messages on stderr as a command does, for a test that calls a part of one."""
    with command_logging():
        yield


@pytest.fixture
def small_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write small and empty figures beside results."""
    monkeypatch.setattr(outputs, "plot", small_figure)


@pytest.fixture
def call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run ``train.py`` or ``analyze.py`` with arguments; return the exit code.

    Figures are small and empty, unless the test is marked ``real_figures``.
    """
    monkeypatch.setattr(photos, "_crops", CACHED_CROPS)
    monkeypatch.setattr(model_facts, "of_model", facts_of_model)
    # a full collection before each command takes 0.4 s in the process of the tests, which holds thousands of objects
    monkeypatch.setattr(exit_codes, "gc", SimpleNamespace(collect=lambda: gc.collect(1)))
    if request.node.get_closest_marker("real_figures") is None:
        monkeypatch.setattr(outputs, "plot", small_figure)

    def run(command: str, *arguments: str) -> int:
        monkeypatch.delenv("VITSCOPE_RUN_DIR", raising=False)
        monkeypatch.setattr(sys, "argv", [f"{command}.py", *arguments])
        return exit_codes.run_command({"train": train, "analyze": analyze}[command]._command)

    return run


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    """Return the runs that `trained` copies, by the arguments of their training."""
    return {}


@pytest.fixture
def trained(
    call: Callable[..., int],
    tiny: list[str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    trained_runs: dict[tuple[str, ...], Path],
) -> Callable[..., Path]:
    """Return a run of the tiny training with further arguments: trained once a process, copied for each test.

    The paths in the copy's configuration and provenance are those of a run that was trained in ``tmp_path``.
    """

    def copy(*arguments: str) -> Path:
        if arguments not in trained_runs:
            root = tmp_path_factory.mktemp("trained")
            here = [f"paths.runs={root}/runs" if option.startswith("paths.runs=") else option for option in tiny]
            assert call("train", *here, *arguments) == 0
            (trained_runs[arguments],) = (path for path in (root / "runs").iterdir() if path.is_dir())
        source = trained_runs[arguments]
        target = tmp_path / "runs" / source.name
        shutil.copytree(source, target)
        for file in (target / "config.yaml", target / "provenance.json"):
            file.write_text(file.read_text().replace(str(source.parents[1]), str(tmp_path)))
        return target

    return copy


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Return overrides for a training of seconds."""
    limits = ["trainer.limit_train_batches=4", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    return [*TINY, *limits, "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", f"paths.runs={tmp_path}/runs"]


@pytest.fixture
def fourier_run(trained: Callable[..., Path]) -> Path:
    """Return a run of one epoch with one analysis at its end."""
    return trained(*FOURIER, "trainer.max_epochs=1", "test=false")
