"""Parts of a study, such as seeds of two machines, are drawn and written as one; parts that do not go together are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fixtures.runs.report_runs import other_card, spectrum, write_run
from vitscope.cli import reproduce
from vitscope.core.objective_card import ObjectiveCard
from vitscope.reports.exports import study_export
from vitscope.reproduce import command_line, draw
from vitscope.runtime.errors import ConfigError, DataError

TARGET = "table-claims"
MODELS = ("alternet", "convnet", "vit")


def runs_of(root: Path, seeds: range, ape: float = 100.0, weights: str = "1f00") -> list[SimpleNamespace]:
    """Return finished runs of all models with their requested results."""
    card = other_card(checkpoint=weights)
    return [
        SimpleNamespace(
            run=write_run(root, model, seed, measured={"hessian": spectrum(0.1, ape + seed, card)}).path,
            results=("hessian/end-0badcafe",),
        )
        for seed in seeds
        for model in MODELS
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.json"))}


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that exports some runs as a study."""

    def export(name: str, outcomes: list[SimpleNamespace], target: str = TARGET, profile: str = "smoke") -> Path:
        study_export.write(tmp_path / name, profile, {target: draw.entries(outcomes)})
        return tmp_path / name

    return export


def test_parts_draw_and_write_what_the_whole_study_does(study: Callable[..., Path], tmp_path: Path) -> None:
    first, later = runs_of(tmp_path / "here", range(3)), runs_of(tmp_path / "there", range(3, 6))
    a, b, whole = study("a", first), study("b", later), study("whole", [*first, *later])
    for name, source in (("of-parts", f"from={a},{b}"), ("of-whole", f"from={whole}")):
        export = [f"export={tmp_path / 'joined'}"] if "," in source else []
        reproduce.reproduce(command_line.parse([TARGET, source, f"out={tmp_path / name}", *export]))
    texts = [(tmp_path / name / TARGET / "claims.csv").read_text() for name in ("of-parts", "of-whole")]
    assert texts[0] == texts[1]
    assert "alternet-18" in texts[0]
    assert files(tmp_path / "joined") == files(whole)
    study_export.join(a, [a, b], [TARGET])  # in place of a part
    assert files(a) == files(whole)


def test_a_run_in_two_parts_counts_once_with_the_results_of_both(study: Callable[..., Path], tmp_path: Path) -> None:
    outcomes = runs_of(tmp_path / "runs", range(2))
    without = [SimpleNamespace(run=o.run, results=()) for o in outcomes[:3]]
    entries = study_export.read([study("a", [*without, *outcomes[3:]]), study("b", outcomes)], TARGET)
    assert len(entries) == len(outcomes)
    assert all(len(e.results) == 1 and not e.superseded for e in entries)


def test_runs_that_supersede_each_other_in_one_part_are_kept(study: Callable[..., Path], tmp_path: Path) -> None:
    repeated = [*runs_of(tmp_path / "runs", range(1)), *runs_of(tmp_path / "runs", range(1), ape=50.0)]
    entries = study_export.read([study("a", repeated), study("b", runs_of(tmp_path / "more", range(1, 2)))], TARGET)
    assert sorted(e.superseded for e in entries) == [False] * 6 + [True] * 3


def analysis_of(content: dict[str, Any]) -> str:
    return next(iter(content["results"])).partition("/")[0]


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = min((folder / "runs").iterdir())
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_measurement_that_was_repeated_with_the_same_numbers_joins(
    study: Callable[..., Path], tmp_path: Path
) -> None:
    a = study("a", runs_of(tmp_path / "runs", range(1)))
    again = Path(shutil.copytree(a, tmp_path / "again"))
    changed(again, lambda content: content["results"][next(iter(content["results"]))].update(time=2e9))
    assert len(study_export.read([a, again], TARGET)) == len(study_export.read([a], TARGET))
    changed(again, lambda content: content["results"][next(iter(content["results"]))]["scalars"].update(extra=1.0))
    with pytest.raises(ConfigError, match="has other numbers than the same run of another part"):
        study_export.read([a, again], TARGET)


