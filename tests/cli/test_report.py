from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.runs.factorial_runs import write as crossed
from tests.fixtures.runs.report_runs import curve, evaluation, spectrum, write_run
from vitscope.cli import exit_codes, report

Run = Callable[..., int]
TWO = ("vit", "pit")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run ``report.py`` with arguments on the runs of the test; return the exit code."""

    def call(*arguments: str) -> int:
        folders = [f"paths.runs={tmp_path}/runs", f"paths.figures={tmp_path}/figures"]
        monkeypatch.setattr(sys, "argv", ["report.py", *folders, *arguments])
        return exit_codes.run_command(report._command)

    return call


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """Write a complete run of two models; return their ids."""
    measured = {"hessian": spectrum(), "slice": curve()}
    return [write_run(tmp_path / "runs", model, measured=measured).id for model in TWO]


def test_everything_is_written(run: Run, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    out = tmp_path / "figures"
    assert {p.name for p in out.iterdir()} == {
        "hessian-end.png", "hessian-end.pdf", "hessian-end.csv", "slice-end.png", "slice-end.pdf", "slice-end.csv",
        "report.html", "tables",
    }  # fmt: skip
    names = ("models", "curvature", "robustness", "buildup", "claims")
    assert {p.name for p in (out / "tables").iterdir()} == {
        *(f"{n}.{e}" for n in names for e in ("md", "csv", "tex")), *(f"{n}-runs.csv" for n in names[:3]),
    }  # fmt: skip
    printed = capsys.readouterr()
    assert "| vit-tiny " in printed.out
    assert f"2 figures, 5 tables: {out / 'report.html'}" in printed.out
    assert printed.err == ""


def test_one_table_alone_and_complete(
    run: Run, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("table=models", "strict=true", "expect.models=[vit,pit]", "expect.seeds=[0]") == 0
    assert capsys.readouterr().out.startswith("**Models**")
    assert not (tmp_path / "figures" / "report.html").exists()
    assert run("table=claims") == 0
    assert "not measured" in capsys.readouterr().out


def test_a_missing_cell_is_named_and_fails_a_strict_table(
    run: Run, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = write_run(tmp_path / "runs", "vit", 1, metrics={"test/accuracy": 0.5, "test/nll": None}).id
    assert run("table=models") == 0  # named all the same
    assert f"failed: run {bare}: test/nll (not finite)" in capsys.readouterr().err
    assert run("table=models", "strict=true", "expect.models=[alternet]") == 3
    lines = capsys.readouterr().err.splitlines()
    assert f"missing: run {bare}: test/ece (not in the journal)" in lines
    assert "missing: alternet: test/accuracy (no run of this model)" in lines
    assert lines[-1].startswith("error: table=models: 10 missing and 1 failed, named above;")


@pytest.mark.parametrize("with_run", [True, False])
def test_a_saved_result_is_drawn_beside_those_of_runs(
    run: Run, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], with_run: bool
) -> None:
    path = curve(depth=2.0).save(tmp_path / "mine")
    named = [f"{tmp_path}/runs/{two[0]}"] if with_run else []
    assert run(f"runs=[{','.join([*named, str(path)])}]", "analyses=[slice]", "pdf=false") == 0
    assert "1 figure, 5 tables" in capsys.readouterr().out
    with (tmp_path / "figures" / "slice-end.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["quantity"] == "nll"]
    heights = [float(row["value"]) for row in rows if row["result"] == "mine"]
    assert heights == curve(depth=2.0).nll.tolist()
    assert {row["result"] for row in rows} == ({"vit-tiny", "mine"} if with_run else {"mine"})


def test_a_file_that_is_no_result_is_named(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"runs=[{tmp_path}/mine.npz]") == 6
    assert f"{tmp_path}/mine.npz: no such file; pass a file that result.save" in capsys.readouterr().err


def test_a_folder_of_runs_stands_for_all_of_them(run: Run, two: list[str], tmp_path: Path) -> None:
    assert run(f"runs=[{tmp_path}/runs]", "analyses=[slice]", "page=false", "pdf=false") == 0
    drawn = (tmp_path / "figures" / "slice-end.csv").read_text()
    assert run("analyses=[slice]", "page=false", "pdf=false") == 0
    assert drawn == (tmp_path / "figures" / "slice-end.csv").read_text()


def test_a_missing_analysis_fails_strict_figures(
    run: Run, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [f"runs=[{tmp_path}/runs/{two[0]}]", "analyses=[slice,fourier]", "page=false"]
    assert run(*chosen, "+plot.slice.value=accuracy", "out=${paths.figures}/a") == 0
    assert (tmp_path / "figures" / "a" / "slice-end.png").exists()
    assert "nll" in (tmp_path / "figures" / "a" / "slice-end.csv").read_text()
    assert run(*chosen, "strict=true") == 3
    assert f"missing: run {two[0]}: fourier (not measured)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["table=model"], 2, "error: table=model: no such choice; did you mean models?"),
        (
            ["runs/a", "runs/b"],
            2,
            "error: config: Error parsing override 'runs/a'; write key=value, a list as runs=[a,b]",
        ),
        (["group_by=seed"], 2, "error: group_by=seed: no such choice; choose from model, run"),
        (["runs=[]"], 2, "error: runs=[]: no run named"),
        (["tabel=models"], 2, "error: tabel"),
        (["runs=[nowhere]"], 4, "error: run=nowhere: no run there"),
        (["paths.runs=nowhere"], 3, "error: paths.runs=nowhere: no run there"),
    ],
)
def test_one_line_says_what_is_wrong(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, line: str
) -> None:
    assert run(*arguments) == code
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(line)


def test_a_folder_that_cannot_be_written_is_exit_6(
    run: Run, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run(f"out={tmp_path}/file/x") == 6
    assert "not writable" in capsys.readouterr().err


@pytest.mark.slow
def test_the_crossed_factors_have_two_tables_and_a_figure(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crossed(lambda model, seed, **options: write_run(tmp_path / "runs", model, seed, **options))
    assert run("table=factors") == 0
    assert capsys.readouterr().out.startswith("**Which factor decides who looks flatter**")
    assert run("analyses=[]") == 0
    out = tmp_path / "figures"
    assert {"conditions.md", "factors.csv"} <= {p.name for p in (out / "tables").iterdir()}
    html = (out / "report.html").read_text()
    section = html[html.index('id="table-factors"') :]
    assert section.index('<img src="data:image/png;base64,') < section.index("<table")


def test_without_crossed_factors_their_table_is_missing(
    run: Run, two: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("table=factors", "strict=true") == 3
    assert "missing: landscape_objective" in capsys.readouterr().err


@pytest.fixture
def own(tmp_path: Path) -> list[str]:
    """Write analyses of two checkpoint files, whose tags are the files' stems; return their ids."""
    ids = []
    for model, tag in (("vit", "vit_best"), ("pit", "model_ema")):
        accuracy = 0.5 if model == "vit" else 0.25
        measured = {f"hessian@{tag}": spectrum(), f"evaluation@{tag}": evaluation(accuracy)}
        facts = {"command": "analyze", "status": "finished"}
        ids.append(
            write_run(tmp_path / "runs", model, measured=measured, facts=facts, metrics={}, ckpt_path=f"{tag}.pth").id
        )
    return ids


