"""A resumed training repeats an uninterrupted one bit for bit, whatever is switched on and wherever it was cut."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import EarlyStopping, WeightAveraging

import vitscope as vs
from tests.fixtures.runs.run_folders import losses
from vitscope.data import DataModule
from vitscope.runs import metrics_log
from vitscope.runs.checkpoints import checkpoint_io
from vitscope.runtime import stop_flag
from vitscope.training.checkpoint_callback import Checkpoints
from vitscope.training.diagnostics_callback import DiagnosticCallback
from vitscope.training.lightning_module import Classifier

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


def stopped(
    call,
    monkeypatch: pytest.MonkeyPatch,
    arguments: Sequence[str],
    after: int,
    during: str = "training",
    code: int = 143,
) -> None:
    """Run a training and ask it to stop in its ``after``-th batch of training or validation, or epoch's diagnostics."""
    owner, method = {
        "training": (Classifier, "on_train_batch_start"),
        "validation": (Classifier, "validation_step"),
        "diagnostics": (DiagnosticCallback, "on_train_epoch_end"),
    }[during]
    begin, seen = getattr(owner, method), []

    def stopping(self: object, *rest: object) -> None:
        seen.append(rest)
        if len(seen) == after:
            stop_flag.request(signal.SIGTERM)
        begin(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, stopping)
        assert call("train", *arguments) == code
    assert during != "training" or len(seen) == after or "trainer.accumulate_grad_batches=2" in arguments


class Killed(BaseException):
    """Raised in place of a kill; only the training loop's own cleanup runs."""


def killed_before_epoch_end(call, monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], after: int) -> None:
    """Ask a training to stop in its ``after``-th batch, the last of an epoch, and kill it once that batch is saved."""

    at_epoch_end = Checkpoints.on_train_epoch_end

    def kill(*rest: Any) -> None:
        if stop_flag.requested():
            raise Killed
        at_epoch_end(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "on_train_epoch_end", kill)
        stopped(call, monkeypatch, arguments, after, code=1)


def measured(run: Path) -> dict[tuple[int, int, str], float]:
    """Return the last row of each epoch's metrics in the journal, by step, epoch and name."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        (row["step"], row["epoch"], name): value
        for row in rows for name, value in row.items() if name.startswith("val/") or name == "train/accuracy"
    }  # fmt: skip


def assert_equal_files(one: Path, other: Path) -> None:
    """Compare the trained weights, the average of them and the optimizer's state of two runs."""
    first, second = (checkpoint_io.read(run / "checkpoints" / "last.ckpt") for run in (one, other))
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


PLACES = {"t": "training", "v": "validation", "d": "diagnostics"}
#: further settings, and where to stop since the start before: in the n-th batch of training (t) or of validation (v), or in an
#: epoch's diagnostics (d)
CUTS = [
    ([], ["t3", "t1"]), ([], ["v1", "t1"]), ([], ["t3", "v2", "t2"]), ([], ["t6", "t3"]), ([], ["t9"]), ([], ["v1", "v1"]),
    (["trainer.limit_val_batches=0"], ["t3", "t1"]),
    (["trainer.check_val_every_n_epoch=2"], ["t3", "t1"]), (["trainer.check_val_every_n_epoch=2"], ["t6", "v1"]),
    (["+trainer.val_check_interval=2", "trainer.limit_train_batches=4"], ["t2", "t2"]),
    (["+trainer.val_check_interval=2", "trainer.limit_train_batches=4"], ["v1", "v2", "v4", "t1"]),
    (["trainer.max_epochs=-1", "trainer.max_steps=5"], ["t3", "t1"]),
    (["trainer.max_epochs=-1", "trainer.max_steps=4"], ["v3"]),
    (["trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=4"], ["t1"]),
    (["trainer.accumulate_grad_batches=2"], ["t1"]),
    (["trainer.accumulate_grad_batches=2", "+trainer.val_check_interval=1", "trainer.limit_train_batches=4"], ["v1"]),
    (WATCHED, ["d1", "t1"]),
    (WATCHED, ["t3", "d1", "t1"]),
    ([*WATCHED, "trainer.max_epochs=-1", "trainer.max_steps=8"], ["d1", "t1"]),
    ([*WATCHED, "trainer.max_epochs=-1", "trainer.max_steps=6", "callbacks.checkpoint.every_n_epochs=5"], ["d2"]),
    (["+trainer.val_check_interval=2", "trainer.limit_train_batches=3"], ["t3"]),
    (["trainer.limit_val_batches=0"], ["k3"]), (["trainer.limit_val_batches=0"], ["k6", "t2"]),
    (["trainer.check_val_every_n_epoch=2"], ["k3"]), (["trainer.check_val_every_n_epoch=2"], ["k9"]),
    (["trainer.limit_val_batches=0", "trainer.max_epochs=-1", "trainer.max_steps=5"], ["k3"]),
]  # fmt: skip
#: in CI: a validation from its start, a kill before the epoch's end
QUICK = (2, 21)


