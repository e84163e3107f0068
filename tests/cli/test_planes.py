"""Planes and lines from the command line: every kind of direction, other runs' checkpoints, and a grid that was killed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import vitscope as vs
from tests.fixtures.runs.run_folders import only_run
from vitscope.runs import partial_results, result_store
from vitscope.runs.checkpoints import checkpoint_sequence
from vitscope.runs.run_dir import Run
from vitscope.training.checkpoint_callback import Checkpoints

SMALL = ["analysis.landscape.n=3", "analysis.landscape.probe.n_images=8"]
LANDSCAPE = ["analysis=[landscape]", *SMALL]
VECTORS = ["analysis=[hessian_eigenvalues]", "analysis.hessian_eigenvalues.probe.n_images=8",
           "analysis.hessian_eigenvalues.k=2", "analysis.hessian_eigenvalues.eigenvectors=true"]  # fmt: skip


@pytest.fixture
def run(call, tiny, tmp_path) -> Path:
    schedule = ["trainer.max_epochs=3", "trainer.limit_train_batches=2", "callbacks.checkpoint.snapshots=log"]
    assert call("train", *tiny, *schedule, "analysis=[]", "test=false") == 0
    return only_run(tmp_path)


def newest(run: Path, analysis: str) -> Any:
    """Return the result that was written last, and forget all."""
    files = sorted((run / "results" / analysis).glob("*.npz"), key=lambda file: file.stat().st_mtime_ns)
    result = result_store.load(files[-1])
    for file in files:
        file.unlink()
    return result


@pytest.mark.slow
def test_every_kind_of_direction(call, run: Path, tmp_path: Path, capsys) -> None:
    at = f"run={run}"
    assert call("analyze", at, *VECTORS) == 0
    (saved,) = (run / "results" / "hessian_eigenvalues").glob("*.npz")
    kinds = {
        "eigenvectors": [f"analysis.landscape.eigenvectors={saved}"],
        "pca": ["analysis.landscape.labels=[init,epoch-0000,epoch-0001]"],
        "checkpoints": ["analysis.landscape.labels=[epoch-0000,init]"],
        "gradient": [],
    }
    found = {}
    for kind, options in kinds.items():
        assert call("analyze", at, *LANDSCAPE, f"analysis.landscape.directions={kind}", *options) == 0, kind
        found[kind] = newest(run, "landscape")
        assert found[kind].directions == kind
    assert len(result_store.load(saved).eigenvectors) == 2
    np.testing.assert_allclose(found["eigenvectors"].direction_norms, 1, rtol=1e-5)  # float32
    assert found["pca"].labels == ("init", "epoch-0000", "epoch-0001")
    np.testing.assert_allclose(found["checkpoints"].path, np.eye(2), atol=1e-5)
    capsys.readouterr()


@pytest.mark.slow  # tests/diagnostics/test_loss_landscape.py has the settings without a run
def test_settings_of_random_directions_and_what_cannot_be(call, run: Path, tmp_path: Path, capsys) -> None:
    at = f"run={run}"
    norms = {}
    for name, option in {
        "all": "ignore=[]",
        "some": "ignore=[one_dim,blocks,'pos_emb.*']",
        "official": "preset=official",
    }.items():
        assert call("analyze", at, *LANDSCAPE, f"analysis.landscape.{option}") == 0, name
        result = newest(run, "landscape")
        norms[name] = result.direction_norms[0]
    assert norms["some"] < norms["all"]
    assert (result.preset, result.normalization) == ("official", "filter_official")
    capsys.readouterr()
    refused = {
        "directions=randm": ("analysis.landscape.directions=randm", "did you mean random"),
        "normalization=filters": ("analysis.landscape.normalization=filters", "did you mean filter"),
        "preset=paper": ("analysis.landscape.preset=paper", "official"),
        "directions=eigenvectors": ("analysis.landscape.eigenvectors", "hessian_eigenvalues"),
        "eigenvectors=no.npz": ("analysis.landscape.eigenvectors=no.npz", "no such file"),
        "ignore=.": ("analysis.landscape", "leaves none"),
        "dtype=bf16": ("analysis.landscape.dtype=bf16", "did you mean bfloat16"),
        "bn=train": ("analysis.landscape.bn=train", "eval"),
        "labels=[none]": ("analysis.landscape", "one of the checkpoints init, epoch-0000, epoch-0001, "),
    }
    for option, (key, why) in refused.items():
        kind = ["analysis.landscape.directions=pca"] if option.startswith("labels") else []
        assert call("analyze", at, *LANDSCAPE, *kind, f"analysis.landscape.{option}") == 2, option
        error = capsys.readouterr().err
        line = next(line for line in error.splitlines() if line.startswith("error: "))
        assert key in line, line
        assert why in line, line
    assert (
        call("analyze", at, *LANDSCAPE, "analysis.landscape.preset=official", "analysis.landscape.normalization=layer")
        == 2
    )
    assert "neither normalization nor ignore" in capsys.readouterr().err
    assert call("analyze", at, *LANDSCAPE, f"analysis.landscape.checkpoints=[{tmp_path}/gone]") == 4
    assert f"analysis.landscape.checkpoints={tmp_path}/gone: no checkpoint there" in capsys.readouterr().err


def test_a_barrier_to_another_run(call, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert call("train", *TINY_OTHER, f"run_dir={other}", f"paths.runs={tmp_path}/runs") == 0
    options = ["analysis=[loss_barrier]", "analysis.loss_barrier.probe.n_images=8", "analysis.loss_barrier.n=3"]
    assert call("analyze", f"run={run}", *options, f"analysis.loss_barrier.checkpoints=[{other}]") == 0
    barrier = newest(run, "loss_barrier")
    assert (barrier.start, barrier.end) == ("other", "model")
    file = other / "checkpoints" / "init.ckpt"
    assert call("analyze", f"run={run}", *options, f"analysis.loss_barrier.checkpoints=[{file},{other}]") == 0
    assert newest(run, "loss_barrier").start == "other/init"
    assert call("analyze", f"run={run}", *options, f"analysis.loss_barrier.checkpoints=[{other},{other}]") == 4
    # the same path with other weights is another measurement
    assert call("analyze", f"run={run}", *options, f"analysis.loss_barrier.checkpoints=[{other}]") == 0
    last = other / "checkpoints" / "last.ckpt"
    last.unlink()
    (other / "checkpoints" / "manifest.json").unlink()
    file.rename(last)
    assert call("analyze", f"run={run}", *options, f"analysis.loss_barrier.checkpoints=[{other}]") == 0
    assert len(list((run / "results" / "loss_barrier").glob("*.npz"))) == 2


TINY_OTHER = ["model=vit", "model.depth=1", "model.patch_size=8", "logger=none", "data.batch_size=16", "seed=1", "test=false",
              "analysis=[]", "trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1",
              "trainer.accelerator=cpu"]  # fmt: skip


class Killed(BaseException):
    """Ends the process as far as what is on disk goes."""


def test_a_grid_that_was_killed_goes_on(call, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with the fourth point half written; started again it measures the six that are missing."""
    write, measured = partial_results.PartialRows.__setitem__, []

    def dying(rows: partial_results.PartialRows, key: str, row: Any) -> None:
        write(rows, key, row)
        if len(rows) == 4:
            rows._file.write_bytes(rows._file.read_bytes()[:-20])
            raise Killed

    def counting(rows: partial_results.PartialRows, key: str, row: Any) -> None:
        measured.append(key)
        write(rows, key, row)

    monkeypatch.setattr(partial_results.PartialRows, "__setitem__", dying)
    assert call("analyze", f"run={run}", *LANDSCAPE) == 1
    assert not list((run / "results" / "landscape").glob("*.npz"))
    monkeypatch.setattr(partial_results.PartialRows, "__setitem__", counting)
    assert call("analyze", f"run={run}", *LANDSCAPE) == 0
    assert len(measured) == 6
    resumed = vs.load_results(run)["landscape"]["end"]
    assert call("analyze", f"run={run}", *LANDSCAPE, "reuse=false") == 0
    assert len(measured) == 6 + 9
    assert np.array_equal(resumed.nll, vs.load_results(run)["landscape"]["end"].nll)
    assert not list((run / "results" / "landscape").glob(".partial*"))


