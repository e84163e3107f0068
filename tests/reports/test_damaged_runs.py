"""A damaged run folder costs a report that folder: it is named in one line, the others are reported, exit code 3."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fixtures.runs.report_runs import curve, spectrum, write_run
from vitscope.cli import exit_codes, report
from vitscope.reports import run_index
from vitscope.runs import run_search
from vitscope.runs.run_dir import Run

CONFIG, FACTS, ROWS = "config.yaml", "provenance.json", "metrics.jsonl"
RESULT = "results/hessian/end-0badcafe.json"


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink() or None or _write(run / name, content.encode())


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def binary(name: str) -> Callable[[Path], None]:
    return lambda run: _write(run / name, bytes(range(256)) * 40)


def fifo(name: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (run / name).unlink()
        os.mkfifo(run / name)

    return damage


def folder(name: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (run / name).unlink()
        (run / name).mkdir()

    return damage


def link(name: str, target: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        path = run / name
        path.rename(run.parent.parent / f"moved-{run.name}")
        path.symlink_to(target.format(moved=run.parent.parent / f"moved-{run.name}"))

    return damage


def huge(name: str) -> Callable[[Path], None]:
    return lambda run: os.truncate(run / name, 2**40)  # a sparse file


def missing(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def config(**changes: Any) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        content = yaml.safe_load((run / CONFIG).read_text())
        (run / CONFIG).write_text(yaml.safe_dump({**content, **changes}))

    return damage


def result(**changes: Any) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        content = json.loads((run / RESULT).read_text())
        (run / RESULT).write_text(json.dumps({**content, **changes}))

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    **{f"fifo {n}": fifo(n) for n in (CONFIG, FACTS, ROWS, RESULT)},
    **{f"folder {n}": folder(n) for n in (CONFIG, FACTS, ROWS, RESULT)},
    **{f"link {n}": link(n, "{moved}") for n in (CONFIG, FACTS, ROWS, RESULT, "results", "results/hessian")},
    **{f"dangling {n}": link(n, "/nowhere/at/all") for n in (CONFIG, FACTS, ROWS, RESULT)},
    **{f"loop {n}": link(n, Path(n).name) for n in (CONFIG, FACTS)},
    **{f"huge {n}": huge(n) for n in (CONFIG, FACTS, ROWS, RESULT)},
    **{f"binary {n}": binary(n) for n in (CONFIG, FACTS, ROWS, RESULT)},
    **{f"empty {n}": text(n, "") for n in (CONFIG, FACTS, RESULT)},
    **{f"list {n}": text(n, "[1, 2]") for n in (CONFIG, FACTS, RESULT)},
    **{f"cut {n}": text(n, '{"a": [') for n in (CONFIG, FACTS, RESULT)},
    **{f"nested {n}": text(n, "[" * 100_000) for n in (FACTS, RESULT)},
    **{f"missing {n}": missing(n) for n in (CONFIG, FACTS)},
    "tag in yaml": text(CONFIG, "a: !!python/object/apply:os.mkdir [x]"),
    "recursive yaml": text(CONFIG, "a: &a [*a]"),
    "text for rows": text(ROWS, "no row\n"),
    "results a file": lambda run: (run / "results").rename(run / "r") and _write(run / "results", b"x"),
    "model a text": config(model="vit"), "model null": config(model=None), "data a list": config(data=[1]),
    "seed a text": config(seed="one"), "seed a list": config(seed=[1]), "trainer a number": config(trainer=3),
    "objective a text": config(objective="weak"), "model nested": config(model={"_target_": {"x": [1]}, "name": [2]}),
    "fraction a text": config(data={"name": "photos", "fraction": "all"}),
    "status a list": text(FACTS, '{"status": [1], "command": "train"}'), "command a number": text(FACTS, '{"command": 5}'),
    "accuracy a text": text(ROWS, '{"step": 1, "test/accuracy": "0.5"}\n'),
    "accuracy a list": text(ROWS, '{"step": 1, "test/accuracy": [0.5]}\n'),
    "accuracy true": text(ROWS, '{"step": 1, "test/accuracy": true}\n'),
    "accuracy of five": text(ROWS, '{"step": 1, "test/accuracy": 5.0}\n'),
    "negative error": text(ROWS, '{"step": 1, "val/ece": -0.5}\n'),
    "scalars a list": result(scalars=[1]), "scalar a text": result(scalars={"x": "1"}),
    "scalar a list": result(scalars={"x": [1]}),
    "scalar NaN": result(scalars={"x": float("nan")}), "scalar infinite": result(scalars={"x": float("inf")}),
    "card a text": result(card="x"), "card of other kinds": result(card={"n_images": "many", "data": [1]}),
}  # fmt: skip


@pytest.fixture
def damaged(tmp_path: Path) -> dict[str, Run]:
    """Write two good runs and one for each kind of damage."""
    root = tmp_path / "runs"
    measured = {"hessian": spectrum(), "slice": curve()}
    for seed in (0, 1):
        write_run(root, "vit", seed, measured=measured, name=f"good-{seed}")
    broken = {}
    for index, (kind, damage) in enumerate(DAMAGES.items()):
        broken[kind] = write_run(root, "convnet", index, measured=measured, name=f"bad-{index:02d}")
        damage(broken[kind].path)
    return broken


def test_every_damaged_folder_is_named_and_left_out(
    damaged: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(DAMAGES) >= 50
    arguments = [f"paths.runs={tmp_path}/runs", f"out={tmp_path}/out", "table=models"]
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    code = exit_codes.run_command(report._command)
    said = capsys.readouterr()
    named = [line for line in said.err.splitlines() if line.startswith("damaged: ")]
    for kind, run in damaged.items():
        assert sum(f"{run.path}:" in line or f"{run.path}/" in line for line in named) == 1, (kind, said.err[-2000:])
    assert len(named) == len(damaged)
    assert code == 3
    assert said.err.splitlines()[-1].startswith(f"error: runs: {len(damaged)} run folders damaged and left out")
    assert "| vit-tiny " in said.out
    assert (tmp_path / "out" / "tables" / "models.md").is_file()
    assert not (tmp_path / "x").exists()


def test_one_by_one(damaged: dict[str, Run], tmp_path: Path) -> None:
    """Each kind alone, and without a list to note it in the first error is raised."""
    for kind, run in damaged.items():
        noted: list[run_index.Damage] = []
        entries = run_index.collect([run], noted)
        assert (len(entries), len(noted)) == (0, 1), kind
        assert "\n" not in str(noted[0])
    with pytest.raises(Exception, match="damaged|mapping"):
        run_index.collect([damaged["list config.yaml"]])


def test_a_damaged_array_costs_its_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "runs", "vit", 0, measured={"slice": curve()}, name="good")
    (run.path / "results" / "slice" / "end-0badcafe.npz").write_bytes(b"PK\x03\x04")
    monkeypatch.setattr(sys, "argv", ["report.py", f"paths.runs={tmp_path}/runs", f"out={tmp_path}/out", "page=false"])
    code = exit_codes.run_command(report._command)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "end-0badcafe.npz" in said
    assert code in (0, 3)


def test_a_train_does_not_stumble_over_them(damaged: dict[str, Run], tmp_path: Path) -> None:
    assert run_search.finished(tmp_path / "runs", "0" * 16) is None
    assert run_search.unfinished(tmp_path / "runs", "0" * 16) is None
