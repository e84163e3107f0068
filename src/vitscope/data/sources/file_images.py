"""Images in files, read one by one and preprocessed by timm's transforms."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms import MaybeToTensor
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from vitscope.core.guard.probe_guard import kept_random_states
from vitscope.data.augment.augment import Recipe
from vitscope.data.philox import Key, uniforms
from vitscope.data.sources.image_decoding import read_image
from vitscope.runtime.errors import ConfigError


@dataclass(frozen=True)
class FileImages:
    """A split on disk.

    Attributes:
        paths: File of each image.
        labels: Class of each image, int64 `(N,)`.
        class_names: Name of each class.
    """

    paths: tuple[str, ...]
    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, indices: ArrayLike) -> FileImages:
        """Return the images at `indices`, in that order."""
        selected = np.asarray(indices)
        paths = tuple(self.paths[index] for index in selected)
        return replace(self, paths=paths, labels=self.labels[torch.from_numpy(selected)])

    def relabeled(self, labels: Tensor) -> FileImages:
        """Return the same images with other labels."""
        return replace(self, labels=labels)

    def image(self, index: int, recipe: Recipe) -> Image.Image:
        """Return the image at an index in mode RGB.

        Raises:
            DataError: A file that cannot be read as an image, see `vitscope.data.sources.image_decoding`.
        """
        return read_image(self.paths[index], background=recipe.background, pixel_range=recipe.pixel_range)

    def batch(self, key: Key, recipe: Recipe) -> tuple[Tensor, Tensor]:
        """Return augmented, normalized images `(B, 3, H, W)` float32 and their labels `(B,)`.

        Raises:
            DataError: A file that cannot be read as an image, see `vitscope.data.sources.image_decoding`.
        """
        labels = self.labels[torch.from_numpy(key.indices)]
        if recipe.augment == "none":
            return torch.stack(self._plain_images(key.indices, recipe)), labels
        words = uniforms(key.indices, 2, seed=key.seed, stream=key.stream, epoch=key.epoch)
        seeds = (words * 2**32).astype(np.uint64)
        transform = _transform(recipe)
        images = []
        with kept_random_states(torch.device("cpu")):
            for index, seed in zip(key.indices, seeds):
                image = self.image(int(index), recipe)
                _seed(seed)
                images.append(transform(image))
        return torch.stack(images), labels

    def _plain_images(self, indices: np.ndarray, recipe: Recipe) -> list[Tensor]:
        """Return images without augmentation, which draws nothing: decoded and resized by the threads that torch computes with.

        Pillow's decoders and filters let other threads run. A worker process of a loader, one of several, takes one thread.
        """
        transform = _transform(recipe)
        steps = list(transform.transforms)
        first_on_tensors = next(i for i, step in enumerate(steps) if isinstance(step, MaybeToTensor))

        def resized(index: int) -> Any:
            image = self.image(index, recipe)
            for step in steps[:first_on_tensors]:
                image = step(image)
            return image

        def tensor(image: Any) -> Tensor:
            for step in steps[first_on_tensors:]:
                image = step(image)
            return image

        n_threads = min(torch.get_num_threads(), len(indices)) if get_worker_info() is None else 1
        if n_threads <= 1:
            return [tensor(resized(int(index))) for index in indices]
        with ThreadPoolExecutor(n_threads) as pool:
            return [tensor(image) for image in pool.map(resized, map(int, indices))]


def model_recipe(model: nn.Module, recipe: Recipe) -> Recipe:
    """Return the recipe with the size, share and mode of the crop, filter, mean and std that timm records for `model`.

    Raises:
        ConfigError: The model carries no such record, or one of images that are not square or not of three channels.
    """
    if not getattr(model, "pretrained_cfg", None):
        problem = f"{type(model).__name__} does not say how its images were preprocessed"
        raise ConfigError("data.transform", "model", problem, "use a timm model, or set data.transform=null")
    config = resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    if height != width or channels != 3:
        shape = f"{channels}x{height}x{width}"
        problem = (
            f"{type(model).__name__} was trained on images of {shape}; only square images of 3 channels are supported"
        )
        raise ConfigError("data.transform", "model", problem, "use another model, or set data.transform=null")
    return replace(
        recipe,
        image_size=width,
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


@lru_cache(maxsize=8)
def _transform(recipe: Recipe) -> Any:
    shared = {
        "input_size": recipe.image_size,
        "interpolation": recipe.interpolation,
        "mean": recipe.mean,
        "std": recipe.std,
    }
    if recipe.augment == "none":
        return create_transform(**shared, is_training=False, crop_pct=recipe.crop_pct, crop_mode=recipe.crop_mode)
    return create_transform(
        **shared,
        is_training=True,
        hflip=0.5 if recipe.flip else 0.0,
        color_jitter=None,  # pyright: ignore[reportArgumentType]  None leaves it out; timm annotates a number
        auto_augment=None if recipe.augment == "crop_flip" else recipe.augment,
        re_prob=recipe.random_erasing,
    )


def _seed(words: np.ndarray) -> None:
    """Seed the generators that timm's and torchvision's transforms draw from."""
    first, second = int(words[0]), int(words[1])
    random.seed((first << 32) | second)
    np.random.seed([first, second])  # noqa: NPY002  timm draws from the global state
    torch.default_generator.manual_seed((first << 31) ^ second)  # the CPU's only
