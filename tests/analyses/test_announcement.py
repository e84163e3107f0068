"""What will be measured is said before it is: images, objective, device and a time that one forward pass predicts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vitscope as vs
from tests.fixtures.configs.configurations import composed
from tests.fixtures.runs.run_folders import only_run
from vitscope.analyses import announcement, spec
from vitscope.analyses.prediction import time_prediction
from vitscope.config import factories
from vitscope.runtime.errors import DataError

DIGITS = ["model=vit", "data=digits", "model.depth=1", "model.patch_size=16"]
STATED = " (default for ckpt_path=; probe.split=, probe.augment= set others)"


def lines(caplog: pytest.LogCaptureFixture, *overrides: str, **options: Any) -> list[str]:
    cfg = composed("analyze", *DIGITS, *overrides)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="vitscope"):
        announcement.announce(cfg, spec.parse(cfg.analysis), factories.data(cfg), **options)
    return caplog.messages


def test_analyses_of_the_same_images_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    images, objective = lines(caplog, "analysis=[fourier,variance]", "objective.weight_decay=0")
    n = len(factories.data(composed("analyze", *DIGITS)).split("test"))
    assert images == f"images: {min(512, n)} of {n} test images of digits, not augmented".replace(
        f"{n} of {n}", f"all {n}"
    )
    assert objective == "objective: cross entropy, no weight decay; no label smoothing, mixup or CutMix"


def test_different_images_and_terms_are_said_with_their_analyses(caplog: pytest.LogCaptureFixture) -> None:
    images, objective = lines(caplog, "analysis=[hessian,slice,fourier]", "objective=strong",
                              "analysis.fourier.probe.n_images=8", "analysis.hessian.probe.n_images=64")  # fmt: skip
    assert images.startswith("images: hessian, slice: 64 of ")
    assert " train images of digits, augmented (rand-m9-n2-mstd1.0 without flip); fourier: 8 of " in images
    assert images.endswith(" test images of digits, not augmented")
    assert objective == (
        "objective: cross entropy, weight decay 0.05 (half_sq); hessian, slice: label smoothing 0.1, mixup 1, CutMix 0.8; "
        "fourier: no label smoothing, mixup or CutMix"
    )


def test_defaults_and_splits_that_are_not_read_yet_are_marked(caplog: pytest.LogCaptureFixture) -> None:
    images, objective = lines(caplog, "analysis=[fourier]", defaults=("images",), count=("train",), of=" of it")
    assert images == f"images of it: up to 512 test images of digits, not augmented{STATED}"
    assert objective.startswith("objective of it: cross entropy, weight decay 0.05 (half_sq); no label")
    assert lines(caplog, "analysis=[]") == []
    with pytest.raises(DataError, match="nothing"):  # before the analyses that come first are made
        lines(caplog, "analysis=[slice,fourier]", "analysis.fourier.probe.split=nothing")


class Clocked(nn.Module):
    """A network whose every pass takes as many seconds as it has images."""

    def __init__(self, seconds: list[float]) -> None:
        super().__init__()
        self.seconds, self.scale, self.norm = seconds, nn.Parameter(torch.ones(1)), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seconds[0] += len(x)
        return self.norm(x).flatten(1)[:, :10] * self.scale


def test_the_time_is_the_timed_pass_s_times_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = composed("analyze", *DIGITS, "analysis=[landscape,slice,evaluation,hessian,fourier]", "analysis.landscape.n=3",
                   "analysis.landscape.bn=recalibrate", "analysis.slice.probe.n_images=5")  # fmt: skip
    seconds = [0.0]
    monkeypatch.setattr(time_prediction, "clock", lambda: seconds[0])
    network, data = Clocked(seconds), factories.data(cfg)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    prediction = time_prediction.predict(spec.parse(cfg.analysis), network, data, ["evaluation"])
    assert prediction.seconds == {"landscape": 3 * 3 * 2 * 64, "slice": 21 * 5}
    assert seconds[0] == 2 * 16 * 2 - 2 * 16  # one kind of images: a pass that warms up and a timed one
    assert list(prediction.unpredicted) == ["hessian", "fourier"]
    assert str(prediction) == (
        "predicted time (one forward pass timed): landscape 19 min, slice 105 s; no prediction for hessian, fourier "
        "(analysis.hessian.budget_s=60 sets a limit); already measured: evaluation"
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert network.norm.training
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())


def test_options_that_are_left_to_the_measure_have_its_defaults() -> None:
    cfg = composed("analyze", *DIGITS, "analysis=[slice]", "~analysis.slice.n", "analysis.slice.probe.n_images=4")
    prediction = time_prediction.predict(spec.parse(cfg.analysis), Clocked([0.0]), factories.data(cfg))
    assert list(prediction.seconds) == ["slice"]


def test_a_network_that_fails_has_no_prediction() -> None:
    cfg = composed("analyze", *DIGITS, "analysis=[evaluation]")
    prediction = time_prediction.predict(spec.parse(cfg.analysis), nn.Linear(3, 2), factories.data(cfg))
    assert str(prediction) == "no prediction for evaluation"


def test_a_checkpoint_without_a_run_says_and_records_what_was_measured(call, tmp_path: Path, capsys) -> None:
    cfg = composed("analyze", *DIGITS)
    torch.save(factories.model(cfg).state_dict(), tmp_path / "my.pth")
    arguments = [*DIGITS, f"ckpt_path={tmp_path}/my.pth", "analysis=[slice]", "analysis.slice.n=2", "probe.n_images=6"]
    assert call("analyze", *arguments, f"paths.runs={tmp_path}/runs") == 0
    first, second, third, fourth = capsys.readouterr().err.splitlines()[:4]
    assert first.startswith("images: 6 of ")
    assert first.endswith(f" test images of digits, not augmented{STATED}")
    assert second == (
        "objective: cross entropy, no weight decay (default for ckpt_path=; objective.weight_decay= set others); "
        "no label smoothing, mixup or CutMix"
    )
    assert third.startswith("device: cpu (")
    assert "predicted time (one forward pass timed): slice " in third
    assert (
        fourth == "decoded images (probe.cache=auto) in host memory: slice 72.0 KiB"
    )  # 6 images of 3 x 32 x 32 float32
    run = only_run(tmp_path)
    card = vs.load_results(run)["slice"]["my"].card
    assert (card.split, card.augmentation, card.n_images, card.weight_decay) == ("test", "none", 6, 0.0)
    assert call("analyze", *arguments, "objective.weight_decay=0.1", f"run_dir={tmp_path}/other") == 0
    assert vs.load_results(tmp_path / "other")["slice"]["my"].card.weight_decay == 0.1
