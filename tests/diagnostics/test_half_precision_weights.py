"""Measures that move weights or pixels, of a model in half precision: equal to those of the same weights in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitscope as vs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def probes(dtype: torch.dtype) -> tuple[vs.Probe, vs.Probe]:
    """Return a model in half precision, and one of the same weights in float32, on the same images."""
    torch.manual_seed(0)
    half = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    x, y = torch.rand(32, 3, 2, 2).to(dtype).float(), torch.arange(32) % 3
    about = {"mean": [0.0], "std": [1.0]}
    return tuple(vs.Probe(m, [(x, y)], about=about) for m in (half, copy.deepcopy(half).float()))


def saved(probe: vs.Probe, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + (torch.randn(value.shape, generator=generator) / 8).to(value)
        for name, value in probe.model.state_dict().items()
    }


def sharpness(probe: vs.Probe) -> tuple[Any, list[np.ndarray]]:
    adaptive = ("elementwise_linf", "filter_l2", "elementwise_average")
    result = vs.sharpness(probe, radii=(0.05,), n_pairs=2, n_steps=3, adaptive=adaptive, m_images=16, ascent_steps=4)
    assert (result.adaptive_rise[:3] > 0).all()  # by 0.1 to 0.4 % of each weight: the same weights in half precision
    return result, [result.rise, result.worst_rise, result.adaptive_rise]


def landscape(probe: vs.Probe) -> tuple[Any, list[np.ndarray]]:
    result = vs.loss_landscape(probe, n=3, span=0.1)
    return result, [result.nll, result.direction_norms, result.l2_sum_norm]


def gradient_slice(probe: vs.Probe) -> tuple[Any, list[np.ndarray]]:
    result = vs.loss_slice(probe, n=3, span=0.1, directions="gradient")
    return result, [result.nll, result.direction_norms]


def attack(probe: vs.Probe) -> tuple[Any, list[np.ndarray]]:
    result = vs.adversarial(probe, attacks=("fgsm", "square"), epsilons=(0, 1), queries=20)
    assert result.nll[:, 0] == pytest.approx(result.clean_nll, rel=1e-6)  # a change of nothing is the clean image
    return result, [result.nll, result.accuracy, np.array([result.clean_nll])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("measure", [sharpness, landscape, gradient_slice, attack])
def test_numbers_are_those_of_full_precision(
    measure: Callable[[vs.Probe], tuple[Any, list[np.ndarray]]], dtype: torch.dtype
) -> None:
    half, full = probes(dtype)
    before = copy.deepcopy(half.model.state_dict())
    (result, found), (_, expected) = measure(half), measure(full)
    for a, b in zip(found, expected):
        np.testing.assert_array_equal(a, b)  # the very same passes
    assert result.card.dtype == "float32"
    assert all(torch.equal(value, before[name]) for name, value in half.model.state_dict().items())


def test_checkpoints_in_half_precision_are_interpolated_in_full() -> None:
    half, full = probes(torch.bfloat16)
    ends = [("a", saved(half, 0)), ("b", saved(half, 1))]
    wide = [(name, {key: value.float() for key, value in state.items()}) for name, state in ends]
    for measure, options in ((vs.linear_interpolation, {"n": 3}), (vs.trajectory, {})):
        a, b = measure(half, checkpoints=ends, **options), measure(full, checkpoints=wide, **options)
        assert a.scalars() == b.scalars()
        assert a.card.dtype == "float32"


def test_autocast_is_stated_and_has_an_error() -> None:
    half, _ = probes(torch.bfloat16)
    result = vs.loss_landscape(half, n=3, span=0.1, dtype="bfloat16")
    assert result.card.dtype == "bfloat16"
    assert result.dtype_error is not None
    assert 0 < result.dtype_error < 2**-6


def test_the_l2_terms_and_the_distance_of_files_of_two_types() -> None:
    """A start in half precision does not round the end: at the end the L2 term is the end's own."""
    _, full = probes(torch.bfloat16)
    full = vs.Probe(full.model, list(full.batches), vs.Objective(weight_decay=0.5))
    start, end = {k: v.bfloat16() for k, v in saved(full, 0).items()}, saved(full, 1)
    result = vs.linear_interpolation(full, checkpoints=[("a", start), ("b", end)], n=3)
    square = sum(float(value.double().square().sum()) for value in end.values())
    assert result.l2_half_sq[-1] == pytest.approx(0.25 * square, rel=1e-6)
    distance = sum(float((end[name].double() - value.double()).square().sum()) for name, value in start.items()) ** 0.5
    assert result.distance == pytest.approx(distance, rel=1e-6)
