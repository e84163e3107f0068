from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.runs.report_runs import CARD, curve, other_card, rise, spectrum, write_run
from vitscope.core.objective_card import check_comparable
from vitscope.reports import run_entry, run_files, run_index
from vitscope.reports.model_costs import Costs
from vitscope.reports.tables import headline_tables
from vitscope.reports.value_lookup import Selection
from vitscope.runs import result_store, run_search
from vitscope.runs.metrics_log import Journal
from vitscope.runtime.errors import StorageError

SPECTRUM, NEP = "hessian_max_eigenvalue_spectrum", "negative_eigenvalue_proportion"


def collect(root: Path) -> list[run_entry.Entry]:
    return run_index.collect(run_search.every(root / "runs"))


def test_what_a_run_left_behind_is_read(make_run: Callable, tmp_path: Path) -> None:
    made = make_run("vit", 3, measured={"hessian": spectrum(0.25), "slice@epoch-0001": curve()})
    (entry,) = collect(tmp_path)
    assert (entry.id, entry.seed, entry.status, entry.family, entry.data) == (made.id, 3, "finished", "vit", "photos")
    assert entry.metrics["test/accuracy"] == 0.5
    assert entry.curves["val/accuracy"] == ([0, 1, 2], [0.3, 0.4, 0.5])
    assert entry.tags() == ["epoch-0001", "end"]
    (hessian,) = [m for m in entry.results if m.analysis == "hessian"]
    assert hessian.card == CARD
    assert hessian.scalars[NEP] == 0.25
    assert hessian.load().grid.shape == (40,)


def test_a_null_metric_is_not_hidden_by_an_earlier_number(make_run: Callable, tmp_path: Path) -> None:
    run = make_run("vit")
    journal = Journal(run.journal)
    journal.append(4, 4, {"test/nll": float("nan")})
    journal.close()
    (entry,) = collect(tmp_path)
    assert entry.metrics["test/nll"] is None
    value = Selection([entry]).metric(entry, "test/nll")
    assert (value.number, value.problem, value.why) == (None, "failed", "not finite")


def test_long_curves_are_thinned_to_means() -> None:
    xs, ys = run_files._thinned([float(i) for i in range(240)], [float(i % 2) for i in range(240)])
    assert len(xs) == 120
    assert set(ys) == {0.5}
    assert xs[0] == 1


def test_a_repeated_seed_counts_once_the_newest_finished(make_run: Callable, tmp_path: Path) -> None:
    older = make_run("vit", metrics={"test/accuracy": 0.1})
    newer = make_run("vit", metrics={"test/accuracy": 0.2})
    failed = make_run("vit", facts={"status": "failed"})
    by_id = {entry.id: entry for entry in collect(tmp_path)}
    assert [by_id[run.id].superseded for run in (older, newer, failed)] == [True, False, True]
    assert [entry.id for entry in Selection(list(by_id.values())).entries] == [newer.id]


def test_numbers_come_from_the_conditions_that_most_runs_share(make_run: Callable, tmp_path: Path) -> None:
    make_run("vit", 0, measured={"hessian": spectrum(0.1)})
    make_run("vit", 1, measured={"hessian": spectrum(0.2)})
    make_run("vit", 2, measured={"hessian": spectrum(0.3, card=other_card(n_images=64))})
    make_run("vit", 3, measured={"hessian": spectrum(0.4, card=other_card(data="digits"))})  # rows name their data
    entries = collect(tmp_path)
    values = [Selection(entries).scalar(e, SPECTRUM, NEP) for e in entries]
    assert [v.number for v in values] == [0.1, 0.2, None, 0.4]
    assert values[2].problem == "missing"
    assert "n_images 64, most runs 32" in values[2].why
    loose = Selection(entries, allow_different=True)
    assert [loose.scalar(e, SPECTRUM, NEP).number for e in entries] == [0.1, 0.2, 0.3, 0.4]


