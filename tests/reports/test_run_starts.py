"""Runs that their configuration alone does not describe: other first weights, another length at first, a limit of time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.runs.report_runs import CARD, bench, spectrum
from vitscope.config import experiment_identity
from vitscope.reports import run_entry, run_index
from vitscope.reports.exports import study_export
from vitscope.reports.value_lookup import Selection
from vitscope.runs import run_search
from vitscope.runs.metrics_log import Journal

TUNED: Mapping[str, Any] = {
    "started_from": {"checkpoint": "/elsewhere/runs/a/checkpoints/last.ckpt", "step": 0, "weights_only": True}
}
LONGER: Mapping[str, Any] = {"changes": [{"step": 9, "key": "trainer.max_epochs", "old": 1, "new": 3}]}


def by_name(root: Path) -> dict[str, run_entry.Entry]:
    return {entry.id: entry for entry in run_index.collect(run_search.every(root / "runs"))}


@pytest.mark.parametrize(
    ("facts", "label"), [(TUNED, "vit-tiny, from a/last.ckpt"), (LONGER, "vit-tiny, max_epochs at first 1")]
)
def test_another_start_is_another_experiment(
    make_run: Callable, tmp_path: Path, facts: Mapping[str, Any], label: str
) -> None:
    make_run("vit", 0, name="plain", metrics={"test/accuracy": 0.4})
    make_run("vit", 0, name="other", facts=facts, metrics={"test/accuracy": 0.8})  # later, with the same seed
    make_run("vit", 1, name="seed1", facts=facts, metrics={"test/accuracy": 0.9})
    entries = by_name(tmp_path)
    assert [entries[name].superseded for name in ("plain", "other", "seed1")] == [False, False, False]
    assert [entries[name].label for name in ("plain", "other", "seed1")] == ["vit-tiny", label, label]
    groups = Selection(list(entries.values())).groups().values()
    assert sorted(sorted(entry.id for entry in group.values()) for group in groups) == [["other", "seed1"], ["plain"]]
    of_claims = bench(tmp_path).groups(lambda _: True)  # the configuration does not say what the others are
    assert [[entry.id for entry in group.values()] for group in of_claims] == [["plain"]]


def test_a_changed_length_counts_where_the_learning_rate_follows_it() -> None:
    for kind, n_changes in (("cosine", 1), ("multistep", 0), ("constant", 0)):
        cfg = {"optimizer": {"schedule": {"kind": kind}}}
        assert len(experiment_identity.changed_lengths(cfg, LONGER)) == n_changes
    before_the_first_step = {"changes": [{"step": 0, "key": "trainer.max_epochs", "old": 1, "new": 3}]}
    assert experiment_identity.changed_lengths({}, before_the_first_step) == []
    of_logging = {"changes": [{"step": 9, "key": "trainer.log_every_n_steps", "old": 1, "new": 3}]}
    assert experiment_identity.changed_lengths({}, of_logging) == []


def test_a_training_that_its_time_may_end_is_no_repetition(make_run: Callable, tmp_path: Path) -> None:
    make_run("vit", 0, name="plain")
    make_run("vit", 1, name="null", trainer__max_time=None)
    make_run("vit", 2, name="limited", trainer__max_time="00:00:05:00")
    entries = by_name(tmp_path)
    assert entries["plain"].group == entries["null"].group != entries["limited"].group
    assert entries["limited"].label == "vit-tiny, max_time 00:00:05:00"
    assert experiment_identity.setting(entries["plain"].config) != experiment_identity.setting(
        entries["limited"].config
    )


def test_numbers_of_an_earlier_end_are_not_those_of_a_run_that_went_on(make_run: Callable, tmp_path: Path) -> None:
    card = dataclasses.replace(CARD, step=3)
    run = make_run("vit", 0, measured={"hessian": spectrum(0.25, card=card)})
    (entry,) = by_name(tmp_path).values()
    assert (entry.metrics["test/accuracy"], entry.tags()) == (0.5, ["end"])
    journal = Journal(run.journal)
    journal.append(3, 3, {"train/loss": 0.1})  # the fourth step: one step an epoch, one epoch more
    (entry,) = by_name(tmp_path).values()
    assert ("test/accuracy" in entry.metrics, entry.tags()) == (False, ["step-000003"])
    for step in (4, 5):
        journal.append(step, step, {"train/loss": 0.1})
    (entry,) = by_name(tmp_path).values()
    assert "test/accuracy" not in entry.metrics
    assert entry.metrics["val/accuracy"] == pytest.approx(0.5)
    assert entry.tags() == ["step-000003"]
    journal.append(6, 6, {"test/accuracy": 0.7})
    journal.close()
    (entry,) = by_name(tmp_path).values()
    assert entry.metrics["test/accuracy"] == 0.7


def test_steps_that_a_resumed_run_writes_again_are_on_its_curve_once(make_run: Callable, tmp_path: Path) -> None:
    run = make_run("vit", 0)
    journal = Journal(run.journal)
    for step in (1, 2, 3):
        journal.append(step, step, {"train/loss": 10.0 + step})
    journal.close()
    (entry,) = by_name(tmp_path).values()
    assert entry.curves["train/loss"] == ([0, 1, 2, 3], [2.0, 11.0, 12.0, 13.0])


def test_a_study_keeps_the_start_without_its_folder(make_run: Callable, tmp_path: Path) -> None:
    make_run("vit", 0, name="plain")
    make_run("vit", 0, name="tuned", facts=TUNED)
    make_run("vit", 0, name="longer", facts=LONGER)
    study_export.write(tmp_path / "study", "smoke", {"table": list(by_name(tmp_path).values())})
    assert "elsewhere" not in (tmp_path / "study/runs/tuned.json").read_text()
    read = {entry.id: entry for entry in study_export.read(tmp_path / "study", "table")}
    assert {name: entry.label for name, entry in read.items()} == {
        "plain": "vit-tiny", "tuned": "vit-tiny, from a/last.ckpt", "longer": "vit-tiny, max_epochs at first 1"
    }  # fmt: skip


@pytest.mark.parametrize("facts", [TUNED, LONGER])
def test_a_training_from_initial_weights_is_not_replaced_by_another(
    make_run: Callable, tmp_path: Path, facts: Mapping[str, Any]
) -> None:
    make_run("vit", 0, name="plain", facts={"config_hash": "0123456789abcdef"})
    assert run_search.finished(tmp_path / "runs", "0123456789abcdef") is not None
    make_run("vit", 0, name="other", facts={"config_hash": "fedcba9876543210", **facts})
    assert run_search.finished(tmp_path / "runs", "fedcba9876543210") is None