def one_run(root: Path, weights: str, rise: float, *analyses: str, tag: str = "end") -> list[SimpleNamespace]:
    """Return a ViT's run of seed 0 with results of some weights, all with one number."""
    measured = {f"{name}@{tag}": spectrum(0.1, rise, other_card(checkpoint=weights)) for name in analyses}
    name = f"{root.name}-{len(list(root.glob('*'))) if root.exists() else 0}"
    run = write_run(root, "vit", 0, name=name, measured=measured, metrics={f"{a}/ape": rise for a in analyses})
    return [SimpleNamespace(run=run.path, results=tuple(f"{name}/{tag}-0badcafe" for name in analyses))]


def test_a_repeated_training_of_the_same_weights_adds_its_results(study: Callable[..., Path], tmp_path: Path) -> None:
    first = study("first", one_run(tmp_path / "here", "1f00", 100.0, "hessian", "other"))
    again = study("again", one_run(tmp_path / "there", "1f00", 50.0, "hessian", "sharpness"))
    third = study("third", one_run(tmp_path / "elsewhere", "1f00", 25.0, "sharpness", "curvature"))
    (entry,) = study_export.read([first, again, third], TARGET)
    found = {m.analysis: m.scalars["average_positive_eigenvalue"] for m in entry.results}
    assert found == {"hessian": 100.0, "other": 100.0, "sharpness": 50.0, "curvature": 25.0}  # of the first that has it
    assert {name: v for name, v in entry.metrics.items() if name.endswith("/ape")} == {
        f"{name}/ape": value for name, value in found.items()
    }
    study_export.join(tmp_path / "joined", [first, again, third], [TARGET])
    (joined,) = study_export.read(tmp_path / "joined", TARGET)
    assert (joined.id, joined.metrics) == (entry.id, entry.metrics)
    assert sorted(m.analysis for m in joined.results) == sorted(found)


def test_runs_of_two_parts_whose_folders_have_one_name_are_both_drawn(
    study: Callable[..., Path], tmp_path: Path
) -> None:
    parts = []
    for seed in range(3):
        run = write_run(
            tmp_path / f"machine{seed}", "vit", seed, name="vit", measured={"hessian": spectrum(0.1 * seed)}
        )
        parts.append(study(f"part{seed}", [SimpleNamespace(run=run.path, results=("hessian/end-0badcafe",))]))
    study_export.join(tmp_path / "joined", parts, [TARGET])
    for source in (parts, tmp_path / "joined"):
        entries = study_export.read(source, TARGET)
        assert [(entry.id, entry.seed) for entry in entries] == [("vit", 0), ("vit-2", 1), ("vit-3", 2)]
        neps = [m.scalars["negative_eigenvalue_proportion"] for entry in entries for m in entry.results]
        assert neps == [0.0, 0.1, 0.2]


def test_two_repetitions_of_one_part_add_the_results_of_both(study: Callable[..., Path], tmp_path: Path) -> None:
    first = study("first", one_run(tmp_path / "here", "1f00", 100.0, "hessian"))
    runs = [
        *one_run(tmp_path / "there", "1f00", 50.0, "hessian", "sharpness"),
        *one_run(tmp_path / "there", "1f00", 50.0, "hessian", "curvature"),
    ]
    (entry,) = study_export.read([first, study("again", runs)], TARGET)
    assert sorted(m.analysis for m in entry.results) == ["curvature", "hessian", "sharpness"]


