"""Every file of ``conf/analysis`` survives a stop in the middle and a model whose numbers are not finite."""

from __future__ import annotations

import json
import shutil
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.fixtures.oracles.result_checks import check_result
from tests.fixtures.runs.analysis_runs import NAMES
from vitscope.analyses import runner, spec
from vitscope.analyses.context import AnalysisContext
from vitscope.config import factories
from vitscope.runs import run_dir
from vitscope.runs.checkpoints import checkpoint_io
from vitscope.runtime import stop_flag
from vitscope.runtime.stop_flag import Interrupted

#: says nothing about the weights
STATIC = {"taps"}
#: refuses the model at hand, so that there is no middle
NEEDS_BATCHNORM = {"bn_policy"}


def state(network: torch.nn.Module) -> dict[str, object]:
    tensors = {f"value of {key}": value.clone() for key, value in network.state_dict().items()}
    grads = {f"grad of {key}": None if p.grad is None else p.grad.clone() for key, p in network.named_parameters()}
    return {**tensors, **grads, **{f"mode of {key}": m.training for key, m in network.named_modules()}}


def assert_same(before: dict[str, object], network: torch.nn.Module) -> None:
    for key, value in state(network).items():
        same = (
            torch.equal(value.nan_to_num(), before[key].nan_to_num())
            if isinstance(value, torch.Tensor)
            else value == before[key]
        )
        assert same, key


def chosen(place: AnalysisContext, name: str) -> spec.Analysis:
    """Return an analysis on three batches."""
    (analysis,) = [a for a in spec.parse(place.cfg.analysis) if a.name == name]
    return spec.replaced(analysis, probe={**analysis.probe, "n_images": 24, "batch_size": 8})


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STATIC | NEEDS_BATCHNORM])
def test_a_stop_in_the_middle(made: AnalysisContext, name: str) -> None:
    before = state(made.network)
    handle = made.network.register_forward_pre_hook(lambda *_: stop_flag.request(signal.SIGTERM))
    try:
        with pytest.raises(Interrupted):
            runner.perform(chosen(made, name), made, reuse=False)
    finally:
        handle.remove()
    assert_same(before, made.network)
    assert not list((made.run.results / name).glob("*.npz"))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STATIC | NEEDS_BATCHNORM])
def test_memory_that_runs_out_in_the_middle(made: AnalysisContext, name: str, tmp_path: Path) -> None:
    """Null with its reason, a warning, and the model as it was; with ``on_error=raise`` the error comes out."""
    folder = tmp_path / "run"
    shutil.copytree(made.run.path, folder, ignore=shutil.ignore_patterns("results"))
    place = replace(made, run=run_dir.Run(folder))
    before = state(made.network)
    passes = []

    def starved(*_: object) -> None:
        passes.append(None)
        if len(passes) >= 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    handle = made.network.register_forward_pre_hook(starved)
    try:
        with pytest.warns(UserWarning, match=f"analysis.{name} failed at end: OutOfMemoryError: .*; recorded as null"):
            assert runner.perform(chosen(place, name), place, reuse=False) is None
        assert_same(before, made.network)
        raising = spec.replaced(chosen(place, name), on_error="raise")
        with pytest.raises(torch.OutOfMemoryError):
            runner.perform(raising, place, reuse=False)
    finally:
        handle.remove()
    assert_same(before, made.network)
    (record,) = (folder / "results" / name).glob("*.json")
    assert json.loads(record.read_text())["scalars"] is None
    assert "OutOfMemoryError" in place.run.log.read_text()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STATIC])
def test_numbers_that_are_not_finite(made: AnalysisContext, name: str, tmp_path: Path) -> None:
    network = factories.model(made.cfg).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.view(-1)[0] = float("nan")
    folder = tmp_path / "run"
    shutil.copytree(made.run.path, folder)
    for file in ("init", "last"):
        content = checkpoint_io.read(folder / "checkpoints" / f"{file}.ckpt")
        content["state_dict"] = {f"model.{key}": value for key, value in network.state_dict().items()}
        checkpoint_io.write(content, folder / "checkpoints" / f"{file}.ckpt")
    place = AnalysisContext(made.cfg, run_dir.Run(folder), network, made.datamodule, "end", epoch=0)
    before = state(network)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = runner.perform(chosen(place, name), place, reuse=False)
    if result is not None:
        check_result(result, tmp_path)
    assert any("null" in str(warning.message) for warning in caught), [str(w.message) for w in caught]
    assert_same(before, network)
    (record,) = (folder / "results" / name).glob("*.json")
    scalars = json.loads(record.read_text())["scalars"]
    assert not scalars or any(value is None for value in scalars.values())
