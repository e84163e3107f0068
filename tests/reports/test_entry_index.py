"""The index of a folder of runs: entries equal those of the files, whatever happened to the index or the files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.runs.report_runs import curve, evaluation, spectrum, write_run
from vitscope.reports import entry_index, run_index
from vitscope.reports.run_entry import Entry
from vitscope.runs import run_search
from vitscope.runs.metrics_log import Journal
from vitscope.runs.run_dir import Run
from vitscope.runtime.errors import StorageError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of three runs, whose files count as settled."""
    monkeypatch.setattr(entry_index, "SETTLED_NS", -(10**12))
    runs = tmp_path / "runs"
    write_run(runs, "vit", 0, measured={"hessian": spectrum(), "slice": curve(), "evaluation": evaluation(0.5)})
    write_run(runs, "vit", 1, measured={"hessian": spectrum(0.2), "slice": "did not converge"})
    write_run(runs, "convnet", 0, metrics={"test/nll": float("nan")}, measured={"hessian@init": spectrum()})
    return runs


def from_files(root: Path) -> tuple[list[Entry], list[str]]:
    damaged: list[run_index.Damage] = []
    return run_index.collect(run_search.every(root), damaged), list(map(str, damaged))


def indexed(root: Path) -> tuple[list[Entry], list[str]]:
    damaged: list[run_index.Damage] = []
    return run_index.collect(run_search.every(root), damaged, root), list(map(str, damaged))


def n_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how many runs are read from their files with the index."""
    read: list[Run] = []
    original = run_index.read_entry
    with monkeypatch.context() as patch:
        patch.setattr(run_index, "read_entry", lambda run, **options: (read.append(run), original(run, **options))[1])
        indexed(root)
    return len(read)


def test_entries_of_the_index_are_those_of_the_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = from_files(root)
    assert not (root / entry_index.FILE).exists()
    assert n_read(root, monkeypatch) == 3
    assert n_read(root, monkeypatch) == 0
    assert indexed(root) == expected
    monkeypatch.chdir(root.parent)
    assert n_read(Path("runs"), monkeypatch) == 0  # by another name of the folder
    assert [m.path for entry in indexed(Path("runs"))[0] for m in entry.results] == [
        m.path for entry in from_files(Path("runs"))[0] for m in entry.results
    ]
    assert {type(entry.results[0].load()).__name__ for entry in indexed(root)[0]} == {
        "HessianMaxEigenvalueSpectrumResult"
    }


def _append(root: Path) -> None:
    journal = Journal(next(root.glob("*vit0")) / "metrics.jsonl")
    journal.append(4, 4, {"test/accuracy": 0.75})
    journal.close()


def _same_size_and_time(root: Path) -> None:
    path = next(root.glob("*vit0")) / "provenance.json"
    status = path.stat()
    path.write_text(path.read_text().replace("finished", "stoppped"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size


def _new_result(root: Path) -> None:
    (next(root.glob("*vit0")) / "results/slice/init-0badcafe.json").write_text(
        json.dumps({"measure": "loss_slice", "error": "no"})
    )


def _lost_result(root: Path) -> None:
    next(root.glob("*vit0/results/slice/*.json")).unlink()


def _damaged_run(root: Path) -> None:
    next(root.glob("*vit0/config.yaml")).write_text("[")


def _linked_results(root: Path) -> None:
    folder = next(root.glob("*vit0")) / "results" / "slice"
    folder.rename(root.parent / "elsewhere")
    folder.symlink_to(root.parent / "elsewhere")


def _renamed_run(root: Path) -> None:
    next(root.glob("*vit0")).rename(root / "another")


@pytest.mark.parametrize(
    "change", [_append, _same_size_and_time, _new_result, _lost_result, _damaged_run, _linked_results, _renamed_run]
)
def test_a_run_that_changed_is_read_again_and_no_other(
    root: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = indexed(root)
    change(root)
    expected = from_files(root)
    assert expected != before
    assert n_read(root, monkeypatch) == 1
    assert indexed(root) == expected


def _without_a_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def _other_digit(path: Path) -> None:
    text = path.read_text()
    assert '"test/accuracy":0.5' in text
    path.write_text(text.replace('"test/accuracy":0.5', '"test/accuracy":0.9'))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to(path.with_name("moved"))


@pytest.mark.parametrize(
    ("damage", "n_lost"),
    [
        (lambda path: path.unlink(), 3),
        (lambda path: path.write_bytes(b"\xff\x00" * 999), 3),
        (lambda path: path.write_text(""), 3),
        (lambda path: path.write_text(path.read_text().replace("vitscope index ", "vitscope index 0")), 3),
        (lambda path: os.truncate(path, path.stat().st_size - 40), 1),
        (_without_a_line, 1),
        (_other_digit, 2),
        (_folder, 3),
        (_link, None),
    ],
    ids=["missing", "binary", "empty", "other version", "cut short", "line lost", "changed by hand", "folder", "link"],
)
def test_a_damaged_index_costs_time_and_changes_no_number(
    root: Path, damage: Callable[[Path], None], n_lost: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = from_files(root)
    indexed(root)
    damage(root / entry_index.FILE)
    if n_lost is not None:
        assert n_read(root, monkeypatch) == n_lost
    assert indexed(root) == expected


def test_of_two_writers_one_wins_and_both_indexes_are_right(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = from_files(root)
    runs = run_search.every(root)
    first, second = entry_index.EntryIndex(root), entry_index.EntryIndex(root)
    for index, own_runs in ((first, runs[:2]), (second, runs[2:])):
        index.begin()
        for run in own_runs:
            files = entry_index.signature(run)
            assert files is not None
            index.add(run, files, run_index.read_entry(run))
    first.save()
    second.save()
    assert n_read(root, monkeypatch) == 2  # those of the first writer
    assert n_read(root, monkeypatch) == 0
    assert indexed(root) == expected
    assert [path.name for path in root.iterdir() if path.is_file()] == [entry_index.FILE]  # no temporary file stays


def test_runs_that_are_still_written_to_are_not_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry_index, "SETTLED_NS", 2 * 10**9)
    assert n_read(root, monkeypatch) == 3
    assert not (root / entry_index.FILE).exists()
    assert n_read(root, monkeypatch) == 3


def test_a_folder_that_cannot_be_written_is_read_from_its_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise StorageError("paths.runs", path, "not writable", "free space")

    monkeypatch.setattr("vitscope.runtime.atomic_write.write_atomically", refuse)
    expected = from_files(root)
    assert indexed(root) == expected
    monkeypatch.setattr(entry_index, "_file_system_time_ns", lambda _: None)
    assert indexed(root) == expected


def test_values_that_json_does_not_keep_are_read_from_the_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = next(root.glob("*vit0/config.yaml"))
    config.write_text(config.read_text() + "notes: {1: 2001-01-01}\n")
    expected = from_files(root)
    indexed(root)
    assert n_read(root, monkeypatch) == 1
    assert indexed(root) == expected
