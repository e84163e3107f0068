"""Probes by depth: what a classifier reads from frozen features, neural collapse and intrinsic dimension at every tap."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitscope.core.cost.measure_cost import declares_cost
from vitscope.core.losses.requirements import check_classes
from vitscope.core.measure_options import record_options
from vitscope.core.objective_card import ObjectiveCard
from vitscope.core.probe import Probe
from vitscope.core.results.result import TAP_COORDINATES, Result
from vitscope.core.run_inputs import TrainingProbe
from vitscope.core.tap import tap_fields
from vitscope.core.undefined_values import warn_nulls
from vitscope.diagnostics.depth_probes._cost import depth_probes_cost
from vitscope.diagnostics.depth_probes._features import LabeledImages, collect
from vitscope.diagnostics.depth_probes._logit_lens import Head, find_head
from vitscope.diagnostics.depth_probes._tap_measurement import N_FOLDS, TapImages, measure_tap
from vitscope.runtime import distributed
from vitscope.runtime.progress import track
from vitscope.runtime.value_ranges import PositiveInt
from vitscope.stats.intervals import few_images, share_interval


@dataclass(frozen=True)
class DepthProbesResult(Result, coordinates=TAP_COORDINATES):
    """Accuracies are of images that the classifier was not fitted on, as shares in [0, 1].

    Attributes:
        taps: (n_taps,) names, by depth.
        kinds: (n_taps,) such as ``msa``.
        stages: (n_taps,) from 0, the stem.
        depths: (n_taps,) from 0 to 1.
        channels: (n_taps,) number of pooled features.
        ridge_accuracy: (n_taps,) ridge regression on pooled features; NaN where they are not finite.
        ridge_accuracy_interval: (n_taps, 2) ends of its 95 % interval over the test images (Wilson, exact near 0 and 1), for
            the classifier as it is fitted. Likewise the other accuracies'.
        knn_accuracy: (n_taps,) nearest neighbors among the training images' pooled features.
        knn_accuracy_interval: (n_taps, 2) see above.
        center_accuracy: (n_taps,) nearest class mean of the training images' pooled features.
        center_accuracy_interval: (n_taps, 2) see above.
        class_token_ridge_accuracy: (n_taps,) ridge regression on the class token; NaN without one.
        class_token_ridge_accuracy_interval: (n_taps, 2) see above.
        class_token_knn_accuracy: (n_taps,) nearest neighbors of the class token; NaN likewise.
        class_token_knn_accuracy_interval: (n_taps, 2) see above.
        logit_lens_accuracy: (n_taps,) the model's own head on the tap's map; NaN where the head does not take it.
        logit_lens_accuracy_interval: (n_taps, 2) see above.
        nc1: (n_taps,) within-class over between-class covariance of the training images, tr(S_W S_B^+) / K; NaN without two
            images of each class, or where class means do not differ.
        nc1_half_width: (n_taps,) half the 95 % interval, a jackknife over 10 groups of images; NaN with fewer than 128 images.
            Likewise those of the next ones.
        nc2: (n_taps,) mean deviation of the cosines of class means from -1 / (K - 1), the simplex.
        nc2_half_width: (n_taps,) see above.
        nc2_equinorm: (n_taps,) standard deviation over mean of the norms of class means.
        nc2_equinorm_half_width: (n_taps,) see above.
        nc3: (n_taps,) squared distance of the classifier's weights and the class means of what it takes of this tap, each of
            unit norm; NaN where the head takes nothing of it, or the same of every class, as of a class token before the first
            block.
        nc3_half_width: (n_taps,) see above.
        nc4: (n_taps,) share of training images on which the model's decision is not the nearest class mean.
        nc4_half_width: (n_taps,) see above.
        intrinsic_dimension: (n_taps,) TwoNN estimate of the test images' pooled features.
        intrinsic_dimension_half_width: (n_taps,) see above.
        model_accuracy: Accuracy of the model itself on the test images.
        majority_share: Share of the most frequent class of the test images, which a constant answer reaches.
        n_classes: Classes among the training images.
        n_train: Training images.
        n_images: Test images.
        training_images: ``train``, or the rule by which the test images were divided.
        card: Conditions of the measurement.
    """

    taps: tuple[str, ...]
    kinds: tuple[str, ...]
    stages: np.ndarray
    depths: np.ndarray
    channels: np.ndarray
    ridge_accuracy: np.ndarray
    ridge_accuracy_interval: np.ndarray
    knn_accuracy: np.ndarray
    knn_accuracy_interval: np.ndarray
    center_accuracy: np.ndarray
    center_accuracy_interval: np.ndarray
    class_token_ridge_accuracy: np.ndarray
    class_token_ridge_accuracy_interval: np.ndarray
    class_token_knn_accuracy: np.ndarray
    class_token_knn_accuracy_interval: np.ndarray
    logit_lens_accuracy: np.ndarray
    logit_lens_accuracy_interval: np.ndarray
    nc1: np.ndarray
    nc1_half_width: np.ndarray
    nc2: np.ndarray
    nc2_half_width: np.ndarray
    nc2_equinorm: np.ndarray
    nc2_equinorm_half_width: np.ndarray
    nc3: np.ndarray
    nc3_half_width: np.ndarray
    nc4: np.ndarray
    nc4_half_width: np.ndarray
    intrinsic_dimension: np.ndarray
    intrinsic_dimension_half_width: np.ndarray
    model_accuracy: float
    majority_share: float
    n_classes: int
    n_train: int
    n_images: int
    training_images: str
    card: ObjectiveCard | None = None

    def scalars(self) -> dict[str, float]:
        """Return the model's accuracy and the numbers at the last tap."""
        names = ("ridge_accuracy", "knn_accuracy", "nc1", "nc2", "nc3", "nc4", "intrinsic_dimension")
        values = {f"{name}_last": float(getattr(self, name)[-1]) for name in names}
        values["model_accuracy"] = self.model_accuracy
        return {name: value for name, value in values.items() if np.isfinite(value)}


