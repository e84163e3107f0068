"""Measures of a transformer whose rotary position embeddings are complex buffers, against the same network in real numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.networks.rotary_vit import rotary_pair

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

X, Y = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 4
#: products and sums on the way to a number of a measure in double precision: two blocks, forward and backward, of sums of at most
#: 32 terms, and the measure's own sums over 5,000 parameters; each adds at most eps of the largest term
ROUNDINGS = 2 * 2 * 32 * 5000


def probe_of(model: nn.Module) -> vs.Probe:
    batches = [(X[:7], Y[:7]), (X[7:], Y[7:])]
    return vs.Probe(model, batches, vs.Objective(weight_decay=0.01), about={"mean": [0.5] * 3, "std": [0.5] * 3})


def eigenvalues(probe: vs.Probe) -> np.ndarray:
    return vs.hessian_eigenvalues(probe, k=2, dtype="float64", tol=1e-8).eigenvalues


def noise(probe: vs.Probe) -> np.ndarray:
    return vs.gradient_noise(probe, dtype="float64").square_norms[0]


def surface(probe: vs.Probe) -> np.ndarray:
    return vs.loss_landscape(probe, n=3, dtype="float64").nll


def diagonal(probe: vs.Probe) -> np.ndarray:
    return vs.hessian_diagonal(probe, n_vectors=2, dtype="float64").diagonal


MEASURES: list[Callable[[vs.Probe], np.ndarray]] = [eigenvalues, noise, surface, diagonal]


@pytest.mark.parametrize("measure", MEASURES)
def test_numbers_are_those_of_the_network_with_real_buffers(measure: Callable[[vs.Probe], np.ndarray]) -> None:
    """In double precision: `torch.nn.Module.to` would drop the imaginary parts, so that nothing is turned."""
    with_complex, with_real = rotary_pair()
    before = {name: value.clone() for name, value in with_complex.state_dict().items()}
    found, expected = measure(probe_of(with_complex)), measure(probe_of(with_real))
    atol = ROUNDINGS * torch.finfo(torch.float64).eps * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    for name, value in with_complex.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    assert {buffer.dtype for buffer in with_complex.buffers()} == {torch.complex64}


@pytest.mark.parametrize(
    ("measure", "field"),
    [("attention_maps", "maps"), ("token_norms", "norms_patch"), ("attention_distance", "distance")],
)
def test_positions_of_turned_queries_are_followed(measure: str, field: str) -> None:
    """All four tokens are on the map, and none is a prefix token."""
    fields = []
    for model in rotary_pair():
        result: Any = getattr(vs, measure)(probe_of(model))
        fields.append(np.concatenate([np.ravel(part) for part in getattr(result, field)]))
    assert np.isfinite(fields[0]).all()
    np.testing.assert_allclose(fields[0], fields[1], rtol=0, atol=64 * 2**-23 * np.abs(fields[1]).max())


class SortedAttention(nn.Module):
    """Attention whose queries and keys are sorted, through which positions are not followed, and multiplied with a table."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("table", torch.rand(4, 16))

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens ``(B, 4, 16)``."""
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = q.sort(dim=1)[0] * self.table, k.sort(dim=1)[0] * self.table
        return self.proj(F.scaled_dot_product_attention(q, k, v))


def test_tokens_of_unknown_position_are_no_prefix_tokens() -> None:
    """Unknown positions times a constant stay unknown: they were taken for those of a constant, a class token."""
    model, _ = rotary_pair()
    for block in model.blocks:
        block.attn = SortedAttention()
    with pytest.warns(UserWarning, match="cannot be followed to positions of the image"):
        result = vs.attention_maps(probe_of(model))
    assert not result.maps.size


def test_the_way_between_complex_buffers_is_straight() -> None:
    model, _ = rotary_pair()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    end = {name: value + (1j if value.is_complex() else 0) for name, value in start.items()}
    expected = vs.evaluation(probe_of(_moved(model, 0.5j))).nll
    found = vs.linear_interpolation(probe_of(model), checkpoints=[("a", start), ("b", end)], n=3)
    assert found.nll[1] == pytest.approx(expected, rel=1e-6)
    assert found.nll[0] != found.nll[2]


def _moved(model: nn.Module, offset: complex) -> nn.Module:
    moved, _ = rotary_pair()
    for buffer in moved.buffers():
        buffer += offset
    return moved