def cut_id(settings: Sequence[str], stops: Sequence[str]) -> str:
    return "-".join([*(setting for setting in settings if setting not in WATCHED), *stops])


@pytest.mark.parametrize(
    ("settings", "stops"),
    [pytest.param(*cut, marks=() if i in QUICK else pytest.mark.slow, id=cut_id(*cut)) for i, cut in enumerate(CUTS)],
)
def test_between_an_epochs_last_batch_and_its_end(call, tiny, tmp_path, monkeypatch, settings, stops) -> None:
    """The losses, every epoch's validation and training accuracy, and the files are those of the uninterrupted run."""
    arguments = [*everything(tiny, "32-true", 0, False), "trainer.limit_val_batches=3", *settings]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call("train", *arguments, f"run_dir={whole}") == 0
    first = [*arguments, f"run_dir={cut}"]
    for stop in stops:
        if stop[0] == "k":
            killed_before_epoch_end(call, monkeypatch, first, int(stop[1:]))
        else:
            stopped(call, monkeypatch, first, int(stop[1:]), PLACES[stop[0]])
        first = [f"run={cut}", "ckpt_path=last"]
    assert call("train", *first) == 0
    assert losses(cut) == losses(whole)
    assert measured(cut) == measured(whole)
    assert_equal_files(whole, cut)
    for name in ("best.ckpt", "last.ckpt"):
        steps = [checkpoint_io.read(run / "checkpoints" / name)["global_step"] for run in (whole, cut)
                 if (run / "checkpoints" / name).exists()]  # fmt: skip
        assert len(steps) in (0, 2), name
        assert len(set(steps)) <= 1, name


@pytest.mark.slow  # each of these is resumed by itself in a test below or in test_train.py
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


AVERAGED = [
    "callbacks=[checkpoint,ema]", "callbacks.ema.decay=0.9", "trainer.max_epochs=2", "trainer.limit_train_batches=3",
    "analysis=[fourier]", "analysis.fourier.probe.n_images=8", "analysis.fourier.when.every_n_epochs=0",
]  # fmt: skip


def end_of(run: Path) -> tuple[dict[str, float], dict[str, float], object]:
    """Return the test metrics, the scalars of the end diagnostic and its card."""
    values = metrics_log.last_values(run / "metrics.jsonl")
    result = vs.load_results(run)["fourier"]["end"]
    return {name: value for name, value in values.items() if name.startswith("test/")}, result.scalars(), result.card


