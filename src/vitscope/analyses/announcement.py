"""Lines at the start of a command that say what will be measured: images, objective, device and predicted time."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig

from vitscope.analyses.prediction.time_prediction import Prediction
from vitscope.analyses.spec import Analysis, probe_request
from vitscope.config import factories
from vitscope.core.losses.named_losses import LOSSES
from vitscope.data import DataModule, batch_cache
from vitscope.runtime.text_layout import count_text, size_text

_logger = logging.getLogger(__name__)

#: terms of an objective that hold for augmented images alone, and the words for them
_TERMS = {"label_smoothing": "label smoothing", "mixup": "mixup", "cutmix": "CutMix"}

#: places of decoded images, and the words for them
_PLACES = {
    "host": "in host memory",
    "device": "in device memory",
    "disk": "in a file of the folder for temporary files",
    "none": "not kept, so that every pass reads them again (probe.cache=disk keeps them)",
}


@dataclass(frozen=True)
class _Images:
    """Images that some analyses share.

    Attributes:
        text: Number, split, data and augmentation in words.
        terms: Terms of the objective that come with the augmentation, in words.
    """

    text: str
    terms: str


def announce(
    cfg: DictConfig,
    analyses: Sequence[Analysis],
    data: Any,
    *,
    defaults: Collection[str] = (),
    count: Collection[str] | None = None,
    of: str = "",
) -> None:
    """Log which images the analyses measure, and under which objective.

    Args:
        cfg: Validated configuration.
        analyses: What will be measured; without any, nothing is logged.
        data: Data module.
        defaults: Groups whose values are the defaults for a checkpoint without a run: ``images``, ``objective``.
        count: Splits that may be read to tell their number of images, all by default; of others the number that is asked for
            is told.
        of: Words behind ``images`` and ``objective``, such as `` of the diagnostics``.

    Raises:
        VitscopeError: A split that is read cannot be, as its analysis would find later.
    """
    if not analyses:
        return
    groups: dict[_Images, list[str]] = {}
    for analysis in analyses:
        groups.setdefault(_images(cfg, analysis, data, count), []).append(analysis.name)
    stated = ("probe.split=, probe.augment=", "objective.weight_decay=")
    notes = [
        f" (default for ckpt_path=; {keys} set others)" if name in defaults else ""
        for name, keys in zip(("images", "objective"), stated)
    ]
    _logger.info(f"images{of}: {_joined({images.text: names for images, names in groups.items()})}{notes[0]}")
    terms: dict[str, list[str]] = {}
    for images, names in groups.items():
        terms.setdefault(images.terms, []).extend(names)
    _logger.info(f"objective{of}: {_loss_text(cfg)}, {_decay_text(cfg)}{notes[1]}; {_joined(terms)}")


def announce_device(device: torch.device, prediction: Prediction) -> None:
    """Log the device and the predicted time of the analyses, or why there is none.

    Args:
        device: Device of the network.
        prediction: Predicted cost of the analyses.
    """
    if device.type == "cuda":
        name = f"{device} ({torch.cuda.get_device_name(device)})"
    else:
        threads = torch.get_num_threads()
        name = f"{device} ({count_text(threads, 'thread')})"
    _logger.info(f"device: {name}; {prediction}")


def announce_image_cache(cfg: DictConfig, analyses: Sequence[Analysis], data: Any, device: torch.device) -> None:
    """Log where the decoded images of the analyses are kept, and their bytes.

    Args:
        cfg: Validated configuration.
        analyses: What will be measured.
        data: Data module; of another one than ours nothing is logged, since nothing of it is kept.
        device: Device of the network.

    Raises:
        ConfigError: A place with less free space than the images of an analysis take.
    """
    if not isinstance(data, DataModule):
        return
    choice = factories.image_cache(cfg)
    groups: dict[str, list[str]] = {}
    for analysis in analyses:
        request = probe_request(analysis, data)
        if isinstance(request["augment"], str):
            mixing = data.augmented_as(factories.named_objective(request["augment"]))
            n_bytes = mixing.probe_bytes(**{**request, "augment": True})
        else:
            n_bytes = data.probe_bytes(**request)
        place = batch_cache.choose_place(choice, n_bytes, device)
        groups.setdefault(place, []).append(f"{analysis.name} {size_text(n_bytes)}")
    texts = [f"{_PLACES[place]}: {', '.join(names)}" for place, names in groups.items()]
    _logger.info(f"decoded images (probe.cache={choice}) {'; '.join(texts)}")


def _images(cfg: DictConfig, analysis: Analysis, data: Any, count: Collection[str] | None) -> _Images:
    request = probe_request(analysis, data)
    split, augment = request["split"], request["augment"]
    recipe: Mapping[Any, Any] = cfg.objective
    if isinstance(augment, str):
        recipe = factories.named_objective(augment)
        data = data.augmented_as(recipe)
    available = len(data.split(split)) if count is None or split in count else None
    number = _number_text(request["n_images"], available)
    is_mixed = request.get("mix")
    mixes = bool(data.mixes and augment) if is_mixed is None else bool(is_mixed)
    augmentation = str(data.describe(split, bool(augment))["augmentation"])
    words = "not augmented" if augmentation == "none" else f"augmented ({augmentation.partition(' + mixup')[0]})"
    terms = []
    for key, word in _TERMS.items():
        # without mixing, targets are smoothed where the images are augmented as in the training
        is_applied = bool(augment) if key == "label_smoothing" and not mixes else mixes
        if recipe.get(key) and is_applied:
            terms.append(f"{word} {float(recipe[key]):g}")
    return _Images(f"{number} {split} images of {data.name}, {words}", ", ".join(terms) or _no_terms())


def _number_text(n_images: int | None, available: int | None) -> str:
    """Return the number of images in words, ``available`` of which may be None where it is not known yet."""
    if available is None:
        return "all" if n_images is None else f"up to {n_images}"
    n = available if n_images is None else min(n_images, available)
    return f"all {n}" if n == available else f"{n} of {available}"


def _no_terms() -> str:
    *first, last = _TERMS.values()
    return f"no {', '.join(first)} or {last}"


def _joined(groups: Mapping[str, Sequence[str]]) -> str:
    """Return the texts, each with the analyses that it holds for unless there is only one."""
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in groups.items())


def _loss_text(cfg: DictConfig) -> str:
    loss = cfg.objective.get("loss", "cross_entropy")
    if isinstance(loss, str):
        return loss.replace("_", " ") if loss in LOSSES else loss
    return str(loss.get("_target_"))


def _decay_text(cfg: DictConfig) -> str:
    weight_decay = float(cfg.objective.weight_decay)
    if not weight_decay or cfg.objective.l2 == "none":
        return "no weight decay"
    return f"weight decay {weight_decay:g} ({cfg.objective.l2})"
