"""Options that a measure refuses whatever the network is are refused before a training that would end in the measure."""

from __future__ import annotations

from typing import Any

import pytest

from vitscope.config.keys.analysis_keys import check_analyses
from vitscope.runtime.errors import ConfigError

#: a measure, options that cannot be meant, the key that the error names, and the start of its reason
REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("linear_interpolation", {"t_min": 2}, "t_min=2", "Expected t_min < t_max"),
    ("hessian_eigenvalues", {"difference_step": 0.1}, "", "Expected product='difference'"),
    ("hessian_eigenvalues", {"bn": "batch", "micro_batch": 2}, "micro_batch=2", "Expected micro_batch=None"),
    ("hessian_trace", {"method": "hutch++", "n_vectors": 2}, "n_vectors=2", "Expected n_vectors to be at least 3"),
    ("adversarial", {"attacks": ["fgsm", "fgsm"]}, "", "Expected each attack once"),
    ("adversarial", {"attacks": ["bim"]}, "attacks=[bim]", "Expected attacks among fgsm"),
    ("corruption", {"severities": [7]}, "severities=[7]", "Expected severities from 1 to 5"),
    ("corruption", {"types": ["rain"]}, "types=[rain]", "Expected types to be common"),
    ("corruption", {"baseline": "resnet"}, "baseline=resnet", "Expected baseline to be auto, none"),
    ("frequency_noise_robustness", {"construction": "official", "n_bands": 1}, "n_bands=1", "Expected n_bands"),
    ("input_filter", {"cutoffs": []}, "cutoffs=[]", "Expected cutoffs in [0, 1]"),
    ("lesion", {"removals": ["block"]}, "removals=[block]", "Expected removals among branch_zero"),
    ("loss_landscape", {"preset": "official", "normalization": "layer"}, "preset=official", "Expected preset="),
    ("loss_slice", {"preset": "official", "ignore": "positions"}, "preset=official", "Expected preset="),
    (
        "curvature_exponents",
        {"n_singular_values": 3},
        "n_singular_values=3",
        "Expected n_singular_values of at least 4",
    ),
    ("evaluation", {"classes": []}, "classes=[]", "Expected classes to be all, present"),
    ("attention_maps", {"query": "middle"}, "query=middle", "Expected query to be 'auto'"),
    ("attention_maps", {"heads": []}, "", "Expected at least one head"),
    ("attention_maps", {"layers": []}, "", "Expected at least one layer"),
    ("similarity", {"measure": ["cka", "cka"]}, "", "Expected different measures"),
    ("nep_stability", {"ks": []}, "ks=[]", "Expected ks to hold positive numbers"),
    ("sharpness", {"radii": [-1]}, "radii.0=-1", "not greater than 0"),
    ("preconditioned_sharpness", {"beta1": 1}, "beta1=1", "not in [0, 1)"),
    ("hessian_class_structure", {"n_splits": 1}, "n_splits=1", "not 0 or at least 2"),
    ("effective_receptive_field", {"area_shares": [1.5]}, "area_shares.0=1.5", "not between 0 and 1"),
]


@pytest.mark.parametrize(("measure", "options", "key", "reason"), REFUSED, ids=[f"{r[0]}-{r[2]}" for r in REFUSED])
def test_options_that_cannot_be_meant(measure: str, options: dict[str, Any], key: str, reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_analyses({"a": {"_target_": f"vitscope.{measure}", **options}})
    text = str(refused.value)
    assert text.startswith(".".join(filter(None, ("analysis.a", key)))), text
    assert f": {reason}" in text, text


def test_a_word_in_a_list_is_refused_with_the_nearest() -> None:
    node = {"_target_": "vitscope.sharpness", "adaptive": ["elementwise_l2", "elementwise_l3"]}
    with pytest.raises(
        ConfigError, match=r"adaptive=\[elementwise_l2, elementwise_l3\]: no such choice; .*elementwise_l"
    ):
        check_analyses({"a": node})
