"""Pieces of work of predicted costs against what the measures do with all their images: how often, and on how many of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import vitscope as vs
from vitscope.core.cost.measure_cost import MeasureCost, Work, all_options, cost_of, workload_of
from vitscope.diagnostics.cka import _comparison_cost, _comparisons
from vitscope.diagnostics.cka._comparisons import RSA
from vitscope.diagnostics.cka._representations import Representation
from vitscope.diagnostics.depth_probes import _cost as depth_probes_cost
from vitscope.diagnostics.gradient_noise._gradient_sums import GradientSums
from vitscope.diagnostics.receptive_field import _gradients
from vitscope.runtime import progress


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "enabled", False)


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return vs.models.vit(size="tiny", patch_size=8, depth=1, num_classes=4, image_size=16).eval()


def probe_of(model: nn.Module, n_images: int, batch_size: int) -> vs.Probe:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(n_images, 3, 16, 16, generator=generator), torch.arange(n_images) % 4
    return vs.Probe(model, list(zip(x.split(batch_size), y.split(batch_size))))


def stated(name: str, options: dict[str, Any], n_images: int, batch_size: int) -> MeasureCost:
    model = transformer()
    work = workload_of(model, batch_size, n_images, (16, 16))
    cost = cost_of(getattr(vs, name), options, dataclasses.replace(work, probe=probe_of(model, 2, 2)))
    assert cost is not None
    return cost


def work_of(cost: MeasureCost, text: str) -> Work:
    (work,) = [work for work in cost.works if text in work.unit.name]
    return work


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n_timed", [2, 6])
def test_similarity_decomposes_the_features_of_all_images_however_many_batches_there_are(
    n_timed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of some taps, times the ratio of the pairs of taps, or of the taps, to those of all."""
    monkeypatch.setattr(_comparison_cost, "TIMED_TAPS", n_timed)
    made: Counter[str] = Counter()
    norm, matrix = _comparisons._nuclear_norm, RSA._matrix

    def note_norm(product: torch.Tensor) -> float:
        made["procrustes"] += 1
        return norm(product)

    def note_matrix(self: RSA, representation: Representation) -> torch.Tensor:
        made["rsa"] += len(representation.features)
        return matrix(self, representation)

    monkeypatch.setattr(_comparisons, "_nuclear_norm", note_norm)
    monkeypatch.setattr(_comparisons, "_rounded_nuclear_norm", note_norm)
    monkeypatch.setattr(RSA, "_matrix", note_matrix)
    options = all_options(vs.similarity, {"measure": ["procrustes", "rsa", "cka"], "n_permutations": 3})
    cost = stated("similarity", options, 22, 4)
    assert [w.n_images for w in cost.works if w.unit.name.startswith("feature pass")] == [22]
    predicted: Counter[str] = Counter()
    for text in ("features of all", "pairs of taps", "comparison of taps"):
        work = work_of(cost, text)
        assert work.n_images == work.unit.n_timed == 1
        made.clear()
        with work.unit.prepare(probe_of(transformer(), 1, 1), options) as compute:
            compute()
        predicted.update({name: round(n * work.repeats.expected) for name, n in made.items()})
    made.clear()
    vs.similarity(probe_of(transformer(), 22, 4), **options)
    assert predicted == made
    assert made["rsa"] % 22 == 0


def test_similarity_by_cka_alone_compares_batches_in_the_pass() -> None:
    cost = stated("similarity", {"measure": "cka"}, 22, 4)
    assert [w.unit.name for w in cost.works if "comparison" in w.unit.name] == []
    assert [w.n_images for w in cost.works if w.unit.name.startswith("feature pass")] == [18, 4]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n_images", [16, 128])
def test_gradient_noise_goes_over_the_images_a_second_time_where_it_has_intervals(n_images: int) -> None:
    passes: Counter[str] = Counter()
    rows = GradientSums._rows

    def note_images(self: GradientSums, description: str) -> Any:
        for index, gradients in rows(self, description):
            passes[description] += len(gradients)
            yield index, gradients

    with mock.patch.object(GradientSums, "_rows", note_images):
        vs.gradient_noise(probe_of(transformer(), n_images, 16))
    cost = stated("gradient_noise", {}, n_images, 16)
    units = [work for work in cost.works if work.unit.name.startswith("gradient of each image")]
    assert [work.repeats.expected * work.n_images for work in units] == list(passes.values())


@pytest.mark.filterwarnings("ignore")
def test_the_head_is_searched_once_not_in_each_timed_pass() -> None:
    cost = stated("depth_probes", {"n_neighbors": 2}, 8, 4)
    collection = work_of(cost, "keeps features")
    options = all_options(vs.depth_probes, {})
    with (
        mock.patch.object(depth_probes_cost, "find_head", wraps=depth_probes_cost.find_head) as search,
        collection.unit.prepare(probe_of(transformer(), 4, 4), options) as compute,
    ):
        compute()
        compute()
    assert search.call_count == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("contribution", ["squared", "channels"])
def test_the_first_batch_of_receptive_fields_has_the_gradients_that_its_piece_of_work_makes(contribution: str) -> None:
    options = all_options(vs.effective_receptive_field, {"taps": "all", "contribution": contribution})
    cost = stated("effective_receptive_field", options, 12, 4)
    initial = cost_of(
        vs.effective_receptive_field, options | {"initial": transformer()}, workload_of(transformer(), 4, 12)
    )
    assert initial is not None
    assert [work_of(part, "extents").repeats.expected for part in (cost, initial)] == [1, 2]
    with mock.patch.object(_gradients, "_gradient", wraps=_gradients._gradient) as gradient:
        made = 0
        for text, n_batches in (("a gradient for each", 2), ("two gradients", 1)):
            work = work_of(cost, text)
            assert work.repeats.expected * work.n_images == 4 * n_batches
            gradient.reset_mock()
            with work.unit.prepare(probe_of(transformer(), 4, 4), options) as compute:
                compute()
            made += n_batches * gradient.call_count
        gradient.reset_mock()
        vs.effective_receptive_field(probe_of(transformer(), 12, 4), taps="all", contribution=contribution)
        assert gradient.call_count == made
