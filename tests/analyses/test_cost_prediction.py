"""``cost=true``: the counts of formulas times what each piece of work takes, as a table; nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vitscope as vs
from tests.fixtures.configs.configurations import composed
from vitscope.analyses import spec
from vitscope.analyses.prediction import cost_prediction
from vitscope.analyses.prediction.cost_prediction import UnitCost, combined, measure_unit, predict_costs
from vitscope.analyses.prediction.cost_table import cost_table
from vitscope.config import factories
from vitscope.core.cost.measure_cost import Count, MeasureCost, Work, WorkUnit
from vitscope.core.cost.tensor_memory import peak_bytes

TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
DIGITS = ["model=vit", "data=digits", "model.depth=1", "model.patch_size=16"]


class Clock:
    """A clock that pieces of work move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def _nothing(probe: Any, options: Any) -> Iterator[Callable[[], object]]:
    yield lambda: None


def unit(name: str, **changes: Any) -> WorkUnit:
    return WorkUnit(name, _nothing, **changes)


def test_a_cost_is_the_sum_of_its_pieces_divided_among_the_ranks() -> None:
    passes, product = unit("pass"), unit("product", forwards=0, is_product=True)
    works = [
        Work(passes, Count.exactly(4), 100),
        Work(product, Count(10, 5, 20), 50),
        Work(passes, Count.exactly(2), 10, is_divided=False, is_check=True),
    ]
    cost = MeasureCost(works, held_bytes=1000, held_bytes_shared=400, result_bytes=80)
    units = {"pass": UnitCost(1.0, 30, 10), "product": UnitCost(3.0, 70, 50)}
    one = combined("a", cost, units, 100, n_model_bytes=5)
    assert one.seconds == Count(4 * 10 + 10 * 3 + 2, 4 * 10 + 5 * 3 + 2, 4 * 10 + 20 * 3 + 2)
    assert one.peak_bytes == 5 + 1000 + 400 + 70
    assert one.forward_passes == Count.exactly(4.2)
    assert one.products == Count(10, 5, 20)
    two = combined("a", cost, units, 100, n_ranks=2, n_model_bytes=5)
    assert two.seconds is not None
    assert two.seconds.expected == 35 + 2  # each rank makes the check
    assert two.peak_bytes == 5 + 1000 + 200 + 70
    limited = combined("a", MeasureCost(works, limit_s=60), units, 100)
    assert limited.seconds == Count(60, 57, 60)


def test_a_piece_of_work_is_timed_after_it_was_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(), []
    monkeypatch.setattr(cost_prediction, "clock", clock)

    @contextmanager
    def prepare(probe: vs.Probe, options: Any) -> Iterator[Callable[[], object]]:
        def compute() -> None:
            calls.append(1)
            clock.now += 1.0 if len(calls) == 1 else 0.2  # the first one warms caches
            torch.zeros(1000)

        yield compute

    probe = vs.Probe(nn.Linear(2, 2), [(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))])
    measured = measure_unit(WorkUnit("piece", prepare), probe, {})
    assert measured.seconds == pytest.approx(0.2)
    assert (measured.n_bytes, measured.n_images) == (4000, 3)
    assert len(calls) == 1 + 3 + 1  # 0.6 s are enough; once more for the bytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_peak_counts_living_storages_once(device: str) -> None:
    def compute() -> torch.Tensor:
        x = torch.zeros(1000, device=device)  # 4000 bytes
        y = x.view(10, 100) + 1  # 8000
        del x
        y.add_(1)
        return y.sum() + torch.zeros(500, device=device)  # 4000, a number of 4, two of 2000

    assert peak_bytes(compute, torch.device("cpu")) == 8004


@pytest.mark.filterwarnings("ignore")
def test_every_chosen_analysis_is_predicted_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_prediction, "TIMED_S", 0.0)
    cfg = composed("analyze", *DIGITS, "analysis=[landscape,hessian,fourier,trajectory]", "analysis.landscape.n=3",
                   "analysis.hessian.probe.n_images=4", "analysis.hessian.probe.batch_size=2",
                   "analysis.landscape.probe.n_images=4", "analysis.fourier.probe.n_images=4")  # fmt: skip
    network, data = factories.model(cfg), factories.data(cfg)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    landscape, hessian, fourier, trajectory = predict_costs(cfg, spec.parse(cfg.analysis), network, data)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert landscape.forward_passes == Count(9 + 2 + 0.5, 9 + 2 + 0.5, 9 + 3 + 0.5)
    assert hessian.products == Count(38, 14, 400)
    size = sum(p.numel() for p in network.parameters())
    assert hessian.peak_bytes is not None
    assert hessian.peak_bytes > 4 * size * (1 + 19 + 2)  # the model, and a basis of 19 rows with two vectors
    assert fourier.seconds is not None
    assert fourier.seconds.expected > 0
    assert trajectory.seconds is None
    text = cost_table([landscape, hessian, fourier, trajectory])
    assert "trajectory: unknown: it depends on the number of checkpoints" in text
    assert " + unknown (1)" in text
    assert "38 [14, 400]" in text
    halves = predict_costs(cfg, spec.parse(cfg.analysis)[:1], network, data, n_ranks=2)
    assert halves[0].forward_passes == landscape.forward_passes


