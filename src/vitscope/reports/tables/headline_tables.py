"""Headline tables: models, curvature, robustness, build-up. Missing cells are listed and left empty; no value is imputed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitscope.config.model_facts import UNRECORDED
from vitscope.core.objective_card import ObjectiveCard
from vitscope.models.alternet_layout import DEFAULT_MSA
from vitscope.reports.model_costs import Costs
from vitscope.reports.run_entry import Entry
from vitscope.reports.tables.table import Cell, Problem, Table, over_seeds, seeds_text
from vitscope.reports.value_lookup import FAILED, MISSING, Selection, Value

#: sources of a column's number besides measures: the metrics log, or the model itself
METRIC, MODEL = "metric", "model"

SPECTRUM = "hessian_max_eigenvalue_spectrum"


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        title: Heading of the column.
        source: ``metric``, ``model``, or a measure's name.
        key: The metric, ``parameters`` or ``flops``, or the measure's scalar.
        style: Format of its numbers.
        optional: Left out where no run has the measure at all.
    """

    title: str
    source: str
    key: str
    style: str = ".3f"
    optional: bool = False

    @property
    def id(self) -> str:
        """A name for files: the metric's, the measure's and its scalar's."""
        return self.key if self.source in (METRIC, MODEL) else f"{self.source}/{self.key}"


_COST = (Column("parameters", MODEL, "parameters", "si"), Column("FLOPs", MODEL, "flops", "si"))
_TEST = (
    Column("accuracy", METRIC, "test/accuracy"),
    Column("NLL", METRIC, "test/nll"),
    Column("ECE", METRIC, "test/ece"),
)
_CURVATURE = (
    Column("NEP", SPECTRUM, "negative_eigenvalue_proportion"),
    Column("APE", SPECTRUM, "average_positive_eigenvalue", ".4g"),
)
_ROBUST = Column("robust accuracy", "corruption", "mean_accuracy", optional=True)

TITLES = {
    "models": "Models",
    "curvature": "Curvature and sharpness",
    "robustness": "Robustness and calibration",
    "buildup": "Build-up of AlterNet",
}

TABLES: Mapping[str, tuple[Column, ...]] = {
    "models": (*_COST, *_TEST, _ROBUST, *(replace(column, optional=True) for column in _CURVATURE)),
    "curvature": (
        *_CURVATURE,
        Column("NEP, k=1", SPECTRUM, "top1_negative_eigenvalue_proportion"),
        Column("APE, k=1", SPECTRUM, "top1_average_positive_eigenvalue", ".4g"),
        Column("max λ", SPECTRUM, "eigenvalue_max", ".4g"),
        Column("min λ", SPECTRUM, "eigenvalue_min", ".4g"),
        Column("max λ, all images", "hessian_eigenvalues", "eigenvalue_max", ".4g", optional=True),
        Column("min λ, all images", "hessian_eigenvalues", "eigenvalue_min", ".4g", optional=True),
        Column("trace", "hessian_trace", "trace", ".4g", optional=True),
        Column("rise at r=.1", "sharpness", "rise_r0.1", ".4g", optional=True),
        Column("worst rise at r=.1", "sharpness", "worst_rise_r0.1", ".4g", optional=True),
    ),
    "robustness": (
        *_TEST,
        Column("Brier", METRIC, "test/brier"),
        _ROBUST,
        Column("mCE (%)", "corruption", "mce", ".1f", optional=True),
        Column("band noise, high − low", "frequency_noise_robustness", "high_minus_low", optional=True),
        Column("FGSM 8/255", "adversarial", "fgsm_8_accuracy", optional=True),
        Column("PGD 8/255", "adversarial", "pgd_8_accuracy", optional=True),
        Column("ECE, T scaled", "calibration", "scaled_ece", optional=True),
        Column("shape bias", "shape_bias", "shape_bias", optional=True),
    ),
    "buildup": (*_COST, *_TEST, *_CURVATURE, _ROBUST),
}


