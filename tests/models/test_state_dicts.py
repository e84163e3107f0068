"""Weights of files with other keys than the model's: what torch fills in is not missed, whatever matters is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.runs.run_folders import only_run
from vitscope import models
from vitscope.core.probe import Probe
from vitscope.models import state_dicts
from vitscope.runs.checkpoints import checkpoint_io, checkpoint_weights
from vitscope.runtime.errors import CheckpointError

PATH = Path("net.th")


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    made = nn.Sequential(*layers, nn.BatchNorm1d(3, momentum=None))
    for buffer in made.buffers():
        buffer.copy_(torch.rand(buffer.shape) + 1)
    return made


def old(state: Mapping[str, Tensor], prefix: str = "") -> OrderedDict[str, Tensor]:
    """Return a state dict as torch 0.3 wrote it: without counters of batches and without metadata."""
    return OrderedDict((prefix + k, v.clone()) for k, v in state.items() if not k.endswith("num_batches_tracked"))


def assert_loaded(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    for name, value in state.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(own[name], value), name


class Wrapped(nn.Module):
    """A network that keeps everything under ``model.``, as wrappers and Lightning do."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.model = network(seed)


class Renaming(nn.Module):
    """A module whose own hook reads the name that an older version of it had, and fills in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("steps", torch.tensor(7))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if f"{prefix}gamma" in state_dict:
            state_dict[f"{prefix}scale"] = state_dict.pop(f"{prefix}gamma")
        state_dict.setdefault(f"{prefix}steps", self.steps)
        super()._load_from_state_dict(state_dict, prefix, *rest)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod.", "module.model."])
@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
def test_an_old_file(prefix: str, nested: str | None) -> None:
    state = network(1).state_dict()
    content: Any = old(state, prefix)
    content = {nested: content, "best_prec1": 91.7} if nested else content
    model = network(2)
    counters = [
        module.num_batches_tracked.clone() for module in model.modules() if hasattr(module, "num_batches_tracked")
    ]
    checkpoint_weights.load_weights(model, content, PATH)
    assert_loaded(model, state)
    left = [module.num_batches_tracked for module in model.modules() if hasattr(module, "num_batches_tracked")]
    assert left == counters


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_a_network_whose_own_names_begin_like_a_wrappers(prefix: str) -> None:
    state = Wrapped(1).state_dict()
    model = Wrapped(2)
    checkpoint_weights.load_weights(model, {"state_dict": old(state, prefix)}, PATH)
    assert_loaded(model, state)


def test_a_modules_own_hooks_are_followed() -> None:
    model = nn.Sequential(nn.Linear(2, 3), Renaming())
    state = {"0.weight": torch.rand(3, 2), "0.bias": torch.rand(3), "1.gamma": torch.rand(3)}
    checkpoint_weights.load_weights(model, state, PATH)
    assert torch.equal(model[1].scale, state["1.gamma"])
    assert model[1].steps == 7


@pytest.mark.parametrize("key", ["0.weight", "1.running_mean", "1.running_var", "1.bias", "5.weight", "5.bias"])
def test_what_matters_is_still_refused(key: str) -> None:
    state = old(network(1).state_dict())
    del state[key]
    with pytest.raises(CheckpointError, match=rf"{key}: the checkpoint lacks it"):
        checkpoint_weights.load_weights(network(2), state, PATH)
    with pytest.raises(CheckpointError, match=r"9\.weight: the model has no such weight"):
        checkpoint_weights.load_weights(network(2), {**old(network(1).state_dict()), "9.weight": torch.ones(1)}, PATH)
    with pytest.raises(CheckpointError, match=r"0\.weight has shape \(4,\) in the checkpoint"):
        checkpoint_weights.load_weights(network(2), {**old(network(1).state_dict()), "0.weight": torch.ones(4)}, PATH)


def test_measures_between_old_files() -> None:
    """A path between two of them is that between the same files of today."""
    one, other = network(1).state_dict(), network(2).state_dict()
    batches = [(torch.rand(5, 3, 6, 6), torch.tensor([0, 1, 2, 1, 0]))]
    results = []
    for pair in ([("a", one), ("b", other)], [("a", old(one)), ("b", other)], [("a", one), ("b", old(other))]):
        results.append(vs.linear_interpolation(Probe(network(3).eval(), batches), checkpoints=pair, n=3).nll)
    assert (results[0] == results[1]).all()
    assert (results[0] == results[2]).all()


@pytest.mark.slow  # five seconds: four commands
def test_an_old_file_in_every_command(call, tiny, tmp_path) -> None:
    """A residual network's, its names behind ``module.``: analyzed, trained from, named as a run's checkpoint, read by name."""
    torch.manual_seed(0)
    state = models.convnet(18, num_classes=16).state_dict()
    file = tmp_path / "resnet.th"
    torch.save({"best_prec1": 91.7, "state_dict": old(state, "module.")}, file)
    assert_loaded(models.load_official_state_dict(models.convnet(18, num_classes=16), torch.load(file)), state)
    model = ["model=convnet", "model.depth=18", f"ckpt_path={file}"]
    small = [
        "trainer.limit_train_batches=1",
        "data.batch_size=2",
        "trainer.limit_val_batches=0",
        "analysis=[]",
        "test=false",
        "optimizer=sgd",  # AdamW's state would double the file
    ]
    assert call("train", *tiny[3:], *model, *small) == 0
    run = only_run(tmp_path)
    assert_loaded_from_file(run / "checkpoints" / "init.ckpt", state)
    measured = ["analysis=[evaluation]", "analysis.evaluation.probe.n_images=2", "device=cpu"]
    assert call("analyze", *model, "data=photos", *measured, f"paths.runs={tmp_path}/other") == 0
    inside = run / "old.ckpt"
    inside.write_bytes(file.read_bytes())
    assert call("analyze", f"run={inside}", *measured) == 0
    assert_loaded(vs.load_probe(inside, n_images=2).model, state)


def assert_loaded_from_file(path: Path, state: Mapping[str, Tensor]) -> None:
    init = checkpoint_weights.model_state(checkpoint_io.read(path))
    for name, value in state.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(init[name], value), name


def test_weights_of_the_models_shapes_come_before_an_entry_of_a_usual_name() -> None:
    """A file of distillation may hold a larger network under ``model`` whose layers have the same names."""
    network, larger = nn.Linear(3, 2), nn.Linear(3, 5)
    reading = state_dicts.select_weights(network, {"model": larger.state_dict(), "student": network.state_dict()})
    assert reading is not None
    assert reading.entry == "student"


def test_a_model_of_averages_is_known_whatever_network_it_is_of() -> None:
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(3, 2))
    assert state_dicts.average_entries({"weights": averaged.state_dict()}) == ["weights"]
    assert state_dicts.average_entries({"weights": nn.Linear(3, 2).state_dict()}) == []
