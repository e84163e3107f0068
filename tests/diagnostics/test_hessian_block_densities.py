"""Densities of the Hessian's diagonal blocks against dense blocks in float64, and the distances of constructed spectra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from scipy.spatial.distance import jensenshannon

import vitscope as vs
from tests.fixtures.oracles.hessian_oracle import dense_hessian, make
from tests.fixtures.programs.processes import results_of_ranks
from vitscope.core.undefined_values import NullWarning
from vitscope.diagnostics.block_spectra._block_distances import block_distances, js_distances
from vitscope.diagnostics.block_spectra._parameter_blocks import n_uncovered

LOG2 = float(np.log(2))

pytestmark = pytest.mark.filterwarnings("ignore:the two halves of a block")  # few vectors


def probe_of(kind: str = "transformer", **objective: Any) -> vs.Probe:
    model, x, y = make(kind)
    return vs.Probe(model, [(x, y)], vs.Objective(**objective))


def distances_of(nodes: list[Any], **options: Any) -> Any:
    values = np.array(nodes, dtype=float)  # (n_blocks, n_vectors, n_steps)
    weights = np.full(values.shape, 1 / values.shape[2])
    given = {"scale": "none", "axis": "linear", "n_grid": 1024, "sigma": None, "n_resamples": 20, "seed": 0, **options}
    return block_distances(values, weights, **given)


@pytest.mark.parametrize("kind", ["conv", "transformer"])
def test_nodes_are_the_eigenvalues_of_dense_blocks(kind: str) -> None:
    """With as many steps as a block has parameters the nodes are all its eigenvalues; float64 rounding of Lanczos."""
    objective = vs.Objective(weight_decay=0.1)
    model, x, y = make(kind)
    dense = dense_hessian(model, x, y, objective)
    names = {"transformer": ["embed", "qkv", "head"], "conv": ["conv", "head"]}[kind]
    with pytest.warns(NullWarning, match="intervals"):
        result = vs.hessian_block_densities(vs.Probe(model, [(x, y)], objective), n_vectors=1, n_steps=1000)
    assert result.blocks == tuple(names)
    places = np.cumsum([0, *(p.numel() for p in model.parameters())])
    owners = [name.rpartition(".")[0] for name, _ in model.named_parameters()]
    for i, block in enumerate(names):
        rows = np.concatenate([np.arange(a, b) for a, b, o in zip(places, places[1:], owners) if o == block])
        values = np.linalg.eigvalsh(dense[np.ix_(rows, rows)])
        nodes = result.nodes[i, 0]
        assert result.sizes[i] == len(rows)
        assert np.isnan(nodes[len(rows) :]).all()
        np.testing.assert_allclose(nodes[: len(rows)], values, atol=1e-7)
        assert result.largest[i] == pytest.approx(values[-1], abs=1e-9)
        assert result.smallest[i] == pytest.approx(values[0], abs=1e-9)
    assert result.n_uncovered == sum(p.numel() for p in model.parameters()) - result.sizes.sum() > 0
    assert result.card is not None
    assert result.card.parameters == "by layer"


def test_a_trace_is_that_of_the_dense_block() -> None:
    model, x, y = make("conv")
    dense = dense_hessian(model, x, y, vs.Objective())
    result = vs.hessian_block_densities(
        vs.Probe(model, [(x, y)]), blocks=["layer:conv", "layer:head"], n_vectors=60, n_steps=3
    )
    sizes = [
        sum(p.numel() for p in module.parameters())
        for module in (model.get_submodule("conv"), model.get_submodule("head"))
    ]
    exact = [np.trace(dense[: sizes[0], : sizes[0]]), np.trace(dense[-sizes[1] :, -sizes[1] :])]
    # 95 % intervals of two blocks, widened to four standard errors
    assert (np.abs(result.trace - exact) < 2 * result.trace_half_width).all()
    assert (result.n_products, result.n_uncovered) == (2 * 60 * 3, 6)


def test_distances_are_scipys_of_the_densities() -> None:
    result = vs.hessian_block_densities(probe_of(), n_vectors=3, n_steps=6, axis="symlog")
    for i, p in enumerate(result.density):
        for j, q in enumerate(result.density):
            assert result.js_distance[i, j] == pytest.approx(jensenshannon(p, q), abs=1e-7)
    assert (result.js_distance == result.js_distance.T).all()
    pairs = np.triu_indices(3, 1)
    assert result.mean_js == pytest.approx(result.js_distance[pairs].mean())
    low, high = result.mean_js_interval
    assert 0 < low <= high <= LOG2**0.5
    assert (result.js_distance_low <= result.js_distance_high).all()


def test_distances_of_constructed_spectra() -> None:
    same = distances_of([[[0, 1, 5]] * 2] * 2)
    np.testing.assert_allclose(same.distance, 0, atol=1e-7)
    np.testing.assert_allclose(same.noise, 0, atol=1e-7)
    np.testing.assert_allclose(same.mean_interval, 0, atol=1e-7)
    apart = distances_of([[[0.0, 1.0]] * 2, [[50.0, 51.0]] * 2])
    assert apart.distance[0, 1] ** 2 == pytest.approx(LOG2, abs=1e-9)
    half = distances_of([[[0.0, 0.0]] * 2, [[0.0, 100.0]] * 2])  # p, and (p + q) / 2 of q without overlap
    expected = LOG2 - 0.75 * np.log(3) + 0.5 * LOG2  # of the masses (1, 0) and (1/2, 1/2)
    assert half.distance[0, 1] ** 2 == pytest.approx(expected, abs=1e-9)
    noisy = distances_of([[[0.0, 1.0], [50.0, 51.0]], [[0.0, 1.0], [0.0, 1.0]]])
    assert noisy.noise[0] ** 2 == pytest.approx(LOG2)
    assert noisy.noise[1] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("n_vectors", [4, 12])
def test_intervals_hold_the_distance_of_the_true_densities(n_vectors: int) -> None:
    """Basic bootstrap intervals of four vectors held it in two thirds of the cases."""
    rng, sigma, draws = np.random.default_rng(0), 0.1, 40
    spectra = [np.concatenate([np.linspace(0, bulk, 50), np.linspace(1, top, 8)]) for bulk, top in ((0.3, 5), (0.6, 3))]
    hits = 0
    for _ in range(draws):
        squares = rng.normal(size=(2, n_vectors, 58)) ** 2  # masses of a random vector in the eigenbasis
        found = block_distances(
            np.repeat(np.stack(spectra)[:, None], n_vectors, axis=1), squares / squares.sum(2, keepdims=True),
            scale="none", axis="linear", n_grid=256, sigma=sigma, n_resamples=60, seed=0,
        )  # fmt: skip
        bells = [np.exp(-0.5 * ((found.grid - values[:, None]) / sigma) ** 2).mean(0) for values in spectra]
        hits += found.low[0, 1] <= jensenshannon(*bells) <= found.high[0, 1]
    assert hits / draws >= 0.88


def test_parameters_of_two_blocks_are_covered_once() -> None:
    sizes = {"a.weight": 60, "a.bias": 6, "b": 5}
    assert n_uncovered(sizes, [{"a.weight[q]": 20}, {"a.weight[q]": 20, "a.bias": 6}]) == 45
    assert n_uncovered(sizes, [{"a.weight": 60}, {"a.weight[q]": 20, "b": 5}]) == 6


def test_noise_as_large_as_the_distances_is_said() -> None:
    with pytest.warns(UserWarning, match=r"halves of a block's probe vectors differ by .* use more n_vectors"):
        vs.hessian_block_densities(probe_of(), n_vectors=2, n_steps=3, axis="symlog")


def test_axis_and_scale() -> None:
    small, large = [[[1e-4, 1.1e-4]] * 2], [[[1.0, 1.1]] * 2]
    spectra = [small[0], large[0], [[0.5, 0.55]] * 2]
    linear, symlog = distances_of(spectra), distances_of(spectra, axis="symlog")
    assert symlog.distance[0, 1] ** 2 == pytest.approx(LOG2, abs=1e-6)
    assert symlog.distance[0, 1] > symlog.distance[1, 2] > 0
    for found in (linear, symlog):  # densities integrate to 1 along the axis
        step = np.diff(found.grid)[0] if found is linear else np.diff(np.arcsinh(found.grid / 1.1e-6) / np.log(10))[0]
        np.testing.assert_allclose(found.density.sum(1) * step, 1, rtol=1e-4)
    shapes = distances_of(spectra, scale="largest")
    np.testing.assert_allclose(shapes.distance, 0, atol=1e-6)
    negative = distances_of([[[-1.0, -0.5]] * 2, [[0.5, 1.0]] * 2], axis="symlog")
    assert negative.distance[0, 1] ** 2 == pytest.approx(LOG2, abs=1e-6)
    with pytest.raises(ValueError, match=r"Expected n_grid to be at least 217 for sigma=0.01, received 100"):
        distances_of([[[0.0, 1.0]] * 2] * 2, n_grid=100)


def test_js_distance_of_masses_without_overlap() -> None:
    density = np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1.0, 1.0, 0.0]])
    assert js_distances(density)[0, 1] == pytest.approx(LOG2**0.5)
    assert js_distances(density)[0, 2] == pytest.approx(jensenshannon(density[0], density[2]))


def test_divisions_of_a_vision_transformer() -> None:
    model = timm.create_model("test_vit", num_classes=4, img_size=32, patch_size=8, depth=2).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    probe = vs.Probe(model, [(x, torch.tensor([0, 1]))])
    options = {"n_vectors": 2, "n_steps": 2, "n_resamples": 2}
    by = {
        blocks: vs.hessian_block_densities(probe, blocks=blocks, **options)
        for blocks in ("layer", "unit", "kind", "part")
    }
    n = sum(p.numel() for p in model.parameters())
    assert by["kind"].blocks == by["kind"].kinds == ("stem", "msa", "mlp", "head")
    assert (by["kind"].sizes.sum(), by["kind"].n_uncovered) == (n, 0)
    assert by["unit"].blocks == ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp")
    assert by["unit"].kinds == ("msa", "mlp") * 2
    assert by["part"].blocks == ("q", "k", "v", "proj", "mlp_in", "mlp_out")
    assert by["part"].kinds == ("msa",) * 4 + ("mlp",) * 2
    layers = dict(zip(by["layer"].blocks, by["layer"].kinds))
    assert layers["pos_embed"] == layers["patch_embed.proj"] == "stem"
    assert layers["blocks.1.attn.qkv"] == "msa"
    assert layers["blocks.0.mlp.fc2"] == "mlp"
    assert "blocks.0.norm1" not in layers
    assert "cls_token" not in layers
    assert by["layer"].sizes.sum() + by["layer"].n_uncovered == n
    named = vs.hessian_block_densities(probe, blocks={"qk": ["part:q", "part:k"], "rest": "kind:mlp"}, **options)
    assert named.blocks == ("qk", "rest")
    assert named.sizes[0] == by["part"].sizes[:2].sum()


def test_a_block_of_zero_curvature_is_named() -> None:
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)
    ).double()
    with torch.no_grad():
        model.get_parameter("3.weight").zero_()
        model.get_parameter("1.bias").fill_(1.0)
    probe = vs.Probe(model, [(torch.rand(5, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1]))])
    with pytest.warns(UserWarning, match="blocks whose curvature is zero: 1$"):
        result = vs.hessian_block_densities(probe, n_vectors=2, n_steps=3)
    assert result.kinds == ("", "")
    assert result.largest[0] == pytest.approx(0, abs=1e-12)
    assert vs.plot(result).axes


def test_rows_of_before_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[str, Any] = {}
    options = {"blocks": "layer", "n_vectors": 2, "n_steps": 3}
    first = vs.hessian_block_densities(probe_of(), partial=rows, **options)
    assert len(rows) == 6
    assert list(rows)[:2] == ["block-0000-vector-0000", "block-0000-vector-0001"]
    monkeypatch.setattr("vitscope.diagnostics.block_spectra.hessian_block_densities.quadrature_rule", pytest.fail)
    again = vs.hessian_block_densities(probe_of(), partial=rows, **options)
    np.testing.assert_array_equal(again.nodes, first.nodes)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"blocks": "layers"}, "Expected blocks to be layer, unit, kind, stage or part, a list .*, received 'layers'"),
        ({"blocks": ["layer:head"]}, "Expected at least two blocks to compare, received layer:head"),
        ({"blocks": ["layer:head", "layer:none"]}, "parameter subset that matches something, received 'layer:none'"),
        ({"scale": "max"}, "Expected scale to be one of none, largest, received 'max'"),
        ({"axis": "log"}, "Expected axis to be one of linear, symlog, received 'log'"),
        ({"sigma": -1.0}, "Expected sigma to be positive"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        vs.hessian_block_densities(probe_of(), n_vectors=2, n_steps=2, **options)


def test_the_figure_has_a_panel_of_distances_and_one_of_sizes_for_each_result() -> None:
    result = vs.hessian_block_densities(probe_of(), n_vectors=2, n_steps=3)
    figure = vs.plot({"a": result, "b": result}, vmax=0.5)
    titles = [ax.get_title().partition("\n")[0] for ax in figure.axes]
    assert titles[:2] == ["a", "b"]
    assert [ax.get_yscale() for ax in figure.axes[2:4]] == ["log", "log"]
    assert figure.axes[0].get_images()[0].get_clim() == (0, 0.5)


def two_batches() -> dict[str, np.ndarray]:
    model, x, y = make("transformer")
    probe = vs.Probe(model, [(x[:3], y[:3]), (x[3:], y[3:])], vs.Objective(weight_decay=0.1))
    blocks = vs.hessian_block_densities(probe, n_vectors=2, n_steps=4, dtype="float64")
    hessian = vs.hessian_operator(probe, dtype="float64")
    numbers = {name: value for name, value in vars(blocks).items() if isinstance(value, np.ndarray)}
    return numbers | {
        "product": hessian @ np.linspace(-1, 1, hessian.shape[0]),
        "eigenvalues": vs.eigenvalues_of(hessian, k=2, tol=1e-8).eigenvalues,
    }


def test_two_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    alone = two_batches()
    for numbers in results_of_ranks(two_batches, tmp_path):
        for name, value in alone.items():
            np.testing.assert_allclose(numbers[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