def build(
    name: str,
    selection: Selection,
    costs: Costs,
    expect_models: Sequence[str] = (),
    expect_seeds: Sequence[int] = (),
    labels: Mapping[str, str] | None = None,
    order: Sequence[str] = (),
) -> Table:
    """Return one of `TABLES`: a row an experiment, means and 95% t-intervals over its seeds, values of fewer than 3 seeds.

    Args:
        name: Name of the table, a key of `TABLES`.
        selection: The runs.
        costs: Parameters and operations of models.
        expect_models: Families that must have a row; one that no run has is a row of missing cells.
        expect_seeds: Seeds that every row must have.
        labels: Names of rows, by run or by the name that the report gives an experiment.
        order: Names of the rows that come first.
    """
    accepts = (
        _in_build_up if name == "buildup" else (lambda entry: entry.trained or _has_any(entry, TABLES[name], selection))
    )
    groups = list(selection.groups(accepts).values())
    if name == "buildup":
        groups.sort(key=lambda runs: (_first(runs).data, sum(n_msa(_first(runs))), n_msa(_first(runs))))
    row_names = [_row_name(_first(runs), labels or {}) for runs in groups]
    ranks = {row_name: rank for rank, row_name in enumerate(order)}
    ranked = sorted(zip(row_names, groups), key=lambda row: ranks.get(row[0], len(ranks)))
    columns = [
        c
        for c in TABLES[name]
        if (not c.optional or _is_measured(selection, c)) and (c.source != METRIC or _is_expected(groups, selection, c))
    ]
    has_several_datasets = len({entry.data for runs in groups for entry in runs.values()}) > 1
    rows: list[tuple[Cell, ...]] = []
    problems: list[Problem] = []
    run_rows: list[dict[str, object]] = []
    for row_name, runs in ranked:
        cells, row_problems = _row(runs, columns, selection, costs, expect_seeds)
        rows.append((*_head(name, row_name, _first(runs), has_several_datasets), *cells))
        problems += row_problems
        run_rows += _run_rows(row_name, runs, columns, selection, costs)
    families = {entry.family for runs in groups for entry in runs.values()}
    head = _heading(name, has_several_datasets)
    for model in [model for model in expect_models if model not in families]:
        rows.append((Cell(model), *(Cell("") for _ in head[1:]), *(Cell(MISSING, None, MISSING) for _ in columns)))
        problems += [Problem(MISSING, model, column.id, "no run of this model") for column in columns]
    return Table(
        name=name,
        title=TITLES[name],
        columns=(*head, *(c.title for c in columns)),
        ids=(*head, *(c.id for c in columns)),
        rows=tuple(rows),
        note=_note(name, groups, columns, selection, any(cell.values for cells in rows for cell in cells)),
        problems=tuple(dict.fromkeys(problems)),
        runs=tuple(run_rows),
    )


def _run_rows(
    row_name: str, runs: Mapping[int, Entry], columns: Sequence[Column], selection: Selection, costs: Costs
) -> list[dict[str, object]]:
    """Return the numbers of each run of a row, by seed."""
    return [
        {
            "model": row_name,
            "data": entry.data,
            "run": entry.id,
            "seed": seed,
            **{column.id: column_value(column, entry, selection, costs).number for column in columns},
        }
        for seed, entry in sorted(runs.items())
    ]


def column_value(column: Column, entry: Entry, selection: Selection, costs: Costs) -> Value:
    """Return a column's number of one run, or why there is none."""
    if column.source == METRIC:
        return selection.metric(entry, column.key)
    if column.source == MODEL:
        cost = costs.of(entry)
        cost_value: Any = getattr(cost, column.key)
        return (
            Value(None, MISSING if cost.why == UNRECORDED else FAILED, cost.why)
            if cost_value is None
            else Value(float(cost_value))
        )
    return selection.scalar(entry, column.source, column.key)


