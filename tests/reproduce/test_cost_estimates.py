"""Estimates from journals with known times, and what is said where nothing is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from vitscope.config import loading
from vitscope.reproduce import run_overrides, work_listing
from vitscope.reproduce.cost_estimates import Estimate, Rates, estimate
from vitscope.reproduce.plan import Target, Trial
from vitscope.reproduce.planned_work import EXISTS, TRAIN, Measurement, PlannedTrial
from vitscope.reproduce.work_listing import start_text
from vitscope.runs.run_dir import Run
from vitscope.runtime.errors import ConfigError

CFG: dict[str, Any] = {
    "seed": 0,
    "model": {"_target_": "vitscope.models.vit", "depth": 12},
    "data": {"name": "cifar100", "image_size": 32, "batch_size": 100, "fraction": 1.0},
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3},
    "trainer": {"max_epochs": 305, "max_steps": -1, "devices": 1, "accelerator": "gpu", "limit_train_batches": 1.0},
    "callbacks": {"checkpoint": {"snapshots": [4, 400], "init": True}},
    "analysis": {},
}


def planned(name: str = "a", state: str = TRAIN, missing: tuple[Measurement, ...] = (), **changes: Any) -> PlannedTrial:
    cfg = OmegaConf.create(CFG)
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return PlannedTrial(Trial((f"model={name}", "seed=0")), loading.plain(cfg), name, state, missing)


def write_short_run(root: Path, wall_s: float, *, gap: float = 0.0) -> None:
    """Write one epoch of 450 steps: 2 s before the first step, 0.1 s a step, then the test; ``gap`` before the last row."""
    folder = root / "short"
    folder.mkdir(parents=True)
    content = {**CFG, "trainer": {**CFG["trainer"], "max_epochs": 1}}
    (folder / "config.yaml").write_text(json.dumps(content))
    facts = {
        "status": "finished",
        "wall_s": wall_s,
        "config_hash": "x",
        "slim": True,
        "host": "node7",
        "model": {"parameters": 5},
    }
    (folder / "provenance.json").write_text(json.dumps(facts))
    times = {step: 1000.0 + 0.1 * step for step in range(9, 450, 20)}
    rows = [{"step": step, "epoch": 0, "time": time, "train/loss": 1.0} for step, time in times.items()]
    rows.append({"step": 449, "epoch": 0, "time": 1000.0 + 44.9 + gap, "val/accuracy": 0.1})
    rows.append({"step": 450, "epoch": 1, "time": 1050.0 + gap, "test/accuracy": 0.1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_short_run_tells_the_time_of_a_long_one(tmp_path: Path) -> None:
    write_short_run(tmp_path, wall_s=50.0)
    rates = Rates([tmp_path], {})
    # 305 epochs of 450 steps at 0.1 s, and the 5 s that are no steps
    assert rates.training_seconds(planned()) == pytest.approx(305 * 450 * 0.1 + 5.0)
    assert rates.training_seconds(planned(trainer__max_steps=1000)) == pytest.approx(105.0)
    assert rates.training_seconds(planned(optimizer__lr=0.5)) is not None  # costs the same
    others: list[dict[str, Any]] = [{"model__depth": 6}, {"data__batch_size": 50}, {"trainer__accelerator": "cpu"}]
    for changes in others:
        assert rates.training_seconds(planned(**changes)) is None  # another kind
    # another share of the data has fewer steps of the same kind: the data set's size is needed
    assert rates.training_seconds(planned(data__fraction=0.1)) is None
    sized = Rates([tmp_path], {}, {"cifar100": 45000})
    assert sized.training_seconds(planned(data__fraction=0.1)) == pytest.approx(305 * 45 * 0.1 + 5.0)


def test_what_a_run_does_not_tell(tmp_path: Path) -> None:
    write_short_run(tmp_path, wall_s=50.0)
    for changes in ({"trainer": {**CFG["trainer"], "max_epochs": 1, "max_steps": 451}}, {"analysis": {"hessian": {}}}):
        (tmp_path / "short" / "config.yaml").write_text(json.dumps({**CFG, **changes}))
        rates = Rates([tmp_path], {})
        assert rates.training_seconds(planned()) is None, changes  # no whole epoch; the time of an analysis is within
    (tmp_path / "short" / "config.yaml").write_text(
        json.dumps({**CFG, "trainer": {**CFG["trainer"], "max_steps": 451}})
    )
    sized = Rates([tmp_path], {}, {"cifar100": 45000})
    assert sized.training_seconds(planned()) == pytest.approx(305 * 450 * 0.1 + 5.0)


def test_a_stated_rate_takes_the_place_of_an_unknown_training_alone(tmp_path: Path) -> None:
    stated = {"rates": {"seconds_per_training": 7, "source": "a page"}}
    result = Measurement("hessian", "end", {"n_top": 5})
    write_short_run(tmp_path, wall_s=50.0)
    known, unknown = estimate(
        [planned(missing=(result,)), planned("b", missing=(result,), model__depth=6)], Rates([tmp_path], stated)
    )
    assert (known.seconds, known.unknown_time) == (pytest.approx(305 * 450 * 0.1 + 5.0), 1)
    assert (unknown.seconds, unknown.unknown_time, unknown.sources) == (7.0, 0, frozenset({"a page"}))
    (resumed,) = estimate([planned(state="resume", model__depth=6)], Rates([], stated))
    assert (resumed.seconds, resumed.unknown_time) == (0.0, 1)


def test_a_run_that_was_resumed_tells_no_rate(tmp_path: Path) -> None:
    write_short_run(tmp_path, wall_s=50.0, gap=7200.0)
    assert Rates([tmp_path], {}).training_seconds(planned()) is None


def test_the_rest_of_a_training_that_stopped(tmp_path: Path) -> None:
    write_short_run(tmp_path / "runs", wall_s=50.0)
    rates = Rates([tmp_path / "runs"], {})
    stopped = planned(state="resume")
    half = tmp_path / "half"
    half.mkdir()
    (half / "metrics.jsonl").write_text('{"step": 68625, "epoch": 152, "time": 1.0, "train/loss": 1.0}\n')
    stopped = PlannedTrial(stopped.trial, stopped.settings, "a", "resume", (), Run(half))
    assert rates.training_seconds(stopped) == pytest.approx((305 * 450 - 68626) * 0.1 + 5.0)  # of steps 0 to 68625


def test_disk_space_is_a_finished_runs_else_that_of_the_checkpoints(tmp_path: Path) -> None:
    write_short_run(tmp_path, wall_s=50.0)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "short").iterdir())
    rates = Rates([tmp_path], {})
    assert rates.run_bytes(planned(trainer__max_epochs=1)) == on_disk
    assert rates.run_bytes(planned()) == 6 * 5 * 4  # of more epochs, which keep more checkpoints
    # init, best, last and epoch 4 (400 is beyond the end), and AdamW's two states in last: 6 x 5 parameters x 4 bytes
    assert rates.run_bytes(planned(optimizer___target_="torch.optim.Adam")) == 6 * 5 * 4
    assert rates.run_bytes(planned(optimizer___target_="torch.optim.SGD")) == 5 * 5 * 4
    assert (
        rates.run_bytes(planned(callbacks__checkpoint__snapshots="log", optimizer___target_="torch.optim.SGD")) is None
    )


def test_what_trials_share_is_counted_once(tmp_path: Path) -> None:
    write_short_run(tmp_path, wall_s=50.0)
    same = Measurement("hessian", "end", {"n_top": 5})
    trials = [planned(missing=(same,)), planned(missing=(same,)), planned("b", EXISTS)]
    costs = estimate(trials, Rates([tmp_path], {}))
    assert [cost.unknown_time for cost in costs] == [1, 0, 0]
    assert costs[1:] == [Estimate(), Estimate()]


def test_nothing_is_made_up(tmp_path: Path) -> None:
    target = Target("fig4", (Trial(("model=a", "seed=0")), Trial(("model=b", "seed=0"))))
    trials = {p.trial: p for p in (planned("a"), planned("b", callbacks__checkpoint__snapshots="log"))}
    text = work_listing.listing([target], trials, Rates([tmp_path], {}), 4)
    lines = [line.split() for line in text.splitlines()]
    assert ["train", "model=a", "seed=0", "unknown"] in lines
    (row,) = [line for line in lines if line[:1] == ["fig4"] and len(line) > 1]
    assert row[:7] == ["fig4", "2", "0", "0", "0", "2", "unknown"]
    assert row[-4:] == [
        "MiB",
        "+",
        "unknown",
        "(1)",
    ]  # of the first by its parameters; the second has no list of snapshots
    assert "a short run measures them: overrides='trainer.max_epochs=1'" in text
    write_short_run(tmp_path, wall_s=50.0)
    text = work_listing.listing([target], trials, Rates([tmp_path], {}), 4)
    assert "7.6 h" in text  # 2 x (13,725 + 5) s
    assert "with 4 side by side, each as fast as alone, at least 3.8 h" in text  # two jobs
    assert "time: by 1 finished run on node7" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed=3", "seed=3: cannot be an override of a reproduction; write seeds=5"),
        ("model=vit", "model=vit: cannot be an override"),
        ("analysis=[]", "cannot be an override"),
        ("test=false", "test=false: runs with and without it could not be told apart; set a key of model, data"),
        ("optimizer.lr", "not key=value"),
        ("~optimizer.lr=1", "not key=value"),
        ("'a", "not a list of key=value"),
    ],
)
def test_overrides_that_would_mix_runs_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_overrides.checked(text)


def test_overrides_are_split_as_a_shell_does() -> None:
    overrides = run_overrides.checked(
        "optimizer.lr=1e-3 'callbacks.checkpoint.snapshots=[0, 4]' analysis.hessian.n_top=3"
    )
    assert overrides == ("optimizer.lr=1e-3", "callbacks.checkpoint.snapshots=[0, 4]", "++analysis.hessian.n_top=3")
    assert run_overrides.suffix(()) == run_overrides.suffix(("data.root=/x", "logger=none", "data.num_workers=4")) == ""


def test_other_files_of_a_data_set_do_not_change_the_work() -> None:
    files = "data=cifar10_jpeg data.root=/x data.name=other data.source.checksums={data_batch_1:0}"
    assert not run_overrides.changes_work(run_overrides.checked(files))
    assert run_overrides.suffix(run_overrides.checked(files))  # but the runs are others
    assert run_overrides.changes_work(run_overrides.checked(f"{files} trainer.max_epochs=2"))


def test_the_work_is_stated_before_it_starts(tmp_path: Path) -> None:
    stated = {"rates": {"seconds_per_training": 3600, "source": "a page"}}
    trials = [planned(), planned("b"), planned("c"), planned("b")]
    text = start_text(trials, estimate(trials, Rates([], stated)), 2)
    assert text == (
        "to do: 3 trainings, 0 finished runs to measure; one job at a time: 3 h, 2 side by side: at least 90 min (by a page)"
    )
    assert "unknown" in start_text(trials, estimate(trials, Rates([], {})), 1)
