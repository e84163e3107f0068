"""``vitscope reproduce``: what is missing is done, what is there is not, and what cannot be had is named."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.report_runs import CARD, curve, spectrum, write_run
from vitscope.cli import exit_codes, reproduce
from vitscope.config import error_translation
from vitscope.reproduce import plan as reproduction
from vitscope.reproduce.plan import Outcome, Trial
from vitscope.runtime import stop_flag
from vitscope.runtime.errors import ConfigError, DataError

PLAN: dict[str, Any] = {
    "profiles": {"smoke": {"models": {"vit": "model=vit", "convnet": "model=convnet"}}},
    "targets": {
        "fig4": {"experiment": "x", "runs": [{"model": ["vit", "convnet"]}], "draw": ["hessian"]},
        "fig5": {"experiment": "x", "runs": [{"model": ["vit", "convnet"]}],
                 "relate": [{"x": "slice.nll_center", "y": ["1-test/accuracy"]}]},
        "table-models": {"experiment": "x", "runs": [{"model": "vit"}], "table": "models"},
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduction, "read", lambda path=None: PLAN)


class Fake:
    """Writes run folders instead of training; trials whose model is in ``broken`` fail."""

    def __init__(self, measured: Any = None, broken: Sequence[str] = ()) -> None:
        self.measured, self.broken = measured or {"hessian": spectrum(), "slice": curve()}, broken
        self.made: list[str] = []

    def __call__(self, trials: Sequence[Trial], root: Path) -> Iterator[tuple[Trial, Outcome]]:
        for trial in trials:
            model = dict(o.split("=", 1) for o in trial.overrides)["model"]
            if model in self.broken:
                yield trial, Outcome(None, (f"{trial.name} (out of memory)",))
                continue
            name = f"{model}-run"
            if not (root / name).exists():
                self.made.append(model)
                write_run(root, model, measured=self.measured, name=name)
            results = tuple(
                f"{analysis}/end-0badcafe" for analysis, m in self.measured.items() if not isinstance(m, str)
            )
            problems = tuple(f"run {name}: {a} at end ({m})" for a, m in self.measured.items() if isinstance(m, str))
            yield trial, Outcome(root / name, problems, results)


def run(names: Sequence[str], tmp_path: Path, fake: Any) -> None:
    reproduce.reproduce(names, "smoke", 1, tmp_path / "runs", tmp_path / "figures", fake)


@pytest.mark.usefixtures("command_messages")
def test_figures_and_tables_are_drawn_and_runs_shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = Fake()
    run(["fig4", "fig5"], tmp_path, fake)
    assert fake.made == ["vit", "convnet"]
    assert (tmp_path / "figures/fig4/hessian-end.png").stat().st_size > 1000
    assert (tmp_path / "figures/fig5/numbers.png").stat().st_size > 1000
    text = (tmp_path / "figures/fig5/numbers.md").read_text()
    assert text.count("0.5") >= 4  # test error and the slice's NLL at the centre, both 0.5, of both models
    assert "[2/2" in capsys.readouterr().err


def test_run_again_it_makes_nothing(tmp_path: Path) -> None:
    fake = Fake()
    run(["fig4"], tmp_path, fake)
    run(["fig4"], tmp_path, fake)
    assert fake.made == ["vit", "convnet"]


@pytest.mark.usefixtures("command_messages")
def test_a_trial_that_fails_is_named_and_the_others_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError) as caught:
        run(["fig4"], tmp_path, Fake(broken=["convnet"]))
    assert caught.value.exit_code == 3
    error = capsys.readouterr().err
    assert "failed: fig4: experiment=x profile=smoke model=convnet seed=0 (out of memory)" in error
    assert (tmp_path / "figures/fig4/hessian-end.png").exists()


@pytest.mark.usefixtures("command_messages")
def test_a_failed_analysis_is_a_missing_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError):
        run(["fig5"], tmp_path, Fake({"hessian": spectrum(), "slice": "NaN in layer 3"}))
    error = capsys.readouterr().err
    assert "failed: fig5: run vit-run: slice at end (NaN in layer 3)" in error
    assert "slice.nll_center" in error
    assert "| vit" in (tmp_path / "figures/fig5/numbers.md").read_text()


@pytest.mark.usefixtures("command_messages")
def test_a_number_that_is_not_finite_is_named_in_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError):
        run(["table-models"], tmp_path, Fake({"hessian": spectrum(ape=float("nan"))}))
    assert (
        "failed: table-models: run vit-run: hessian_max_eigenvalue_spectrum/average_positive_eigenvalue (not finite)"
        in (capsys.readouterr().err)
    )
    assert "failed" in (tmp_path / "figures/table-models/models.md").read_text()


@pytest.mark.usefixtures("command_messages")
def test_results_with_other_settings_are_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = Fake()
    fake([], tmp_path / "runs")
    for model in ("vit", "convnet"):
        write_run(tmp_path / "runs", model, measured={"hessian": spectrum(card=CARD)}, name=f"{model}-run")

    def elsewhere(trials: Sequence[Trial], root: Path) -> Iterator[tuple[Trial, Outcome]]:
        for trial in trials:
            model = dict(o.split("=", 1) for o in trial.overrides)["model"]
            yield trial, Outcome(root / f"{model}-run", (), ("hessian/end-12345678",))

    with pytest.raises(DataError):
        run(["fig4"], tmp_path, elsewhere)
    assert "missing: fig4: run vit-run: hessian (not measured at end)" in capsys.readouterr().err


def _tried(trial: Trial, root: Path) -> Outcome:
    """In the other process: one trial kills it, one fails, one does well."""
    import os

    if "seed=1" in trial.overrides:
        os._exit(9)
    if "seed=2" in trial.overrides:
        raise ValueError("no such data")
    return Outcome(root / trial.overrides[0])


@pytest.mark.slow  # two processes that import torch
def test_a_process_that_dies_takes_one_trial_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "_serve", _serve_with_tried)
    trials = [Trial((f"seed={seed}",)) for seed in range(4)]
    outcomes = [outcome for _, outcome in reproduce.in_processes(trials, tmp_path)]
    assert [outcome.run and outcome.run.name for outcome in outcomes] == ["seed=0", None, None, "seed=3"]
    assert "ended with 9" in outcomes[1].problems[0]
    assert "no such data" in outcomes[2].problems[0]


def _serve_with_tried(pipe: Any, trials: Sequence[Trial], root: Path) -> None:
    from vitscope.reproduce import trial

    trial.perform = _tried
    reproduce._serve(pipe, trials, root)


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["fig4", "profil=smoke"], "did you mean profile"),
        (["fig4", "seeds=0"], "at least 1"),
        (["fig4", "seeds=x"], "at least 1"),
    ],
)
def test_arguments_are_checked(argv: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        reproduce.arguments(argv)


def test_folders_follow_the_profile() -> None:
    names, profile, seeds, root, out = reproduce.arguments(["fig4", "table-models", "profile=cifar100", "seeds=5"])
    assert (names, profile, seeds) == (["fig4", "table-models"], "cifar100", 5)
    assert (root, out) == (Path("runs/reproduce-cifar100"), Path("figures/cifar100"))


def test_an_unknown_target_ends_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["vitscope reproduce", "fig44"])
    code = exit_codes.run_command(lambda: reproduce.reproduce(*reproduce.arguments(sys.argv[1:])))
    assert code == 2
    assert "target=fig44: no such figure or table; did you mean fig4" in capsys.readouterr().err


def test_lightnings_own_end_at_sigterm_is_no_success() -> None:
    def command() -> None:
        stop_flag.request(signal.SIGTERM)
        raise SystemExit

    assert exit_codes.run_command(command) == error_translation.TERMINATED
    stop_flag.clear()
