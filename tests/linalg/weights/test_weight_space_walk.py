"""Walking in place: every point exact, everything back bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitscope.linalg.weights import weight_space_walk
from vitscope.linalg.weights.directions import random_direction
from vitscope.linalg.weights.weight_space_walk import points_in_plane, points_on_segment, set_aside, squared_norms


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    shapes = {"a": torch.empty(7, 3), "b": torch.empty(5), "still": torch.empty(2)}
    return {name: w.to(dtype) for name, w in random_direction(shapes, 9).items()}


def directions() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    w = weights()
    # so large that adding and subtracting them again would lose every bit of the weights
    first = {"a": 1e9 * random_direction(w, 0)["a"]}
    second = {name: 1e7 * random_direction(w, 1)[name] for name in ("a", "b")}
    return first, second


def test_points_do_not_depend_on_the_way():
    first, second = directions()
    points = [(0.5, -1.0), (0.5, 0.25), (-2.0, 0.25), (0.0, 0.0), (0.5, -1.0)]
    w, start = weights(), weights()
    with points_in_plane(w, set_aside(first), second) as move:
        for a, b in points:
            move(a, b)
            expected = start["a"].add(first["a"], alpha=a).add(second["a"], alpha=b)
            assert torch.equal(w["a"], expected)
            assert torch.equal(w["b"], start["b"].add(second["b"], alpha=b))
            assert torch.equal(w["still"], start["still"])
        move(0.0, 0.0)
        assert all(torch.equal(w[name], start[name]) for name in w)
    assert all(torch.equal(w[name], start[name]) for name in w)


@pytest.mark.parametrize("line", [True, False])
def test_weights_are_back_after_an_exception(line: bool):
    first, second = directions()
    w, start = weights(), weights()
    with pytest.raises(RuntimeError, match="stop"), points_in_plane(w, None if line else first, second) as move:
        move(1.0, 1.0)
        assert not torch.equal(w["a"], start["a"])
        raise RuntimeError("stop")
    assert all(torch.equal(w[name], start[name]) for name in w)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_set_aside_keeps_every_bit(dtype: torch.dtype):
    tensors = {
        "odd": torch.randn(3).to(torch.bfloat16),
        **weights(dtype),
        "none": torch.empty(0),
        "one": torch.tensor(2.5),
    }
    kept = set_aside(tensors)
    for name, t in tensors.items():
        assert kept[name].dtype == t.dtype
        assert torch.equal(kept[name], t)
        assert kept[name].data_ptr() != t.data_ptr() or not t.numel()


def test_a_full_disk_falls_back_to_memory(monkeypatch: pytest.MonkeyPatch):
    def full(tensors: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_space_walk, "_mapped", full)
    w = weights()
    kept = set_aside(w)
    assert all(torch.equal(kept[name], w[name]) for name in w)
    w["a"].zero_()
    assert not torch.equal(kept["a"], w["a"])


def test_between_is_exact_at_both_ends():
    w, start, end = weights(), weights(), {name: 1e8 * d for name, d in random_direction(weights(), 4).items()}
    counter, ends = torch.tensor(3), (torch.tensor(5), torch.tensor(8))
    tensors = {**w, "counter": counter}
    with points_on_segment(tensors, {**start, "counter": ends[0]}, {**end, "counter": ends[1]}) as move:
        for t, expected, count in ((0.0, start, 5), (1.0, end, 8)):
            move(t)
            assert all(torch.equal(w[name], expected[name]) for name in w)
            assert int(counter) == count
        move(0.25)
        torch.testing.assert_close(w["a"], 0.75 * start["a"] + 0.25 * end["a"], rtol=1e-6, atol=1e-6)  # float32
    assert int(counter) == 3
    assert all(torch.equal(w[name], weights()[name]) for name in w)


def test_squared_norms_are_those_of_the_moved_weights():
    w = weights(torch.float64)
    u, v = {"a": random_direction(w, 0)["a"]}, {name: random_direction(w, 1)[name] for name in ("a", "b")}
    x, y = np.meshgrid([-1.0, 0.0, 0.3], [0.5, 2.0], indexing="ij")
    norms = squared_norms(w, u, v)
    for index in np.ndindex(x.shape):
        a, b = x[index], y[index]
        moved = {"a": w["a"] + a * u["a"] + b * v["a"], "b": w["b"] + b * v["b"], "still": w["still"]}
        squares = [float(t.square().sum()) for t in moved.values()]
        # float64 rounding, with some cancellation between the quadratic's terms
        np.testing.assert_allclose(norms.at(a, b), squares, rtol=1e-12)
        np.testing.assert_allclose(norms.half_sq(0.1, x, y)[index], 0.05 * sum(squares), rtol=1e-12)
        np.testing.assert_allclose(norms.sum_norm(0.1, x, y)[index], 0.1 * np.sqrt(squares).sum(), rtol=1e-12)


def test_between_keeps_a_live_end_apart_and_one_ends_nan_from_the_other():
    w = weights()
    broken = {name: value * float("nan") for name, value in w.items()}
    with points_on_segment(w, broken, w) as move:
        for t in (0.0, 1.0):
            move(t)
        assert all(torch.equal(w[name], weights()[name]) for name in w)