@declares_cost(depth_probes_cost)
@record_options
def depth_probes(
    probe: Probe,
    *,
    train: TrainingProbe | None = None,
    n_neighbors: PositiveInt = 20,
    max_memory: float | None = None,
) -> DepthProbesResult:
    """Measure how well the classes can be read from the frozen features at every tap, in closed form.

    Features are the means of a map over its positions, and the class token where there is one. docs/definitions.md section 7
    gives the formulas.

    - Ridge regression of one-hot classes (Alain and Bengio 2017, in closed form), its penalty chosen by leaving one
      training image out; weighted votes of the nearest training images (Wu et al. 2018); the nearest class mean.
    - Logit lens: the model's own head (norm, pooling, classifier) on the map of an earlier tap of the same channels. Which
      modules are the head is verified by the model's own logits.
    - Neural collapse, NC1 to NC4, of the training images. Source: Papyan, Han and Donoho (2020).
    - Intrinsic dimension by the two nearest neighbors, of the test images. Source: Facco et al. (2017).

    One forward pass over the images of each probe; the features of all images stay in memory, 4 bytes each.

    Args:
        probe: Model and the images on which accuracy is measured, with class indices.
        train: Training images without augmentation, of the same model, none of which is in ``probe``; in a run its own. None:
            5 folds of the images of ``probe``, classes divided alike, each predicted by a classifier of the other four;
            neural collapse is then of the images of ``probe``.
        n_neighbors: Nearest training images that vote; 20 in Caron et al. (2021).
        max_memory: Bytes that the features of one probe may take; None: a quarter of what is free.

    Raises:
        ValueError: Another loss than the cross entropy, targets that are no class indices, a probe without taps, training images
            of another model or that are test images, fewer training images than neighbors, or features that do not fit into
            memory.
    """
    _check_probes(probe, train)
    with probe.guard() as model:
        head = find_head(model, next(probe.iter_batches())[0], probe.taps)
    fitted_on = collect(train, probe.taps, head, max_memory, "training") if train is not None else None
    test = collect(probe, probe.taps, head, max_memory, "test")
    if fitted_on is not None:
        _check_overlap(fitted_on, test)
    _check_neighbors(n_neighbors, fitted_on, test)
    rows = _measured(probe, head, fitted_on, test, n_neighbors)
    return _result(probe, head, fitted_on or test, test, rows, train is not None)


def _check_probes(probe: Probe, train: Probe | None) -> None:
    check_classes(probe, "depth_probes")
    if train is not None:
        check_classes(train, "depth_probes")
    probe.check_taps()
    if train is None:
        return
    if train.model is not probe.model:
        raise ValueError(
            "depth_probes needs training images of the same model, received another: Probe(probe.model, batches)."
        )
    if train is probe or train.batches is probe.batches or train.batches.source is probe.batches.source:
        raise ValueError(
            "depth_probes needs training images that are not its test images, received the same batches: pass train=None to "
            f"predict each of {N_FOLDS} folds from the others."
        )


def _check_overlap(train: LabeledImages, test: LabeledImages) -> None:
    training_digests = set(train.digests)
    shared = sum(digest in training_digests for digest in test.digests)
    if 2 * shared > len(test.digests):
        raise ValueError(
            f"depth_probes needs training images that are not its test images, received {shared} of "
            f"{len(test.digests)} test images in both: pass another split, or none "
            "(train=None; train: cross_validation in a configuration), so that folds of the test images are predicted."
        )
    if shared:
        warnings.warn(
            f"depth_probes: {shared} of {len(test.digests)} test images are among the training images, bit for bit; their "
            "accuracy is not that of unseen images",
            stacklevel=3,
        )


