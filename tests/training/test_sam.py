"""SAM against its closed form on a quadratic, and inside a training step: one set of statistics, one random stream."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from vitscope.training.lightning_module import Classifier
from vitscope.training.sam import SAM

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*", "ignore:.*does not have many workers.*", "ignore:.*lr_scheduler.step.*",
    "ignore:.*GPU available but not used.*", "ignore:.*no `val_dataloader`.*", "ignore:.*smaller than the logging interval.*",
)  # fmt: skip


def quadratic(hessian: Tensor, w: nn.Parameter, optimizer: torch.optim.Optimizer) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * w @ hessian @ w
        loss.backward()
        return loss

    return closure


def a_hessian(n: int) -> Tensor:
    root = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return root @ root.T


def test_a_step_on_a_quadratic_has_its_closed_form() -> None:
    hessian = a_hessian(5)
    start = torch.arange(1.0, 6.0, dtype=torch.float64)
    w = nn.Parameter(start.clone())
    optimizer = SAM([w], torch.optim.SGD, rho=0.3, lr=0.1)
    loss = optimizer.step(quadratic(hessian, w, optimizer))
    g = hessian @ start
    expected = start - 0.1 * hessian @ (start + 0.3 * g / g.norm())
    torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=1e-12)  # a handful of float64 roundings
    torch.testing.assert_close(loss.detach(), 0.5 * start @ hessian @ start, rtol=1e-13, atol=0)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_without_a_radius_it_is_the_base_optimizer_bit_for_bit(base: Any) -> None:
    hessian = a_hessian(5)
    ends = []
    for make in (base, functools.partial(SAM, base=base, rho=0.0)):
        w = nn.Parameter(torch.ones(5, dtype=torch.float64))
        optimizer = make([w], lr=1e-3, weight_decay=0.1)
        for _ in range(7):
            optimizer.step(quadratic(hessian, w, optimizer))
        ends.append(w.detach())
    assert torch.equal(*ends)


def test_it_tends_to_the_base_optimizer_with_its_radius() -> None:
    hessian = a_hessian(5)
    start = torch.ones(5, dtype=torch.float64)
    plain = start - 0.01 * hessian @ start
    gaps = []
    for rho in (1e-2, 1e-3, 1e-4):
        w = nn.Parameter(start.clone())
        optimizer = SAM([w], torch.optim.SGD, rho=rho, lr=0.01)
        optimizer.step(quadratic(hessian, w, optimizer))
        gaps.append(float((w.detach() - plain).norm()))
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=1e-6)  # linear in rho on a quadratic
    assert gaps[1] / gaps[2] == pytest.approx(10, rel=1e-6)


def test_a_point_without_a_gradient_stays() -> None:
    w = nn.Parameter(torch.zeros(3))
    optimizer = SAM([w], torch.optim.SGD, rho=0.1, lr=1.0)
    optimizer.step(quadratic(torch.eye(3), w, optimizer))
    assert torch.equal(w.detach(), torch.zeros(3))


def test_weights_return_when_the_second_pass_fails() -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = SAM([w], torch.optim.SGD, rho=0.1, lr=1.0)

    def closure() -> Tensor:
        if optimizer.perturbed:
            raise RuntimeError("second")
        return quadratic(torch.eye(3), w, optimizer)()

    with pytest.raises(RuntimeError, match="second"):
        optimizer.step(closure)
    assert torch.equal(w.detach(), torch.ones(3))
    assert not optimizer.perturbed


def test_its_state_is_the_base_optimizers_and_comes_back() -> None:
    hessian = a_hessian(4)
    ends = []
    for interrupted in (False, True):
        w = nn.Parameter(torch.ones(4, dtype=torch.float64))
        optimizer = SAM([w], rho=0.1, lr=0.01, weight_decay=0.1)
        for step in range(6):
            if interrupted and step == 3:
                kept = optimizer.state_dict()
                optimizer = SAM([w], rho=0.1, lr=0.5)
                optimizer.load_state_dict(kept)
                assert optimizer.base.param_groups is optimizer.param_groups
                assert optimizer.param_groups[0]["lr"] == 0.01
            optimizer.step(quadratic(hessian, w, optimizer))
        ends.append(w.detach())
    assert torch.equal(*ends)


def test_refusals() -> None:
    w = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="at least 0, received -1"):
        SAM([w], rho=-1)
    with pytest.raises(ValueError, match="closure"):
        SAM([w]).step()


class Seen(nn.Module):
    """A normalized and a dropped layer that note what they are given and give."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)
        self.given: list[Tensor] = []
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.training:
            self.given.append(x.clone())
            self.kept.append((self.drop(torch.ones_like(x)) > 0).clone())
        return self.head(self.norm(x))


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_a_training_step_makes_two_passes_of_one_kind(tmp_path: Path, clip: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 4, generator=generator) + 2, torch.randint(3, (12,), generator=generator)

    def mix(x: Tensor, y: Tensor, seed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        share = torch.rand(1, generator=torch.Generator().manual_seed(sum(seed)))
        return share * x + (1 - share) * x.flip(0), torch.nn.functional.one_hot(y, 3).float()

    network = Seen()
    module = Classifier(network, num_classes=3, optimizer=functools.partial(SAM, rho=0.5, lr=1e-2), mix=mix,
                        lr_schedule={"kind": "constant"})  # fmt: skip
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=clip,
                         default_root_dir=tmp_path, log_every_n_steps=1)  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=4))
    assert len(network.given) == 6
    assert trainer.global_step == 3
    mean = torch.zeros(4)
    for first, second, a, b in zip(network.given[::2], network.given[1::2], network.kept[::2], network.kept[1::2]):
        assert torch.equal(first, second)
        assert torch.equal(a, b)
        mean = 0.9 * mean + 0.1 * first.mean(0)
    torch.testing.assert_close(network.norm.running_mean, mean)  # of three batches, not of six
    assert network.norm.num_batches_tracked == 3
    assert network.norm.track_running_stats
