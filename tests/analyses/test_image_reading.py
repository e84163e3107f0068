"""The reading of images counts in a predicted cost: once where they are kept, with every pass where they are read again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.fixtures.configs.configurations import composed
from vitscope.analyses import spec
from vitscope.analyses.prediction import cost_prediction, image_reading
from vitscope.config import factories
from vitscope.core.cost.measure_cost import all_options, stated_cost
from vitscope.data.probe_batches import ProbeBatches
from vitscope.runtime import progress

DIGITS = ["model=vit", "data=digits", "model.depth=1", "model.patch_size=16"]


def read_images(cfg: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[float, int]:
    """Return the predicted number of images that an analysis reads, and how often it read batches beside the first one."""
    monkeypatch.setattr(progress, "enabled", False)
    (analysis,) = spec.parse(cfg.analysis)
    network, data = factories.model(cfg), factories.data(cfg)
    seen: Counter[int] = Counter()
    make = ProbeBatches.__init__

    def make_noted(self: ProbeBatches, build: Callable[[int], Any], *arguments: Any, **more: Any) -> None:
        make(self, lambda index: seen.update([index]) or build(index), *arguments, **more)

    monkeypatch.setattr(ProbeBatches, "__init__", make_noted)
    probe = factories.probe(cfg, network, data, spec.probe_request(analysis, data))
    work = cost_prediction.workload(probe, 4, probe.n_images)
    cost = stated_cost(analysis.measure, analysis.options, work)
    works = image_reading.reading_works(analysis, probe, cost, {})
    predicted = sum(w.repeats.expected * w.n_images for w in works)
    seen.clear()
    analysis.measure(probe, **all_options(analysis.measure, {**analysis.options, **options}))
    return predicted, seen[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "options", "n_again"),
    [
        ("evaluation", [], 1),
        ("landscape", ["n=3"], 3),  # a row of points shares a pass
        ("slice", ["n=17"], 2),  # of which 16 at most
        ("sharpness", ["n_pairs=1", "radii=[0.1,0.2]", "n_steps=0"], 2),  # the center beside a direction
        ("linear_interpolation", ["n=4"], 4),
        ("input_filter", ["cutoffs=[0.5]"], 1),  # with all changes of a batch
    ],
)
def test_images_are_read_as_often_as_predicted(
    name: str, options: list[str], n_again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [f"analysis.{name}.{text}" for text in ("probe.n_images=8", "probe.batch_size=4", *options)]
    torch.manual_seed(0)
    for cache, n_passes in (("host", 1), ("none", n_again)):
        cfg = composed("analyze", *DIGITS, f"analysis=[{name}]", *own, f"probe.cache={cache}")
        given: dict[str, Any] = {}
        if name == "linear_interpolation":
            state = {key: 1.1 * value for key, value in factories.model(cfg).state_dict().items()}
            given = {"checkpoints": [("start", state)]}
        predicted, n_read = read_images(cfg, given, monkeypatch)
        assert n_read <= n_passes  # the first pass is kept already where the workload was looked at
        assert predicted == pytest.approx(8 * n_passes, rel=0.2)
        if cache == "none":
            assert n_read == n_passes


def test_pieces_of_work_are_timed_without_the_reading() -> None:
    cfg = composed("analyze", *DIGITS, "analysis=[evaluation]", "probe.cache=none")
    assert factories.image_cache(image_reading.keeping_images(cfg)) == "auto"
    assert factories.image_cache(cfg) == "none"
    plain = composed("analyze", *DIGITS)
    assert image_reading.keeping_images(plain) is plain
    cost = cost_prediction.predict_costs(cfg, spec.parse(cfg.analysis), factories.model(cfg), factories.data(cfg))[0]
    assert cost.units is not None
    assert image_reading.READING.name in cost.units
