"""``analyze.py`` on a run, a checkpoint file, and a model without any."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

import vitscope as vs
from tests.fixtures.programs.commands import FOURIER
from tests.fixtures.runs.run_folders import only_run
from vitscope.runs import result_store


@pytest.fixture
def run(fourier_run: Path) -> Path:
    return fourier_run


def test_a_run_gives_the_numbers_of_training_and_they_are_reused(call, run, monkeypatch, tmp_path, capsys) -> None:
    trained = vs.load_results(run)["fourier"]["end"]
    (file,) = (run / "results" / "fourier").glob("end-*.npz")
    written = file.stat().st_mtime_ns
    assert call("analyze", f"run={run}", *FOURIER) == 0
    assert file.stat().st_mtime_ns == written, "a finished analysis was made again"
    assert call("analyze", f"run={run}", *FOURIER, "reuse=false") == 0
    assert file.stat().st_mtime_ns > written
    again = result_store.load(file)
    for one, other in zip(trained.log_amplitude, again.log_amplitude):
        np.testing.assert_array_equal(one, other)
    assert call("analyze", f"run={run / 'checkpoints' / 'init.ckpt'}", *FOURIER) == 0
    assert set(vs.load_results(run)["fourier"]) == {"end", "init"}
    assert call("analyze", f"run={run}", "ckpt=nothing", *FOURIER) == 4
    assert "choose from" in capsys.readouterr().err
    # a dotted override of the run's values, and a group chosen anew
    assert call("analyze", f"run={run}", "data.split_seed=0", "objective=strong", *FOURIER) == 0
    assert call("analyze", f"run={run}", "data.split_sed=1", *FOURIER) == 2
    assert "did you mean split_seed" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:relative_log_amplitude. null for", "ignore:analysis.fourier. ")  # 2x2 and 1x1 maps
def test_a_timm_model(call, tmp_path) -> None:
    model = ["model=timm", "model.name=resnet10t", "data=digits", f"paths.runs={tmp_path}/runs"]
    assert call("analyze", *model, *FOURIER) == 0
    result = vs.load_results(only_run(tmp_path))["fourier"]["end"]
    assert result.taps == ("stem", "layer1.0", "layer2.0", "layer3.0", "layer4.0")
    assert result.card.data == "digits"


def test_an_impossible_option_names_the_analysis(call, tmp_path, capsys) -> None:
    arguments = ["model=vit", "model.depth=1", "analysis=[hessian]", "caps=smoke", f"paths.runs={tmp_path}/runs"]
    assert call("analyze", *arguments, "analysis.hessian.parameters=no_such_pattern") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: analysis.hessian")


@pytest.mark.parametrize(("argument", "key"), [("name=mine", "name"), ("tags=[a]", "tags")])
def test_results_in_a_run_s_folder_have_no_other_name(call, run, argument: str, key: str, capsys) -> None:
    assert call("analyze", f"run={run}", *FOURIER, argument) == 2
    assert capsys.readouterr().err.startswith(f"error: {key}=")


def test_common_images_are_a_setting_of_their_own(call, run, capsys) -> None:
    """``probe.*`` is seen by what decides that a result is there already."""
    assert call("analyze", f"run={run}", *FOURIER) == 0
    assert "already measured: fourier" in capsys.readouterr().err
    count = len(list((run / "results" / "fourier").glob("end-*.npz")))
    other = ["analysis=[fourier]", "probe.n_images=6", "probe.split=val"]
    assert call("analyze", f"run={run}", *other) == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("images: 6 of ") and " val images of photos" in line for line in lines)
    assert "no prediction for fourier" in "".join(lines)
    assert len(list((run / "results" / "fourier").glob("end-*.npz"))) == count + 1
    assert call("analyze", f"run={run}", *other) == 0
    assert "already measured: fourier" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "tag"),
    [("net.pth", "net"), ("model_best.pth.tar", "model_best"), ("last.pth.tar", "end"), ("v1.2.pt", "v1.2")],
)
def test_results_of_a_file_are_named_by_it_without_its_endings(file: str, tag: str, tmp_path: Path) -> None:
    from vitscope.analyses import analysis_run

    run = SimpleNamespace(provenance=lambda: {}, checkpoints=tmp_path / "checkpoints")
    assert analysis_run._moment(tmp_path / file, {"state_dict": {}}, cast(Any, run))[0] == tag
