"""Measures of the feature maps from one forward pass: bit for bit those of passes of their own, and really one pass."""

from __future__ import annotations

import dataclasses
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist

import vitscope as vs
from tests.fixtures.configs.configurations import composed
from tests.fixtures.programs.processes import on_ranks
from vitscope.analyses import runner, spec
from vitscope.analyses.context import AnalysisContext
from vitscope.config import factories
from vitscope.core import feature_pass
from vitscope.runs.run_dir import Run

pytestmark = pytest.mark.usefixtures("small_figures")

MEASURES = {
    "relative_log_amplitude": {},
    "feature_map_variance": {},
    "effective_rank": {"positions": 4},
    "cka": {"seed": 3},
}
SHARED = ("fourier", "variance", "effective_rank", "cka")


def probe_of(name: str) -> vs.Probe:
    torch.manual_seed(0)
    size = 96
    model = timm.create_model(name, num_classes=5, **({} if "resnet" in name else {"img_size": size}))
    return vs.Probe(model, [(torch.randn(n, 3, size, size), torch.zeros(n, dtype=torch.long)) for n in (5, 4)])


def passes_of(network: torch.nn.Module) -> tuple[list[int], torch.utils.hooks.RemovableHandle]:
    passes: list[int] = []
    return passes, network.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))


def assert_same(one: object, other: object) -> None:
    assert type(one) is type(other)
    for f in dataclasses.fields(one):
        if f.name != "card":
            values = ([v] if not isinstance(v, tuple) else v for v in (getattr(one, f.name), getattr(other, f.name)))
            for a, b in zip(*values, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=f.name)


@pytest.mark.parametrize("name", ["resnet18", pytest.param("vit_tiny_patch16_224", marks=pytest.mark.slow)])
def test_results_are_those_of_passes_of_their_own(name: str) -> None:
    probe = probe_of(name)
    passes, handle = passes_of(probe.model)
    found = vs.one_pass(probe, MEASURES)
    handle.remove()
    assert passes == [5, 5, 5, 4]  # the first batch twice more, to see that the model repeats itself
    assert list(found) == list(MEASURES)
    for measure, options in MEASURES.items():
        assert_same(found[measure], getattr(vs, measure)(probe, **options))


