"""Check whether a network numbers the classes otherwise than the labels do."""

from __future__ import annotations

import warnings

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom

from vitscope.core.checks.unlikely_input import UnlikelyInputWarning

#: probability, by chance alone, of as many images that are right in the other order and wrong in the labels' own
_LEVEL = 1e-6
#: least share of images that are right in the other order
_LEAST_SHARE = 0.5
#: more classes than these are not matched
_MOST_CLASSES = 2000


def warn_of_other_order(labels: np.ndarray, answers: np.ndarray) -> None:
    """Warn where classes in another order make far more answers right: the class order of the data is not the network's.

    Each label gets a logit of its own, such that most images of a random half are right; the other half then decides, by the sign
    test between the order found and the labels' own. The label with most of its images is left out, so that a network that always
    gives one answer has no order.

    Args:
        labels: (n,) class of each image.
        answers: (n,) logit that is the largest.
    """
    right = labels == answers
    if right.mean() >= _LEAST_SHARE:
        return
    classes, rows = np.unique(labels, return_inverse=True)
    logits, columns = np.unique(answers, return_inverse=True)
    if max(len(classes), len(logits)) > _MOST_CLASSES:
        return
    is_first = np.random.default_rng(0).random(len(labels)) < 0.5
    counts = np.zeros((len(classes), len(logits)))
    np.add.at(counts, (rows[is_first], columns[is_first]), 1)
    pairs = dict(zip(*linear_sum_assignment(counts, maximize=True)))
    matched = np.array([pairs.get(row, -1) for row in rows]) == columns
    decides = ~is_first & (rows != np.bincount(rows[matched]).argmax() if matched.any() else False)
    n_gained, n_lost = int((matched & ~right)[decides].sum()), int((right & ~matched)[decides].sum())
    if matched[decides].sum() < _LEAST_SHARE * decides.sum() or binom.sf(n_gained - 1, n_gained + n_lost, 0.5) > _LEVEL:
        return
    examples = [(classes[row], logits[column]) for row, column in pairs.items() if classes[row] != logits[column]][:3]
    listed = ", ".join(f"label {label} as logit {logit}" for label, logit in examples)
    warnings.warn(
        f"evaluation: {right.mean():.0%} of the answers are right, but {matched[~is_first].mean():.0%} would be with the classes "
        f"in another order ({listed}): the labels of the data and the logits of the network number the classes in different ways",
        UnlikelyInputWarning,
        stacklevel=4,
    )
