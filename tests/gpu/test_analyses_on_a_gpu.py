"""Every analysis on a GPU: the numbers of the CPU, and a model whose state is as it was."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch

from tests.fixtures.configs.configurations import composed
from tests.fixtures.runs.analysis_runs import NAMES
from tests.gpu.device import DEVICE, needs_a_gpu
from vitscope.analyses import runner, spec
from vitscope.analyses.context import AnalysisContext
from vitscope.config import caps, factories
from vitscope.runs import run_dir
from vitscope.runs.checkpoints import checkpoint_io

pytestmark = [pytest.mark.gpu, needs_a_gpu]

MODELS = {
    "vit": ["model=vit", "model.depth=2", "model.patch_size=8"],
    "alternet": ["model=alternet"],
    "convnet": ["model=convnet"],
}
#: relative difference that float32 sums in another order may make: 24 bits, some 10^4 terms, and quantities such as a small
#: eigenvalue or a difference of two losses that lose two more digits by cancellation
TOLERANCE = 1e-2
#: refuses networks without the layers or the training that it measures
NEEDS = {"bn_policy": ("alternet", "convnet"), "attention_distance": ("vit", "alternet")}


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, AnalysisContext]:
    """Return the name of a model and a run of it with two checkpoints, on the CPU."""
    root = tmp_path_factory.mktemp("runs")
    arguments = [
        "data=shapes",
        "data.fraction=0.02",
        "caps=smoke",
        f"analysis=[{','.join(NAMES)}]",
        f"paths.runs={root}",
    ]
    cfg = composed("train", *MODELS[request.param], *arguments)
    caps.apply_caps(cfg)
    run = run_dir.create(cfg, "train")
    network = factories.model(cfg).eval()
    for step, name in enumerate(("init", "last")):
        state = {
            f"model.{k}": v + 0.01 * (1 - step) if v.is_floating_point() else v for k, v in network.state_dict().items()
        }
        checkpoint_io.write({"epoch": 0, "global_step": step, "state_dict": state}, run.checkpoints / f"{name}.ckpt")
    data = factories.data(cfg)
    data.adapt_to(network)
    return request.param, AnalysisContext(cfg, run, network, data, "end", epoch=0)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_equal_those_of_the_cpu(trained: tuple[str, AnalysisContext], name: str) -> None:
    model, place = trained
    if model not in NEEDS.get(name, MODELS):
        pytest.skip(f"{name} does not measure a {model}")
    (analysis,) = [a for a in spec.parse(place.cfg.analysis) if a.name == name]
    images = {"batch_size": 8} if analysis.probe.get("n_images", 1) is None else {"n_images": 16, "batch_size": 8}
    analysis = spec.replaced(analysis, probe={**analysis.probe, **images}, on_error="raise")
    on_gpu = copy.deepcopy(place.network).to(DEVICE)
    before = {key: value.clone() for key, value in on_gpu.state_dict().items()}
    scalars = []
    for network in (place.network, on_gpu):
        context = AnalysisContext(place.cfg, place.run, network, place.datamodule, "end", epoch=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notices of few images and of values that are not finite
            result = runner.perform(analysis, context, reuse=False)
        assert result is not None
        scalars.append(result.scalars())
    changed = [key for key, value in on_gpu.state_dict().items() if not torch.equal(value, before[key])]
    assert not changed
    on_cpu, on_card = scalars
    assert on_cpu.keys() == on_card.keys()
    different = {
        key: (value, on_card[key])
        for key, value in on_cpu.items()
        if math.isfinite(value) != math.isfinite(on_card[key])
        or (math.isfinite(value) and abs(value - on_card[key]) > TOLERANCE * max(abs(value), TOLERANCE))
    }
    assert not different
