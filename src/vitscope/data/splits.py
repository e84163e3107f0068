"""Selection of a split's images: stratified hold-outs, per-class fractions, random labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitscope.data import philox
from vitscope.runtime.errors import ConfigError


def hold_out(labels: NDArray[np.int64], share: float, *, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split indices in two, class by class.

    Args:
        labels: Class of each image, `(N,)`.
        share: Share of each class that is held out; at least one image of each class that has two.
        seed: Seed of the selection.

    Returns:
        Kept and held-out indices, disjoint, each ascending.
    """
    ranks, sizes = _rank_in_class(labels, seed)
    held = np.minimum(np.maximum(np.round(share * sizes), 1), sizes - 1)
    out = ranks < held
    return np.flatnonzero(~out), np.flatnonzero(out)


def refuse_empty_validation(split: str, val_share: float) -> None:
    """Refuse to read the validation split where no image is held out for it: all of them are training images.

    Raises:
        ConfigError: It is that split, and the share is 0.
    """
    if split == "val" and not val_share:
        reason = "no image is held out for validation, which a training and val/ metrics need"
        fix = "set 0.1; with 0, analyze.py measures train and test images"
        raise ConfigError("data.source.val_share", val_share, reason, fix)


def fraction(labels: NDArray[np.int64], share: float, *, seed: int) -> NDArray[np.int64]:
    """Return the indices of a random `share` of each class, at least one image, ascending.

    A smaller share is a subset of a larger one of the same seed.
    """
    ranks, sizes = _rank_in_class(labels, seed)
    return np.flatnonzero(ranks < np.maximum(np.round(share * sizes), 1))


def permuted(labels: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
    """Return the labels in random order: the same class counts, no relation to the images."""
    return labels[philox.permutation(len(labels), seed=seed, stream=philox.LABELS)]


def _rank_in_class(labels: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each image's place in a random order of its class, and its class's size, both `(N,)`."""
    shuffled = philox.permutation(len(labels), seed=seed, stream=philox.SUBSET)
    grouped = shuffled[np.argsort(labels[shuffled], kind="stable")]  # class by class, random within
    counts = np.bincount(labels, minlength=1)
    starts = np.cumsum(counts) - counts
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[grouped] = np.arange(len(labels)) - starts[labels[grouped]]
    return ranks, counts[labels]