def _row(
    runs: Mapping[int, Entry], columns: Sequence[Column], selection: Selection, costs: Costs, seeds: Sequence[int]
) -> tuple[list[Cell], list[Problem]]:
    cells, problems = [], []
    absent = [seed for seed in seeds if seed not in runs]
    for column in columns:
        values = {f"run {entry.id}": column_value(column, entry, selection, costs) for entry in runs.values()}
        values |= {f"{_first(runs).label}, seed {seed}": Value(None, MISSING, "no run") for seed in absent}
        cell, cell_problems = over_seeds(values, column.id, column.style, len(runs) + len(absent))
        cells.append(cell)
        problems += cell_problems
    return cells, problems


def _heading(name: str, several: bool) -> list[str]:
    return ["model", *(["data"] if several else []), *(["MSAs"] if name == "buildup" else [])]


def _row_name(entry: Entry, labels: Mapping[str, str]) -> str:
    return labels.get(entry.id, labels.get(entry.label, entry.label))


def _head(name: str, row_name: str, entry: Entry, several: bool) -> list[Cell]:
    texts = [row_name, *([entry.data] if several else [])]
    return [Cell(t) for t in (*texts, *([",".join(map(str, n_msa(entry)))] if name == "buildup" else []))]


def _first(runs: Mapping[int, Entry]) -> Entry:
    return runs[min(runs)]


def _is_measured(selection: Selection, column: Column) -> bool:
    """Return whether some run has the scalar, or a failed analysis of it."""
    tag = None if selection.or_newest else selection.tag
    attempts = (m for e in selection.entries for m in e.results_at(tag) if m.measure == column.source)
    return any(m.error or column.key in m.scalars for m in attempts)


def _is_expected(groups: Sequence[Mapping[int, Entry]], selection: Selection, column: Column) -> bool:
    """Return whether some run of the rows was trained here, or its evaluation has the metric: else nobody asked for it."""
    entries = [entry for runs in groups for entry in runs.values()]
    return not entries or any(e.trained or selection.evaluation(e, column.key) is not None for e in entries)


def _has_any(entry: Entry, columns: Sequence[Column], selection: Selection) -> bool:
    """Return whether a trained model that was analyzed has a number for one of the columns that are measured."""
    if entry.untrained:
        return False
    measures = {column.source for column in columns}
    return any(not m.error and m.measure in measures for m in entry.results) or any(
        selection.evaluation(entry, column.key) is not None for column in columns if column.source == METRIC
    )


def _in_build_up(entry: Entry) -> bool:
    return entry.trained and entry.family in ("alternet", "preresnet")


def n_msa(entry: Entry) -> tuple[int, ...]:
    """Return the number of attention blocks in each stage of an AlterNet or a ResNet; none where another mixer replaces them."""
    node = entry.config.get("model") or {}
    if entry.family != "alternet" or (node.get("mixer") or "msa") != "msa":
        return (0, 0, 0, 0)
    return tuple(node.get("n_msa") or DEFAULT_MSA.get(node.get("depth", 18), ()))


def _note(
    name: str,
    groups: Sequence[Mapping[int, Entry]],
    columns: Sequence[Column],
    selection: Selection,
    has_few_seeds: bool,
) -> str:
    if not groups:
        if name == "buildup" or not any(entry.results for entry in selection.entries):
            return "No run of a ResNet or an AlterNet that was trained here." if name == "buildup" else "No run."
        return "No run that was trained here, or evaluated on the whole test split at this moment."
    flops = " FLOPs: forward pass of one image, two for each multiply-add." if _COST[1] in columns else ""
    robust = _robustness_note(groups, columns, selection)
    newest = ", or the newest of a run that has none there" if selection.or_newest else ""
    evaluations = {
        m.card.n_images
        for runs in groups
        for entry in runs.values()
        if not entry.trained and (m := selection.evaluation(entry, "test/accuracy")) is not None and m.card
    }
    if evaluations and _TEST[0] in columns:
        counts_text = " or ".join(map(str, sorted(evaluations)))
        newest += f"; accuracy and NLL of models that were not trained here: evaluation on {counts_text} test images"
    seeds = seeds_text([len(runs) for runs in groups], has_few_seeds)
    spectrum = (
        " NEP: negative eigenvalue proportion; APE: average positive eigenvalue (top Hessian eigenvalues of mini-batches)."
        if any(column.source == SPECTRUM for column in columns)
        else ""
    )
    return f"{seeds}; measures at {selection.tag}{newest}.{flops}{spectrum}{robust}"


