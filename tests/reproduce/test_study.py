"""A study of committed numbers draws the tables and figures that its runs draw, and holds no weights, arrays or places."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.fixtures.runs.report_runs import other_card, rise, spectrum, write_run
from vitscope.cli import reproduce
from vitscope.diagnostics.fourier.branch_transfer import BranchTransferResult
from vitscope.reports.exports import study_export
from vitscope.reproduce import command_line, draw, plan
from vitscope.reproduce.plan import Target, Trial
from vitscope.runtime.errors import ConfigError, DataError, StorageError

TABLE = Target("table-claims", (Trial(("seed=0",)),), table="claims")
SEEDS = 6


def transfer(value: float, reference: str = "initial") -> BranchTransferResult:
    one, none = np.array([value]), np.full(1, np.nan)
    return BranchTransferResult(
        units=("a",), kinds=("msa",), stages=np.ones(1), depths=np.zeros(1), normalized_frequency=(np.arange(3.0),),
        transfer=(np.zeros(3),), contrast=one, contrast_half_width=one, contrast_own=one, contrast_initial=none,
        replicates=np.zeros((2, 1)), kind_names=("msa",), kind_contrast=one, kind_low=one, kind_high=one,
        reference=reference, level=0.95, seed=0, n_images=4, card=other_card(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[SimpleNamespace]:
    """Return runs with clear, unclear and missing statistics, one repeated, and what their trials asked for."""
    root, made, rng = tmp_path_factory.mktemp("runs"), [], np.random.default_rng(0)
    for seed in range(SEEDS):
        for model, ape in (("alternet", 100.0), ("convnet", 200.0), ("vit", 50.0)):
            measured: dict[str, Any] = {
                "hessian": spectrum(0.1 * rng.random(), ape * np.exp(0.1 * rng.standard_normal())),
                "sharpness": rise(0.1 * rng.random(), nll=1.0),
                "branch_transfer": transfer(-0.5 - rng.random(), "initial" if seed else "none"),
            }
            run = write_run(root, model, seed, measured=measured, metrics={"test/accuracy": 0.5 + 0.01 * seed})
            asked = ("hessian/end-0badcafe", "branch_transfer/end-0badcafe", "sharpness/end-0badcafe")
            made.append(SimpleNamespace(run=run.path, results=asked[: 2 if model == "vit" else 3]))
    again = write_run(root, "convnet", 0, measured={"hessian": spectrum(0.9, 1.0)})  # supersedes the first
    return [*made, SimpleNamespace(run=again.path, results=("hessian/end-0badcafe",))]


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_study_draws_what_its_runs_draw(outcomes: list[SimpleNamespace], tmp_path: Path, capsys: Any) -> None:
    problems = draw.draw(TABLE, outcomes, tmp_path / "a")
    size = study_export.write(tmp_path / "study", "smoke", {TABLE.name: draw.entries(outcomes)})
    for outcome in outcomes:
        (outcome.run / "moved").touch()  # the study reads nothing of the runs any more
    reproduce.reproduce(command_line.parse(["table-claims", f"from={tmp_path / 'study'}", f"out={tmp_path / 'b'}"]))
    drawn, again = files(tmp_path / "a"), files(tmp_path / "b")
    text = drawn["table-claims/claims.md"].decode()
    assert re.search(r"-0\.(6|7)\d* \[-0\.\d+, -0\.\d+\] ln", text)  # ln(100 / 200), six seeds
    assert "Data: photos." in text
    pictures = {name for name in drawn if name.endswith((".png", ".pdf"))}
    assert {"table-claims/effects.png"} <= pictures
    assert again.keys() == drawn.keys()
    assert {n: again[n] for n in again if not n.endswith(".pdf")} == {
        n: drawn[n] for n in drawn if not n.endswith(".pdf")
    }
    assert problems == []
    assert size < 12_000 * len(outcomes)


def test_a_study_holds_numbers_cards_and_hashes_alone(outcomes: list[SimpleNamespace], tmp_path: Path) -> None:
    entries = draw.entries(outcomes)
    study_export.write(tmp_path / "study", "smoke", {TABLE.name: entries})
    found = files(tmp_path / "study")
    assert {Path(name).suffix for name in found} == {".json"}
    content = json.loads(found[f"runs/{entries[0].id}.json"])
    result = content["results"]["hessian/end-0badcafe"]
    assert len(result["sha256"]) == 64
    assert result["card"]["batch_size"] == 16
    assert content["results"]["branch_transfer/end-0badcafe"]["texts"]["reference"] in ("initial", "none")
    assert not any(str(tmp_path.parent) in text.decode() for text in found.values())
    assert "root" not in content["config"]["data"]
    again = study_export.read(tmp_path / "study", TABLE.name)
    for one, other in zip(entries, again, strict=True):
        assert (one.id, one.group, one.label, one.superseded, one.metrics) == (
            other.id, other.group, other.label, other.superseded, other.metrics,
        )  # fmt: skip
        for m, n in zip(one.results, other.results, strict=True):
            assert dataclasses.replace(m, path=n.path, texts=n.texts) == n


def test_numbers_that_differ_are_named(outcomes: list[SimpleNamespace], tmp_path: Path) -> None:
    entries = draw.entries(outcomes)
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        study_export.write(folder, "smoke", {TABLE.name: entries})
    assert study_export.differing_numbers(a, b) == []
    path = b / "runs" / f"{entries[0].id}.json"
    content = json.loads(path.read_text())
    content["metrics"]["test/accuracy"] *= 1 + 1e-4
    path.write_text(json.dumps(content))
    assert [" test/accuracy: " in line for line in study_export.differing_numbers(a, b)] == [True]
    assert study_export.differing_numbers(a, b, relative=1e-3) == []


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "study.json").unlink(), DataError, "no study there"),
        (
            lambda f: (f / "study.json").write_text('{"format": 99, "targets": {}}'),
            StorageError,
            "not a study of format 1",
        ),
        (lambda f: next((f / "runs").iterdir()).write_text("{"), StorageError, "cannot be read"),
        (lambda f: next((f / "runs").iterdir()).write_text("{}"), StorageError, "is no run of a study"),
    ],
)
def test_damaged_studies_are_one_clear_error(
    outcomes: list[SimpleNamespace], tmp_path: Path, damage: Callable, error: type[Exception], message: str
) -> None:
    study_export.write(tmp_path / "study", "smoke", {TABLE.name: draw.entries(outcomes[:1])})
    damage(tmp_path / "study")
    with pytest.raises(error, match=message):
        study_export.read(tmp_path / "study", TABLE.name)


def test_what_does_not_go_together_is_refused(outcomes: list[SimpleNamespace], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="draws from committed numbers"):
        command_line.parse(["table-claims", "from=results/x", "jobs=2"])
    assert str(command_line.parse(["table-claims", "from=results/x", "profile=smoke", "seeds=1"]).out) == "figures/x"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not replaced"):
        study_export.write(tmp_path / "other", "smoke", {})
    study_export.write(tmp_path / "study", "smoke", {TABLE.name: draw.entries(outcomes[:1])})
    with pytest.raises(DataError, match="does not hold table-models; choose one of table-claims"):
        study_export.read(tmp_path / "study", "table-models")


TINY = (
    "experiment=fig12b_robustness", "profile=smoke", "caps=smoke", "logger=none", "objective=weak", "model=vit", "model.depth=1",
    "model.patch_size=8", "model.width=32", "analysis=[hessian,evaluation]", "seed=3",
)  # fmt: skip


def test_a_run_repeated_from_its_seed_gives_its_numbers(tmp_path: Path) -> None:
    from vitscope.reproduce import trial

    target = Target("table-claims", (Trial(TINY),), table="claims")
    for name in ("a", "b"):
        outcome = trial.perform(target.trials[0], tmp_path / f"runs-{name}")
        assert outcome.problems == ()
        study_export.write(tmp_path / name, "smoke", {target.name: draw.entries([outcome])})
    assert study_export.differing_numbers(tmp_path / "a", tmp_path / "b") == []
    (entry,) = study_export.read(tmp_path / "a", target.name)
    assert {"test/accuracy", "test/nll", "val/nll"} <= entry.metrics.keys()
    assert {m.measure for m in entry.results} == {"hessian_max_eigenvalue_spectrum", "evaluation"}
    hashes = [json.loads(next((tmp_path / name / "runs").iterdir()).read_text())["checkpoints"] for name in ("a", "b")]
    assert hashes[0].keys() == hashes[1].keys() >= {"init.ckpt", "last.ckpt"}


def test_the_targets_of_the_small_profile_name_models_of_the_paper_s_blocks() -> None:
    models = plan.read()["profiles"]["cifar10_small"]["models"]
    assert models["alternet"] == models["matched"] == models["placed"]
    trials = plan.target("table-claims", plan.read(), "cifar10_small", seeds=10).trials
    assert len({t.name for t in trials}) == len(trials) == 340
