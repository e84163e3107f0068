"""Data module: splits, loaders that resume at a position, and frozen batches for diagnostics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from vitscope.core.objective_card import RANDOM_LABELS
from vitscope.data import philox, range_checks, splits
from vitscope.data.augment.augment import Recipe
from vitscope.data.augment.mixup import Mixing, mix
from vitscope.data.loader import Augmented, BatchSampler, Loader
from vitscope.data.probe_batches import Batch, ProbeBatches, freeze_batches, limit_images
from vitscope.data.sources import photos
from vitscope.data.sources.array_images import ArrayImages
from vitscope.data.sources.file_images import FileImages, model_recipe
from vitscope.data.split_checks import check_split
from vitscope.runtime import distributed
from vitscope.runtime.errors import ConfigError
from vitscope.runtime.value_ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    PositiveShare,
    Seed,
    ShareBelowOne,
    UnitInterval,
)

Images = ArrayImages | FileImages


class DataModule(pl.LightningDataModule):
    """Any data set, behind one interface.

    `split_seed` decides what the data set is (held-out images, fraction, random labels), `seed` in what order and
    how augmented it is seen: five seeds of one experiment share their images.

    Args:
        source: `source(split, root=..., split_seed=...)` gives `ArrayImages` or `FileImages`.
        name: Name of the data set, for cards and errors.
        root: Where files are; not used by sets that come with a package.
        image_size: Height and width of what the model sees.
        num_classes: Number of classes, checked against the data.
        mean: Mean of each channel, pixels in [0, 1].
        std: Standard deviation of each channel, pixels in [0, 1].
        batch_size: Training images per batch and rank.
        eval_batch_size: Images per batch and rank in evaluation.
        fraction: Share of each class's training images that is used.
        num_workers: Worker processes of each loader.
        seed: Seed of order and augmentation.
        split_seed: Seed of held-out images, fraction and random labels.
        augment: `none`, `crop_flip`, or a RandAugment string such as `rand-m9-n2-mstd1.0`.
        flip: Whether augmentation may mirror images.
        crop_fill: Byte that pads an image in memory before its random crop.
        random_erasing: Probability of erasing a rectangle.
        mixup: Alpha of mixup, 0 for none.
        cutmix: Alpha of CutMix, 0 for none.
        switch_prob: Probability of CutMix where both are on.
        label_smoothing: Smoothing of mixed targets.
        random_labels: Train on labels in random order (the random-label baseline).
        drop_last: Leave out the last, smaller training batch.
        crop_pct: Share of the resized image that the center crop of files keeps.
        interpolation: Resizing filter of files.
        crop_mode: `center`, `squash` or `border`: how files are resized before the crop (see `Recipe`).
        background: Red, green and blue, 0 to 255, that show through transparent pixels of files.
        pixel_range: Samples of files that become black and white, `[low, high]`: needed by 32-bit integers and floats; None
            for 8-bit images, and for 16-bit ones on their full scale.
        transform: `model`: size, crop, filter, mean and std are those the model was trained with (see `adapt_to`).

    Raises:
        ConfigError: A value out of range, or a number of classes that is not the data's.
        DataError: Data that is missing, unreadable, empty, or labeled out of range.
    """

    def __init__(
        self,
        source: Callable[..., Images] = photos.load,
        *,
        name: str = "photos",
        root: str | None = None,
        image_size: PositiveInt = 32,
        num_classes: PositiveInt = 16,
        mean: Sequence[float] = (0.502, 0.502, 0.502),
        std: Sequence[float] = (0.1647, 0.1647, 0.1647),
        batch_size: PositiveInt = 96,
        eval_batch_size: int = 256,
        fraction: PositiveShare = 1.0,
        num_workers: NonNegativeInt = 0,
        seed: Seed = 0,
        split_seed: Seed = 0,
        augment: str = "none",
        flip: bool = True,
        crop_fill: int = 0,
        random_erasing: UnitInterval = 0.0,
        mixup: NonNegativeFloat = 0.0,
        cutmix: NonNegativeFloat = 0.0,
        switch_prob: UnitInterval = 0.5,
        label_smoothing: ShareBelowOne = 0.0,
        random_labels: bool = False,
        drop_last: bool = False,
        crop_pct: float = 0.875,
        interpolation: str = "bilinear",
        crop_mode: str = "center",
        background: Sequence[int] = (255, 255, 255),
        pixel_range: Sequence[float] | None = None,
        transform: str | None = None,
    ) -> None:
        super().__init__()
        self.source, self.name, self.root = source, name, root
        self.num_classes, self.channels = range_checks.integer("data.num_classes", num_classes, 1), 3
        self.batch_size = range_checks.integer("data.batch_size", batch_size, 1)
        self.eval_batch_size = range_checks.integer("data.eval_batch_size", eval_batch_size, 1)
        self.num_workers = range_checks.integer("data.num_workers", num_workers, 0)
        self.seed = range_checks.integer("data.seed", seed, 0)
        self.split_seed = range_checks.integer("data.split_seed", split_seed, 0)
        if not 0 < fraction <= 1:
            raise ConfigError("data.fraction", fraction, "not in (0, 1]", "give the share of each class to train on")
        self.fraction, self.random_labels, self.drop_last = float(fraction), random_labels, drop_last
        if transform not in (None, "model"):
            raise ConfigError("data.transform", transform, "unknown transform", "choose null or model")
        self.transform = transform
        self.mixing = Mixing(mixup, cutmix, switch_prob, label_smoothing)
        self.recipe = Recipe(
            augment=augment,
            mean=tuple(mean),
            std=tuple(std),
            image_size=image_size,
            flip=flip,
            crop_fill=crop_fill,
            random_erasing=random_erasing,
            crop_pct=crop_pct,
            interpolation=interpolation,
            crop_mode=crop_mode,
            background=tuple(background),
            pixel_range=None if pixel_range is None else tuple(pixel_range),
        )
        self._splits: dict[str, Images] = {}
        self._position = (0, 0)
        self._train_sampler: BatchSampler | None = None

    @property
    def image_size(self) -> int:
        """Height and width of what the model sees."""
        return self.recipe.image_size

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel, pixels in [0, 1]: `x * std + mean` is pixel space again."""
        return self.recipe.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, pixels in [0, 1]."""
        return self.recipe.std

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class (reads the test split if nothing was read yet)."""
        split = next(iter(self._splits), "test")
        return self.split(split).class_names

    def present_classes(self, split: str) -> tuple[int, ...]:
        """Return the classes that have images in a split: not all of the 1000 in ImageNet-A and -R."""
        return tuple(self.split(split).labels.unique().tolist())

    @property
    def mixes(self) -> bool:
        """Whether training batches are mixed."""
        return self.mixing.on

    def adapt_to(self, model: nn.Module) -> None:
        """Take timm's preprocessing for `model` where `transform` is `model`; otherwise do nothing."""
        if self.transform == "model":
            self.recipe = model_recipe(model, self.recipe)
            self._splits.clear()  # images in memory are kept at the size that was known

    def setup(self, stage: str | None = None) -> None:
        """Read the splits of a stage (`fit`, `validate`, `test`; all for None)."""
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), None: ("train", "val", "test")}
        for split in needed.get(stage, ()):
            self.split(split)

    def split(self, split: str) -> Images:
        """Return a split's images, read at the first request: `train`, `val`, `test`, or a set's further ones."""
        if split not in self._splits:
            images = self.source(split, root=self.root, split_seed=self.split_seed)
            check_split(images, split, name=self.name, root=self.root, num_classes=self.num_classes)
            if split == "train":
                images = self._thinned(images)
            if isinstance(images, ArrayImages):
                if self.transform == "model":
                    problem = f"the images of {self.name} are in memory and are neither resized nor cropped as a model's files"
                    raise ConfigError(
                        "data.transform", "model", problem, "set data.transform=null, data.mean and data.std"
                    )
                images = images.resized(self.image_size)
            self._splits[split] = images
        return self._splits[split]

    def train_dataloader(self) -> Loader:
        """Return the training loader; it starts where `resume_at` said."""
        self._train_sampler = self._sampler("train", self.batch_size, shuffle=True, drop_last=self.drop_last)
        self._train_sampler.resume_at(*self._position)
        return self._loader("train", self._train_sampler, self.recipe)

    def val_dataloader(self) -> Loader:
        """Return the loader of the validation split, not augmented.

        In one mixed order, for splits lie class by class: so the first batches (`trainer.limit_val_batches`) stand for all.
        """
        return self._mixed_loader("val")

    def test_dataloader(self) -> Loader:
        """Return the loader of the test split, not augmented, in one mixed order as the validation split's."""
        return self._mixed_loader("test")

    def eval_dataloader(self, split: str) -> Loader:
        """Return a loader over any split: in order, not augmented, each image once over all ranks."""
        sampler = self._sampler(split, self.eval_batch_size, shuffle=False)
        return self._loader(split, sampler, self.recipe.plain())

    def _mixed_loader(self, split: str) -> Loader:
        sampler = self._sampler(split, self.eval_batch_size, shuffle=True, fixed=True, seed=self.split_seed)
        return self._loader(split, sampler, self.recipe.plain())

    def resume_at(self, epoch: int, batch: int) -> None:
        """Start training at `batch` of `epoch`, now or when the loader is made; later epochs start at 0."""
        self._position = (epoch, batch)
        if self._train_sampler is not None:
            self._train_sampler.resume_at(epoch, batch)

    def probe_batches(
        self,
        split: str = "train",
        *,
        augment: bool = False,
        n_images: int | None = None,
        batch_size: int = 16,
        seed: int | None = None,
        mix: bool | None = None,
    ) -> ProbeBatches:
        """Return frozen batches for diagnostics (docs/definitions.md section 2, "Batches").

        Batch b holds images b * batch_size and following of an order that `seed` decides; each is augmented by
        (seed, index) and the batch is mixed by (seed, b): one lambda, partner = flip. Without augmentation and
        without `n_images`: the whole split in its own order.

        Args:
            split: Any split.
            augment: Whether to apply the training augmentation, mixup and CutMix.
            n_images: How many images; all of them for None.
            batch_size: Images a batch; the last one may be smaller.
            seed: Seed of images, augmentation and mixing; the module's for None.
            mix: Mix the batches; None: where `augment` is set and the objective mixes.

        Returns:
            A sequence of `(x, y)`: float32 `(B, 3, H, W)`; class indices `(B,)`, or, mixed, soft targets
            `(B, num_classes)` with label smoothing included.

        Raises:
            ConfigError: Fewer than one image or image a batch.
        """
        images = self.split(split)
        seed = self.seed if seed is None else seed
        n = limit_images(n_images, len(images), self.name)
        range_checks.integer("probe.batch_size", batch_size, 1)
        is_mixed = (augment and self.mixes) if mix is None else mix
        if n_images is None and not augment:
            order = np.arange(n)
        else:
            order = philox.permutation(len(images), seed=seed, stream=philox.PROBE)[:n]
        recipe = self.recipe if augment else self.recipe.plain()
        return freeze_batches(
            images, order, recipe, batch_size=batch_size, seed=seed, mixed=self.mixed if is_mixed else None,
            n_bytes=n * self._bytes_per_image(is_mixed),
        )  # fmt: skip

    def probe_bytes(
        self, split: str, n_images: int | None = None, augment: bool = False, mix: bool | None = None, **_: Any
    ) -> int:
        """Return the bytes of the batches that `probe_batches` gives for the same arguments, decoded."""
        available = len(self.split(split))
        n = available if n_images is None else min(n_images, available)
        return n * self._bytes_per_image((augment and self.mixes) if mix is None else mix)

    def _bytes_per_image(self, is_mixed: bool) -> int:
        """Return the bytes of an image in float32 and of its target, a class index in int64 or a soft one in float32."""
        return 4 * self.channels * self.image_size**2 + (4 * self.num_classes if is_mixed else 8)

    def augmented_as(self, objective: Mapping[str, Any]) -> DataModule:
        """Return this module with the augmentation and the mixing of another objective, its images shared.

        Args:
            objective: The keys of a file of `conf/objective`.
        """
        other = copy.copy(self)
        other.recipe = replace(self.recipe, augment=objective["augment"], random_erasing=objective["random_erasing"])
        mixing_keys = ("mixup", "cutmix", "switch_prob", "label_smoothing")
        other.mixing = Mixing(**{key: float(objective[key]) for key in mixing_keys})
        return other

    def mixed(self, x: Tensor, y: Tensor, seed: tuple[int, ...]) -> Batch:
        """Return the batch mixed as the objective says, by `seed` (see `vitscope.data.augment.mixup.mix`)."""
        return mix(x, y, num_classes=self.num_classes, seed=seed, **asdict(self.mixing))

    def describe(self, split: str = "train", augment: bool = False) -> dict[str, Any]:
        """Return the facts of a split for the objective card: plain values, none of them measured."""
        augmentation = str(self.recipe if augment else self.recipe.plain())
        if augment and self.mixes:
            augmentation += f" + {self.mixing}"
        data = str(self.name)
        if split == "train":  # evaluation is on whole splits and true labels, whatever the training was on
            data += "" if self.fraction == 1 else f", {self.fraction:g} of each class"
            data += RANDOM_LABELS if self.random_labels else ""
        return {
            "data": data,
            "split": split,
            "augmentation": augmentation,
            "preprocessing": self.recipe.preprocessing,
            "image_size": self.image_size,
            "seed": self.seed,
            "split_seed": self.split_seed,
        }

    def _sampler(self, split: str, batch_size: int, **options: Any) -> BatchSampler:
        return BatchSampler(
            len(self.split(split)),
            batch_size,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            name=f"{self.name} {split}",
            **{"seed": self.seed, **options},
        )

    def _loader(self, split: str, sampler: BatchSampler, recipe: Recipe) -> Loader:
        dataset = Augmented(self.split(split), recipe, self.seed)
        return Loader(dataset, sampler, num_workers=self.num_workers, pin_memory=torch.cuda.is_available())

    def _thinned(self, images: Images) -> Images:
        if self.fraction < 1:
            images = images.select(splits.fraction(images.labels.numpy(), self.fraction, seed=self.split_seed))
        if self.random_labels:
            images = images.relabeled(torch.from_numpy(splits.permuted(images.labels.numpy(), seed=self.split_seed)))
        return images
