"""A sweep's trials as processes: pinned, journalled, resumed, stopped, and an exit code that is true."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.fixtures.programs.processes import wait_until
from vitscope.runs import metrics_log
from vitscope.runtime import stop_flag
from vitscope.runtime.errors import ConfigError
from vitscope.runtime.stop_flag import Interrupted
from vitscope.sweep import progress_table, sweep_file, trial_process, trial_ranking
from vitscope.sweep.local_runner import LocalSweep, Trial
from vitscope.sweep.sweep_file import Sweep

PROGRAM = Path(__file__).parents[1] / "fixtures" / "programs" / "sweep_program.py"


def sweep_of(**parameters: Any) -> Sweep:
    nodes = {
        key: {"values": value} if isinstance(value, list) else {"value": value} for key, value in parameters.items()
    }
    metric = {"name": "val/accuracy", "goal": "maximize"}
    return Sweep(Path("x.yaml"), {"program": str(PROGRAM), "method": "grid", "metric": metric, "parameters": nodes})


def local(sweep: Sweep, root: Path, jobs: int = 2, **options: Any) -> LocalSweep:
    return LocalSweep(sweep, root, trial_process.slots(None, jobs), **options)


def starts(trial: Trial) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (trial.folder / "starts.txt").read_text().splitlines()]


def test_a_finished_sweep_is_not_run_again(tmp_path: Path) -> None:
    sweep = sweep_of(do="finish", seed=[0, 1, 2])
    first = local(sweep, tmp_path)
    assert first.run() == 0
    assert [trial.state for trial in first.trials] == ["finished"] * 3
    assert [trial.params["seed"] for trial in first.trials] == [0, 1, 2]
    again = local(sweep, tmp_path)
    assert again.run() == 0
    assert all(len(starts(trial)) == 1 for trial in again.trials)
    assert [trial.history for trial in again.trials] == [[0.5]] * 3  # read back from the folders
    rows = [json.loads(line) for line in (first.folder / "sweep.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows].count("end") == 3


def test_rows_after_one_that_was_cut_short_are_read(tmp_path: Path) -> None:
    """A full disk or a kill may leave a part of a row at the end of the journal."""
    sweep = local(sweep_of(do="finish", seed=[0, 1]), tmp_path)
    journal = sweep.folder / "sweep.jsonl"
    journal.write_text('{"event": "start", "trial": 0, "params": {}}\n{"event": "end", "tri')
    sweep._note(event="end", trial=0, state="stopped early", exit_code=0)
    assert [row["event"] for row in metrics_log.read(journal)] == ["start", "end"]
    again = local(sweep_of(do="finish", seed=[0, 1]), tmp_path)
    trial = again.next_job()
    assert trial is not None
    assert (trial.index, again.trials[0].state) == (1, "stopped early")


def test_limit_takes_the_first_trials(tmp_path: Path) -> None:
    one = local(sweep_of(do="finish", seed=[0, 1, 2]), tmp_path, limit=1)
    assert one.run() == 0
    assert [trial.params["seed"] for trial in one.trials] == [0]


@pytest.mark.usefixtures("command_messages")
def test_a_failure_is_named_and_retried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = sweep_of(do=["finish", "fail"])
    first = local(sweep, tmp_path, show=progress_table.SweepDisplay())
    assert first.run() == 3
    progress_table.report(first)
    shown = capsys.readouterr()
    assert "failed: trial 1 (do=fail): exit 3" in shown.err
    assert "error: data.root=x: not there" in shown.err
    assert "1 finished, 1 failed" in shown.out
    assert "trial 1 (do=fail): failed, cpu" in shown.out
    again = local(sweep, tmp_path)
    assert again.run() == 0
    assert [len(starts(trial)) for trial in again.trials] == [1, 2]
    assert starts(again.trials[1])[1]["resumed"]


def test_an_exit_code_of_0_without_a_result_is_a_failure(tmp_path: Path) -> None:
    sweep = local(sweep_of(do="lie"), tmp_path, jobs=1)
    assert sweep.run() == 1
    assert [trial.state for trial in sweep.trials] == ["failed"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_ends_the_children_with_their_own_codes(tmp_path: Path, signum: int, code: int) -> None:
    sweep = sweep_of(do=["finish", "wait"])
    first = local(sweep, tmp_path)

    def when_ready() -> None:
        while not list(first.folder.glob("*/ready")):
            time.sleep(0.01)
        stop_flag.request(signum)

    threading.Thread(target=when_ready).start()
    with pytest.raises(Interrupted):
        first.run()
    waiting = first.trials[1]
    assert (waiting.state, waiting.exit_code, waiting.process) == ("stopped", code, None)
    assert trial_process.outcome(waiting.folder).status == "stopped"
    stop_flag.clear()
    again = local(sweep, tmp_path)
    assert again.run() == 0
    assert [start["resumed"] for start in starts(again.trials[1])] == [False, True]
    assert len(starts(again.trials[0])) == 1


def test_a_killed_trial_goes_on(tmp_path: Path) -> None:
    sweep = sweep_of(do="wait")
    first = local(sweep, tmp_path, jobs=1)

    def when_ready() -> None:
        while not list(first.folder.glob("*/ready")):
            time.sleep(0.01)
        process = first.trials[0].process
        assert process is not None
        process.kill()

    threading.Thread(target=when_ready).start()
    assert first.run() == 137
    assert first.trials[0].state == "failed"
    assert local(sweep, tmp_path, jobs=1).run() == 0


def test_children_end_when_the_sweep_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "trial" / "ready"
    ready.parent.mkdir()
    script = (
        "import sys\nfrom pathlib import Path\nfrom vitscope.sweep import trial_process\n"
        f"command = [sys.executable, {str(PROGRAM)!r}, 'do=wait', {f'run_dir={ready.parent}'!r}]\n"
        "trial_process.start(command, trial_process.environment(), None).wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    wait_until(ready.exists, "trial")
    parent.kill()
    parent.wait()
    wait_until(lambda: trial_process.outcome(ready.parent).status == "stopped", "end of the trial")
    assert trial_process.outcome(ready.parent).exit_code == 143


def test_pinning_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    sweep = local(sweep_of(do="finish", seed=[0]), tmp_path)
    assert sweep.run() == 0
    (seen,) = starts(sweep.trials[0])
    assert seen == {
        "resumed": False,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "4",
        "WANDB_RUN_GROUP": sweep.sweep.name,
        "RANK": None,
    }
    gpus = trial_process.slots("0,2+3", None)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in gpus] == ["0", "2,3"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the caller's own bound is kept
    assert trial_process.slots(None, 2)[0].environment["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(("gpus", "jobs"), [("0", 1), ("a", None), ("0,0", None), (None, 0), ("", None)])
def test_slots_that_make_no_sense_are_refused(gpus: str | None, jobs: int | None) -> None:
    with pytest.raises(ConfigError):
        trial_process.slots(gpus, jobs)


def test_hyperband_ends_the_trial_that_falls_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscope.sweep.local_runner.WATCH", 0.05)
    sweep = sweep_of(do="learn", steps=60, accuracy=[0.9, 0.1])
    terminate = {"type": "hyperband", "min_iter": 10, "eta": 3}
    sweep = Sweep(sweep.path, {**sweep.content, "early_terminate": terminate})
    run = local(sweep, tmp_path)
    assert run.run() == 0
    assert [trial.state for trial in run.trials] == ["finished", "stopped early"]
    assert len(run.trials[1].history) < 60
    again = local(sweep, tmp_path)
    assert again.run() == 0
    assert [len(starts(trial)) for trial in again.trials] == [1, 1]


def test_the_live_table_has_a_row_a_trial(tmp_path: Path) -> None:
    run = local(sweep_of(do=["finish", "fail"]), tmp_path)
    run.run()
    shown = progress_table.table(run)
    assert shown.row_count == 2
    assert list(shown.columns[3].cells) == ["finished", "failed (3)"]
    assert list(shown.columns[6].cells) == ["0.5", ""]
    assert sweep_file.label(run.sweep, run.trials[0].params) == "do=finish"


def test_trials_end_ranked_by_the_metric_with_a_file_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = sweep_of(do=["finish", "fail"], accuracy=[0.2, 0.9, 0.4], seed=7)
    run = local(sweep, tmp_path)
    assert run.run() == 3
    assert [trial.index for trial in run.ranking()] == [1, 2, 0]
    progress_table.report(run)
    shown = capsys.readouterr().out
    table = [line.split() for line in shown.split("highest value of each trial:\n")[1].splitlines()]
    assert table[0] == ["rank", "trial", "do", "accuracy", "val/accuracy", "highest", "state", "run", "folder"]
    assert [row[:5] for row in table[1:4]] == [
        ["1", "1", "finish", "0.9", "0.9"], ["2", "2", "finish", "0.4", "0.4"], ["3", "0", "finish", "0.2", "0.2"],
    ]  # fmt: skip
    file = run.folder / "trials.csv"
    assert str(file) in shown
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["rank"], row["trial"], row["state"], row["val/accuracy"]) for row in rows[:3]] == [
        ("1", "1", "finished", "0.9"), ("2", "2", "finished", "0.4"), ("3", "0", "finished", "0.2"),
    ]  # fmt: skip
    assert [(row["rank"], row["state"], row["exit_code"]) for row in rows[3:]] == [("", "failed", "3")] * 3
    assert {row["seed"] for row in rows} == {"7"}
    assert Path(rows[0]["run_folder"]) == run.trials[1].folder


def test_a_trial_that_diverged_has_no_rank(tmp_path: Path) -> None:
    run = local(sweep_of(do=["diverge", "finish"], accuracy=[0.9, 0.2]), tmp_path)
    assert run.run() == 0
    assert [trial.params["do"] for trial in run.ranking()] == ["finish", "finish"]
    with trial_ranking.write(run).open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["rank"], row["do"], row["val/accuracy"]) for row in rows] == [
        ("1", "finish", "0.9"), ("2", "finish", "0.2"), ("", "diverge", ""), ("", "diverge", ""),
    ]  # fmt: skip


def test_trials_that_are_not_complete_have_no_rank(tmp_path: Path) -> None:
    run = local(sweep_of(do="finish", accuracy=[0.2, 0.9]), tmp_path)
    run.run()
    run.trials[1].state = "failed"  # the best value, in the middle of its training
    assert [trial.index for trial in run.ranking()] == [0]


def test_a_metric_to_minimize_ranks_the_lowest_first(tmp_path: Path) -> None:
    sweep = sweep_of(do="finish", accuracy=[0.2, 0.9, 0.4])
    content = {**sweep.content, "metric": {"name": "val/accuracy", "goal": "minimize"}}
    run = local(Sweep(sweep.path, content), tmp_path)
    assert run.run() == 0
    assert [trial.index for trial in run.ranking()] == [0, 2, 1]


def test_seconds_of_earlier_invocations_are_kept(tmp_path: Path) -> None:
    sweep = sweep_of(do="finish")
    first = local(sweep, tmp_path, jobs=1)
    first.run()
    again = local(sweep, tmp_path, jobs=1)
    again.run()
    assert again.trials[0].seconds == pytest.approx(first.trials[0].seconds, abs=1e-3)
    assert first.trials[0].seconds > 0


def test_without_a_terminal_a_running_trial_is_told_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vitscope.sweep.local_runner.WATCH", 0.05)
    monkeypatch.setattr(progress_table, "PLAIN_INTERVAL", 0.1)
    run = local(sweep_of(do="learn", steps=40), tmp_path, jobs=1, show=progress_table.SweepDisplay())
    assert run.run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"trial 0 (the only trial): running, cpu0, output {run.trials[0].output}"
    assert lines[-1].startswith("trial 0 (the only trial): finished, cpu0, val/accuracy 0.539")
    progress = [line for line in lines[1:-1] if "epoch" in line]
    assert 2 <= len(progress) <= 20
    assert "val/accuracy 0.5" in progress[-1]


def test_the_live_table_fits_the_terminal(tmp_path: Path) -> None:
    run = local(sweep_of(do=["finish", "fail"], seed=[0, 1, 2]), tmp_path)
    run.run()
    shown = progress_table.table(run, n_rows=4)
    assert list(shown.columns[0].cells) == ["2", "3", "4", "5"]  # all failed ones, then the newest of the others
    assert shown.caption == "and 2 more trials"
    screen = io.StringIO()
    console = Console(width=80, file=screen)
    console.print(progress_table.table(run, width=console.width))
    text = screen.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert all(trial.folder.name in text for trial in run.trials)
    assert "failed (3)" in text
    assert "output: <folder>/output.txt" in text


def test_time_left_is_that_of_the_complete_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr("vitscope.sweep.local_runner.WATCH", 0.05)
    run = local(sweep_of(do="learn", steps=30, seed=[0, 1]), tmp_path, jobs=1,
                show=lambda sweep, changed: titles.append(str(progress_table.table(sweep).title)))  # fmt: skip
    run.run()
    assert "1 running, 1 waiting" in titles[0]
    assert " left" not in titles[0]  # nothing to go by
    assert any("1 finished, 1 running, about 1 s left" in title for title in titles)
    assert titles[-1].endswith(": 2 finished")


def test_bayes_runs_trials_of_optuna_and_repeats_none(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    metric = {"name": "val/accuracy", "goal": "maximize"}
    nodes = {"do": {"value": "finish"}, "accuracy": {"min": 0.0, "max": 1.0}}
    content = {"program": str(PROGRAM), "method": "bayes", "metric": metric, "run_cap": 6, "parameters": nodes}
    first = local(Sweep(Path("x.yaml"), content), tmp_path, limit=4)
    assert first.run() == 0
    again = local(Sweep(Path("x.yaml"), content), tmp_path)
    assert again.run() == 0
    assert [trial.params for trial in again.trials[:4]] == [trial.params for trial in first.trials]
    assert [len(starts(trial)) for trial in again.trials] == [1] * 6
    accuracies = [trial.params["accuracy"] for trial in again.trials]
    assert [trial.index for trial in again.ranking()] == sorted(range(6), key=lambda i: -accuracies[i])
