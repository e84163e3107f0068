from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.fixtures.runs.report_runs import curve, other_card, rise, spectrum
from vitscope.reports import run_entry, run_index
from vitscope.reports.figures import figure_captions, figure_worker
from vitscope.reports.figures.figure_plan import PER_FIGURE, Panel, missing_results, panels
from vitscope.runs import run_search
from vitscope.runtime.errors import StorageError


def collect(root: Path) -> list[run_entry.Entry]:
    return run_index.collect(run_search.every(root / "runs"))


def draw(panel: Panel, folder: Path, options: dict | None = None) -> figure_captions.DrawnPanel:
    return figure_captions.with_picture(panel, figure_worker.draw(figure_captions.drawing_job(panel, folder, options)))


def test_seeds_share_a_curve_and_models_a_figure(make_run: Callable, tmp_path: Path) -> None:
    for seed in (1, 0, 2):
        make_run("vit", seed, measured={"slice": curve()})
    make_run("convnet", 0, measured={"slice": curve(), "slice@init": curve()})
    (panel,) = panels(collect(tmp_path))
    assert panel.name == "slice-end"
    assert [(c.label, c.entry.seed, len(c.others)) for c in panel.curves] == [("convnet-18", 0, 0), ("vit-tiny", 0, 2)]
    by_run = panels(collect(tmp_path), group_by="run")
    assert [len(p.curves) for p in by_run] == [4]
    assert panels(collect(tmp_path), analyses=["hessian"]) == []
    assert [p.tag for p in panels(collect(tmp_path), tag="init")] == ["init"]


def test_cards_that_differ_stand_apart_with_the_keys_named(make_run: Callable, tmp_path: Path) -> None:
    make_run("convnet", measured={"slice": curve()})
    make_run("vit", measured={"slice": curve()})
    make_run("pit", measured={"slice": curve(other_card(augmentation="none", split="test"))})
    first, second = panels(collect(tmp_path))
    assert (first.name, len(first.curves)) == ("slice-end-1", 2)
    assert (second.name, [c.label for c in second.curves]) == ("slice-end-2", ["pit-tiny"])
    for panel in (first, second):
        assert "objective cards differ in split, augmentation" in panel.notice
    assert "here split test, augmentation none" in second.notice
    (together,) = panels(collect(tmp_path), allow_different=True)
    labels = [c.label for c in together.curves]
    assert labels[-1] == "pit-tiny, split test, augmentation none"
    assert "overlaid as asked" in together.notice


def test_one_run_measured_under_two_objectives_gives_both(make_run: Callable, tmp_path: Path) -> None:
    run = make_run("vit", measured={"hessian": spectrum()})
    from vitscope.runs import result_store

    result_store.save(run.results / "hessian", "end-11111111", spectrum(card=other_card(l2="none")))
    assert sorted(p.curves[0].measured.card.l2 for p in panels(collect(tmp_path)) if p.curves[0].measured.card) == [
        "half_sq",
        "none",
    ]


def test_crowds_are_spread_evenly(make_run: Callable, tmp_path: Path) -> None:
    for i in range(PER_FIGURE + 1):
        make_run("vit", model__patch_size=2**i, measured={"slice": curve()})
    made = panels(collect(tmp_path))
    assert [p.name for p in made] == ["slice-end-part1", "slice-end-part2"]
    assert sorted(len(p.curves) for p in made) == [3, 4]
    labels = [c.label for p in made for c in p.curves]
    assert labels == [f"vit-tiny, patch_size {2**i}" for i in range(PER_FIGURE + 1)]  # by number, not by letter


def test_all_moments_and_each_model_along_training(make_run: Callable, tmp_path: Path) -> None:
    tags = ("init", "epoch-0000", "end")
    make_run("vit", measured={f"hessian@{tag}": spectrum(ape=10.0 * i + 1) for i, tag in enumerate(tags)})
    made = panels(collect(tmp_path), tag="all")
    assert [p.name for p in made] == [*(f"hessian-{tag}" for tag in tags), "hessian-training-vit-tiny"]
    assert [c.label for c in made[-1].curves] == list(tags)