def test_numbers_of_a_run_are_those_of_its_own_images_and_network(make_run: Callable, tmp_path: Path) -> None:
    """Results on another folder of images, which are as many and newer, do not stand in the place of the runs' own."""
    changed = other_card(changes={"data.root": "/images/b"})
    for seed in range(2):
        run = make_run("vit", seed, measured={"hessian": spectrum(0.1)})
        result_store.save(run.results / "hessian", "end-1badcafe", spectrum(0.9, card=changed))
    only_changed = make_run("vit", 2, measured={"hessian": spectrum(0.9, card=changed)})
    selection = Selection(collect(tmp_path))
    values = {e.id: selection.scalar(e, SPECTRUM, NEP) for e in selection.entries}
    assert [v.number for v in values.values()] == [0.1, 0.1, None]
    assert "changes (('data.root', '/images/b'),), most runs 'none'" in values[only_changed.id].why


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_images": 16}, "n_images 16, most runs 32"),
        ({"batch_size": 8}, "batch_size 8, most runs 16"),
        ({"solver": {"solver": "power"}}, "solver.solver 'power', most runs 'not stated'"),
        ({"options": {"n_top": 5}}, r"options 'recorded', most runs 'not recorded \(a result of an older version\)'"),
    ],
)
def test_a_number_under_other_conditions_is_left_out_with_the_keys_named(
    make_run: Callable, tmp_path: Path, changes: dict, said: str
) -> None:
    old = other_card(options=None)
    for seed in range(2):
        make_run("vit", seed, measured={"hessian": spectrum(0.1, card=old)})
    make_run("vit", 2, measured={"hessian": spectrum(0.3, card=other_card(**({"options": None} | changes)))})
    selection = Selection(collect(tmp_path))
    values = [selection.scalar(e, SPECTRUM, NEP) for e in selection.entries]
    assert [v.number for v in values] == [0.1, 0.1, None]
    assert re.search(said, values[2].why)
    assert len(selection.refusals()) == 1
    assert re.search(f"{said} \\(1 left out\\)", selection.refusals()[0])


OPTIONS = {"solver": "lanczos", "operator": "hessian", "n_top": 5, "tol": 1e-3, "root": None, "normalization": "filter",
           "which": "LM", "radii": [0.1, 0.2], "attacks": ["fgsm", "pgd"], "epsilons": [1, 2, 4, 8]}  # fmt: skip
CHANGED = {"solver": "power", "operator": "ggn", "n_top": 6, "tol": 1e-2, "root": "data/CIFAR-10-C", "normalization": "layer",
           "which": "SA", "radii": [0.1], "attacks": ["fgsm"], "epsilons": [2, 4, 8]}  # fmt: skip


@pytest.mark.parametrize("key", OPTIONS)
def test_every_option_of_a_measure_is_compared(make_run: Callable, tmp_path: Path, key: str) -> None:
    with_options = other_card(options=OPTIONS)
    for seed in range(2):
        make_run("vit", seed, measured={"hessian": spectrum(0.1, card=with_options)})
    other = other_card(options={**OPTIONS, key: CHANGED[key]})
    make_run("vit", 2, measured={"hessian": spectrum(0.3, card=other)})
    selection = Selection(collect(tmp_path))
    values = [selection.scalar(e, SPECTRUM, NEP) for e in selection.entries]
    assert [v.number for v in values] == [0.1, 0.1, None]
    assert f"options.{key}" in values[2].why
    assert with_options.differences(other) == [f"options.{key}"]
    with pytest.raises(ValueError, match=f"differ in options.{key}: "):
        check_comparable({"a": with_options, "b": other})
    assert Selection(selection.entries, allow_different=True).scalar(selection.entries[2], SPECTRUM, NEP).number == 0.3


def test_results_without_recorded_options_compare_with_each_other_by_what_their_solver_states() -> None:
    old = [other_card(solver={"tol": 1e-3, "n_products": n}, options=None) for n in (3, 4)]
    check_comparable({"a": old[0], "b": old[1]})
    new = other_card(options={"tol": 1e-3}, solver={"tol": 1e-3})
    with pytest.raises(
        ValueError, match="differ in options: 'not recorded .a result of an older version.' and 'recorded'"
    ):
        check_comparable({"a": old[0], "b": new})


