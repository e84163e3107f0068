"""Measures that take a batch apart refuse networks whose outputs for an image depend on the other images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.fixtures.networks.own_networks import Block, Tokens, X
from vitscope.core.undefined_values import NullWarning
from vitscope.linalg.curvature.operator_factory import curvatures

IMAGES = torch.cat((X, 0.5 * X.flip(2), X.flip(3)))  # (6, 3, 16, 24)
Y = torch.arange(6) % 4
PIXELS = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


class Centered(Tokens):
    """A network that subtracts the mean of its batch, of which the derivative of a sum over images is zero."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Crowded(nn.Module):
    """An expert that takes the first tokens of a batch alone, as many as half of its images have."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.expert, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT  # (B, N, 8)
        rows = tokens.flatten(0, 1)
        taken = rows[: len(rows) // 2]
        rows = torch.cat((taken + self.expert(taken).tanh(), rows[len(taken) :]))
        return self.head(rows.view(tokens.shape).mean(1))


MEASURES: dict[str, Callable[[vs.Probe], Any]] = {
    "micro_batch=2": lambda probe: vs.hessian_trace(probe, n_vectors=1, micro_batch=2),
    "effective_receptive_field": vs.effective_receptive_field,
    "adversarial": lambda probe: vs.adversarial(probe, attacks=("fgsm",), epsilons=(8,), **PIXELS),
}


NETWORKS: dict[str, Callable[[], nn.Module]] = {"centered": lambda: Centered(Block()), "crowded": Crowded}
#: the second has no map behind its stem
CASES = [(name, measure) for name in NETWORKS for measure in MEASURES if name == "centered" or "field" not in measure]


@pytest.mark.filterwarnings("ignore:the outputs of:UserWarning")  # the notice of a measure that takes whole batches
@pytest.mark.parametrize(("name", "measure"), CASES)
def test_networks_whose_images_influence_each_other_are_refused(name: str, measure: str) -> None:
    probe = vs.Probe(NETWORKS[name]().double().eval(), [(IMAGES, Y)])
    with pytest.raises(ValueError, match=rf"depends on that image alone for {measure}, .* influence each other"):
        MEASURES[measure](probe)


@pytest.mark.filterwarnings("ignore:the outputs of:UserWarning")
def test_gradients_of_attention_are_left_out() -> None:
    text = r"null for gradient_rollout \(.*depends on that image alone for gradients of attention maps"
    with pytest.warns(NullWarning, match=text):
        vs.attention_maps(vs.Probe(Centered(Block()).double().eval(), [(IMAGES, Y)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_networks_have_the_products_of_whole_batches(dtype: torch.dtype) -> None:
    probe = vs.Probe(Tokens(Block()).to(dtype).eval(), [(IMAGES.to(dtype), Y)])
    products = []
    for micro_batch in (None, 2):
        with curvatures(probe, micro_batch=micro_batch) as made:
            operator = made.mean()
            products.append(operator(torch.ones(operator.size, dtype=dtype)))
    error = (products[0] - products[1]).norm() / products[0].norm()
    assert error < 100 * torch.finfo(dtype).eps  # sums over images in another order, of two derivatives