@pytest.mark.filterwarnings("ignore")
def test_sizes_of_what_a_run_supplies_are_known_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_prediction, "TIMED_S", 0.0)
    names = ["calibration", "depth_probes", "effective_receptive_field", "trajectory"]
    few = [f"analysis.{name}.probe.{key}=4" for name in names for key in ("n_images", "batch_size")]
    cfg = composed("analyze", *DIGITS, f"analysis=[{','.join(names)}]", *few, "analysis.depth_probes.train.n_images=6",
                   "analysis.depth_probes.n_neighbors=2", "analysis.trajectory.n=2")  # fmt: skip
    network, data = factories.model(cfg), factories.data(cfg)
    with torch.no_grad():
        next(network.parameters()).add_(0.01)  # as trained
    costs = predict_costs(cfg, spec.parse(cfg.analysis), network, data, n_checkpoints=3)
    passes = {cost.name: cost.forward_passes for cost in costs}
    n_validation = len(data.split("val"))
    # without the model's tables: two passes of a check each; the last is of two images where the weights move
    calibration, depth_probes, receptive_field, trajectory = (passes[name] for name in names)
    assert calibration is not None
    assert calibration.low == pytest.approx((4 + n_validation + 2 * 4 + 2 * 4) / 4)
    assert depth_probes is not None
    assert depth_probes.low == pytest.approx((4 + 4 + 6 + 2 * 4 + 2 * 4) / 4)
    assert receptive_field is not None
    # with the model before training; one and two images show whether they influence each other
    assert receptive_field.low == 2 * (1 + 2 + (1 + 2) / 4)
    assert trajectory is not None
    assert trajectory.low == 2 * 3 + 4 + 2 + 0.5
    assert all(cost.seconds is not None and cost.seconds.expected > 0 for cost in costs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_pieces_of_work_of_all_measures_can_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_prediction, "TIMED_S", 0.0)
    names = ["adversarial", "attention_distance", "hessian_block_densities", "hessian_class_structure", "critical_point",
             "branch_transfer", "gradient_noise", "hessian_by_kind", "nep_stability", "rayleigh_split", "curvature_exponents",
             "lesion", "edge_of_stability", "normalized_hessian", "preconditioned_sharpness", "taps"]  # fmt: skip
    few = [f"analysis.{name}.probe.{key}={n}" for name in names for key, n in (("n_images", 8), ("batch_size", 4))]
    cfg = composed("analyze", *DIGITS, f"analysis=[{','.join(names)}]", *few)
    costs = predict_costs(cfg, spec.parse(cfg.analysis), factories.model(cfg), factories.data(cfg))
    assert {cost.name: cost.reason for cost in costs} == dict.fromkeys(names, "")
    assert all(cost.seconds is not None and cost.seconds.expected > 0 for cost in costs)


def test_a_network_that_fails_is_unknown_with_its_error() -> None:
    cfg = composed("analyze", *DIGITS, "analysis=[evaluation]", "analysis.evaluation.probe.n_images=4")
    (cost,) = predict_costs(cfg, spec.parse(cfg.analysis), nn.Linear(3, 2), factories.data(cfg))
    assert cost.seconds is None
    assert "Error: " in cost.reason


def test_the_command_prints_a_table_and_writes_nothing(
    call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["analysis=[evaluation]", "analysis.evaluation.probe.n_images=4", "cost=true"]
    before = sorted(tmp_path.rglob("*"))
    assert call("analyze", *DIGITS, f"paths.runs={tmp_path}/runs", *options, *TWO) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split()[:2] == ["analysis", "time"]
    assert "together: " in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_a_cost_that_is_no_flag_is_refused(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("analyze", *DIGITS, "analysis=[evaluation]", "cost=2") == 2
    assert "cost=2" in capsys.readouterr().err
