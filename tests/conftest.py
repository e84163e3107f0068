"""Settings of every test: no network, no W&B server, run folders in a temporary place, few threads."""

from __future__ import annotations

import gc
import os

# tests of small networks gain nothing from more threads, and the other test process uses the other core
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch
from torch import nn

import vitscope.runtime.progress
from tests.fixtures.configs import parsed_configurations
from tests.fixtures.programs import safe_forks

safe_forks.install()
parsed_configurations.install()
pytest_plugins = [
    "tests.fixtures.programs.commands",
    "tests.fixtures.images.data_files",
    "tests.fixtures.runs.analysis_runs",
]


def pytest_collection_finish() -> None:
    """Exempt what imports and collection made from garbage collection: a full one would take half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No progress lines; every test starts from the same random state and with no stop asked for."""
    from vitscope.runtime import stop_flag

    monkeypatch.setattr(vitscope.runtime.progress, "enabled", False)
    stop_flag.clear()
    torch.manual_seed(0)


@pytest.fixture
def mlp() -> nn.Module:
    """Return a small smooth network in float64, from (B, 1, 2, 3) to 4 logits."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


@pytest.fixture
def mlp_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return three batches of different sizes for `mlp`."""
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(n, 1, 2, 3, generator=generator, dtype=torch.float64),
            torch.randint(0, 4, (n,), generator=generator),
        )
        for n in (4, 7, 2)
    ]
