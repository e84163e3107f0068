"""Weights that no number can be made from are refused by name; the others are measured and come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from vitscope.runtime.errors import NumericalError

FORWARD: dict[str, Callable[[vs.Probe], Any]] = {
    "evaluation": vs.evaluation,
    "feature_map_variance": vs.feature_map_variance,
}
WEIGHTS: dict[str, Callable[[vs.Probe], Any]] = {
    "hessian_eigenvalues": lambda probe: vs.hessian_eigenvalues(probe, k=1, max_products=4),
    "loss_landscape": lambda probe: vs.loss_landscape(probe, n=3),
    "loss_slice": lambda probe: vs.loss_slice(probe, n=3),
    "linear_interpolation": lambda probe: vs.linear_interpolation(
        probe,
        checkpoints=[("a", {k: v.clone() for k, v in probe.model.state_dict().items() if isinstance(v, Tensor)})],
        n=3,
    ),
    "sharpness": lambda probe: vs.sharpness(probe, radii=(0.1,), n_pairs=1, n_steps=1),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def probe_of(model: nn.Module) -> vs.Probe:
    x = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return vs.Probe(model, [(x, torch.arange(6) % 3)])


@pytest.mark.parametrize("measure", [*FORWARD, *WEIGHTS])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(measure: str, value: float) -> None:
    model = network()
    with torch.no_grad():
        model[5].weight[1, 2] = value
    with pytest.raises(NumericalError, match=r"parameter '5\.weight' holds 1 NaN or infinite values of 12") as raised:
        (FORWARD | WEIGHTS)[measure](probe_of(model))
    assert raised.value.exit_code == 5


def test_statistics_and_buffers_that_are_not_finite_are_named() -> None:
    model = network()
    model[1].running_var[0] = float("inf")
    with pytest.raises(NumericalError, match=r"buffer '1\.running_var' holds 1 NaN or infinite"):
        vs.evaluation(probe_of(model))
    model = network()
    model.register_buffer("table", torch.tensor([1.0, float("nan")]))
    with pytest.raises(NumericalError, match="buffer 'table' holds 1 NaN values of 2"):
        vs.evaluation(probe_of(model))


def test_masks_and_large_weights_are_finite() -> None:
    model = network().half()
    with torch.no_grad():
        model[5].weight.fill_(60000.0)  # a sum of them is infinite in half precision
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    model.float()
    assert vs.evaluation(probe_of(model)).n_images == 6
    half = network().half()
    with torch.no_grad():
        half[0].weight.fill_(60000.0)
    with vs.Probe(half, [(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]))]).guard() as model:
        assert not model.training  # entered: nothing was refused


class WithSparse(nn.Module):
    """Multiplies features by a sparse matrix, a buffer or a parameter."""

    def __init__(self, layout: str, parameter: bool) -> None:
        super().__init__()
        self.net = network()
        matrix = torch.eye(4)[[1, 0, 2, 3]]
        matrix = matrix.to_sparse_csr() if layout == "csr" else matrix.to_sparse()
        if parameter:
            self.mix = nn.Parameter(matrix, requires_grad=False)
        else:
            self.register_buffer("mix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        features = self.net[:5](x)
        return self.net[5]((self.mix @ features.T).T)


@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_buffers_are_measured_and_come_back(layout: str) -> None:
    model = WithSparse(layout, parameter=False)
    dense = WithSparse(layout, parameter=False)
    dense.load_state_dict(model.state_dict())
    dense.mix = dense.mix.to_dense()
    buffer, values = model.mix, model.mix.to_dense()
    for name in ("evaluation", "feature_map_variance", "loss_landscape", "loss_slice", "sharpness"):
        measure = (FORWARD | WEIGHTS)[name]
        scalars, expected = measure(probe_of(model)).scalars(), measure(probe_of(dense)).scalars()
        assert scalars == pytest.approx(expected, rel=1e-3, abs=1e-5), name  # float32, products in another order
        assert model.mix is buffer
        assert torch.equal(model.mix.to_dense(), values)


@pytest.mark.parametrize("measure", WEIGHTS)
def test_sparse_parameters_are_refused_where_weights_move(measure: str) -> None:
    model = WithSparse("coo", parameter=True)
    with pytest.raises(ValueError, match="Expected dense weights, received 'mix' of layout sparse_coo"):
        WEIGHTS[measure](probe_of(model))
    assert vs.evaluation(probe_of(model)).n_images == 6


def test_interpolation_moves_sparse_buffers() -> None:
    model = WithSparse("coo", parameter=False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["mix"] = torch.eye(4).to_sparse()
    found = vs.linear_interpolation(probe_of(model), checkpoints=[("other", state)], n=3)
    model.mix = torch.eye(4)
    want = vs.evaluation(probe_of(model)).nll
    assert found.nll[0] == pytest.approx(want, rel=1e-6)
    assert np.isfinite(found.nll).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("measure", [*WEIGHTS, "normalized_hessian", "hessian_trace", "spectral_density"])
def test_dynamically_quantized_weights_are_refused_by_every_measure_of_weights(measure: str) -> None:
    supported = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]
    assert supported, "this build of torch has no quantized kernels"
    torch.backends.quantized.engine = supported[-1]
    model = torch.ao.quantization.quantize_dynamic(network().eval(), {nn.Linear}, dtype=torch.qint8)
    run = WEIGHTS.get(measure) or (lambda probe: getattr(vs, measure)(probe))
    with pytest.raises(ValueError, match=r"integers have no gradient.*received '5' of Linear"):
        run(probe_of(model))
    assert vs.evaluation(probe_of(model)).n_images == 6  # its answers need no gradient


def test_integer_parameters_are_refused() -> None:
    model = network()
    model.codes = nn.Parameter(torch.arange(4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="received 'codes' of Sequential"):
        WEIGHTS["loss_slice"](probe_of(model))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_scripted_model_is_not_called_quantized() -> None:
    model = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(6, 4)))
    probe = vs.Probe(model, [(torch.rand(2, 1, 2, 3), torch.tensor([0, 1]))])
    with pytest.raises(ValueError, match=r"received .* made by torch\.jit\.script"):
        vs.hessian_eigenvalues(probe, k=1)
