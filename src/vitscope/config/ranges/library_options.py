"""Options whose targets belong to other libraries or to no single class, with the ranges that these do not check themselves.

Each class documents one group of keys. The fields hold types of `vitscope.runtime.value_ranges`; keys without a range are left
out, for the signature of the target checks them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from vitscope.runtime.value_ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Seed,
    ShareBelowOne,
    ValueRange,
)


def _is_some_batches(limit: float) -> bool:
    return limit >= 1 if isinstance(limit, int) else 0 < limit <= 1


def _is_any_batches(limit: float) -> bool:
    return limit >= 0 if isinstance(limit, int) else limit <= 1


def _is_limit(number: int) -> bool:
    return number == -1 or number >= 1


#: a number of batches, or a share of them; not none
SomeBatches = Annotated[int | float, ValueRange("at least 1, or a share in (0.0, 1.0]", _is_some_batches)]

#: a number of batches, or a share of them
AnyBatches = Annotated[int | float, ValueRange("at least 0, or a share in [0.0, 1.0]", _is_any_batches)]

LearningRate = Annotated[float, ValueRange("greater than 0", lambda rate: rate > 0, example="0.001")]


@dataclass(frozen=True)
class RunOptions:
    """Keys outside of groups.

    Attributes:
        seed: Seed of the initial weights, of the order of the images and of augmentation.
    """

    seed: Seed


@dataclass(frozen=True)
class OptimizerOptions:
    """Options of optimizers of `torch.optim` and `timm.optim`, which accept rates and momenta that cannot train.

    Attributes:
        lr: Learning rate at the end of the warm-up.
        momentum: Share of the last step that is kept.
        weight_decay: Decay of the weights, as the optimizer defines it.
    """

    lr: LearningRate
    momentum: ShareBelowOne
    weight_decay: NonNegativeFloat


@dataclass(frozen=True)
class TrainerOptions:
    """Options of Lightning's Trainer, some of which it accepts outside of their range and some of which it checks late.

    Attributes:
        max_epochs: Number of epochs; -1 for no limit.
        max_steps: Number of optimizer steps; -1 for no limit.
        limit_train_batches: Batches of a training epoch: a number, or a share of all.
        limit_val_batches: Batches of a validation.
        limit_test_batches: Batches of the test.
        limit_predict_batches: Batches of a prediction.
        val_check_interval: Training batches between validations: a number, or a share of an epoch.
        check_val_every_n_epoch: Epochs between validations.
        num_nodes: Number of machines.
        gradient_clip_val: Largest norm of the gradient; 0 for no limit.
        accumulate_grad_batches: Batches of an optimizer step.
        log_every_n_steps: Optimizer steps between rows of the metrics log.
    """

    max_epochs: Annotated[int, ValueRange("at least 1 (or -1 with trainer.max_steps)", _is_limit)]
    max_steps: Annotated[int, ValueRange("at least 1 (or -1 for none)", _is_limit)]
    limit_train_batches: SomeBatches
    limit_val_batches: AnyBatches
    limit_test_batches: AnyBatches
    limit_predict_batches: AnyBatches
    val_check_interval: SomeBatches
    check_val_every_n_epoch: PositiveInt
    num_nodes: PositiveInt
    gradient_clip_val: NonNegativeFloat
    accumulate_grad_batches: PositiveInt
    log_every_n_steps: NonNegativeInt


@dataclass(frozen=True)
class DataRecipe:
    """Defaults of trainer, optimizer and models on a data set.

    Attributes:
        warmup_epochs: Epochs in which the learning rate rises linearly.
        gradient_clip_val: Largest norm of the gradient; 0 for no limit.
        drop_path: Rate of dropped residual branches in the last block.
    """

    warmup_epochs: NonNegativeFloat
    gradient_clip_val: NonNegativeFloat
    drop_path: ShareBelowOne


@dataclass(frozen=True)
class ProbeOptions:
    """Images that an analysis measures.

    Attributes:
        split: ``train``, ``val`` or ``test``.
        augment: Whether to apply the training augmentation; or the name of the objective whose augmentation to apply.
        n_images: Number of images; None for the whole split.
        batch_size: Images of a batch; None for the size that the data set is evaluated with.
        seed: Seed of the choice of images and of augmentation; None for the run's.
        mix: Whether to mix images as in training; None to follow ``augment``.
    """

    split: str
    augment: bool | str
    n_images: PositiveInt | None
    batch_size: PositiveInt | None
    seed: Seed | None
    mix: bool | None


@dataclass(frozen=True)
class MeasurementTimes:
    """Points of a training at which an analysis measures.

    Attributes:
        start: Whether to measure before the first step.
        every_n_epochs: Epochs between measurements during training; 0 or None for none.
        every_n_steps: Optimizer steps between measurements during training; 0 or None for none.
        at_steps: Numbers of optimizer steps after which to measure, counted from 1.
        end: Whether to measure at the end.
    """

    start: bool
    every_n_epochs: NonNegativeInt | None
    every_n_steps: NonNegativeInt | None
    at_steps: list[int] | None
    end: bool
