"""Measures of attention give the same numbers wherever class and register tokens stand in the sequence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.fixtures.networks.tokens_behind_patches import TransformerOfOnesOwn

pytestmark = pytest.mark.filterwarnings("ignore::vitscope.core.undefined_values.NullWarning")


@pytest.fixture(scope="module")
def probes() -> tuple[vs.Probe, vs.Probe]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 3, 12, 16, generator=generator, dtype=torch.float64)
    y = torch.arange(6) % 3
    in_front, behind = (vs.Probe(TransformerOfOnesOwn(is_behind), [(x, y)]) for is_behind in (False, True))
    with torch.no_grad():
        torch.testing.assert_close(in_front.model(x), behind.model(x), rtol=0, atol=1e-12)
    return in_front, behind


@pytest.mark.parametrize(
    ("measure", "fields"),
    [
        ("attention_distance", ("distance", "entropy", "off_map", "uniform_distance", "n_keys")),
        (
            "attention_maps",
            ("maps", "prefix_attention", "sink_share", "entropy", "rollout", "gradient_rollout", "query"),
        ),
        (
            "token_norms",
            (
                "sink_ratio",
                "sink_on_prefix",
                "attention_received",
                "attention_prefix",
                "norm",
                "prefix_norm",
                "norms_prefix",
                "massive_ratio",
                "massive_on_prefix",
            ),
        ),
        ("depth_probes", ("class_token_ridge_accuracy", "logit_lens_accuracy", "nc3", "ridge_accuracy")),
        ("oversmoothing", ("cosine", "nmi", "head_similarity", "layer_similarity")),
    ],
)
def test_numbers_do_not_depend_on_where_the_tokens_stand(
    probes: tuple[vs.Probe, vs.Probe], measure: str, fields: tuple[str, ...]
) -> None:
    options = {"n_neighbors": 2} if measure == "depth_probes" else {}
    expected, result = (getattr(vs, measure)(probe, **options) for probe in probes)
    for name in fields:
        one, other = getattr(expected, name), getattr(result, name)
        if isinstance(one, str):
            assert one == other
            continue
        for left, right in zip(one, other, strict=True):
            np.testing.assert_allclose(right, left, rtol=1e-9, atol=1e-12, err_msg=name)


def test_tokens_behind_the_patches_have_their_kinds(probes: tuple[vs.Probe, vs.Probe]) -> None:
    for probe in probes:
        result = vs.token_norms(probe)
        assert result.prefix_kinds == ("class", "register")
        assert np.isfinite(result.prefix_norm).all()
    assert np.isfinite(vs.depth_probes(probes[1], n_neighbors=2).class_token_ridge_accuracy).all()


def test_the_class_token_is_the_query_where_it_stands(probes: tuple[vs.Probe, vs.Probe]) -> None:
    for probe in probes:
        result = vs.attention_maps(probe)
        assert result.query == "class"
        assert np.asarray(result.prefix_attention).shape == (2, 6, 3, 2)
        total = np.asarray(result.maps).sum((-2, -1)) + np.asarray(result.prefix_attention).sum(-1)
        np.testing.assert_allclose(total, 1.0, rtol=1e-9)
