"""Columns of the headline tables: where each number comes from and how it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

#: sources of a column's number besides measures: the metrics log, or the model itself
METRIC, MODEL = "metric", "model"

SPECTRUM = "hessian_max_eigenvalue_spectrum"


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        title: Heading of the column.
        source: ``metric``, ``model``, or a measure's name.
        key: The metric, ``parameters`` or ``flops``, or the measure's scalar.
        style: Format of its numbers.
        optional: Left out where no run has the measure at all.
    """

    title: str
    source: str
    key: str
    style: str = ".3f"
    optional: bool = False

    @property
    def id(self) -> str:
        """A name for files: the metric's, the measure's and its scalar's."""
        return self.key if self.source in (METRIC, MODEL) else f"{self.source}/{self.key}"


COST = (Column("parameters", MODEL, "parameters", "si"), Column("FLOPs", MODEL, "flops", "si"))
TEST = (
    Column("accuracy", METRIC, "test/accuracy"),
    Column("NLL", METRIC, "test/nll"),
    Column("ECE", METRIC, "test/ece"),
)
CURVATURE = (
    Column("NEP", SPECTRUM, "negative_eigenvalue_proportion"),
    Column("APE", SPECTRUM, "average_positive_eigenvalue", ".4g"),
)
ROBUST = Column("robust accuracy", "corruption", "mean_accuracy", optional=True)

TITLES = {
    "models": "Models",
    "curvature": "Curvature and sharpness",
    "robustness": "Robustness and calibration",
    "buildup": "Build-up of AlterNet",
}

TABLES: Mapping[str, tuple[Column, ...]] = {
    "models": (*COST, *TEST, ROBUST, *(replace(column, optional=True) for column in CURVATURE)),
    "curvature": (
        *CURVATURE,
        Column("NEP, k=1", SPECTRUM, "top1_negative_eigenvalue_proportion"),
        Column("APE, k=1", SPECTRUM, "top1_average_positive_eigenvalue", ".4g"),
        Column("max λ", SPECTRUM, "eigenvalue_max", ".4g"),
        Column("min λ", SPECTRUM, "eigenvalue_min", ".4g"),
        Column("max λ, all images", "hessian_eigenvalues", "eigenvalue_max", ".4g", optional=True),
        Column("min λ, all images", "hessian_eigenvalues", "eigenvalue_min", ".4g", optional=True),
        Column("trace", "hessian_trace", "trace", ".4g", optional=True),
        Column("rise at r=.1", "sharpness", "rise_r0.1", ".4g", optional=True),
        Column("worst rise at r=.1", "sharpness", "worst_rise_r0.1", ".4g", optional=True),
    ),
    "robustness": (
        *TEST,
        Column("Brier", METRIC, "test/brier"),
        ROBUST,
        Column("mCE (%)", "corruption", "mce", ".1f", optional=True),
        Column("band noise, high − low", "frequency_noise_robustness", "high_minus_low", optional=True),
        Column("FGSM 8/255", "adversarial", "fgsm_8_accuracy", optional=True),
        Column("PGD 8/255", "adversarial", "pgd_8_accuracy", optional=True),
        Column("ECE, T scaled", "calibration", "scaled_ece", optional=True),
        Column("shape bias", "shape_bias", "shape_bias", optional=True),
    ),
    "buildup": (*COST, *TEST, *CURVATURE, ROBUST),
}
