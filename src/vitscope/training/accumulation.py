"""Weights of micro-batches, so that an optimizer step follows the gradient of the mean over all images of its group.

An optimizer step sees a group of micro-batches k = 1, ..., K on ranks r = 1, ..., W; micro-batch (k, r) has n_kr images with
a label and the mean loss L_kr over them. The loss of the step is the mean over all those images,

    L = sum_kr n_kr L_kr / N,    N = sum_kr n_kr.

Lightning divides each loss by A = ``accumulate_grad_batches`` and averages gradients over the ranks, which gives
sum_kr L_kr / (A W): another loss where the last group of an epoch has K < A micro-batches, or where the n_kr differ. Here a
micro-batch enters with the weight ``W n_kr / N_1``, N_1 being the images of the first micro-batch on all ranks, and the
gradient of the whole group is multiplied by ``A N_1 / N``; the product is the gradient of L. Both factors are exactly 1 where
all n_kr are equal and K = A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch.optim import Optimizer

from vitscope.runtime.distributed import all_reduce_sum
from vitscope.runtime.errors import NumericalError

Batch = tuple[Tensor, Tensor]


@dataclass
class StepGroup:
    """Counts the micro-batches of one optimizer step on all ranks.

    Attributes:
        first: Number of labeled images of the first micro-batch on all ranks, at least 1.
        images: Number of labeled images of all micro-batches on all ranks; N once the group is complete.
        loss_sum: Sum of their losses.
        parts: ``(batch, number within the epoch, weight)`` of this rank's micro-batches, where SAM needs them again.
    """

    first: int = 0
    images: int = 0
    loss_sum: float = 0.0
    parts: list[tuple[Batch, int, float]] = field(default_factory=list)

    def add(self, mean_loss: Tensor, n_images: int, world_size: int) -> float:
        """Count a micro-batch of this rank and of the other ranks; return the weight of this rank's.

        Args:
            mean_loss: Mean loss over the labeled images of the micro-batch; 0 where there is none.
            n_images: Number of labeled images.
            world_size: Number of ranks, each of which calls this at the same micro-batch.
        """
        loss_sum = float(mean_loss.detach()) * n_images
        images = n_images
        if world_size > 1:
            shared = all_reduce_sum(
                torch.tensor([n_images, loss_sum], dtype=torch.float64, device=mean_loss.device)
            ).tolist()
            images, loss_sum = int(shared[0]), shared[1]
        if self.first == 0:
            self.first = max(images, 1)
        self.images += images
        self.loss_sum += loss_sum
        return world_size * n_images / self.first

    @property
    def mean_loss(self) -> float:
        """Mean loss over the images so far; NaN where none has a label."""
        return self.loss_sum / self.images if self.images else float("nan")

    def gradient_factor(self, accumulate_grad_batches: int) -> float:
        """Return the factor ``A N_1 / N`` of the accumulated gradient."""
        return accumulate_grad_batches * self.first / self.images


def refuse_nonfinite(loss: float, step: int, optimizer: Optimizer) -> None:
    """Raise NumericalError where the loss of a step, or a sum of such losses, is not finite.

    Args:
        loss: The loss.
        step: Number of the step.
        optimizer: The optimizer that makes the step; the error states ``optimizer.lr``, and the step's own rate where a warm-up
            or a schedule has made it another one.
    """
    if math.isfinite(loss):
        return
    rate = float(optimizer.param_groups[0]["lr"])
    configured_rate = float(optimizer.defaults.get("lr", rate))
    reason = f"loss {loss} at step {step}"
    if rate != configured_rate:
        reason += f", whose learning rate is {rate:.4g}"
    fix = "lower it, warm up longer or clip gradients; the last checkpoint is finite"
    raise NumericalError("optimizer.lr", configured_rate, reason, fix)


def is_accumulating(trainer: Trainer) -> bool:
    """Tell whether the gradient of the current micro-batch waits for more micro-batches before the optimizer steps."""
    n_batches = trainer.fit_loop.batch_idx + 1  # of this epoch, the current one included
    is_last = trainer.is_last_batch or n_batches == trainer.num_training_batches
    ends_group = is_last and not trainer.strategy.handles_gradient_accumulation
    return n_batches % trainer.accumulate_grad_batches != 0 and not ends_group


def is_first(batch_idx: int, accumulate_grad_batches: int) -> bool:
    """Tell whether a micro-batch opens a group: groups are counted from the start of each epoch."""
    return batch_idx % accumulate_grad_batches == 0
