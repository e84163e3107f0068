"""The options that curvature measures share: checks, and their place in signatures."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields, replace
from typing import Unpack, get_type_hints

import pytest
import torch
from torch import nn

import vitscope as vs
from vitscope.linalg.curvature.curvature_options import CurvatureArguments, CurvatureOptions, curvature_arguments
from vitscope.linalg.curvature.operator_factory import curvatures

OPERATOR = (
    "operator", "parameters", "dtype", "bn", "product", "difference_step", "micro_batch", "basis", "checkpoint_blocks", "seed",
)  # fmt: skip
SEARCH = ("tol", "parameters", "dtype", "bn", "micro_batch", "max_products", "max_memory", "basis", "seed")
#: the shared options of each measure, as they were before they had one definition
MEASURES = {
    "hessian_eigenvalues": tuple(f.name for f in fields(CurvatureOptions)),
    "hessian_max_eigenvalue_spectrum": tuple(f.name for f in fields(CurvatureOptions)),
    "hessian_trace": OPERATOR,
    "spectral_density": OPERATOR,
    "rayleigh_split": SEARCH,
    "preconditioned_sharpness": SEARCH,
    "critical_point": SEARCH,
    "normalized_hessian": tuple(name for name in SEARCH if name != "parameters"),
    "nep_stability": ("parameters", "dtype", "bn", "max_products", "max_memory", "basis", "seed"),
    "hessian_by_kind": ("tol", "dtype", "bn", "product", "difference_step", "max_products", "seed"),
    "bn_policy": ("tol", "parameters", "dtype", "max_products", "seed"),
}


@pytest.mark.parametrize("name", MEASURES)
def test_signatures_list_the_options_with_their_defaults(name: str) -> None:
    listed = inspect.signature(getattr(vs, name)).parameters
    shared = {key: p.default for key, p in listed.items() if key in MEASURES["hessian_eigenvalues"]}
    expected = {key: getattr(CurvatureOptions(), key) for key in MEASURES[name]}
    assert shared == (expected | {"tol": 1e-2} if name == "critical_point" else expected)
    hints, field_hints = get_type_hints(getattr(vs, name)), get_type_hints(CurvatureOptions)
    assert {key: hints[key] for key in expected} == {key: field_hints[key] for key in expected}
    assert not any(p.kind is p.VAR_KEYWORD for p in listed.values())


def test_typed_arguments_and_fields_are_the_same() -> None:
    assert get_type_hints(CurvatureArguments) == get_type_hints(CurvatureOptions)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tol": 0.0}, "Expected tol between 0 and 1, received 0.0"),
        ({"tol": float("nan")}, "Expected tol between 0 and 1, received nan"),
        ({"max_products": 0}, "Expected max_products to be at least 1, received 0"),
        ({"solver": "arpack"}, "Expected solver to be one of lanczos, power, received 'arpack'"),
        ({"operator": "hesian"}, "Expected operator to be one of hessian, .*, received 'hesian'"),
        ({"product": "forward"}, "Expected product to be one of reverse, linearize, difference, received 'forward'"),
        (
            {"product": "difference", "operator": "ggn"},
            "Expected operator='hessian' with product='difference', received 'ggn'",
        ),
        ({"difference_step": 0.1}, "Expected product='difference' with difference_step, received 'reverse'"),
        (
            {"product": "difference", "difference_step": 0.0},
            "Expected difference_step to be positive or None, received 0.0",
        ),
        ({"product": "difference", "checkpoint_blocks": True}, "Expected product='reverse' with checkpoint_blocks"),
        ({"micro_batch": 0}, "Expected micro_batch to be at least 1 or None, received 0"),
        ({"dtype": "float16"}, "Expected dtype to be float32, float64 or None, received 'float16'"),
        ({"dtype": torch.int64}, "Expected dtype to be float32, float64 or None, received 'int64'"),
        ({"bn": "batch", "micro_batch": 2}, "Expected micro_batch=None with bn='batch' .*, received 2"),
    ],
)
def test_values_that_cannot_be_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CurvatureOptions(**values)
    with pytest.raises(ValueError, match=message):
        replace(CurvatureOptions(), **values)


def test_options_are_frozen_and_read_as_the_parts_need_them() -> None:
    options = CurvatureOptions(parameters=("0.*", "1.*"), dtype="torch.float64", tol=0.1, max_memory=7.0, seed=2)
    assert options.subset == ["0.*", "1.*"]
    assert options.torch_dtype is torch.float64
    assert options.search() == {"tol": 0.1, "max_products": 200, "max_memory": 7.0, "seed": 2}
    with pytest.raises(FrozenInstanceError):
        options.tol = 0.5


def test_power_iteration_has_a_stopping_rule_of_its_own() -> None:
    assert CurvatureOptions(solver="power", tol=0.0).tol == 0.0


def test_a_field_that_does_not_apply_is_refused() -> None:
    probe = vs.Probe(nn.Linear(2, 2), [(torch.rand(2, 2), torch.tensor([0, 1]))])
    with pytest.raises(TypeError, match=r"hessian_trace\(\) got an unexpected keyword argument 'solver'"):
        vs.hessian_trace(probe, n_vectors=1, solver="power")
    with pytest.raises(ValueError, match="Expected fields of CurvatureOptions, received tolerance"):

        @curvature_arguments("tolerance")
        def measure(probe: vs.Probe, **curvature: Unpack[CurvatureArguments]) -> None:
            """Never called."""


def test_operators_take_an_object_and_changes_of_it() -> None:
    probe = vs.Probe(nn.Linear(2, 2), [(torch.rand(2, 2), torch.tensor([0, 1]))])
    options = CurvatureOptions(parameters="weight", dtype="float64")
    with curvatures(probe, options, operator="ggn") as operators:
        assert operators.options == replace(options, operator="ggn")
        assert list(operators.parameters) == ["weight"]
        assert operators.mean().dtype is torch.float64


@pytest.mark.filterwarnings("ignore:the outputs of:UserWarning")  # noticed, then refused
def test_micro_batches_are_refused_where_they_change_the_statistics() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3)).double()
    probe = vs.Probe(model, [(torch.randn(n, 3, 8, 8, dtype=torch.float64), torch.arange(n) % 3) for n in (2, 4)])
    with pytest.raises(
        ValueError, match=r"Expected micro_batch=None with BatchNorm that uses the statistics .* received 2"
    ):
        vs.hessian_trace(probe, n_vectors=1, micro_batch=2)
    with curvatures(probe, micro_batch=4) as whole:  # of whole batches the statistics are the same
        product = whole.mean()(torch.ones(whole.mean().size, dtype=torch.float64))
    with curvatures(probe) as plain:
        assert torch.equal(product, plain.mean()(torch.ones(plain.mean().size, dtype=torch.float64)))


def test_the_card_states_that_most_of_a_network_is_frozen() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Linear(20, 3))
    batches = [(torch.randn(4, 30), torch.arange(4) % 3)]
    names = []
    for frozen in ([], [model[0].bias], [model[0].weight]):  # none, 20 and 600 of 683 values
        for p in frozen:
            p.requires_grad_(False)
        names.append(vs.hessian_trace(vs.Probe(model, batches), n_vectors=1).card.parameters)
    assert names == ["all", "all", "trainable"]
    assert (
        vs.hessian_trace(vs.Probe(model, batches), n_vectors=1, parameters="1.*").card.parameters == "1.* (trainable)"
    )
