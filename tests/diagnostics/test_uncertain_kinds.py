"""Measures that sort numbers by kind say why they do not where the kinds are not certain."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.networks.own_networks import Block, Tokens, X
from vitscope.core.undefined_values import NullWarning

Y = torch.tensor([0, 1, 2])


class Exit(Tokens):
    """A classifier of the first tokens that no pass of these images uses."""

    def __init__(self) -> None:
        super().__init__(Block())
        self.early = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[-1] == 24 else self.early(self.patches(x).mean((2, 3)))


OPTIONS = {
    "curvature_exponents": {"n_singular_values": 4, "parameters": "classifier.*"},
    "gradient_noise": {},
    "hessian_block_densities": {
        "blocks": ["classifier.*", "norm.*"],
        "n_vectors": 1,
        "n_steps": 2,
        "n_resamples": 2,
    },
    "hessian_diagonal": {"n_vectors": 2},
    "kronecker_factors": {},
    "rayleigh_split": {"k": 1, "n_ends": 0, "parameters": "classifier.*", "tol": 1e-2},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.filterwarnings("ignore:.*do not depend on", "ignore:.*null for (?!the kinds)")
def test_the_reason_is_told(name: str) -> None:
    if name == "kronecker_factors" and importlib.util.find_spec("curvlinops") is None:
        pytest.skip("needs curvlinops-for-pytorch")
    probe = vs.Probe(Exit().double().eval(), [(X[[0, 1, 0]], Y)])
    text = rf"{name}: null for the kinds of parameters \(.*early.weight is not used by the forward pass"
    with pytest.warns(NullWarning, match=text):
        getattr(vs, name)(probe, **OPTIONS[name])


def test_rows_of_a_parameter_have_its_kind() -> None:
    model = vs.models.vit(size="tiny", image_size=16, patch_size=8, depth=1, heads=2, dim_head=4, num_classes=4)
    probe = vs.Probe(model.double().eval(), [(torch.rand(3, 3, 16, 16, dtype=torch.float64), Y)])
    assert vs.rayleigh_split(probe, k=1, n_ends=0, parameters="part:q", tol=1e-2).kinds == ("msa",)