@pytest.mark.real_figures
def test_results_of_own_checkpoints_are_overlaid_whatever_their_tags(
    run: Run, own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"labels={{{own[0]}: ViT-Ti, pit-tiny: PiT}}", "order=[ViT-Ti]", "colors={PiT: '#ff0000', msa: blue}"]
    assert run(*names) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert re.search(r"^\| ViT-Ti .* 0\.500 \|.*\n\| PiT .* 0\.250 \|", printed.out, re.MULTILINE)
    assert "evaluation on 32 test images" in printed.out
    figures = tmp_path / "figures"
    assert (figures / "hessian-newest.pdf").exists()
    header, *rows = (figures / "hessian-newest.csv").read_text().splitlines()
    assert list(dict.fromkeys(row.split(",")[0] for row in rows)) == ["ViT-Ti", "PiT"], header
    assert run("tag=model_ema", "analyses=[hessian]") == 0
    assert f"missing: run {own[0]}: hessian (not measured at model_ema)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["tag=end"], 3, "error: tag=end: no run has a result of it ("),
        (["analyses=cka"], 3, "error: analyses=['cka']: no run has a result of it ("),
        (["order=[ViT]"], 2, "error: order=ViT: no such name in a legend; "),
        (["colors={ViT: redd}"], 2, "error: colors.ViT=redd: no color of matplotlib"),
        (["colors={vit: red}"], 2, "error: colors=vit: no such name in a legend"),
        (["labels=[a]"], 2, "error: labels="),
        (["labels={vit: ViT}"], 2, "error: labels=vit: no run or model of this name"),
        (["labels={vit-tiny: A, pit-tiny: A}"], 2, "error: labels=A: the label of two experiments"),
        (["order=vit"], 2, "error: order=vit: not a list of names"),
        (["runs=there_is_none"], 4, "error: run=there_is_none: no run there; "),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    run: Run, own: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, line: str
) -> None:
    assert run(*arguments) == code
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert code != 3 or f"{own[0]}: hessian at vit_best, evaluation at vit_best" in printed
