"""All numbers of one tap: accuracies of held-out images, neural collapse and intrinsic dimension, with their intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitscope.diagnostics.depth_probes import _neural_collapse
from vitscope.diagnostics.depth_probes._classifiers import Classifier, nearest_center, nearest_neighbors, ridge
from vitscope.diagnostics.depth_probes._intrinsic_dimension import intrinsic_dimension
from vitscope.diagnostics.depth_probes._neural_collapse import LabeledFeatures, neural_collapse
from vitscope.stats.intervals import LEAST_IMAGES, t_quantile
from vitscope.stats.jackknife import N_GROUPS, group_numbers, jackknife_half_width

#: folds of the test images where there are no training images
N_FOLDS = 5


@dataclass(frozen=True)
class TapImages:
    """Images at one tap.

    Attributes:
        labels: (n,) classes.
        decisions: (n,) of the model.
        pooled: (n, C) means over positions, float64.
        class_token: (n, C) class tokens; None without.
        lens: (n,) classes of the model's head on this tap; None where it takes nothing of it.
        head_input: (n, C') what the head's classifier takes; None likewise.
        weight: (K, C') of that classifier; None likewise.
    """

    labels: Tensor
    decisions: Tensor
    pooled: Tensor
    class_token: Tensor | None
    lens: Tensor | None
    head_input: Tensor | None
    weight: Tensor | None


def measure_tap(train: TapImages | None, test: TapImages, n_neighbors: int) -> dict[str, np.ndarray]:
    """Return the numbers of one tap by the name of their field; NaN where they are undefined.

    Args:
        train: Training images; None to predict each fold of the test images from the others.
        test: Test images.
        n_neighbors: Training images that vote.
    """
    neighbors = nearest_neighbors(n_neighbors)
    sources = train or test
    pooled = (None if train is None else train.pooled, test.pooled)
    tokens = (None if train is None else train.class_token, test.class_token)

    def accuracy(classifier: Classifier, features: tuple[Tensor | None, Tensor | None]) -> float:
        return _accuracy(classifier, features, None if train is None else train.labels, test.labels)

    values = {
        "ridge_accuracy": accuracy(ridge, pooled),
        "knn_accuracy": accuracy(neighbors, pooled),
        "center_accuracy": accuracy(nearest_center, pooled),
        "class_token_ridge_accuracy": accuracy(ridge, tokens),
        "class_token_knn_accuracy": accuracy(neighbors, tokens),
        "logit_lens_accuracy": _lens_accuracy(test),
        **_collapse(sources),
        **_dimension(test.pooled),
    }
    return {name: np.asarray(value) for name, value in {"channels": test.pooled.shape[1], **values}.items()}


def fold_numbers(labels: Tensor) -> Tensor:
    """Return the fold of each image ``(n,)``: equal sizes up to one, also within each class, images of a class at random.

    The draw is always the same. A class of two images or more is in every training set.
    """
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    by_class = order[labels[order].argsort(stable=True)]
    folds = torch.empty_like(by_class)
    folds[by_class] = torch.arange(len(labels)) % N_FOLDS
    return folds


def _accuracy(
    classifier: Classifier, features: tuple[Tensor | None, Tensor | None], train_labels: Tensor | None, labels: Tensor
) -> float:
    train, test = features
    if test is None or not all(bool(torch.isfinite(x).all()) for x in (train, test) if x is not None):
        return float("nan")
    if train is not None and train_labels is not None:
        predicted = classifier(train, train_labels, test)
    else:
        predicted, folds = torch.empty_like(labels), fold_numbers(labels)
        for fold in range(min(N_FOLDS, len(labels))):
            predicted[folds == fold] = classifier(test[folds != fold], labels[folds != fold], test[folds == fold])
    return float((predicted == labels).double().mean())


def _lens_accuracy(test: TapImages) -> float:
    if test.lens is None or bool((test.lens < 0).any()):
        return float("nan")
    return float((test.lens == test.labels).double().mean())


def _collapse(images: TapImages) -> dict[str, float]:
    data = LabeledFeatures(images.pooled, images.labels, images.decisions, images.head_input, images.weight)
    values = neural_collapse(data)
    half_widths = np.full(len(values), np.nan)
    if len(images.labels) >= LEAST_IMAGES and np.isfinite(values).any():
        groups = group_numbers(len(images.labels))
        rest = [data.rows(torch.from_numpy(np.flatnonzero(groups != group))) for group in range(N_GROUPS)]
        half_widths = jackknife_half_width(np.stack([neural_collapse(part) for part in rest]))
    named = dict(zip(_neural_collapse.NAMES, values))
    return named | {f"{name}_half_width": value for name, value in zip(_neural_collapse.NAMES, half_widths)}


def _dimension(x: Tensor) -> dict[str, float]:
    if len(x) < 4 or not bool(torch.isfinite(x).all()):
        return {"intrinsic_dimension": np.nan, "intrinsic_dimension_half_width": np.nan}
    dimension, error = intrinsic_dimension(x)
    half_width = t_quantile(len(x)) * error if len(x) >= LEAST_IMAGES else np.nan
    return {"intrinsic_dimension": dimension, "intrinsic_dimension_half_width": half_width}
