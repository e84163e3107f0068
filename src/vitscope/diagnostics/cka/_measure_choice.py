"""Names of similarity measures, the features each compares, and the checks of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from vitscope.core.probe import Probe
from vitscope.diagnostics.cka._hsic import MIN_IMAGES
from vitscope.stats.intervals import LEAST_IMAGES
from vitscope.stats.jackknife import N_GROUPS

MeasureName = Literal["procrustes", "mutual_knn", "rsa", "linear_regression", "cka"]
FeatureName = Literal["pooled", "flattened"]

#: features that each measure compares where ``features`` is None
DEFAULT_FEATURES: dict[str, FeatureName] = {
    "procrustes": "pooled", "mutual_knn": "pooled", "rsa": "pooled", "linear_regression": "pooled", "cka": "flattened",
}  # fmt: skip


def measure_names(measure: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of one or several measures."""
    return (measure,) if isinstance(measure, str) else tuple(measure)


def check_choice(measure: str | Sequence[str], features: str | None) -> None:
    """Check two arguments of `vitscope.similarity`.

    Raises:
        ValueError: An unknown measure, none, one twice, or an unknown kind of features.
    """
    measures = measure_names(measure)
    names = ", ".join(DEFAULT_FEATURES)
    for name in measures:
        if str(name).lower() == "rtd":
            raise ValueError(
                f"Expected measure to be one of {names}, received 'rtd': no package on PyPI that is kept up computes the "
                "representation topology divergence; use measure='mutual_knn', which compares neighborhoods too."
            )
        if name not in DEFAULT_FEATURES:
            raise ValueError(f"Expected measure to be one of {names}, received {name!r}.")
    if not measures or len(set(measures)) < len(measures):
        raise ValueError(f"Expected different measures out of {names}, received {list(measures)}.")
    if features not in (None, "pooled", "flattened"):
        raise ValueError(f"Expected features to be 'pooled', 'flattened' or None, received {features!r}.")


def check_number_of_images(probe: Probe, measures: Sequence[str], n_neighbors: int) -> None:
    """Raise ValueError where a probe has too few images for the measures."""
    if set(measures) != {"cka"} and probe.n_images < MIN_IMAGES:
        raise ValueError(f"Expected at least {MIN_IMAGES} images, received {probe.n_images}.")
    n = probe.n_images
    others = n - 1 if n < LEAST_IMAGES else n - -(-n // N_GROUPS) - 1  # intervals leave a group out
    if "mutual_knn" in measures and not 1 <= n_neighbors < others:
        raise ValueError(
            f"Expected n_neighbors from 1 to below {others}, the other images, received {n_neighbors}: "
            f"use n_neighbors={max(1, min(10, others // 4))}, or more images."
        )
