"""LightningModule that trains any ``nn.Module`` from images to logits."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from vitscope.core import lr_schedule as schedule
from vitscope.core.batches.batch_format import BatchFormat
from vitscope.core.objective import Objective, hard_targets, labeled, n_labeled
from vitscope.runtime.distributed import all_reduce_sum, gather_objects
from vitscope.runtime.errors import DataError
from vitscope.runtime.logging import is_main_process
from vitscope.runtime.torch_internals import BatchNormBase, set_last_rates, whole_tensor
from vitscope.training import lightning_internals, resume_state
from vitscope.training.accumulation import StepGroup, is_accumulating, is_first, refuse_nonfinite
from vitscope.training.calibration_metric import ExpectedCalibrationError
from vitscope.training.sam import SAM, still_statistics

_logger = logging.getLogger(__name__)

#: seeds of training steps are kept apart from those of data by this constant
_STEP_STREAM = 0x5EED


class Classifier(pl.LightningModule):
    """Trains and evaluates a network under the stated objective.

    Randomness inside a step (mixup, dropout, drop path) is a function of the seed, the step and the rank, so that a resumed
    run repeats an uninterrupted one bit for bit, with or without diagnostics in between.

    Args:
        network: A module from images ``(B, C, H, W)`` to logits ``(B, num_classes)``, or to a mapping or an object with
            ``logits``.
        num_classes: K.
        optimizer: Function from parameters to an optimizer.
        lr_schedule: Keyword arguments of `vitscope.core.lr_schedule.factor`.
        label_smoothing: Smoothing of index targets.
        loss: Name or callable, as `vitscope.Objective` takes it.
        mix: Function from ``(x, y, seed)`` to mixed ``(x, soft y)``; None for no mixup.
        seed: Seed of the run.
        compile: Train through ``torch.compile``; diagnostics always see the uncompiled network.
        channels_last: Hand images over in NHWC order, which convolutions keep; weights stay as they are.
        identity: Plain facts kept in checkpoints and compared on resume.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        num_classes: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        lr_schedule: Mapping[str, Any] | None = None,
        label_smoothing: float = 0.0,
        loss: str | Callable[..., Any] = "cross_entropy",
        mix: Callable[[Tensor, Tensor, tuple[int, ...]], tuple[Tensor, Tensor]] | None = None,
        seed: int = 0,
        compile: bool = False,
        channels_last: bool = False,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = network
        # in a tuple, for a module that is an attribute would be registered, and its weights saved, a second time
        self._compiled = (torch.compile(network),) if compile else (network,)
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        # layers with running statistics that gradient checkpointing runs a second time in the backward pass
        recomputes_activations = any(getattr(m, "grad_checkpointing", False) for m in network.modules())
        self._run_again = [
            m
            for m in network.modules()
            if recomputes_activations and isinstance(m, BatchNormBase) and m.track_running_stats
        ]
        self._optimizer = optimizer
        self._schedule = dict(lr_schedule or {})
        self._mix = mix
        self._seed = seed
        self._position = (0, 0)
        self._pending = ""
        self._group = StepGroup()
        self._counts = torch.zeros(2, dtype=torch.int64)  # this epoch's training images: right, seen
        self.identity = dict(identity or {})
        self.hard_objective = Objective(label_smoothing=label_smoothing, loss=loss)
        self.soft_objective = Objective(loss=loss)
        self._outputs = BatchFormat()
        self.metrics = nn.ModuleDict({f"{stage}_metrics": _metrics(num_classes) for stage in ("val", "test")})

    def __deepcopy__(self, memo: dict[int, Any]) -> Classifier:
        """Copy what is the module's own: weights, metrics and settings; neither the trainer nor the data module that mixes."""
        memo[id(self._mix)] = self._mix  # a method of the data module, shared in place of copied
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        duplicate.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # Lightning's leaves the trainer out
        return duplicate

    @property
    def position(self) -> tuple[int, int]:
        """The epoch and the batches of it that are done, as the last checkpoint read or written states them."""
        return self._position

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, num_classes)``."""
        return self._outputs.selected(self._compiled[0](x.contiguous(memory_format=self._format)))

    def on_fit_start(self) -> None:
        """Move a loss that is a module to the device of the weights."""
        if isinstance(loss := self.hard_objective.loss, nn.Module):
            loss.to(self.device)

    def on_train_start(self) -> None:
        """Do what a stop left to do; let the rates follow the schedule that is in force from here on."""
        for scheduler_config in self.trainer.lr_scheduler_configs:
            _restore_rates(scheduler_config.scheduler)
        resume_state.finish_interrupted_epoch(self.trainer, self._pending)
        self._pending = ""

    def on_train_epoch_end(self) -> None:
        """Let the epoch after a resumed one begin with its first batch."""
        resume_state.leave_resumed_epoch(self.trainer)

    def epoch_accuracy(self) -> float | None:
        """Return the accuracy on this epoch's training batches of all ranks, those before a stop included, and forget them."""
        # an epoch that a stop left only its end to has counts from a file, not yet where the ranks can add them up
        n_correct, n_images = all_reduce_sum(self._counts.to(self.device)).tolist()
        self._counts = torch.zeros_like(self._counts)
        return n_correct / n_images if n_images else None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Note where training stands, for checkpoints."""
        self._position = (self.current_epoch, batch_idx + 1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a micro-batch, mixed if the recipe mixes, with its weight in the optimizer step's mean over images.

        Raises:
            NumericalError: The loss is not finite; the weights are those of the step before.
            DataError: No image of the whole step has a label.
        """
        if self._second_pass():
            return self._loss_at_ascent()
        loss, logits, y = self._loss(batch, batch_idx, ascended=False)
        trainer = self.trainer
        if is_first(batch_idx, trainer.accumulate_grad_batches):
            self._group = StepGroup()
        weight = self._group.add(loss, n_labeled(y), trainer.world_size)
        refuse_nonfinite(self._group.loss_sum, self.global_step, self.trainer.optimizers[0])  # of all ranks
        if self._steps_twice():
            self._group.parts.append((batch, batch_idx, weight))
        if self._group.images == 0 and not is_accumulating(trainer):
            raise DataError("data", None, f"no image of step {self.global_step} has a label: all are ignored (-100)",
                            "leave such images out")  # fmt: skip
        self.log("train/loss", torch.tensor(self._group.mean_loss, dtype=torch.float64).to(loss), prog_bar=True,
                 batch_size=len(y))  # fmt: skip
        counts = labeled(y)
        self._counts = self._counts.to(y.device)
        self._counts[0] += (logits.detach().argmax(dim=1) == hard_targets(y))[counts].sum()
        self._counts[1] += counts.sum()
        return loss * weight

    def _loss(self, batch: tuple[Tensor, Tensor], batch_idx: int, *, ascended: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean loss over the images with a label (0 where there is none), the logits and the targets."""
        x, y = batch
        step = self.current_epoch * self._batches_per_epoch() + batch_idx
        torch.manual_seed(_step_seed(self._seed, step, self.global_rank))
        if self._mix is not None:
            x, y = self._mix(x, y, (self._seed, _STEP_STREAM, step, self.global_rank))
        with still_statistics(self.model, ascended):
            logits = self(x)
        objective = self.soft_objective if y.ndim == 2 else self.hard_objective
        exact_logits = _in_full_precision(logits)
        loss = objective.data_loss(exact_logits, y) if n_labeled(y) else exact_logits.sum() * 0
        return loss, logits, y

    def _loss_at_ascent(self) -> Tensor:
        """Differentiate the group's micro-batches once more, at the end of SAM's ascent; return the last one's loss for that.

        It is not the training loss, so it is neither logged nor counted.
        """
        *earlier, (batch, batch_idx, weight) = self._group.parts
        if earlier:  # the gradient of the first pass; the trainer clears it at the first micro-batch of a group alone
            self.trainer.optimizers[0].zero_grad()
        for part, number, share in earlier:
            loss = self._loss(part, number, ascended=True)[0] * share / self.trainer.accumulate_grad_batches
            refuse_nonfinite(loss.item(), self.global_step, self.trainer.optimizers[0])
            self.trainer.strategy.backward(loss, None)
        loss = self._loss(batch, batch_idx, ascended=True)[0]
        refuse_nonfinite(loss.item(), self.global_step, self.trainer.optimizers[0])
        return loss * weight

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate; what is run again for that moves no running statistics a second time."""
        with _preserved_buffers(self._run_again):
            super().backward(loss, *args, **kwargs)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Add a batch to the ``val/`` metrics; return the ``logits`` and ``targets`` of its labeled images for callbacks."""
        return self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Add a batch to the ``test/`` metrics; return the ``logits`` and ``targets`` of its labeled images for callbacks."""
        return self._evaluate("test", batch)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make the gradient that of the mean over the step's images; log its norm before clipping, at the logging interval."""
        factor = self._group.gradient_factor(self.trainer.accumulate_grad_batches)
        if factor != 1:
            for p in self.model.parameters():
                if p.grad is not None:
                    p.grad.mul_(factor)
        interval = max(getattr(self.trainer, "log_every_n_steps", 1), 1)
        if (self.global_step + 1) % interval == 0 and not self._second_pass():
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            self.log("train/grad_norm", whole_tensor(get_total_norm(gradients)))

    def new_optimizer(self) -> Optimizer:
        """Return the optimizer over all parameters, before its first step."""
        return self._optimizer([p for p in self.model.parameters() if p.requires_grad])

    def configure_optimizers(self) -> Any:
        """Return the optimizer over all parameters and its schedule by step."""
        optimizer = self.new_optimizer()
        if is_main_process() and isinstance(summary := getattr(optimizer, "summary", None), str):
            _logger.info(f"optimizer: {summary}")
        if self.trainer.num_training_batches == float("inf"):
            # a training of steps alone: Lightning has not looked yet, and an epoch without end would be all warm-up
            lightning_internals.load_training_data(self.trainer)
        total = float(self.trainer.estimated_stepping_batches)
        per_epoch = max(1, -(-self._batches_per_epoch() // self.trainer.accumulate_grad_batches))
        factor = functools.partial(
            schedule.factor, steps_per_epoch=per_epoch, total_epochs=total / per_epoch, **self._schedule
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what a resumed run needs besides Lightning's own state."""
        epoch, batch = self._position
        is_epoch_over = batch >= self._batches_per_epoch()
        pending = None
        if self.trainer.state.fn == "fit":
            pending = resume_state.mark_unfinished_epoch(self.trainer, checkpoint, is_epoch_over)
        # of all ranks: one sum where it goes on
        n_correct, n_images = map(sum, zip(*gather_objects(self._counts.tolist())))
        if is_epoch_over:
            epoch, batch = epoch + 1, 0
        facts = {"epoch": epoch, "batch": batch, "pending": pending or "", "right": n_correct, "seen": n_images}
        checkpoint["vitscope"] = {**facts, **self.identity}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Tell the data where to go on."""
        facts = checkpoint.get("vitscope", {})
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None and "epoch" in facts:
            self._position, self._pending = (facts["epoch"], facts["batch"]), facts.get("pending", "")
            datamodule.resume_at(facts["epoch"], facts["batch"])
            counts = (facts.get("right", 0), facts.get("seen", 0)) if self.global_rank == 0 else (0, 0)
            self._counts = torch.tensor(counts, dtype=torch.int64)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = batch
        counts = labeled(y)
        logits = _in_full_precision(self(x)[counts])
        y = hard_targets(y)[counts]
        probabilities = logits.softmax(dim=1)
        n = len(y)
        metrics: Any = self.metrics[f"{stage}_metrics"]
        if n:
            metrics["scores"](probabilities, y)
        brier = probabilities.square().sum(1) + 1 - 2 * probabilities.gather(1, y[:, None]).squeeze(1)
        means = {"loss": self.hard_objective.data_loss(logits, y) if n else logits.sum()}
        # else outputs are not said to be logits of a softmax
        is_likelihood = self.hard_objective.loss == "cross_entropy"
        if is_likelihood:
            means |= {"nll": self.soft_objective.data_loss(logits, y), "brier": brier.mean()}
        for name, value in means.items():
            metrics[name](value if n else torch.zeros_like(value), n)  # a mean over no image is NaN
            self.log(f"{stage}/{name}", metrics[name], batch_size=n, prog_bar=False, on_epoch=True)
        for name, metric in metrics["scores"].items(keep_base=True):
            if name != "ece" or is_likelihood:
                self.log(f"{stage}/{name}", metric, batch_size=n, prog_bar=name == "accuracy", on_epoch=True)
        return {"logits": logits.detach(), "targets": y}

    def _batches_per_epoch(self) -> int:
        batches = self.trainer.num_training_batches
        return int(batches) if batches != float("inf") else 1 << 40

    def _steps_twice(self) -> bool:
        return isinstance(next(iter(self.trainer.optimizers), None), SAM)

    def _second_pass(self) -> bool:
        optimizer = next(iter(self.trainer.optimizers), None)
        return isinstance(optimizer, SAM) and optimizer.perturbed


def _metrics(num_classes: int) -> nn.ModuleDict:
    scores = MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "accuracy_top5": MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes)),
            "ece": ExpectedCalibrationError(),
        },
        compute_groups=False,
    )
    # NaN stays NaN: by default torchmetrics leaves such batches out of the mean, and "disable" drops the weights
    means = {name: MeanMetric(nan_strategy=float("nan")) for name in ("loss", "nll", "brier")}
    return nn.ModuleDict({"scores": scores, **means})


def _in_full_precision(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype != torch.float64 else logits


def _restore_rates(scheduler: Any) -> None:
    """Give the optimizer the rates of a schedule at its step: those restored with it may be of a shorter or a longer training."""
    rates = [base * factor(scheduler.last_epoch) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates):
        group["lr"] = rate
    set_last_rates(scheduler, rates)


@contextmanager
def _preserved_buffers(layers: Sequence[nn.Module]) -> Iterator[None]:
    copies = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]
    yield
    for buffer, value in copies:
        buffer.copy_(value)


def _step_seed(seed: int, step: int, rank: int) -> int:
    # torch.manual_seed takes 64 bits; splitmix64's constants spread neighboring steps over them
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB + _STEP_STREAM) % 2**64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    return (mixed ^ (mixed >> 31)) % 2**63
