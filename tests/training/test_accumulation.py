"""A step follows the mean over all images of its group: incomplete groups, uneven batches, ignored labels, SAM, ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tests.fixtures.programs.processes import results_of_ranks
from vitscope.data.loader import BatchSampler, Draw
from vitscope.runtime import distributed
from vitscope.runtime.errors import DataError, NumericalError
from vitscope.training.accumulation import StepGroup, refuse_nonfinite
from vitscope.training.lightning_module import Classifier
from vitscope.training.sam import SAM

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*", "ignore:.*does not have many workers.*", "ignore:.*lr_scheduler.step.*",
    "ignore:.*GPU available but not used.*", "ignore:.*no `val_dataloader`.*", "ignore:.*smaller than the logging interval.*",
)  # fmt: skip

LR, RHO, EPOCHS = 0.5, 0.3, 2
generator = torch.Generator().manual_seed(3)
X = torch.randn(13, 4, generator=generator, dtype=torch.float64)
Y = torch.randint(3, (13,), generator=generator)
IGNORED = Y.clone()
IGNORED[[0, 2, 3, 4, 5, 6, 7, 12]] = -100  # with batches of four: one of one label, one without any
Batches = Sequence[tuple[Tensor, Tensor]]


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


class Images(Dataset[Any]):
    def __init__(self, y: Tensor) -> None:
        self.y = y

    def __getitems__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        return X[torch.from_numpy(draw.indices)], self.y[torch.from_numpy(draw.indices)]

    def __getitem__(self, index: int) -> Any: ...


class Data(pl.LightningDataModule):
    """Thirteen images in their order, in batches over the ranks: nothing is padded or repeated."""

    def __init__(self, y: Tensor, batch_size: int) -> None:
        super().__init__()
        self.y, self.batch_size = y, batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        rank, world = distributed.rank(), distributed.world_size()
        sampler = BatchSampler(13, self.batch_size, shuffle=False, rank=rank, world_size=world)
        return DataLoader(Images(self.y), batch_sampler=sampler, collate_fn=as_is)


def as_is(batch: Any) -> Any:
    return batch


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.seen.append(float(trainer.callback_metrics["train/loss"]))


def trained(
    folder: Path, y: Tensor, batch_size: int, accumulate: int, optimizer: Callable[..., Any], smoothing: float = 0.0,
    **options: Any,
) -> tuple[nn.Module, list[float]]:  # fmt: skip
    model, losses = network(), Losses()
    module = Classifier(model, num_classes=3, optimizer=optimizer, lr_schedule={"kind": "constant"},
                        label_smoothing=smoothing)  # fmt: skip
    trainer = pl.Trainer(max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False, precision="64-true",
                         enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
                         accumulate_grad_batches=accumulate, callbacks=[losses], use_distributed_sampler=False,
                         **options)  # fmt: skip
    trainer.fit(module, datamodule=Data(y, batch_size))
    return model, losses.seen


def by_hand(y: Tensor, groups: Sequence[slice], rho: float, smoothing: float) -> tuple[nn.Module, list[float]]:
    """Gradient descent where each step takes a group's images at once, with torch's own mean over those with a label."""
    model, losses = network(), []
    parameters = list(model.parameters())
    for _ in range(EPOCHS):
        for group in groups:

            def loss(group: slice = group) -> Tensor:
                return F.cross_entropy(model(X[group]), y[group], label_smoothing=smoothing)

            losses.append(float(loss().detach()))
            gradient = torch.autograd.grad(loss(), parameters)
            length = torch.cat([g.flatten() for g in gradient]).norm()
            kept = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p, g in zip(parameters, gradient):
                    p.add_(rho * g / length)
            gradient = torch.autograd.grad(loss(), parameters)
            with torch.no_grad():
                for p, old, g in zip(parameters, kept, gradient):
                    p.copy_(old - LR * g)
    return model, losses


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for p, q in zip(one.parameters(), other.parameters()):
        # some hundred float64 operations of size one, in another order
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-12)


# four batches of 4, 4, 4 and 1 images
GROUPS = {1: (4, 8, 12), 2: (8,), 3: (12,), 4: (), 7: ()}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("y", [Y, IGNORED], ids=["labeled", "ignored"])
@pytest.mark.parametrize("rho", [0.0, RHO], ids=["sgd", "sam"])
@pytest.mark.parametrize("accumulate", [2, 3, 7])
def test_a_step_is_of_the_mean_over_its_images(tmp_path: Path, accumulate, rho, y, smoothing) -> None:
    optimizer: Any = functools.partial(torch.optim.SGD, lr=LR)
    if rho:
        optimizer = functools.partial(SAM, base=torch.optim.SGD, rho=rho, lr=LR)
    if accumulate == 3 and y is IGNORED:
        y = y.clone()
        y[12] = Y[12]  # else its last step has no label at all
    cuts = [0, *GROUPS[accumulate], 13]
    expected, losses = by_hand(y, [slice(a, b) for a, b in zip(cuts, cuts[1:])], rho, smoothing)
    model, seen = trained(tmp_path, y, 4, accumulate, optimizer, smoothing)
    assert_same(model, expected)
    assert seen == pytest.approx(losses, rel=1e-6)  # what Lightning keeps of a metric is in single precision


def test_a_step_without_any_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image of step 1 has a label"):
        trained(tmp_path, IGNORED, 4, 1, functools.partial(torch.optim.SGD, lr=LR))


def error_of_step() -> str:
    group, loss = StepGroup(), torch.tensor(float("nan") if distributed.rank() else 1.5)
    group.add(loss, 2, distributed.world_size())
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer.param_groups[0]["lr"] = 0.025  # as a warm-up does
    with pytest.raises(NumericalError) as raised:
        refuse_nonfinite(group.loss_sum, 3, optimizer)
    return str(raised.value)


def test_all_ranks_stop_where_one_has_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    first, second = results_of_ranks(error_of_step, tmp_path)
    assert first == second
    assert first.startswith("optimizer.lr=0.1: loss nan at step 3, whose learning rate is 0.025; lower it")


@pytest.mark.parametrize(("y", "accumulate", "rho"), [(Y, 2, RHO), (IGNORED, 2, RHO)], ids=["labeled", "ignored"])
def test_two_ranks_make_the_steps_of_one(tmp_path: Path, y: Tensor, accumulate: int, rho: float) -> None:
    """Two images a rank, so global batches of 4, 4 and 5 (3 and 2): the last group is incomplete and uneven."""
    expected, _ = by_hand(y, [slice(0, 8), slice(8, 13)], rho, 0.0)
    optimizer = functools.partial(SAM, base=torch.optim.SGD, rho=rho, lr=LR)
    model, _ = trained(tmp_path, y, 2, accumulate, optimizer, devices=2, strategy="ddp_fork")
    assert_same(model, expected)
