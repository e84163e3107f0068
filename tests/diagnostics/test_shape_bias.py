from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import vitscope as vs
from vitscope.core.undefined_values import NullWarning

# answers are rows that sum to 1
pytestmark = pytest.mark.filterwarnings("ignore:the outputs of .* are probabilities:UserWarning")


class Answers(nn.Module):
    """Reads its answer from the image itself: pixel 0 is the class, a negative one makes the logits NaN."""

    def __init__(self, n_classes: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.n_classes = n_classes

    def forward(self, x):
        answer = x[:, 0, 0, 0]
        logits = nn.functional.one_hot(answer.clamp(min=0).long(), self.n_classes).float()
        return logits.masked_fill(answer[:, None] < 0, float("nan"))


def probe_of(answers: list[int], shapes: list[int], batches: int = 2, **about) -> vs.Probe:
    x = torch.tensor(answers, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2)
    return vs.Probe(Answers(), list(zip(x.chunk(batches), torch.tensor(shapes).chunk(batches))), about=about)


def test_decisions_are_counted_on_conflicting_images_only():
    shapes = [0, 0, 0, 1, 1, 2, 2, 3]
    texture = [1, 1, 2, 0, 3, 2, 3, 0]  # image 5 is no conflict
    answers = [0, 1, 0, 0, 2, 2, 2, 0]
    result = vs.shape_bias(probe_of(answers, shapes, batches=3), texture=texture)
    assert (result.shape_decisions, result.texture_decisions, result.other_decisions) == (3, 3, 1)
    assert result.shape_bias == 0.5
    assert result.n_conflicts == 7
    assert result.n_images == 8
    np.testing.assert_array_equal(result.shape_bias_of_shape, [2 / 3, 0, 1, 0])
    assert result.scalars()["decided"] == 6 / 7


def test_images_without_a_label_decide_nothing():
    shapes, texture, answers = [0, -100, 1, -100, 2], [1, 1, 0, 2, 3], [0, 1, 0, 2, 2]
    found = vs.shape_bias(probe_of(answers, shapes), texture=texture)
    assert (found.shape_decisions, found.texture_decisions, found.other_decisions) == (2, 1, 0)
    assert found.n_conflicts == 3


@pytest.mark.parametrize(("shape", "texture_count"), [(3, 5), (0, 8), (8, 0), (1, 7), (5, 5), (30, 6)])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_interval_is_wilsons_and_exact_for_few_decisions_either_way(shape: int, texture_count: int, level: float):
    n = shape + texture_count
    answers = [0] * shape + [1] * texture_count
    result = vs.shape_bias(probe_of(answers, [0] * n, texture=torch.ones(n)), level=level)
    interval = stats.binomtest(shape, n).proportion_ci(
        level, method="wilson" if min(shape, texture_count) >= 5 else "exact"
    )
    assert result.shape_bias_low == pytest.approx(interval.low, abs=1e-12)
    assert result.shape_bias_high == pytest.approx(interval.high, abs=1e-12)


def test_shapes_of_the_data_module_carry_their_textures():
    from vitscope.data import DataModule
    from vitscope.data.sources import shapes

    data = DataModule(shapes.load, name="shapes", num_classes=8, mean=(0.5,) * 3, std=(0.25,) * 3)
    batches = data.probe_batches("cue_conflict", n_images=60, batch_size=25, seed=3)
    texture = batches.attributes["texture"]
    assert len(texture) == 60
    labels = torch.cat([y for _, y in batches])
    assert (labels != texture).all()

    class Texture(nn.Module):
        """Answers the texture of images that it knows by heart."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.known = torch.cat([x for x, _ in batches])

        def forward(self, x):
            at = torch.cdist(x.flatten(1), self.known.flatten(1)).argmin(1)
            return nn.functional.one_hot(texture[at], 8).float()

    result = vs.shape_bias(vs.Probe(Texture(), batches, about=batches.attributes))
    assert result.shape_bias == 0.0
    assert result.texture_decisions == 60


def test_nulls_are_named():
    with pytest.warns(NullWarning, match="no image was answered with its shape or its texture"):
        result = vs.shape_bias(probe_of([3, 3], [0, 1]), texture=[1, 2])
    assert np.isnan(result.shape_bias)
    with pytest.warns(NullWarning, match=r"1 answers \(logits are not finite\)"):
        result = vs.shape_bias(probe_of([-1, 0], [0, 0]), texture=[1, 1])
    assert (result.shape_decisions, result.other_decisions, result.n_conflicts) == (1, 0, 2)


@pytest.mark.parametrize(
    ("texture", "message"),
    [
        (None, r"texture=\(n_images,\) classes or probe.about\['texture'\], received none"),
        ([1], r"one texture for each of 2 images, received \(1,\)"),
        ([0, 1], "whose shape and texture differ, received none"),
    ],
)
def test_refusals(texture: list[int] | None, message: str):
    with pytest.raises(ValueError, match=message):
        vs.shape_bias(probe_of([0, 1], [0, 1]), texture=texture)


def test_figure_shows_each_model():
    result = vs.shape_bias(probe_of([0, 1, 0], [0, 0, 0]), texture=[1, 1, 1])
    ax = vs.plot({"a": result, "b": result}).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert ax.get_lines()[0].get_xdata()[0] == result.shape_bias
