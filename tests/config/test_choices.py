"""Options of measures that are one of a few words: a configuration with another word is refused before anything is built."""

from __future__ import annotations

import pytest

import vitscope as vs
from vitscope.config.signature_checks import check_arguments
from vitscope.runtime.errors import ConfigError

#: a measure's option, a word that it does not take, and the nearest that it takes
CHOICES = [
    ("hessian_max_eigenvalue_spectrum", "solver", "lancos", "lanczos"),
    ("hessian_max_eigenvalue_spectrum", "dtype", "float16", "float64"),
    ("hessian_eigenvalues", "which", "lm", "LM"),
    ("hessian_eigenvalues", "operator", "hesian", "hessian"),
    ("hessian_eigenvalues", "bn", "evel", "eval"),
    ("hessian_eigenvalues", "product", "revers", "reverse"),
    ("hessian_eigenvalues", "basis", "dev", "device"),
    ("hessian_trace", "method", "hutchinsen", "hutchinson"),
    ("hessian_diagonal", "method", "exakt", "exact"),
    ("hessian_by_kind", "by", "kinds", "kind"),
    ("hessian_block_densities", "blocks", "layers", "layer"),
    ("hessian_block_densities", "axis", "symlogg", "symlog"),
    ("normalized_hessian", "normalization", "weights", "weight"),
    ("preconditioned_sharpness", "preconditioner", "adam", "adamw"),
    ("kronecker_factors", "approximation", "expend", "expand"),
    ("relative_log_amplitude", "path", "diagonals", "diagonal"),
    ("frequency_noise_robustness", "construction", "equal", "equal_rms"),
    ("effective_receptive_field", "contribution", "square", "squared"),
    ("calibration", "binning", "equal_widths", "equal_width"),
    ("evaluation", "classes", "presents", "present"),
    ("adversarial", "norm", "l_inf", "linf"),
    ("sharpness", "normalization", "filters", "filter"),
    ("lesion", "bn", "recalibrated", "recalibrate"),
]


@pytest.mark.parametrize(("measure", "option", "word", "nearest"), CHOICES, ids=[f"{c[0]}.{c[1]}" for c in CHOICES])
def test_another_word_is_refused_with_the_nearest(measure: str, option: str, word: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"^analysis\.a\.{option}={word}: no such choice; .*{nearest}"):
        check_arguments("analysis.a", {option: word}, getattr(vs, measure))
    check_arguments("analysis.a", {option: nearest}, getattr(vs, measure))
