"""Learning rates, gradient norms and accuracies of a training against values worked out by hand."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vitscope.training.lightning_module import Classifier

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*", "ignore:.*does not have many workers.*", "ignore:.*GPU available but not used.*",
    "ignore:.*no `val_dataloader`.*", "ignore:.*smaller than the logging interval.*", "ignore:.*lr_scheduler.step.*",
)  # fmt: skip

LR = 0.5
generator = torch.Generator().manual_seed(3)
X = torch.randn(13, 4, generator=generator, dtype=torch.float64)
Y = torch.randint(3, (13,), generator=generator)


class Steps(pl.Callback):
    """Notes the learning rate of each step, the logged norms by step, and the accuracy of each epoch."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.norms: dict[int, float] = {}
        self.accuracies: list[float | None] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"] / LR)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.accuracies.append(pl_module.epoch_accuracy())


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()


def train(folder: Path, schedule: dict[str, Any], *, lr: float = LR, **options: Any) -> Steps:
    """Train two epochs of four batches of 4, 4, 4 and 1 images."""
    optimizer: Any = functools.partial(torch.optim.SGD, lr=lr)
    steps = Steps()
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, precision="64-true",
                         enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
                         callbacks=[steps], **options)  # fmt: skip
    module = Classifier(network(), num_classes=3, optimizer=optimizer, lr_schedule=schedule)

    def note_norm(name: str, value: Any, **_: Any) -> None:
        if name == "train/grad_norm":
            steps.norms[module.global_step] = float(value)

    module.log = note_norm
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=4))
    return steps


def test_epochs_of_the_schedule_have_as_many_steps_as_those_of_the_training(tmp_path: Path) -> None:
    """Three batches a step and one left over: two steps an epoch, so a warm-up of one epoch has two."""
    steps = train(tmp_path, {"kind": "cosine", "warmup_epochs": 1}, accumulate_grad_batches=3)
    assert steps.rates == pytest.approx([0.5, 1.0, 1.0, 0.5 * (1 + math.cos(math.pi / 2))])


def test_norms_are_those_of_every_nth_gradient(tmp_path: Path) -> None:
    steps = train(tmp_path, {"kind": "constant"}, log_every_n_steps=3)
    model, norms = network(), []
    for step in range(8):
        batch = slice(4 * (step % 4), 4 * (step % 4) + 4)
        gradients = torch.autograd.grad(F.cross_entropy(model(X[batch]), Y[batch]), list(model.parameters()))
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients):
                p -= LR * g
    assert steps.norms == pytest.approx({step: norms[step] for step in (2, 5)}, rel=1e-12)


def test_the_accuracy_of_an_epoch_is_over_its_images_alone(tmp_path: Path) -> None:
    steps = train(tmp_path, {"kind": "constant"}, lr=0.0)
    expected = float((network()(X).argmax(1) == Y).double().mean())
    assert 0 < expected < 1
    assert steps.accuracies == pytest.approx([expected] * 2, rel=1e-12)