@pytest.mark.parametrize(
    ("weights", "tag", "reason"),
    [
        ("2f00", "end", r"came to other weights \(at end\)"),
        ("1f00", "init", "no moment was measured in both"),
        (ObjectiveCard().checkpoint, "end", "no moment was measured in both"),
    ],
)
def test_a_repeated_training_of_other_or_unknown_weights_is_refused(
    study: Callable[..., Path], tmp_path: Path, weights: str, tag: str, reason: str
) -> None:
    first = study("first", one_run(tmp_path / "here", "1f00", 100.0, "hessian"))
    again = study("again", one_run(tmp_path / "there", weights, 100.0, "hessian", "sharpness", tag=tag))
    with pytest.raises(
        ConfigError, match=rf"its run .* repeats .* \(the same experiment with seed 0\), and .*{reason}"
    ):
        study_export.read([first, again], TARGET)


def test_parts_that_do_not_go_together_are_refused(study: Callable[..., Path], tmp_path: Path) -> None:
    outcomes = runs_of(tmp_path / "runs", range(2))
    a = study("a", outcomes)
    again = study("again", runs_of(tmp_path / "elsewhere", range(1, 2), weights="2f00"))
    with pytest.raises(ConfigError, match=r"its run .* repeats .* of .*/a \(the same experiment with seed 1\)"):
        study_export.read([a, again], TARGET)
    other_profile = study("profile", runs_of(tmp_path / "more", range(2, 3)), profile="cifar100")
    with pytest.raises(ConfigError, match="its profile is cifar100, that of .*/a is smoke"):
        study_export.read([a, other_profile], TARGET)
    other_data = study("data", runs_of(tmp_path / "data-runs", range(2, 3)))
    for path in (other_data / "runs").iterdir():
        content = json.loads(path.read_text())
        content["config"]["data"]["name"] = "CIFAR-10"
        path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"its data is \['CIFAR-10'\], that of .*/a is \['photos'\]"):
        study_export.read([a, other_data], TARGET)
    edited = Path(shutil.copytree(a, tmp_path / "edited"))
    changed(edited, lambda content: content["metrics"].update({"test/accuracy": 0.99}))
    with pytest.raises(ConfigError, match="has other numbers than the same run of another part"):
        study_export.read([a, edited], TARGET)
    with pytest.raises(DataError, match="does not hold table-models; choose one of table-claims"):
        study_export.join(tmp_path / "joined", [a], ["table-models"])
    assert not (tmp_path / "joined").exists()


def test_a_run_that_was_measured_again_after_an_export_has_the_numbers_of_both(
    study: Callable[..., Path], tmp_path: Path
) -> None:
    whole = study("whole", runs_of(tmp_path / "runs", range(2)))
    earlier = Path(shutil.copytree(whole, tmp_path / "earlier"))
    changed(earlier, lambda content: content["metrics"].pop("test/accuracy"))
    # metrics of an analysis are those of its last moment
    changed(whole, lambda content: content["metrics"].update({f"{analysis_of(content)}/value": 2.0}))
    changed(earlier, lambda content: content["metrics"].update({f"{analysis_of(content)}/value": 1.0}))
    changed(earlier, lambda content: content["results"].popitem())
    for order in ([whole, earlier], [earlier, whole]):
        study_export.join(tmp_path / "joined", order, [TARGET])
        assert study_export.differing_numbers(tmp_path / "joined", whole) == []


def test_runs_whose_folders_have_one_name_are_all_exported(study: Callable[..., Path], tmp_path: Path) -> None:
    outcomes = []
    for seed in range(3):
        folder = tmp_path / "runs" / f"seed{seed}"
        run = write_run(folder, "vit", seed, name="vit", measured={"hessian": spectrum(0.1 * seed)})
        outcomes.append(SimpleNamespace(run=run.path, results=("hessian/end-0badcafe",)))
    entries = study_export.read(study("one", outcomes), TARGET)
    neps = [m.scalars["negative_eigenvalue_proportion"] for entry in entries for m in entry.results]
    assert [(entry.id, entry.seed) for entry in entries] == [(f"seed{seed}-vit", seed) for seed in range(3)]
    assert neps == [0.0, 0.1, 0.2]
