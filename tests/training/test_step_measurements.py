"""Analyses after chosen optimizer steps: their steps, their results after a stop or a kill, and errors of wrong values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vitscope as vs
from tests.fixtures.programs.kills import Killed
from tests.fixtures.programs.stopped_measurements import stopping_at_measurement
from tests.fixtures.runs.run_folders import losses
from vitscope.analyses import runner
from vitscope.analyses.spec import Analysis, step_tag
from vitscope.runs import run_end

#: an epoch has 2 steps and the training 6
WATCHED = ["analysis=[fourier]", "analysis.fourier.probe.n_images=8", "analysis.fourier.when.every_n_steps=3",
           "analysis.fourier.when.at_steps=[1,4]", "trainer.max_epochs=3", "trainer.limit_train_batches=2",
           "test=false"]  # fmt: skip
STEPS = ("step-000001", "step-000003", "step-000004", "step-000006")


def rows_of(run: Path) -> list[tuple[str, int]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["tag"], row["step"]) for row in rows if "tag" in row]


def assert_same_measurements(one: Path, other: Path) -> None:
    """Every result has the same numbers and card, and each moment stands once in the metrics log."""
    first, second = (vs.load_results(run)["fourier"] for run in (one, other))
    assert set(first) == set(second) == {*STEPS, "end"}
    for tag, result in first.items():
        assert result.scalars() == second[tag].scalars()
        assert result.card == second[tag].card
    assert (
        sorted(rows_of(one)) == sorted(rows_of(other)) == sorted([(tag, int(tag[5:])) for tag in STEPS] + [("end", 6)])
    )
    assert losses(one) == losses(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a training that nothing interrupts, made when the first test asks for it."""
    return tmp_path_factory.mktemp("steps") / "whole"


@pytest.fixture
def uninterrupted(whole: Path, call, tiny) -> Path:
    if not whole.exists():
        assert call("train", *tiny, *WATCHED, f"run_dir={whole}") == 0
    return whole


def test_due_steps() -> None:
    analysis = Analysis("x", len, {}, {}, {"every_n_steps": 10, "at_steps": [7]})
    assert [step for step in range(31) if analysis.due_at_step(step)] == [7, 10, 20, 30]
    assert not any(Analysis("x", len, {}, {}, {}).due_at_step(step) for step in range(5))
    assert step_tag(120) == "step-000120"


def test_steps_leave_training_as_it_is(uninterrupted, call, tiny, tmp_path) -> None:
    bare = [*tiny, "analysis=[]", *WATCHED[-3:], f"run_dir={tmp_path}/bare"]
    assert call("train", *bare) == 0
    assert losses(tmp_path / "bare") == losses(uninterrupted)
    assert [tag for tag, _ in rows_of(uninterrupted)] == [*STEPS, "end"]
    results = vs.load_results(uninterrupted)["fourier"]
    assert [results[tag].card.step for tag in (*STEPS, "end")] == [1, 3, 4, 6, 6]
    figures = {path.name for path in (uninterrupted / "figures").glob("*.png")}
    # steps that are listed have a figure, of the others the numbers alone are written
    assert figures == {"fourier-step-000001.png", "fourier-step-000004.png", "fourier-end.png"}


@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_a_stop_while_a_step_is_measured(uninterrupted, call, tiny, tmp_path, monkeypatch, at) -> None:
    """It is measured when the run resumes, on the weights of that step; the last one has no step after it."""
    with stopping_at_measurement(at, monkeypatch):
        assert call("train", *tiny, *WATCHED, f"run_dir={tmp_path}/cut") == 143
    assert len(rows_of(tmp_path / "cut")) == at - 1
    assert call("train", f"run={tmp_path}/cut", "ckpt_path=last") == 0
    assert_same_measurements(uninterrupted, tmp_path / "cut")


@pytest.mark.parametrize(("at", "before"), [(2, True), (3, False)])
def test_a_kill_while_a_step_is_measured(uninterrupted, call, tiny, tmp_path, at, before) -> None:
    """Steps are repeated from the last epoch's checkpoint; what was measured of them is found again, and not twice."""
    measure, seen = runner._measured, []

    def deadly(*arguments):
        seen.append(arguments)
        if before and len(seen) == at:
            raise Killed
        result = measure(*arguments)
        if len(seen) == at:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_end, "note_end", lambda run, code, **facts: None)
        patch.setattr(runner, "_measured", deadly)
        call("train", *tiny, *WATCHED, f"run_dir={tmp_path}/cut")
    assert call("train", f"run={tmp_path}/cut", "ckpt_path=auto") == 0
    assert_same_measurements(uninterrupted, tmp_path / "cut")


def test_steps_are_the_optimizers(call, tiny, tmp_path) -> None:
    """With two batches a step, the second step is made after the fourth batch, and measured once."""
    options = [
        "trainer.accumulate_grad_batches=2",
        "analysis.fourier.when.at_steps=[]",
        "analysis.fourier.when.every_n_steps=2",
    ]
    assert call("train", *tiny, *WATCHED, *options, "trainer.max_epochs=2", f"run_dir={tmp_path}/run") == 0
    assert rows_of(tmp_path / "run") == [("step-000002", 2), ("end", 2)]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("when.every_n_steps=-1", ["analysis.fourier.when.every_n_steps=-1", "not at least 0"]),
        ("when.every_n_steps=2.5", ["analysis.fourier.when.every_n_steps=2.5", "not a whole number", "set 10"]),
        ("when.at_steps=[0]", ["analysis.fourier.when.at_steps", "counted from 1", "when.start=true"]),
        ("when.at_steps=100", ["analysis.fourier.when.at_steps=100", "not a list of whole numbers", "[100, 1000]"]),
        (
            "when.at_steps=[10,ten]",
            ["analysis.fourier.when.at_steps=[10, ten]", "not a list of whole numbers", "[100, 1000]"],
        ),
        ("when.every_n_step=5", ["every_n_step", "every_n_steps"]),
    ],
)
def test_wrong_steps_are_one_line(call, tiny, capsys, override, words) -> None:
    code = call("train", *tiny, "analysis=[fourier]", f"analysis.fourier.{override}")
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert [word for word in words if word not in lines[0]] == [], lines[0]


def test_steps_after_the_last_one_are_named(call, tiny, tmp_path, capsys, caplog) -> None:
    options = ["analysis.fourier.when.every_n_steps=50", "analysis.fourier.when.at_steps=[2,900]"]
    assert call("train", *tiny, *WATCHED, *options, f"run_dir={tmp_path}/run") == 0
    said = capsys.readouterr().err + caplog.text
    assert "analysis.fourier.when: steps 900 and every_n_steps=50 are beyond the last step, 6" in said
    assert {tag for tag, _ in rows_of(tmp_path / "run")} == {"step-000002", "end"}