def test_a_figure_is_drawn_with_its_numbers(make_run: Callable, tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run("vit", seed, measured={"slice": curve(depth=1.0 + seed)})
    make_run("convnet", measured={"slice": curve(depth=3.0)})
    (panel,) = panels(collect(tmp_path))
    drawn = draw(panel, tmp_path / "out")
    assert drawn.picture.png is not None
    assert drawn.picture.pdf is not None
    assert (drawn.picture.png.read_bytes()[:4], drawn.picture.pdf.read_bytes()[:4]) == (b"\x89PNG", b"%PDF")
    assert drawn.caption.startswith("The loss along lines")
    assert [trace["name"] for trace in json.loads(drawn.picture.interactive or "")["data"]] == [
        "convnet-18",
        "vit-tiny",
    ]
    heads, rows = figure_captions.numbers_over_seeds(panel)
    assert heads == ["convnet-18", "vit-tiny"]
    texts = {row[0].text: [cell.text for cell in row[1:]] for row in rows}
    assert texts["nll_rise_at_ends"] == ["3", "1, 2"]  # two seeds: both values, no interval
    shared, differing = figure_captions.shared_conditions(panel.curves)
    assert shared["data"] == "photos"
    assert differing == []


def test_a_damaged_result_or_a_refused_option_costs_one_figure(make_run: Callable, tmp_path: Path) -> None:
    bad = make_run("vit", measured={"slice": curve(), "sharpness": rise(0.1)})
    make_run("convnet", measured={"slice": curve()})
    (bad.results / "slice" / "end-0badcafe.npz").write_bytes(b"no")
    (bad.results / "sharpness" / "end-0badcafe.npz").write_bytes(b"no")
    by_name = {p.analysis: p for p in panels(collect(tmp_path))}
    drawn = draw(by_name["slice"], tmp_path / "out")
    assert drawn.picture.labels == ("convnet-18",)
    assert "measure again" in drawn.panel.notice
    assert draw(by_name["sharpness"], tmp_path / "out").picture.png is None
    refused = draw(by_name["slice"], tmp_path / "out", {"value": "nonsense"})
    assert refused.picture.problem.startswith("not drawn: ValueError: Expected value")


def test_a_folder_that_cannot_be_written_ends_the_report(make_run: Callable, tmp_path: Path) -> None:
    make_run("vit", measured={"slice": curve()})
    (panel,) = panels(collect(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="not writable"):
        draw(panel, tmp_path / "file")


def test_what_a_figure_lacks_is_named(make_run: Callable, tmp_path: Path) -> None:
    first = make_run("vit", 0, measured={"hessian": "RuntimeError: out of memory"})
    second = make_run("vit", 1, measured={"hessian@init": spectrum()})
    lines = [str(p) for p in missing_results(collect(tmp_path), ["hessian"], "end")]
    assert lines == [
        f"failed: run {first.id}: hessian (RuntimeError: out of memory)",
        f"missing: run {second.id}: hessian (not measured at end)",
    ]


def test_a_figure_says_which_of_several_seeds_it_shows(
    make_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 1, 2):
        make_run("vit", seed, measured={"slice": curve()})
    notes = []

    def note_texts(figure: Figure, *_: object, **__: object) -> list[Path]:
        notes.append(" ".join(text.get_text() for text in figure.texts))
        return [Path()]

    monkeypatch.setattr(figure_worker, "save_figure", note_texts)
    (panel,) = panels(collect(tmp_path))
    draw(panel, tmp_path / "out")
    make_run("convnet", 3, measured={"slice": curve()})
    (panel,) = panels(collect(tmp_path))
    draw(panel, tmp_path / "out")
    (panel,) = panels(collect(tmp_path), group_by="run")[:1]
    draw(panel, tmp_path / "out")
    (label,) = (curve.label for curve in panels(collect(tmp_path))[0].curves if curve.others)
    assert notes == ["shown: seed 0 of 3 seeds", f"shown: {label}: seed 0 of 3 seeds", ""]


@pytest.mark.slow  # two interpreters are started
def test_other_processes_draw_the_same(make_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("vit", measured={"slice": curve()})
    jobs = [figure_captions.drawing_job(p, tmp_path / "here") for p in panels(collect(tmp_path))]
    away = [figure_captions.drawing_job(p, tmp_path / "away") for p in panels(collect(tmp_path))]
    with figure_worker.drawing(jobs) as finish:
        (here,) = finish()
    monkeypatch.setattr(figure_worker, "PARALLEL_FROM", 1)
    with figure_worker.drawing(away) as finish:
        (there,) = finish()
    assert here.png is not None
    assert there.png is not None
    assert there.png.parent.name == "away"
    assert there.png.read_bytes() == here.png.read_bytes()
    assert there.interactive == here.interactive