def _check_neighbors(n_neighbors: int, train: LabeledImages | None, test: LabeledImages) -> None:
    n = len(test.labels)
    if n < 2:
        raise ValueError(f"Expected at least 2 test images with a label, received {n}: use a probe of more images.")
    available = len(train.labels) if train is not None else n - -(-n // N_FOLDS)
    if not 1 <= n_neighbors <= available:
        raise ValueError(
            f"Expected n_neighbors from 1 to the number of training images, {available}, received {n_neighbors}: use "
            f"n_neighbors={max(1, available // 4)}, or more images."
        )


def _measured(
    probe: Probe, head: Head | None, train: LabeledImages | None, test: LabeledImages, n_neighbors: int
) -> list[dict[str, np.ndarray]]:
    """Return the numbers of every tap; each rank measures its share of them."""
    classifier = head.classifier if head is not None else None
    weight = None if classifier is None else classifier.weight.detach().double().cpu()
    numbers: dict[int, dict[str, np.ndarray]] = {}
    for index in track(range(len(probe.taps)), "depth probes: taps"):
        sides = [_of_tap(images, index, weight) for images in (train, test) if images is not None]
        with distributed.failing_together():
            if index % distributed.world_size() == distributed.rank():
                numbers[index] = measure_tap(sides[0] if train is not None else None, sides[-1], n_neighbors)
    merged = {index: row for share in distributed.gather_objects(numbers) for index, row in share.items()}
    return [merged[index] for index in range(len(probe.taps))]


def _of_tap(images: LabeledImages, index: int, weight: Tensor | None) -> TapImages:
    pooled = images.gathered("pooled", index)
    assert pooled is not None
    head_input = images.gathered("head_inputs", index)
    return TapImages(
        images.labels, images.decisions, pooled, images.gathered("class_tokens", index), images.gathered("lens", index),
        head_input, weight if head_input is not None else None,
    )  # fmt: skip


def _result(
    probe: Probe, head: Head | None, train: LabeledImages, test: LabeledImages,
    rows: Sequence[dict[str, np.ndarray]], has_train: bool,
) -> DepthProbesResult:  # fmt: skip
    taps, n = probe.taps, len(test.labels)
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    intervals = {
        f"{name}_interval": np.stack(share_interval(values * n, n), axis=-1)
        for name, values in arrays.items() if name.endswith("accuracy")
    }  # fmt: skip
    decided = bool((test.decisions >= 0).all())
    rule = "train" if has_train else f"{N_FOLDS} folds of the test images, each class divided alike"
    result = DepthProbesResult(
        **tap_fields(taps),
        **arrays,
        **intervals,
        model_accuracy=float((test.decisions == test.labels).double().mean()) if decided else np.nan,
        majority_share=float(torch.bincount(test.labels).max()) / n,
        n_classes=len(train.labels.unique()),
        n_train=len(train.labels),
        n_images=n,
        training_images=rule,
        card=probe.card(solver={"training_images": rule}),
    )
    warn_nulls("depth_probes", _null_reasons(result, head) | few_images(n))
    return result


def _null_reasons(result: DepthProbesResult, head: Head | None) -> dict[str, str]:
    """Return why taps, or one measure at some taps, are null."""
    reasons = {
        name: "its activations are not finite"
        for name, value in zip(result.taps, result.ridge_accuracy) if np.isnan(value)
    }  # fmt: skip
    finite = [name not in reasons for name in result.taps]
    if not any(finite):
        return reasons
    lens = np.isnan(result.logit_lens_accuracy)
    if head is None:
        reasons["logit_lens_accuracy, nc3"] = "what follows the last tap is no sequence of modules with one pooling"
    elif lens[finite].any():
        names = [name for name, null in zip(result.taps, lens) if null and name not in reasons]
        which = ", ".join(names) if len(names) < 4 else f"{len(names)} taps from {names[0]} to {names[-1]}"
        reasons[f"logit_lens_accuracy, nc3 at {which}"] = (
            "other channels, tokens or a map of another size than the head takes"
        )
    unread = [name for name, null in zip(result.taps, np.isnan(result.nc3) & ~lens & ~np.isnan(result.nc1)) if null]
    if unread:
        reasons[f"nc3 at {', '.join(unread)}"] = "class means of what the head takes that do not differ"
    if np.isnan(result.nc1[finite]).any():
        reasons["nc1"] = "fewer than two images of a class, or class means that do not differ"
    if np.isnan(result.intrinsic_dimension[finite]).any():
        reasons["intrinsic_dimension"] = "too few images without a duplicate"
    return reasons
