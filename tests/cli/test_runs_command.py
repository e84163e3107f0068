"""`vitscope runs list | show | export | delete` on constructed run folders."""

from __future__ import annotations

import csv
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.runs.report_runs import spectrum, write_run
from vitscope.cli import exit_codes, runs
from vitscope.reports import run_index
from vitscope.runs import run_lock, run_search
from vitscope.runs.run_dir import Run

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run ``vitscope runs`` on the folder ``runs`` of the test; return the exit code, the output and the errors."""
    monkeypatch.setenv("VITSCOPE_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = exit_codes.run_command(lambda: runs.command(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def three(tmp_path: Path) -> list[Run]:
    """Write a measured ViT with checkpoints, a failed PiT and a ConvNet whose process is gone."""
    root = tmp_path / "runs"
    facts = {"arguments": ["model=vit", "experiment=fig4_hessian_spectra"]}
    vit = write_run(root, "vit", name="vit-run", measured={"hessian": spectrum(), "slice@init": "diverged"}, facts=facts,
                    metrics={"test/accuracy": 0.9})  # fmt: skip
    vit.checkpoints.mkdir()
    (vit.checkpoints / "last.ckpt").write_bytes(b"w" * 5000)
    vit.figures.mkdir()
    for name in ("hessian-end.png", "hessian-end.csv", "notes.ckpt"):
        (vit.figures / name).write_text(name)
    pit = write_run(root, "pit", 1, name="pit-run", facts={"status": "failed"}, metrics={"test/accuracy": 0.2})
    killed = write_run(root, "convnet", name="conv-run", facts={"status": "running"}, metrics={"test/nll": 2.0},
                       data__name="digits")  # fmt: skip
    return [vit, pit, killed]


def ids(output: str) -> list[str]:
    return [run["id"] for run in json.loads(output)]


def test_a_list_shows_each_run(command: Command, three: list[Run]) -> None:
    code, out, err = command("list")
    assert (code, err) == (0, "")
    head, conv, pit, vit, total = out.splitlines()
    assert head.split() == ["id", "model", "data", "experiment", "seed", "state", "metrics", "measured", "size", "age"]
    assert conv.startswith("conv-run  convnet-18")
    assert " stopped " in conv, "a killed run must not count as running"
    assert " failed " in pit
    assert "fig4_hessian_spectra" in vit
    assert "test/accuracy 0.9" in vit
    assert "hessian, 1 failed" in vit
    assert total.startswith("3 of 3 runs in ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model=vit"], ["vit-run"]),
        (["model=?it-tiny"], ["pit-run", "vit-run"]),
        (["data=dig*"], ["conv-run"]),
        (["experiment=fig4*"], ["vit-run"]),
        (["state=failed,stopped"], ["conv-run", "pit-run"]),
        (["state=finished", "data=digits"], []),
        (["sort=test/accuracy"], ["pit-run", "vit-run", "conv-run"]),
        (["sort=-test/accuracy"], ["vit-run", "pit-run", "conv-run"]),
        (["sort=-size", "state=f*"], ["vit-run", "pit-run"]),
        (["sort=size", "state=f*"], ["pit-run", "vit-run"]),
    ],
    ids=" ".join,
)
def test_filters_and_order(command: Command, three: list[Run], arguments: list[str], expected: list[str]) -> None:
    code, out, _ = command("list", "json=true", *arguments)
    assert code == 0
    assert ids(out) == expected


def test_tags_are_shown_and_found(command: Command, three: list[Run], tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "swin", name="swin-run", tags=["baseline", "seed sweep"])
    head, _, _, swin, _, _ = command("list")[1].splitlines()
    assert head.split()[3:6] == ["experiment", "tags", "seed"]
    assert swin.startswith("swin-run")
    assert "baseline, seed sweep" in swin
    for pattern in ("baseline", "seed sweep", "base*", "other,Baseline"):
        assert ids(command("list", "json=true", f"tags={pattern}")[1]) == ["swin-run"]
    assert ids(command("list", "json=true", "tags=base")[1]) == []


def test_json_holds_metrics_measurements_and_sizes(command: Command, three: list[Run]) -> None:
    (fact,) = json.loads(command("list", "model=vit", "json=true")[1])
    assert fact["measured"] == {"hessian": ["end"]}
    assert fact["failed"] == {"slice@init": "diverged"}
    assert fact["metrics"]["test/accuracy"] == 0.9
    assert fact["sizes_bytes"]["checkpoints"] == 5000
    assert fact["size_bytes"] == sum(file.stat().st_size for file in three[0].path.rglob("*") if file.is_file())


def test_damaged_folders_are_named_and_left_out(command: Command, three: list[Run], tmp_path: Path) -> None:
    (three[1].path / "config.yaml").write_text("[")
    (three[2].path / "provenance.json").unlink()
    code, out, err = command("list", str(tmp_path / "runs"), "json=true")
    assert (code, ids(out)) == (3, ["vit-run"])
    assert f"damaged: {three[1].path}" in err
    assert f"damaged: {three[2].path}: has no provenance.json" in err
    code, _, err = command("show", "pit-run")
    assert (code, err.count("\n")) == (3, 1)


def test_a_run_in_full(command: Command, three: list[Run]) -> None:
    code, out, err = command("show", "vit")  # the beginning of one id alone
    assert (code, err) == (0, "")
    for text in ("vit-run: vit-tiny on photos", "hessian at end", "average_positive_eigenvalue", "slice at init", "diverged",
                 "last.ckpt  4.9 KiB", "figures/hessian-end.png", "model.parameters"):  # fmt: skip
        assert text in out
    (fact,) = json.loads(command("show", str(three[0].path), "json=true")[1])
    assert fact["choices"] == ["model=vit", "experiment=fig4_hessian_spectra"]
    assert fact["overrides"]["trainer.max_epochs"] == 3
    assert "seed" not in fact["overrides"], "a value that equals the default is no difference"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["lst"], 2, "runs=lst: no such action; did you mean list"),
        (["list", "modle=vit"], 2, "modle: no option of runs list; did you mean model"),
        (["list", "state=finishd"], 2, "state=finishd: no such state; did you mean finished"),
        (["list", "sort=agge"], 2, "sort=agge: no such key; did you mean age"),
        (["list", "json=1"], 2, "json=1: not true or false"),
        (["list", "nowhere"], 3, "paths.runs=nowhere: no run there"),
        (["show"], 2, "run: no run named"),
        (["show", "vit-rnu"], 2, "run=vit-rnu: no such run; did you mean vit-run"),
        (["show", "runs"], 2, "run=runs: no run folder"),
        (["show", "--all"], 2, "--all: no such option"),
        (["export", "vit-run"], 2, "to: no target named"),
        (["delete", "vit-run", "keep=figures"], 2, "keep=figures: no such choice"),
        (["delete", "vit-run"], 2, "yes: no answer on standard input"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_refusal_is_one_line(
    command: Command, three: list[Run], monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, text: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    actual_code, _, err = command(*arguments)
    key = text.partition(":")[0]
    assert (actual_code, err.count("\n")) == (code, 1), err
    assert err.startswith(f"error: {key}")
    assert text.partition(": ")[2] in err
    assert all(run.path.is_dir() for run in three)


def test_an_ambiguous_id(command: Command, three: list[Run], tmp_path: Path) -> None:
    other = write_run(tmp_path / "runs" / "sweeps", "vit", name="vit-run")
    code, _, err = command("delete", "vit-run", "yes=true")
    assert (code, err.count("\n")) == (2, 1)
    assert f"names 2 runs ({other.path}, {three[0].path})" in err
    assert command("delete", str(other.path), "yes=true")[0] == 0
    assert (other.path.exists(), three[0].path.exists()) == (False, True)


def test_an_exported_folder_is_read_as_runs(command: Command, three: list[Run], tmp_path: Path) -> None:
    code, out, err = command("export", "vit-run", "pit-run", "to=bundle")
    assert (code, err) == (0, "")
    assert "2 runs" in out
    bundle = tmp_path / "bundle"
    assert not list(bundle.rglob("*.ckpt"))
    assert sorted(p.name for p in (bundle / "vit-run" / "figures").iterdir()) == ["hessian-end.csv", "hessian-end.png"]
    rows = list(csv.DictReader((bundle / "runs.csv").read_text().splitlines()))
    assert [(row["id"], row["test/accuracy"]) for row in rows] == [("vit-run", "0.9"), ("pit-run", "0.2")]
    originals = {entry.id: entry for entry in run_index.collect(three[:2])}
    for entry in run_index.collect(run_search.every(bundle)):
        original = originals.pop(entry.id)
        assert (entry.config, entry.facts, entry.metrics) == (original.config, original.facts, original.metrics)
        assert [m.scalars for m in entry.results] == [m.scalars for m in original.results]
    assert not originals
    (result,) = [m for m in run_index.collect([Run(bundle / "vit-run")])[0].results if not m.error]
    assert result.load().average_positive_eigenvalue == 100.0


def test_an_export_replaces_nothing_unasked(command: Command, three: list[Run], tmp_path: Path) -> None:
    assert command("export", "vit-run", "to=b.zip")[0] == 0
    with zipfile.ZipFile("b.zip") as archive:
        names = archive.namelist()
    assert "b/vit-run/config.yaml" in names
    assert not [name for name in names if name.endswith(".ckpt")]
    before = Path("b.zip").read_bytes()
    code, _, err = command("export", "pit-run", "to=b.zip")
    assert (code, "exists already" in err, Path("b.zip").read_bytes() == before) == (2, True, True)
    assert command("export", "pit-run", "to=b.zip", "overwrite=true")[0] == 0
    assert Path("b.zip").read_bytes() != before
    Path("mine").mkdir()
    Path("mine", "thesis.txt").write_text("text")
    code, _, err = command("export", "pit-run", "to=mine", "overwrite=true")
    assert (code, "no bundle" in err, Path("mine", "thesis.txt").read_text()) == (2, True, "text")
    for names in (["vit-run"], ["pit-run", "overwrite=true"]):
        assert command("export", *names, "to=folder")[0] == 0
    assert sorted(p.name for p in Path("folder").iterdir()) == ["bundle.json", "pit-run", "runs.csv"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.zip", "folder", "mine", "runs"], (
        "no temporary folder stays"
    )


def test_an_export_holds_no_secret_and_follows_no_link(
    command: Command, three: list[Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh12345678")
    facts = json.loads((three[0].path / "provenance.json").read_text())
    (three[0].path / "provenance.json").write_text(json.dumps({**facts, "note": "used hf_abcdefgh12345678"}))
    assert command("export", "vit-run", "to=bundle")[0] == 0
    assert not [p for p in (tmp_path / "bundle").rglob("*") if p.is_file() and b"hf_abcdefgh" in p.read_bytes()]
    (tmp_path / "outside.csv").write_text("private")
    (three[0].figures / "linked.csv").symlink_to(tmp_path / "outside.csv")
    code, _, err = command("export", "vit-run", "to=second")
    assert (code, "a symbolic link" in err, Path("second").exists()) == (6, True, False)


def test_a_deletion_asks(command: Command, three: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = command("delete", "vit-run", "dry=true")
    assert (code, f"would delete: run folder {three[0].path}" in out, "KiB in all; nothing" in out) == (0, True, True)
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert "nothing was deleted" in command("delete", "vit-run")[1]
    assert (three[0].checkpoints / "last.ckpt").exists()
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert command("delete", "vit-run")[0] == 0
    assert [run.path.exists() for run in three] == [False, True, True]


def test_results_can_be_kept(command: Command, three: list[Run]) -> None:
    before = run_index.collect([three[0]])[0]
    assert command("delete", "vit-run", "keep=results", "yes=true")[0] == 0
    assert not three[0].checkpoints.exists()
    assert run_index.collect([three[0]])[0] == before
    assert not (three[0].path / run_lock.FILE).exists()


def test_a_living_run_is_not_deleted(command: Command, three: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    lock = three[1].path / run_lock.FILE
    lock.write_text(json.dumps({"host": "other", "machine": "elsewhere", "pid": 1}))  # its heartbeat is new
    assert [run["state"] for run in json.loads(command("list", "model=pit", "json=true")[1])] == ["running"]
    for option in ("keep=results", "dry=true"):
        code, _, err = command("delete", "vit-run", "pit-run", "yes=true", option)
        assert (code, "process 1 on other trains in this folder" in err) == (6, True)
    assert all(run.path.is_dir() for run in three)
    assert (three[0].checkpoints / "last.ckpt").exists(), "where one run is refused, none is touched"
    old = lock.stat().st_mtime - 2 * run_lock.STALE_AFTER
    os.utime(lock, (old, old))
    assert command("delete", "pit-run", "yes=true")[0] == 0
    assert not three[1].path.exists()


def test_a_deletion_follows_no_link(command: Command, three: list[Run], tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "data.bin").write_text("data")
    (tmp_path / "alias").symlink_to(three[0].path)
    code, _, err = command("delete", "./alias", "yes=true")
    assert (code, "a symbolic link" in err, three[0].path.is_dir()) == (2, True, True)
    (three[0].results / "linked").symlink_to(outside)
    (three[1].path / "checkpoints").symlink_to(outside)
    code, _, err = command("delete", "pit-run", "keep=results", "yes=true")
    assert (code, "a symbolic link" in err) == (2, True)
    assert command("delete", "vit-run", "pit-run", "yes=true")[0] == 0
    assert (three[0].path.exists(), three[1].path.exists()) == (False, False)
    assert (outside / "data.bin").read_text() == "data"


def test_what_vitscope_did_not_write_is_not_deleted(command: Command, three: list[Run]) -> None:
    for name in ("csv", "tensorboard"):  # of the loggers beside W&B
        (three[2].path / name).mkdir()
    (three[2].path / "job.json").write_text("{}")  # of a multirun
    assert command("delete", three[2].id, "yes=true")[0] == 0
    (three[0].path / "thesis.txt").write_text("text")
    inner = write_run(three[1].path / "inner", "vit")
    for name, foreign in (("vit-run", "thesis.txt"), ("pit-run", "inner")):
        code, _, err = command("delete", name, "yes=true")
        assert (code, f"holds {foreign}, which vitscope did not write" in err) == (2, True)
    assert (three[0].path / "thesis.txt").exists()
    assert inner.path.is_dir()
