"""A resumed training repeats an uninterrupted one bit for bit, whatever is switched on and wherever it was cut."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.commands.test_train import losses, pytestmark  # noqa: F401 (the same libraries warn)
from vitscope import checkpoint, interrupt
from vitscope.classifier import Classifier

#: mixup and random erasing, an average of the weights, dropout and drop path
EVERYTHING = [
    "objective=strong", "callbacks=[checkpoint,ema]", "callbacks.ema.decay=0.9", "model=timm",
    "model.name=vit_tiny_patch16_224", "+model.patch_size=8", "+model.depth=1", "+model.drop_rate=0.1",
    "+model.proj_drop_rate=0.1", "+model.attn_drop_rate=0.1", "+model.drop_path_rate=0.1", "trainer.max_epochs=3",
    "trainer.limit_train_batches=3", "test=false",
]  # fmt: skip
OURS = (
    "model=vit",
    "model.depth=1",
    "model.patch_size=8",
)  # of the tiny model, in whose place timm's with dropout stands
WATCHED = ["analysis=[fourier]", "analysis.fourier.when.every_n_epochs=1", "analysis.fourier.when.start=true",
           "analysis.fourier.probe.n_images=8"]  # fmt: skip


def stopped(call, monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], after: int) -> None:
    """Run a training and end it with SIGTERM in its ``after``-th step."""
    begin, seen = Classifier.on_train_batch_start, []

    def stopping(self: Classifier, batch: object, batch_idx: int) -> None:
        seen.append(batch_idx)
        if len(seen) == after:
            interrupt.request(signal.SIGTERM)
        begin(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "on_train_batch_start", stopping)
        assert call("train", *arguments) == 143
    assert len(seen) == after


def assert_equal_files(one: Path, other: Path) -> None:
    """Compare the trained weights, the average of them and the optimizer's state of two runs."""
    first, second = (checkpoint.read(run / "checkpoints" / "last.ckpt") for run in (one, other))
    parts = [key for key in ("state_dict", "current_model_state", "optimizer_states") if key in first]
    assert "current_model_state" in parts
    for part in parts:
        values, others = tensors(first[part]), tensors(second[part])
        assert values.keys() == others.keys()
        for name, tensor in values.items():
            assert torch.equal(tensor, others[name]), f"{part} {name}"


def tensors(node: object, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(node, torch.Tensor):
        return {path: node}
    if isinstance(node, dict):
        return {k: v for key, item in node.items() for k, v in tensors(item, f"{path}.{key}").items()}
    if isinstance(node, list):
        return {k: v for i, item in enumerate(node) for k, v in tensors(item, f"{path}.{i}").items()}
    return {}


def everything(tiny: list[str], precision: str, workers: int, diagnostics: bool) -> list[str]:
    shared = [argument for argument in tiny if argument not in OURS]
    watched = WATCHED if diagnostics else ["analysis=[]"]
    return [*shared, *EVERYTHING, *watched, f"trainer.precision={precision}", f"data.num_workers={workers}"]


def resumed(call, monkeypatch, arguments: list[str], folder: Path, stops: Sequence[int]) -> None:
    """Cut a training after so many steps, once more so many steps later, ..., and let it end."""
    first: Sequence[str] = [*arguments, f"run_dir={folder}"]
    for after in stops:
        stopped(call, monkeypatch, first, after)
        first = [f"run={folder}", "ckpt_path=last"]
    assert call("train", *first) == 0


def test_bf16_average_dropout_and_diagnostics_cut_twice(call, tiny, tmp_path, monkeypatch) -> None:
    """Everything on, cut in the middle of an epoch and again at an epoch's end; without diagnostics the losses are the same."""
    arguments = everything(tiny, "bf16-mixed", 0, True)
    assert call("train", *everything(tiny, "bf16-mixed", 0, False), f"run_dir={tmp_path}/whole") == 0
    resumed(call, monkeypatch, arguments, tmp_path / "cut", (2, 4))
    assert len(losses(tmp_path / "whole")) == 9
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert_equal_files(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_combination(call, tiny, tmp_path, monkeypatch, precision, workers) -> None:
    """Cuts within the first epoch, at its end, in the last step but one, twice in a row at once; diagnostics on and off."""
    whole = tmp_path / "whole"
    assert call("train", *everything(tiny, precision, 0, False), f"run_dir={whole}") == 0
    for diagnostics in (False, True):
        arguments = everything(tiny, precision, workers, diagnostics)
        for stops in ((1,), (3,), (4, 2), (2, 1, 1)):
            cut = tmp_path / f"cut-{diagnostics}-{'-'.join(map(str, stops))}"
            resumed(call, monkeypatch, arguments, cut, stops)
            assert losses(cut) == losses(whole), f"diagnostics {diagnostics}, stops {stops}"
            assert_equal_files(whole, cut)
