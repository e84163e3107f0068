"""A tiny trained run on which every analysis is tried."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.helpers.configurations import composed
from vitscope.analyses.context import AnalysisContext
from vitscope.config import caps, factories, loading
from vitscope.runs import run_dir
from vitscope.runs.checkpoints import checkpoint_io

#: analyses that need a package which is not installed
MISSING = {"kronecker_factors"} if importlib.util.find_spec("curvlinops") is None else set()

NAMES = [name for name in loading.options("analysis") if name not in MISSING]


ARGUMENTS = ["model=vit", "model.depth=1", "model.patch_size=8", "data=shapes", "data.fraction=0.02", "caps=smoke"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> AnalysisContext:
    """Return a run with two checkpoints, its data and its network, which tests copy."""
    root = tmp_path_factory.mktemp("runs")
    cfg = composed("train", *ARGUMENTS, f"analysis=[{','.join(NAMES)}]", f"paths.runs={root}")
    caps.apply_caps(cfg)
    run = run_dir.create(cfg, "train")
    network = factories.model(cfg)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.001)  # a training has moved it
    for step, name in enumerate(("init", "last")):
        state = {f"model.{key}": value + 0.01 * (1 - step) for key, value in network.state_dict().items()}
        content = {"epoch": 0, "global_step": step, "state_dict": state}
        checkpoint_io.write(content, run.checkpoints / f"{name}.ckpt")
    data = factories.data(cfg)
    data.adapt_to(network)
    network.eval()
    network.get_submodule("norm").train()  # as it is found: a mixture of modes, gradients of a step
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    return AnalysisContext(cfg, run, network, data, "end", epoch=0)