def test_failed_missing_and_unknown_are_told_apart(make_run: Callable, tmp_path: Path) -> None:
    make_run("vit", 0, measured={"hessian": "ValueError: boom"})
    make_run("vit", 1)
    make_run("vit", 2, facts={"status": "failed"}, metrics={})
    make_run("vit", 3, measured={"hessian": spectrum(), "sharpness": rise(0.1)})
    entries = collect(tmp_path)
    selection = Selection(entries)
    found = [selection.scalar(e, SPECTRUM, NEP) for e in entries]
    assert [(v.problem, v.why) for v in found[:3]] == [
        ("failed", "ValueError: boom"), ("missing", "not measured at end"), ("failed", "the run failed"),
    ]  # fmt: skip
    assert selection.metric(entries[2], "test/accuracy").problem == "failed"
    assert selection.metric(entries[1], "test/nonsense").problem == "missing"
    assert selection.scalar(entries[3], "sharpness", "rise_r9").why == "sharpness has no rise_r9"


def test_results_being_written_are_left_out_and_damaged_ones_refused(make_run: Callable, tmp_path: Path) -> None:
    run = make_run("vit", measured={"hessian": spectrum(), "slice": curve()})
    (run.results / "hessian" / "end-0badcafe.json").write_text("{")
    (run.results / "slice" / "end-0badcafe.npz").write_bytes(b"PK")
    (entry,) = collect(tmp_path)
    (left,) = entry.results
    assert left.analysis == "slice"
    with pytest.raises(StorageError, match="delete it and measure again"):
        left.load()
    (run.path / "config.yaml").write_text("a: [")
    with pytest.raises(StorageError, match=r"config\.yaml is damaged"):
        collect(tmp_path)


def test_a_card_of_another_version_is_read_as_far_as_it_is_known(make_run: Callable, tmp_path: Path) -> None:
    run = make_run("vit", measured={"hessian": spectrum()})
    file = run.results / "hessian" / "end-0badcafe.json"
    content = json.loads(file.read_text())
    content["card"]["invented"] = 1
    file.write_text(json.dumps(content))
    (entry,) = collect(tmp_path)
    assert entry.results[0].card == CARD


def test_of_analyses_of_one_model_the_newest_counts_whatever_its_name(make_run: Callable, tmp_path: Path) -> None:
    analyzed = {"command": "analyze", "created": "2026-03-01T00:00:00"}
    make_run("vit", name="a-newer", facts=analyzed, measured={"hessian": spectrum(0.25)})
    make_run("vit", name="b-older", facts={**analyzed, "created": "2026-02-01T00:00:00"})
    (group,) = Selection(collect(tmp_path)).groups().values()
    assert {seed: entry.id for seed, entry in group.items()} == {0: "a-newer"}


def test_runs_whose_folders_have_one_name_all_count(tmp_path: Path) -> None:
    """A table of ``seed0/vit``, ``seed1/vit`` and ``seed2/vit`` once gave the number of the last one, ``0.700 (1 of 3)``."""
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        metrics = {"test/accuracy": accuracy, "test/nll": 1.0, "test/ece": 0.1}
        card = other_card(n_images=64 if seed == 2 else 32)
        measured = {"hessian": spectrum(0.1 * seed, card=card)}
        write_run(tmp_path / "runs" / f"seed{seed}", "vit", seed, name="vit", metrics=metrics, measured=measured)
    write_run(tmp_path / "runs" / "older", "vit", name="vit", facts={"created": "2025-01-01T00:00:00"})
    entries = collect(tmp_path)
    assert [(e.id, e.superseded) for e in entries] == [
        ("seed0/vit", False), ("seed1/vit", False), ("seed2/vit", False), ("older/vit", True)
    ]  # fmt: skip
    table = headline_tables.build("models", Selection(entries), Costs())
    cells = dict(zip(table.ids, table.rows[0]))
    assert cells["test/accuracy"].text == "0.600 ± 0.248"  # 4.303 x 0.1 / 3**.5
    assert cells[f"{SPECTRUM}/{NEP}"].text == "0.000, 0.100 (2 of 3)"  # two of three share their conditions


def test_names_of_folders_are_as_short_as_they_can_be() -> None:
    paths = [Path(p) for p in ("/a/x/vit", "/b/x/vit", "/b/y/vit", "/b/pit")]
    assert list(run_index._names(paths).values()) == ["a/x/vit", "b/x/vit", "y/vit", "pit"]
    assert list(run_index._names([Path("runs/vit"), Path("/a/runs/vit")]).values()) == ["runs/vit", "a/runs/vit"]
