"""Directions against direct formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from vitscope.linalg.weights.checkpoint_pca import difference, principal_directions
from vitscope.linalg.weights.directions import (
    OFFICIAL_IGNORE,
    as_direction,
    filter_parameters,
    inner,
    moving,
    norm,
    normalize,
    orthogonalize,
    project,
    random_direction,
)


class Zoo(nn.Module):
    """One of every kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.grouped = nn.Conv2d(6, 6, 3, groups=2)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.up = nn.ConvTranspose2d(6, 4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 5)
        self.tied = nn.Linear(8, 5, bias=False)
        self.tied.weight = self.head.weight
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 4, 8))
        self.relative_position_bias_table = nn.Parameter(torch.randn(9, 2))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


@pytest.fixture
def zoo() -> Zoo:
    return Zoo().double()


ROWS = {"conv.weight", "grouped.weight", "depthwise.weight", "attention.in_proj_weight", "attention.out_proj.weight",
        "head.weight"}  # fmt: skip


def test_random_numbers_depend_on_seed_index_and_name_alone():
    small, large = {"a": torch.zeros(3, 2)}, {"b": torch.zeros(5), "a": torch.zeros(3, 2, dtype=torch.float64)}
    alone, among = random_direction(small, 1, 2)["a"], random_direction(large, 1, 2)["a"]
    assert torch.equal(alone.double(), among)  # exact: both come from the same float32 numbers
    for seed, index in ((2, 2), (1, 3)):
        assert not torch.equal(alone, random_direction(small, seed, index)["a"])
    state = torch.get_rng_state()
    random_direction(large, 0)
    assert torch.equal(state, torch.get_rng_state())


def test_random_numbers_are_standard_normal():
    drawn = random_direction({"w": torch.zeros(200, 200)}, 0)["w"].double()
    # five standard errors of mean and variance with 40,000 draws
    assert abs(float(drawn.mean())) < 5 / 200
    assert abs(float(drawn.var()) - 1) < 5 * 2**0.5 / 200


def test_filters_are_rows_of_linear_and_convolution_weights(zoo: Zoo):
    assert filter_parameters(zoo) - {"frozen.weight"} == ROWS


def test_filter_gives_each_row_the_weights_norm(zoo: Zoo):
    parameters = dict(zoo.named_parameters())
    found = normalize(random_direction(parameters, 0), parameters, "filter", filter_parameters(zoo))
    for name, d in found.items():
        w = parameters[name].detach()
        shape = (len(w), -1) if name in ROWS else (1, -1)
        # float64 rounding of sums of up to 64 squares
        torch.testing.assert_close(d.reshape(shape).norm(dim=1), w.reshape(shape).norm(dim=1), rtol=1e-13, atol=1e-15)


def test_filter_official_follows_the_released_formula(zoo: Zoo):
    parameters = moving(dict(zoo.named_parameters()), OFFICIAL_IGNORE)
    assert not any(p.ndim < 2 for p in parameters.values())
    assert "cls_token" in parameters
    assert "pos_embed" not in parameters
    assert "relative_position_bias_table" not in parameters
    drawn = random_direction(parameters, 3)
    raw = {name: d.clone() for name, d in drawn.items()}
    for name, d in normalize(drawn, parameters, "filter_official").items():
        w = parameters[name].detach()
        expected = raw[name] * (
            w.square().sum(0, keepdim=True).sqrt() / (raw[name].square().sum(0, keepdim=True).sqrt() + 1e-7)
        )
        torch.testing.assert_close(d, expected, rtol=1e-13, atol=1e-15)
    # a class token has one row: every entry keeps its size, up to the formula's 1e-7
    torch.testing.assert_close(drawn["cls_token"].abs(), zoo.cls_token.detach().abs(), rtol=1e-4, atol=1e-6)


def test_layer_gives_each_tensor_the_weights_norm_and_none_changes_nothing(zoo: Zoo):
    parameters = dict(zoo.named_parameters())
    for name, d in normalize(random_direction(parameters, 0), parameters, "layer").items():
        torch.testing.assert_close(d.norm(), parameters[name].detach().norm(), rtol=1e-13, atol=1e-15)
    raw, same = random_direction(parameters, 0), normalize(random_direction(parameters, 0), parameters, "none")
    assert all(torch.equal(raw[name], same[name]) for name in raw)


def test_a_filter_of_zero_weights_stays():
    w = {"w": torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)}
    found = normalize(random_direction(w, 0), w, "filter", ["w"])["w"]
    assert torch.equal(found[0], torch.zeros(2, dtype=torch.float64))
    assert float(found[1].norm()) == pytest.approx(5.0, rel=1e-14)