@pytest.mark.filterwarnings("ignore:.*null for")
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_measures_of_maps_tokens_and_attention_share_their_values_and_not_a_bit_changes(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "vit":
        network = vs.models.vit(size="tiny", patch_size=8, depth=2, reg_tokens=1, image_size=32)
    else:
        options = {"window_size": 4, "embed_dim": 12, "depths": (2,), "num_heads": (2,)}
        network = timm.models.swin_transformer.SwinTransformer(img_size=32, patch_size=4, num_classes=3, **options)
    probe = vs.Probe(network, [(torch.randn(n, 3, 32, 32), torch.zeros(n, dtype=torch.long)) for n in (5, 4)])
    measures = MEASURES | {"attention_maps": {"images": 2}, "token_norms": {}, "oversmoothing": {}}
    together = vs.one_pass(probe, measures)
    for measure, options in measures.items():
        assert together[measure] == getattr(vs, measure)(probe, **options), measure


@pytest.mark.parametrize(
    ("name", "options"), [("lesion", {}), ("nothing", {}), ("cka", {"other": object()}), ("Probe", {})]
)
def test_what_needs_more_than_one_pass_is_refused(name: str, options: dict) -> None:
    with pytest.raises(ValueError, match=f"the feature maps of one pass, received '{name}'"):
        vs.one_pass(probe_of("resnet18"), {name: options})


def with_due(place: AnalysisContext, *names: str, **changes: dict) -> AnalysisContext:
    parsed = {a.name: a for a in spec.parse(place.cfg.analysis)}
    request = {"split": "test", "augment": False, "n_images": 16, "batch_size": 8}
    due = [spec.replaced(parsed[name], probe=request | changes.get(name, {}), on_error="raise") for name in names]
    return dataclasses.replace(place, due=due, ahead={})


def test_analyses_of_the_same_images_share_a_pass(made: AnalysisContext) -> None:
    place = with_due(made, *SHARED, variance={"n_images": 8})
    passes, handle = passes_of(made.network)
    shared = {analysis.name: runner.perform(analysis, place, reuse=False) for analysis in place.due}
    handle.remove()
    # two batches for three of them, and one of its own for the variance; each probe repeats its first batch twice
    assert passes == [8] * (2 + 2 + 2 + 1)
    assert not place.ahead
    for analysis in place.due:
        assert_same(shared[analysis.name], runner.perform(analysis, dataclasses.replace(place, due=()), reuse=False))
        assert runner.perform(analysis, place) is not None


def test_what_is_there_is_not_measured_again(made: AnalysisContext) -> None:
    place = with_due(made, *SHARED, **{key: {"seed": 7} for key in SHARED})
    runner.perform(place.due[2], dataclasses.replace(place, due=()))
    passes, handle = passes_of(made.network)
    for analysis in place.due:
        runner.perform(analysis, place)
    handle.remove()
    assert passes == [8, 8, 8, 8]  # two for the check, two batches


def test_one_that_fails_does_not_take_the_others_with_it(made: AnalysisContext) -> None:
    place = with_due(made, "fourier", "cka", **{key: {"batch_size": 2} for key in SHARED})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert runner.perform(place.due[0], place, reuse=False) is not None
    with pytest.raises(runner.ConfigError, match="at least 4 images"):  # too few for the unbiased estimator
        runner.perform(place.due[1], place, reuse=False)


def _late_rank(rank: int, folder: str) -> None:
    """Two analyses that share a pass; rank 1 comes to the second once rank 0 has saved it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    options = ["model=vit", "model.depth=1", "model.patch_size=8", "data=shapes", "data.fraction=0.02",
               "analysis=[variance,effective_rank]"]  # fmt: skip
    cfg = composed("train", *options)
    torch.manual_seed(0)
    network, data = factories.model(cfg), factories.data(cfg)
    data.adapt_to(network)
    place = with_due(AnalysisContext(cfg, Run(Path(folder)), network, data, "end", 0), "variance", "effective_rank")
    found = []
    for number, analysis in enumerate(place.due):
        if (rank, number) == (1, 1):
            results = Path(folder, "results", "effective_rank")
            while not list(results.glob("*.npz")):
                time.sleep(0.05)
        found.append(runner.perform(analysis, place).scalars())
    meeting = torch.tensor([1.0 + rank])
    dist.all_reduce(meeting)  # in step
    torch.save((found, float(meeting)), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_a_rank_that_is_late_does_not_take_a_saved_result_for_an_earlier_one(tmp_path: Path) -> None:
    for name in ("results", "figures"):
        (tmp_path / name).mkdir()
    on_ranks(_late_rank, str(tmp_path))
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert found[0] == found[1]
    assert found[0][1] == 3.0


def test_a_measure_shares_its_pass_where_it_declares_an_accumulator_and_no_option_needs_another_pass() -> None:
    class Count:
        def __init__(self, probe: vs.Probe, step: int) -> None:
            self.step, self.images = step, 0

        def read(self, index: int, tap: vs.Tap, x: torch.Tensor) -> None: ...

        def close_batch(self, number: int, n_images: int) -> None:
            self.images += self.step * n_images

        def result(self) -> int:
            return self.images

    def accumulate(probe: vs.Probe, *, step: int = 1) -> Count:
        return Count(probe, step)

    @feature_pass.shares_pass(accumulate)
    def count(probe: vs.Probe, *, step: int = 1, reference: object = None) -> int:
        raise AssertionError("the accumulator takes its place")

    def undeclared(probe: vs.Probe) -> int:
        return 0

    assert feature_pass.accumulator_of(count, {"step": 2, "reference": None}) is accumulate
    assert feature_pass.accumulator_of(count, {"reference": object()}) is None
    assert feature_pass.accumulator_of(undeclared, {}) is None
    assert feature_pass.accumulator_of(vs.cka, {"other": None}) is not None
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(64, 2)).eval()
    probe = vs.Probe(network, [(torch.randn(n, 3, 6, 6), torch.zeros(n, dtype=torch.long)) for n in (3, 2)])
    options = {"step": 2, "reference": None}
    assert feature_pass.collect(probe, [(count, options), (count, {})]) == [10, 5]


def test_prefix_tokens_are_read_by_accumulators_that_take_them_alone() -> None:
    class Calls:
        def __init__(self) -> None:
            self.calls: list[tuple[str, int, tuple[int, ...]]] = []

        def read(self, index: int, tap: vs.Tap, x: torch.Tensor) -> None:
            self.calls.append(("map", index, tuple(x.shape)))

        def close_batch(self, number: int, n_images: int) -> None: ...

        def result(self) -> None: ...

    class PrefixCalls(Calls):
        def read_prefix(self, index: int, tap: vs.Tap, tokens: torch.Tensor) -> None:
            self.calls.append(("prefix", index, tuple(tokens.shape)))

    torch.manual_seed(0)
    network = vs.models.vit(size="tiny", patch_size=8, depth=1, reg_tokens=2, image_size=(16, 24))
    probe = vs.Probe(network, [(torch.randn(2, 3, 16, 24), torch.zeros(2, dtype=torch.long))])
    alone, both = Calls(), PrefixCalls()
    feature_pass.run_feature_pass(probe, [alone, both], "tokens")
    assert alone.calls == [("map", i, (2, 192, 2, 3)) for i in range(3)]
    assert both.calls == [call for i in range(3) for call in [("prefix", i, (2, 3, 192)), ("map", i, (2, 192, 2, 3))]]
    network = timm.create_model("resnet18", num_classes=2)
    probe = vs.Probe(network, [(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))])
    both = PrefixCalls()
    feature_pass.run_feature_pass(probe, [both], "tokens")
    assert {name for name, *_ in both.calls} == {"map"}
