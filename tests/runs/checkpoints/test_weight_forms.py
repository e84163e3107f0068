"""Every form in which weights come is read with exactly equal outputs."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.utils.checkpoint_saver import CheckpointSaver
from timm.utils.model import unwrap_model
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import vitscope as vs
from tests.fixtures.runs.weight_files import (
    AVERAGES,
    IMAGES,
    OTHER,
    WEIGHTS,
    S,
    State,
    loaded_outputs,
    network,
    prefixed,
)
from vitscope.models import state_dicts
from vitscope.runs.checkpoints import checkpoint_io, checkpoint_sequence, checkpoint_weights
from vitscope.runtime.errors import CheckpointError


def of_lightning(prefix: str) -> dict[str, Any]:
    """Return what Lightning saves of a module that keeps its network as an attribute, beside a loss with weights."""
    others = {"criterion.weight": torch.ones(5), "val_accuracy.total": torch.tensor(3.0)}
    return {
        "epoch": 3,
        "global_step": 9,
        "pytorch-lightning_version": "2.6.6",
        "loops": {},
        "callbacks": {},
        "state_dict": {**prefixed(prefix, WEIGHTS.state_dict()), **others},
        "hyper_parameters": {"lr": 0.1},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}],
    }


def of_timm(tmp_path: Path, wrapped: bool = False) -> dict[str, Any]:
    """Return what timm's own `CheckpointSaver` writes, with averages and its options in a Namespace."""
    model: nn.Module = nn.DataParallel(WEIGHTS) if wrapped else WEIGHTS
    ema = ModelEmaV3(model)
    ema.module.load_state_dict(prefixed("module." if wrapped else "", AVERAGES.state_dict()))
    args = argparse.Namespace(model="resnet18", lr=0.1, sched=None, mean=(0.5, 0.5, 0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    unwrap = (lambda inner: inner) if wrapped else unwrap_model
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=ema, checkpoint_dir=str(tmp_path), unwrap_fn=unwrap)
    saver.save_checkpoint(epoch=3, metric=71.0)
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(tmp_path / "last.pth.tar", weights_only=True)


def of_our_average() -> dict[str, Any]:
    """Return a checkpoint under Lightning's `EMAWeightAveraging`, as a training of ours with callbacks=[ema] writes it."""
    return {
        "state_dict": prefixed("model.", AVERAGES.state_dict()),
        "current_model_state": prefixed("model.", WEIGHTS.state_dict()),
        "epoch": 1,
        "global_step": 4,
    }


def of_swa() -> dict[str, Any]:
    averaged = AveragedModel(copy.deepcopy(WEIGHTS))
    averaged.module.load_state_dict(AVERAGES.state_dict())
    return averaged.state_dict()


def without_counters(state: State) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def parameters_of(state: State) -> dict[str, Any]:
    return {name: nn.Parameter(v) if v.is_floating_point() else v for name, v in state.items()}


#: contents of files that `torch.save` writes; what is loaded without and with ``ckpt=ema``
CONTENTS: dict[str, tuple[Callable[[Path], Any], nn.Module | None, nn.Module | None]] = {
    "state dict": (lambda _: S, WEIGHTS, None),
    "plain dict": (lambda _: dict(S), WEIGHTS, None),
    "parameters": (lambda _: parameters_of(S), WEIGHTS, None),
    "without counters": (lambda _: {"state_dict": prefixed("module.", without_counters(S))}, WEIGHTS, None),
    "state_dict": (lambda _: {"state_dict": S, "epoch": 1, "best": 0.5}, WEIGHTS, None),
    "model": (lambda _: {"model": S, "optimizer": {"state": {0: {"step": torch.ones(())}}}}, WEIGHTS, None),
    "model_state_dict": (lambda _: {"model_state_dict": S, "loss": torch.ones(())}, WEIGHTS, None),
    "net": (lambda _: {"net": prefixed("module.", S), "acc": 91.0, "epoch": 3}, WEIGHTS, None),
    "an entry of any name": (lambda _: {"my_weights": S}, WEIGHTS, None),
    "nested": (lambda _: {"checkpoint": {"model": {"state_dict": S}}}, WEIGHTS, None),
    "module.": (lambda _: prefixed("module.", S), WEIGHTS, None),
    "_orig_mod.": (lambda _: prefixed("_orig_mod.", S), WEIGHTS, None),
    "_orig_mod.module.": (lambda _: {"state_dict": prefixed("_orig_mod.module.", S)}, WEIGHTS, None),
    "Lightning model.": (lambda _: of_lightning("model."), WEIGHTS, None),
    "Lightning net.": (lambda _: of_lightning("net."), WEIGHTS, None),
    "Lightning classifier._orig_mod.": (lambda _: of_lightning("classifier._orig_mod."), WEIGHTS, None),
    "Lightning with averages": (
        lambda _: {"state_dict": {**prefixed("model.", S), **prefixed("ema_model.module.", AVERAGES.state_dict())}},
        WEIGHTS,
        AVERAGES,
    ),
    "student and equal teacher": (lambda _: {"student": S, "teacher": copy.deepcopy(S)}, WEIGHTS, None),
    "timm": (of_timm, WEIGHTS, AVERAGES),
    "timm under DataParallel": (lambda path: of_timm(path, wrapped=True), WEIGHTS, AVERAGES),
    "ours with averages": (lambda _: of_our_average(), AVERAGES, AVERAGES),
    "AveragedModel": (lambda _: of_swa(), AVERAGES, AVERAGES),
    "model and ema": (lambda _: {"model": S, "ema": {"model": AVERAGES.state_dict()}}, WEIGHTS, AVERAGES),
    "model_ema alone": (lambda _: {"model_ema": AVERAGES.state_dict()}, AVERAGES, AVERAGES),
    "bfloat16": (lambda _: {n: v.bfloat16() if v.is_floating_point() else v for n, v in S.items()}, WEIGHTS, None),
    "float64": (lambda _: {n: v.double() if v.is_floating_point() else v for n, v in S.items()}, WEIGHTS, None),
    "not contiguous": (
        lambda _: {**S, "0.weight": S["0.weight"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)},
        WEIGHTS,
        None,
    ),
}


def expected_outputs(model: nn.Module, form: str) -> Tensor:
    model = copy.deepcopy(model)
    if form == "bfloat16":
        model.bfloat16().float()
    with torch.no_grad():
        return model(IMAGES)


@pytest.mark.parametrize("form", CONTENTS)
def test_a_form_is_read_with_equal_outputs(form: str, tmp_path: Path) -> None:
    build, weights, averages = CONTENTS[form]
    path = tmp_path / "net.pth"
    torch.save(build(tmp_path), path)
    assert weights is not None
    assert torch.equal(loaded_outputs(path), expected_outputs(weights, form))
    if averages is None:
        with pytest.raises(
            CheckpointError, match=r"^ckpt=ema: .*net\.pth holds no averages, but \S+.*; use ckpt=last$"
        ):
            loaded_outputs(path, average=True)
    else:
        assert torch.equal(loaded_outputs(path, average=True), expected_outputs(averages, form))


def test_formats_of_files(tmp_path: Path) -> None:
    torch.save(S, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(dict(S), tmp_path / "net.safetensors")
    save_file(prefixed("module.", S), tmp_path / "named_otherwise.bin")
    (tmp_path / "link.pth").symlink_to(tmp_path / "old.pth")
    for name in ("old.pth", "net.safetensors", "named_otherwise.bin", "link.pth"):
        assert torch.equal(loaded_outputs(tmp_path / name), expected_outputs(WEIGHTS, name)), name


def test_what_was_taken_is_said(tmp_path: Path, capsys, command_messages) -> None:
    def message(content: Any, average: bool = False) -> str:
        checkpoint_weights.load_weights(network(7), content, Path("net.pth"), average=average)
        return capsys.readouterr().err.strip()

    assert message(S) == message({"state_dict": S}) == ""
    assert "loaded the averages over training steps (state_dict_ema)" in message(of_timm(tmp_path), average=True)
    assert "loaded state_dict; ckpt=ema loads the averages (state_dict_ema)" in message(of_timm(tmp_path))
    assert "loaded the averages over training steps (state_dict under model.*)" in message(of_our_average())
    taken = message(of_lightning("net."))
    assert (
        "loaded 9 weights state_dict under net.*; 2 others are left out: criterion.weight, val_accuracy.total" in taken
    )


def test_files_of_a_path_between_networks_come_in_every_form(tmp_path: Path) -> None:
    for name, content in (("a", of_lightning("net.")), ("b", {"my_weights": AVERAGES.state_dict()})):
        torch.save(content, tmp_path / f"{name}.pth")
    batches = [(IMAGES, torch.tensor([0, 1]))]
    files = checkpoint_sequence.named([tmp_path / "a.pth", tmp_path / "b.pth"], network(7))
    pairs = [("a", dict(S)), ("b", AVERAGES.state_dict())]
    one, other = (
        vs.linear_interpolation(vs.Probe(network(7), batches), checkpoints=c, n=3).nll for c in (files, pairs)
    )
    assert one.tolist() == other.tolist()
    torch.save({"student": S, "teacher": OTHER.state_dict()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"checkpoints=.*a\.pth: student and teacher fit the model equally well"):
        files[0]


def test_class_counts_are_those_of_the_classifier_alone() -> None:
    five = network(1).state_dict()
    assert state_dicts.class_counts(five, network(1, 37).state_dict()) == (37, 5)
    assert state_dicts.class_counts(five, five) is None
    assert state_dicts.class_counts(five, {**network(1, 37).state_dict(), "0.bias": torch.ones(3)}) is None


class WithExtraState(nn.Linear):
    """A layer that saves a plain value besides its weights."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.steps = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def test_extra_states_are_loaded(tmp_path: Path) -> None:
    inner, loaded = WithExtraState(), WithExtraState()
    one, other = nn.Sequential(inner), nn.Sequential(loaded)
    inner.steps = 5
    torch.save({"state_dict": prefixed("module.", one.state_dict())}, tmp_path / "net.pth")
    content = checkpoint_io.read(tmp_path / "net.pth")
    checkpoint_weights.load_weights(other, content, tmp_path / "net.pth")
    assert loaded.steps == 5
    assert checkpoint_weights.weights_hash(one) == checkpoint_weights.weights_hash(other)


def test_averages_in_a_command(call, tmp_path: Path, capsys) -> None:
    """The weights and the averages of one file of timm, each under a name of its own; a run without averages says so."""
    options = ["model=vit", "model.depth=1", "model.patch_size=8", "data=digits", "analysis=[evaluation]", "device=cpu",
               "analysis.evaluation.probe.n_images=4", f"paths.runs={tmp_path}/runs"]  # fmt: skip
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(vs.models.vit("tiny", 10, 32, 8, depth=1).state_dict())
    file = tmp_path / "last.pth.tar"
    other_counters = {"global_step": torch.tensor(7), "epoch": "last", "args": argparse.Namespace(lr=0.1)}
    torch.save({"state_dict": states[0], "state_dict_ema": states[1], **other_counters}, file)
    nll = {}
    for ckpt in ("last", "ema"):
        folder = tmp_path / ckpt
        assert call("analyze", *options, f"ckpt_path={file}", f"ckpt={ckpt}", f"run_dir={folder}") == 0
        ((tag, result),) = vs.load_results(folder)["evaluation"].items()
        nll[tag] = result.nll
    assert sorted(nll) == ["end", "end-ema"]
    assert len(set(nll.values())) == 2
    assert "loaded the averages over training steps (state_dict_ema)" in capsys.readouterr().err
    torch.save({"state_dict": states[0]}, file)
    assert call("analyze", *options, f"ckpt_path={file}", "ckpt=ema") == 4
    assert "error: ckpt=ema:" in capsys.readouterr().err
    assert call("analyze", *options, f"ckpt_path={file}", "ckpt=best") == 2
    torch.save(vs.models.vit("tiny", 10, 32, 8, depth=1), file)
    assert call("analyze", *options, f"ckpt_path={file}") == 4
    err = capsys.readouterr().err.strip()
    assert "save model.state_dict() instead" in err