@pytest.mark.parametrize(
    ("ignore", "stay"),
    [
        ("bias_bn", {"norm.weight", "head.bias", "pos_embed", "relative_position_bias_table"}),
        ("one_dim", {"norm.weight", "head.bias"}),
        ("positions", {"pos_embed", "relative_position_bias_table"}),
        (["^conv", "cls"], {"conv.weight", "conv.bias", "cls_token"}),
    ],
)
def test_ignored_parameters_stay(zoo: Zoo, ignore: str | list[str], stay: set[str]):
    parameters = dict(zoo.named_parameters())
    left = moving(parameters, ignore)
    assert not stay & set(left)
    assert set(left) == set(parameters) if ignore == [] else set(left) < set(parameters)
    assert set(moving(parameters, [])) == set(parameters)


def test_tied_parameters_are_moved_once(zoo: Zoo):
    assert "head.weight" in dict(zoo.named_parameters())
    assert "tied.weight" not in random_direction(dict(zoo.named_parameters()), 0)


def test_projection_shortens_only_what_is_too_long():
    w = {"w": torch.tensor([[3.0, 4.0], [0.6, 0.8]], dtype=torch.float64)}
    d = {"w": torch.tensor([[3.0, 4.0], [0.03, 0.04]], dtype=torch.float64)}
    found = project(d, w, 0.1, "filter", ["w"])["w"]
    expected = torch.tensor([[0.3, 0.4], [0.03, 0.04]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_orthogonal_parts_are_orthogonal():
    shapes = {"a": torch.zeros(5, 4, dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float64)}
    one, other = random_direction(shapes, 0), random_direction(shapes, 1)
    orthogonalize(other, one)
    assert abs(inner(one, other)) < 1e-14 * norm(one) * norm(other)


def test_flat_vectors_and_mappings_become_copies():
    parameters = {"a": torch.zeros(2, 2, dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float64)}
    flat = as_direction(np.arange(7.0), parameters)
    assert flat["a"].tolist() == [[0, 1], [2, 3]]
    assert flat["b"].tolist() == [4, 5, 6]
    given = torch.ones(3, dtype=torch.float64)
    as_direction({"b": given}, parameters)["b"].mul_(5)
    assert given.tolist() == [1, 1, 1]


def test_principal_directions_are_the_singular_vectors():
    shapes = {"a": torch.zeros(4, 3, dtype=torch.float64), "b": torch.zeros(5, dtype=torch.float64)}
    points = [random_direction(shapes, seed) for seed in range(4)]
    found, squares = principal_directions(points)
    matrix = np.stack([np.concatenate([d["a"].numpy().ravel(), d["b"].numpy()]) for d in points])
    _, singular, rows = np.linalg.svd(matrix)
    np.testing.assert_allclose(squares, singular**2, rtol=1e-12)
    for direction, row in zip(found, rows):
        flat = np.concatenate([direction["a"].numpy().ravel(), direction["b"].numpy()])
        # the Gram matrix squares the condition number: half the digits of float64 are left at worst
        np.testing.assert_allclose(flat, row * np.sign(row @ flat), atol=1e-10)
        assert flat @ matrix[0] >= 0


def test_dependent_differences_give_fewer_directions():
    d = random_direction({"a": torch.zeros(3, dtype=torch.float64)}, 0)
    found, _ = principal_directions([d, {"a": 2 * d["a"]}])
    assert len(found) == 1
    with pytest.raises(ValueError, match="differs from the final weights"):
        principal_directions([{"a": torch.zeros(3)}])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: normalize({}, p, "filters"), "filter, filter_official, layer, none, received 'filters'"),
        (lambda p: moving(p, "("), "regular expressions, received '\\('"),
        (lambda p: moving(p, "."), "that leaves none"),
        (lambda p: project({}, p, 0.1, "none"), "filter or layer for a ball, received 'none'"),
        (lambda p: as_direction(np.zeros(3), p), "with 4 entries, received 3"),
        (lambda p: as_direction({"b": np.zeros(3)}, p), "received 'b'"),
        (lambda p: as_direction({"a": np.zeros(3)}, p), r"shape \(2, 2\), received \(3,\)"),
        (lambda p: difference({}, p, "init"), "'a' in checkpoint 'init', received none"),
        (lambda p: difference({"a": torch.zeros(3)}, p, "init"), r"\(2, 2\) in checkpoint 'init', received \(3,\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call({"a": torch.zeros(2, 2)})
