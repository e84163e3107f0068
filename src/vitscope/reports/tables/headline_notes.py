"""Notes below the headline tables: seeds, and which images each number was measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vitscope.core.objective_card import ObjectiveCard
from vitscope.reports.run_entry import Entry
from vitscope.reports.tables.headline_columns import COST, SPECTRUM, TEST, Column
from vitscope.reports.tables.table import seeds_text
from vitscope.reports.value_lookup import Selection


def note(
    name: str,
    groups: Sequence[Mapping[int, Entry]],
    columns: Sequence[Column],
    selection: Selection,
    has_few_seeds: bool,
) -> str:
    """Return the note below a table: seeds, images, and what its abbreviations mean.

    Args:
        name: Name of the table.
        groups: The runs of each row, by seed.
        columns: The columns that it has.
        selection: The runs.
        has_few_seeds: Whether some cell has the values of seeds in place of an interval.
    """
    if not groups:
        return _no_run(name, selection)
    place = f"measures at {selection.tag}"
    if selection.or_newest:
        place += ", or the newest of a run that has none there"
    counts = _evaluated_images(groups, selection)
    if counts and TEST[0] in columns:
        counts_text = " or ".join(map(str, counts))
        place += f"; accuracy and NLL of models that were not trained here: evaluation on {counts_text} test images"
    text = f"{seeds_text([len(runs) for runs in groups], has_few_seeds)}; {place}."
    if COST[1] in columns:
        text += " FLOPs: forward pass of one image, two for each multiply-add."
    if any(column.source == SPECTRUM for column in columns):
        text += (
            " NEP: negative eigenvalue proportion; APE: average positive eigenvalue (top Hessian eigenvalues of "
            "mini-batches)."
        )
    return text + _robustness_note(groups, columns, selection)


def _no_run(name: str, selection: Selection) -> str:
    """Return the note of a table without rows."""
    if name == "buildup":
        return "No run of a ResNet or an AlterNet that was trained here."
    if not any(entry.results for entry in selection.entries):
        return "No run."
    return "No run that was trained here, or evaluated on the whole test split at this moment."


def _evaluated_images(groups: Sequence[Mapping[int, Entry]], selection: Selection) -> list[int]:
    """Return the numbers of test images on which models that were not trained here were evaluated."""
    entries = [entry for runs in groups for entry in runs.values() if not entry.trained]
    evaluations = [selection.evaluation(entry, "test/accuracy") for entry in entries]
    return sorted({m.card.n_images for m in evaluations if m is not None and m.card})


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
    if not sentences or not any(column in columns for column in TEST):
        return "".join(f" {sentence}" for sentence in sentences)
    tested = " or ".join(sorted({_tested_text(entry) for entry in entries if entry.trained})) or "all test images"
    titles = ", ".join(column.title for column in columns if column in TEST)
    return "".join(f" {sentence}" for sentence in [*sentences, f"{titles}: on {tested}."])


def _images_text(cards: Sequence[ObjectiveCard]) -> str:
    """Return in words which images results were measured on."""
    folders = {str((card.options or {}).get("root")) for card in cards if (card.options or {}).get("root")}
    if folders:  # a published set of corrupted images
        largest = _range_text([int((card.options or {}).get("n_images") or card.n_images) for card in cards])
        return f"at most {largest} published images per condition ({', '.join(Path(folder).name for folder in sorted(folders))})"
    split = " and ".join(dict.fromkeys(card.split for card in cards))
    if len({card.seed for card in cards}) > 1:
        choice = ", different ones for each seed if the split has more"
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
    return f"at most {limit} batches of test images per process"


def _range_text(numbers: Sequence[int]) -> str:
    return " to ".join(f"{n:,}" for n in dict.fromkeys((min(numbers), max(numbers))))