def test_one_key_keeps_the_start_the_end_of_warm_up_and_log_spaced_epochs(run: Path) -> None:
    found = checkpoint_sequence.of_run(Run(run))
    assert found.labels == ["init", "epoch-0000", "epoch-0001", "epoch-0002"]  # last.ckpt repeats the last of them
    assert found[0][0] == "init"
    schedule = Checkpoints(snapshots="log", warmup_epochs=5)

    def kept(n_epochs: int, max_epochs: int) -> list[int]:
        at = [
            SimpleNamespace(
                max_epochs=max_epochs, max_steps=-1, current_epoch=e, should_stop=False, num_training_batches=20,
                accumulate_grad_batches=2,
            )
            for e in range(n_epochs)
        ]  # fmt: skip
        return [trainer.current_epoch for trainer in at if schedule._is_snapshot(trainer.current_epoch, trainer)]

    assert kept(305, 305) == [0, 1, 3, 4, 7, 15, 31, 63, 127, 255, 304]
    assert kept(20, -1) == [0, 1, 3, 4, 7, 15]
    schedule = Checkpoints(snapshots=[0], warmup_epochs=5, warmup_steps=30)  # of 10 steps an epoch
    assert kept(305, 305) == [0, 2]
    schedule = Checkpoints(warmup_epochs=5)
    assert not kept(305, 305)
    with pytest.raises(ValueError, match="'log', a list of epochs or None, received 'lgo'"):
        Checkpoints(snapshots="lgo")