@pytest.mark.parametrize("place", ["end diagnostics", "test"])
def test_the_average_is_tested_after_a_stop_behind_the_last_checkpoint(
    call, tiny, tmp_path, monkeypatch, place
) -> None:
    """Stopped by TERM or INT after the last epoch was saved: test metrics and end diagnostics are of the average, bit for bit."""
    signum = signal.SIGTERM if place == "test" else signal.SIGINT
    arguments = [*tiny, *AVERAGED]
    assert call("train", *arguments, f"run_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        if place == "test":
            step = Classifier.test_step
            patch.setattr(Classifier, "test_step", lambda *a: (stop_flag.request(signum), step(*a))[1])
        else:
            patch.setattr(
                "vitscope.analyses.runner.factories.probe", lambda *_: (stop_flag.request(signum), stop_flag.check())
            )
        assert call("train", *arguments, f"run_dir={tmp_path}/cut") == (143 if place == "test" else 130)
    assert call("train", f"run={tmp_path}/cut", "ckpt_path=last") == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = end_of(tmp_path / "whole"), end_of(tmp_path / "cut")
    assert set(whole[0]) >= {"test/nll", "test/accuracy"}
    assert cut == whole


def test_an_average_copies_neither_trainer_nor_data(call, tiny, tmp_path, monkeypatch) -> None:
    """The module that holds the average shares the mixing with the data module, and knows no trainer."""
    copies = []
    setup = WeightAveraging.setup

    def noted(self: WeightAveraging, trainer, pl_module, stage: str) -> None:
        setup(self, trainer, pl_module, stage)
        if stage == "fit":
            copies.append((self._average_model.module, pl_module, trainer))

    monkeypatch.setattr(WeightAveraging, "setup", noted)
    monkeypatch.setattr(DataModule, "__deepcopy__", lambda *_: pytest.fail("the data module was copied"), raising=False)
    arguments = [
        "objective=strong",
        "callbacks=[checkpoint,ema]",
        "trainer.limit_train_batches=1",
        "analysis=[]",
        "test=false",
    ]
    assert call("train", *tiny, *arguments) == 0
    ((copied, module, _),) = copies
    assert copied._trainer is None
    assert copied._mix.__self__ is module._mix.__self__
    assert copied._compiled[0] is copied.model is not module.model
    for one, other in zip(copied.parameters(), module.parameters()):
        assert one.data_ptr() != other.data_ptr()


#: a value of the monitor for each epoch: the best is the third, so that patience 2 ends training after the fifth
MONITORED = [3.0, 2.0, 1.0, 1.5, 1.2, 0.5, 0.4, 0.3]
EARLY = [
    "callbacks=[checkpoint,ema,early_stopping]", "callbacks.ema.decay=0.9", "callbacks.early_stopping.monitor=val/nll",
    "callbacks.early_stopping.mode=min", "callbacks.early_stopping.patience=2", "trainer.max_epochs=8",
    "trainer.limit_train_batches=2", "analysis=[fourier]", "analysis.fourier.probe.n_images=4",
    "analysis.fourier.when.every_n_epochs=1",
]  # fmt: skip


@pytest.fixture
def monitored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the callbacks see the values above in place of the validation's."""
    begin = EarlyStopping._run_early_stopping_check

    def told(self: EarlyStopping, trainer) -> None:
        trainer.callback_metrics["val/nll"] = torch.tensor(MONITORED[trainer.current_epoch])
        begin(self, trainer)

    monkeypatch.setattr(EarlyStopping, "_run_early_stopping_check", told)
    monkeypatch.setattr("vitscope.analyses.outputs.plot", lambda *_: None)  # figures take longer than the training
    monkeypatch.setattr("vitscope.analyses.outputs.save_figure", lambda *_: (None, None))


@pytest.mark.parametrize(
    ("every", "stops"),
    [
        (1, ["d1"]),
        pytest.param(5, ["d2"], marks=pytest.mark.slow),
        pytest.param(5, ["d5"], marks=pytest.mark.slow),
        pytest.param(1, ["d3", "d1"], marks=pytest.mark.slow),
        pytest.param(5, ["t5"], marks=pytest.mark.slow),
        pytest.param(1, ["v4"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_early_stopping_keeps_its_checks(call, tiny, tmp_path, monkeypatch, monitored, every, stops) -> None:
    """Cut at an epoch's end, within one, or after the check that ended the training: as many epochs, the same weights."""
    arguments = [*tiny, *EARLY, f"callbacks.checkpoint.every_n_epochs={every}"]
    assert call("train", *arguments, f"run_dir={tmp_path}/whole") == 0
    assert len(losses(tmp_path / "whole")) == 10, "five epochs of two steps"
    cut = tmp_path / "cut"
    first = [*arguments, f"run_dir={cut}"]
    for stop in stops:
        stopped(call, monkeypatch, first, int(stop[1:]), PLACES[stop[0]])
        assert (cut / "checkpoints" / "last.ckpt").exists()
        first = [f"run={cut}", "ckpt_path=last"]
    assert call("train", *first) == 0
    assert losses(cut) == losses(tmp_path / "whole")
    assert_equal_files(tmp_path / "whole", cut)
    assert end_of(cut) == end_of(tmp_path / "whole")
    states = [checkpoint_io.read(run / "checkpoints" / "last.ckpt")["callbacks"] for run in (tmp_path / "whole", cut)]
    (key,) = [key for key in states[0] if key.startswith("EarlyStopping")]
    assert states[0][key]["wait_count"] == states[1][key]["wait_count"] == 2