#: measures of robustness by the words that a note has for their columns
_ROBUSTNESS = {
    "corruption": "Robust accuracy (mean over types and severities of corruption)",
    "frequency_noise_robustness": "Band noise",
    "adversarial": "FGSM and PGD",
    "calibration": "ECE, T scaled",
    "shape_bias": "Shape bias",
}


def _robustness_note(groups: Sequence[Mapping[int, Entry]], columns: Sequence[Column], selection: Selection) -> str:
    """Return sentences that say which images each measure of robustness used, beside those of accuracy, NLL and ECE."""
    sentences = []
    sources = dict.fromkeys(column.source for column in columns if column.source in _ROBUSTNESS)
    entries = [entry for runs in groups for entry in runs.values()]
    for source in sources:
        results = [measured for entry in entries if (measured := selection.measured(entry, source)[0]) is not None]
        cards = [measured.card for measured in results if measured.card is not None]
        if not cards:
            continue
        words = _ROBUSTNESS[source]
        if source == "corruption" and not any(column.key == "mean_accuracy" for column in columns):
            words = "Corruption"
        sentences.append(f"{words}: on {_images_text(cards)}.")
    if not sentences or not any(column in columns for column in _TEST):
        return "".join(f" {sentence}" for sentence in sentences)
    tested = " or ".join(sorted({_tested_text(entry) for entry in entries if entry.trained})) or "all test images"
    titles = ", ".join(column.title for column in columns if column in _TEST)
    return "".join(f" {sentence}" for sentence in [*sentences, f"{titles}: on {tested}."])


def _images_text(cards: Sequence[ObjectiveCard]) -> str:
    """Return in words which images results were measured on."""
    folders = {str((card.options or {}).get("root")) for card in cards if (card.options or {}).get("root")}
    if folders:  # a published set of corrupted images
        largest = _range_text([int((card.options or {}).get("n_images") or card.n_images) for card in cards])
        return f"at most {largest} published images a condition ({', '.join(Path(folder).name for folder in sorted(folders))})"
    split = " and ".join(dict.fromkeys(card.split for card in cards))
    if len({card.seed for card in cards}) > 1:
        choice = ", other ones for each seed where the split has more"
    else:
        is_same = len({(card.split, card.n_images, str(card.data)) for card in cards}) == 1
        choice = ", the same for every run" if is_same else ""
    return f"{_range_text([card.n_images for card in cards])} {split} images{choice}"


def _tested_text(entry: Entry) -> str:
    """Return in words which test images a run's own test used."""
    trainer = entry.config.get("trainer") or {}
    limit, size = trainer.get("limit_test_batches"), (entry.config.get("data") or {}).get("eval_batch_size")
    if limit is None or (isinstance(limit, float) and limit == 1.0):
        return "all test images"
    if isinstance(limit, float):
        return f"a share of {limit:g} of the test images"
    is_one_process = trainer.get("devices") in (1, "1") and trainer.get("num_nodes", 1) == 1
    if is_one_process and isinstance(size, int):
        return f"at most {limit * size:,} test images"
    return f"at most {limit} batches of test images a process"


def _range_text(numbers: Sequence[int]) -> str:
    return " to ".join(f"{n:,}" for n in dict.fromkeys((min(numbers), max(numbers))))
