"""``vitscope reproduce``: what is missing is done, what is there is not, and what cannot be had is named."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.programs.processes import PATIENCE, wait_until
from tests.fixtures.runs.report_runs import CARD, curve, spectrum, write_run
from vitscope.cli import exit_codes, reproduce
from vitscope.config import error_translation
from vitscope.reproduce import command_line
from vitscope.reproduce import plan as reproduction
from vitscope.reproduce.command_line import Request
from vitscope.reproduce.plan import Outcome, Trial
from vitscope.runtime import stop_flag
from vitscope.runtime.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
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
    reproduce.reproduce(Request(list(names), runs=tmp_path / "runs", out=tmp_path / "figures"), fake)


@pytest.mark.usefixtures("command_messages")
def test_figures_and_tables_are_drawn_and_runs_shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = Fake()
    run(["fig4", "fig5"], tmp_path, fake)
    assert fake.made == ["vit", "convnet"]
    assert (tmp_path / "figures/fig4/hessian-end.png").stat().st_size > 1000
    assert (tmp_path / "figures/fig5/numbers.png").stat().st_size > 1000
    text = (tmp_path / "figures/fig5/numbers.md").read_text()
    assert text.count("0.5") >= 4  # test error and the slice's NLL at the center, both 0.5, of both models
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


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["fig4", "profil=smoke"], "did you mean profile"),
        (["fig4", "seeds=0"], "at least 1"),
        (["fig4", "seeds=x"], "at least 1"),
        (["fig4", "seeds=5-x"], "seeds=5-x: not a range of seeds; give the first and the last one, such as seeds=5-8"),
        (["fig4", "seeds=8-5"], "seeds=8-5: not a range of seeds"),
        (["fig4", "jobs=0"], "jobs=0: not a whole number of at least 1; write jobs=2"),
        (["fig4", "dry=maybe"], "dry=maybe: not true or false; write dry=true"),
        (["fig4", "--dry-run"], "--dry-run: no such option; options are key=value, such as dry=true"),
        (["profile=smoke"], "no figure or table named; write vitscope reproduce all"),
        (["fig4", "launcher=pbs"], "launcher=pbs: no such launcher; choose local or slurm"),
        (["fig4", "launcher=slurm", "gpus=0"], "gpus=0: SLURM chooses the GPUs"),
        (["fig4", "slurm.partition=gpu"], "launcher=slurm is not set"),
        (["fig4", "launcher=slurm", "slurm.time=12:00:00"], "slurm.time=12:00:00: not a whole number of minutes"),
        (["fig4", "overrides=lr"], "overrides=lr: not key=value"),
    ],
)
def test_arguments_are_checked(argv: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        command_line.parse(argv)


def test_folders_follow_the_profile_and_the_overrides() -> None:
    request = command_line.parse(["fig4", "table-models", "profile=cifar100", "seeds=5", "gpus=", "jobs="])
    assert (request.names, request.profile, request.seeds) == (["fig4", "table-models"], "cifar100", 5)
    assert (request.runs, request.out) == (Path("runs/reproduce-cifar100"), Path("figures/cifar100"))
    assert (request.gpus, request.jobs, request.dry, request.launcher) == (None, None, False, "local")
    one = command_line.parse(["fig4", "overrides=optimizer.lr=1e-3 trainer.max_epochs=5"])
    assert one.overrides == ("optimizer.lr=1e-3", "trainer.max_epochs=5")
    assert one.runs.name.startswith("reproduce-smoke-optimizer.lr-1e-3-trainer.max_epochs-5-")
    assert one.out.name == one.runs.name.removeprefix("reproduce-")
    other = command_line.parse(["fig4", "overrides=trainer.max_epochs=5 optimizer.lr=1e-3"])
    assert other.runs == one.runs
    assert command_line.parse(["fig4", "overrides=optimizer.lr=1e-4"]).runs != one.runs
    assert command_line.parse(["fig4", "seeds=5-8"]).seeds == range(5, 9)
    assert command_line.parse(["fig4", "overrides=data.root=/data"]).runs == Path("runs/reproduce-smoke")
    slurm = command_line.parse(["all", "launcher=slurm", "slurm.partition=gpu", "slurm.time=600", "dry=1"])
    assert (dict(slurm.slurm), slurm.dry) == ({"partition": "gpu", "time": 600}, True)
    values = {"begin": "16:00", "comment": "thesis: part 2", "setup": "[module load cuda]", "exclusive": "true"}
    slurm = command_line.parse(["all", "launcher=slurm", *(f"slurm.{key}={value}" for key, value in values.items())])
    assert dict(slurm.slurm) == {
        **values,
        "setup": ["module load cuda"],
        "exclusive": True,
    }  # no times to the base of 60


def test_the_help_lists_every_target(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        command_line.parse(["--help"])
    words = set(capsys.readouterr().out.replace(",", " ").replace("(", " ").replace(")", " ").split())
    plan = reproduction.read()
    assert {"all", *plan["targets"], *reproduction.groups(plan), *plan["profiles"]} <= words
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {"reproduce", *reproduction.groups(plan)} <= set(shown)


def test_make_hands_its_settings_over() -> None:
    settings = ["PROFILE=cifar100", "GPUS=0,1", "JOBS=4", "OVERRIDES=optimizer.lr=1e-3 trainer.max_epochs=5", "DRY=1"]
    slurm = ["LAUNCHER=slurm", "SLURM=partition=gpu time=600"]
    for target, name in (("reproduce", "all"), ("fig4", "fig4"), ("table-models", "table-models"), ("sam", "sam")):
        make = ["make", "-n", target, *settings, *slurm]
        text = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        (line,) = [line for line in text.splitlines() if "vitscope reproduce" in line]
        words = shlex.split(line)
        assert words[words.index("reproduce") + 1 :] == [
            name, "profile=cifar100", "seeds=1", "gpus=0,1", "jobs=4", "overrides=optimizer.lr=1e-3 trainer.max_epochs=5",
            "dry=1", "launcher=slurm", "slurm.partition=gpu", "slurm.time=600",
        ]  # fmt: skip


def test_dry_lists_the_work_and_does_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    reproduce.reproduce(command_line.parse(["fig9", "fig8", "dry=true", "jobs=2"]))
    shown = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    lines = [line.split() for line in shown.splitlines()]
    assert ["train", "model=convnet", "seed=0", "29", "s"] in lines  # the profile's stated rate
    assert ["train", "model=vit", "model.depth=4", "seed=0", "29", "s"] in lines
    table = {line[0]: line for line in lines if len(line) > 6}
    assert table["fig9"][1:8] == ["2", "0", "0", "0", "2", "58", "s"]
    assert table["fig8"][1:8] == ["1", "0", "0", "0", "1", "29", "s"]
    assert table["together"][1:8] == ["3", "0", "0", "0", "2", "58", "s"]  # the ViT is trained once
    assert "with 2 side by side, each as fast as alone, at least 29 s" in shown
    assert "time: by docs/reproduce.md: all targets in 45 minutes on two CPU cores" in shown
    reproduce.reproduce(command_line.parse(["fig9", "dry=true", "overrides=optimizer.lr=3e-4"]))
    assert "docs/reproduce.md" not in capsys.readouterr().out  # the rate is that of the profile's own settings
    with pytest.raises(ConfigError, match="optimizer.lrr.*did you mean lr"):
        reproduce.reproduce(command_line.parse(["fig9", "dry=true", "overrides=optimizer.lrr=3e-4"]))
    with pytest.raises((ConfigError, ValueError), match="depth"):  # composes, and does not build
        reproduce.reproduce(command_line.parse(["fig9", "dry=true", "overrides=model.depth=2"]))
    for key in ("data.fraction", "++data.fraction"):
        with pytest.raises(ConfigError, match="fig5b sets this key itself"):
            reproduce.reproduce(command_line.parse(["fig5b", "dry=true", f"overrides={key}=0.5"]))
    with pytest.raises(ConfigError, match="weight_decay=-1"):  # composes, and does not validate
        reproduce.reproduce(command_line.parse(["fig9", "dry=true", "overrides=objective.weight_decay=-1"]))


def test_an_unknown_target_ends_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["vitscope reproduce", "fig44"])
    code = exit_codes.run_command(lambda: reproduce.reproduce(command_line.parse(sys.argv[1:])))
    assert code == 2
    assert "target=fig44: no such figure or table; did you mean fig4" in capsys.readouterr().err


def test_lightnings_own_end_at_sigterm_is_no_success() -> None:
    def command() -> None:
        stop_flag.request(signal.SIGTERM)
        raise SystemExit

    assert exit_codes.run_command(command) == error_translation.TERMINATED
    stop_flag.clear()


def test_the_sbatch_file_asks_for_what_the_command_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for `vitscope` writes down its arguments, waits for SIGTERM and ends as a stopped command does."""
    command = tmp_path / "vitscope"
    command.write_text(
        f"#!/bin/bash\nprintf '%s\\n' \"$@\" > {tmp_path}/arguments\ntrap 'sleep 0.2; exit 143' TERM\n"
        'touch "$0.ready"\nwhile :; do sleep 0.05; done\n'
    )
    command.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "TARGETS": "fig4 table-models",
        "OVERRIDES": "optimizer.lr=3e-4",
    }
    process = subprocess.Popen(["bash", str(ROOT / "docs/slurm/reproduce.sbatch")], cwd=tmp_path, env=environment)
    wait_until(Path(f"{command}.ready").exists, "command that runs")
    process.terminate()  # SLURM's --signal=B:TERM@120
    assert process.wait(PATIENCE) == 143
    words = (tmp_path / "arguments").read_text().splitlines()
    assert words[0] == "reproduce"
    request = command_line.parse(words[1:])
    assert (request.names, request.profile, request.gpus) == (["fig4", "table-models"], "cifar100", "0,1,2,3")
    assert request.overrides == ("optimizer.lr=3e-4",)
