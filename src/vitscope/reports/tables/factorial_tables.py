"""Tables of the factorial analysis: who looks flatter under each condition, and which factor decides.

See `vitscope.reports.claims.factorial_analysis`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vitscope.plotting.api import save_figure
from vitscope.reports.claims.factorial_analysis import (
    CONDITIONS,
    OBJECTIVES,
    QUANTITIES,
    Effect,
    FactorialResult,
    analyze_factors,
)
from vitscope.reports.claims.factorial_runs import MODELS
from vitscope.reports.figures import factorial_figure
from vitscope.reports.tables.table import LEAST_SEEDS, Cell, Problem, Table, interval_text
from vitscope.reports.value_lookup import MISSING, Selection
from vitscope.runtime.errors import StorageError
from vitscope.stats.intervals import LEAST_IMAGES
from vitscope.stats.t_tests import Interval

NAMES = ("conditions", "factors")

#: words for a change of each factor
SWITCHES = {"training": "trained strong, not weak", "images": "augmented images, not clean"}

NOTHING = Problem(
    MISSING,
    "landscape_objective",
    "ConvNet and ViT trained weak and strong",
    "no such runs in one setting; run `vitscope reproduce landscape-objective`",
)


def write_factorial_tables(selection: Selection, folder: Path) -> dict[str, Table]:
    """Return both tables of the runs by name, the figure (``factors.png`` and ``.pdf``) drawn into ``folder``.

    Raises:
        StorageError: The folder cannot be written.
    """
    result = analyze_factors(selection)
    by_name = {table.name: table for table in tables(result)}
    if result is not None and result.values:
        try:
            picture, *_ = save_figure(factorial_figure.draw(result), folder / "factors")
        except OSError as error:
            raise StorageError(
                "out", folder, f"not writable ({error.strerror})", "choose another folder: out=<folder>"
            ) from None
        by_name["factors"] = replace(by_name["factors"], picture=picture)
    return by_name


def tables(result: FactorialResult | None) -> list[Table]:
    """Return `conditions` and `factors`; both without rows, and with the problem named, where there is no answer."""
    problems = (NOTHING,) if result is None else result.problems
    return [
        _table("conditions", "Who looks flatter", _condition_heads(), _condition_rows(result), _notes(result), problems),
        _table("factors", "Which factor decides who looks flatter", _FACTOR_HEADS, _factor_rows(result), _verdicts(result),
               problems),
    ]  # fmt: skip


def switch_text(effect: Effect) -> str:
    """Return in words what is switched."""
    return SWITCHES.get(effect.factor, f"{OBJECTIVES[effect.l2].removeprefix('NLL ')}, not NLL alone")


def verdict_sentence(result: FactorialResult, quantity: str, l2: str) -> str:
    """Return a sentence: who looks flatter how often, and which factor the difference between the models follows most."""
    effects = [e for e in result.effects if (e.quantity, e.l2) == (quantity, l2)]
    if not all(math.isfinite(e.share) for e in effects):
        return ""
    title = next(q.title for q in QUANTITIES if q.key == quantity)
    lower, most = result.lower(quantity, l2), max(effects, key=lambda e: e.share)
    rest = 1 - sum(e.share for e in effects)
    conclusion = f"{most.factor} makes {most.share:.0%} of how the difference varies"
    if rest > most.share:
        conclusion = f"no factor alone: interactions make {rest:.0%} of how the difference varies"
    return f"{title}, {OBJECTIVES[l2]}: {MODELS['vit']} looks flatter in {lower} of 8 conditions; {conclusion}."


_FACTOR_HEADS = (
    ("quantity", "quantity"), ("L2 form", "l2"), ("switched", "switched"), *((name, key) for key, name in MODELS.items()),
    ("ViT − ConvNet", "difference"), ("share of its variation", "share"), ("flips who is flatter", "flips"),
)  # fmt: skip


def _table(
    name: str,
    title: str,
    heads: Sequence[tuple[str, str]],
    rows: Sequence[tuple[Cell, ...]],
    note: str,
    problems: Sequence[Problem],
) -> Table:
    titles, ids = zip(*heads)
    return Table(name, title, titles, ids, tuple(rows), note, tuple(problems))


def _condition_heads() -> list[tuple[str, str]]:
    heads = [("trained, images, objective", "condition")]
    for q in QUANTITIES:
        heads += [(f"{q.title}: {name}", f"{q.key}/{key}") for key, name in MODELS.items()]
        heads += [("ViT − ConvNet", f"{q.key}/difference"), ("flatter", f"{q.key}/flatter")]
    return heads


def _condition_rows(result: FactorialResult | None) -> list[tuple[Cell, ...]]:
    if result is None:
        return []
    rows = []
    for c in CONDITIONS:
        cells = [Cell(f"{c[0]}, {c[1]}, {OBJECTIVES[c[2]]}")]
        for q in QUANTITIES:
            three = [result.values.get((q.key, c, column)) for column in (*MODELS, "difference")]
            word = result.undefined.get((q.key, c), "")
            cells += [_cell(value, c[2] in q.objectives, word, result.seeds) for value in three]
            cells.append(Cell(_flatter(*three)))
        rows.append(tuple(cells))
    return rows


def _factor_rows(result: FactorialResult | None) -> list[tuple[Cell, ...]]:
    if result is None:
        return []
    titles = {q.key: q.title for q in QUANTITIES}
    words = {quantity: word for (quantity, _), word in result.undefined.items()}
    rows = []
    for effect in result.effects:
        word = words.get(effect.quantity, "")
        texts = (titles[effect.quantity], OBJECTIVES[effect.l2].removeprefix("NLL + "), switch_text(effect))
        intervals = (effect.convnet, effect.vit, effect.difference)
        values = [_cell(interval, word=word, seeds=result.seeds) for interval in intervals]
        share, flips = "–", "–"
        if math.isfinite(effect.share):
            share, flips = f"{effect.share:.0%}", f"{effect.flips} of 4"
        rows.append((*map(Cell, texts), *values, Cell(share), Cell(flips)))
    return rows


def _cell(value: Interval | None, defined: bool = True, word: str = "", seeds: Sequence[int] = ()) -> Cell:
    if value is None:
        return Cell(MISSING, None, MISSING) if defined else Cell("–")
    # an interval over few seeds tells nothing; that of one seed is over something else
    if 1 < len(seeds) < LEAST_SEEDS:
        value = replace(value, half_width=math.nan, ends=None)
    if math.isfinite(value.mean):
        return Cell(interval_text(value, ".3g"), value)
    return Cell(word) if word else Cell("failed", None, "failed")


def _flatter(convnet: Interval | None, vit: Interval | None, difference: Interval | None) -> str:
    """Return the name of the flatter model; a question mark where the interval holds zero or there is none.

    A model whose value is negative is at no minimum: the loss falls around it, and that is not flatness.
    """
    if difference is None or not math.isfinite(difference.mean):
        return "–"
    models = zip(MODELS.values(), (convnet, vit))
    if at_no_minimum := [name for name, value in models if value is not None and value.mean < 0]:
        return f"no minimum: {', '.join(at_no_minimum)}"
    name = MODELS["vit" if difference.mean < 0 else "convnet"]
    return name if difference.half_width < abs(difference.mean) else f"{name} ?"


def _notes(result: FactorialResult | None) -> str:
    if result is None:
        return "No runs."
    if 1 < len(result.seeds) < LEAST_SEEDS:
        n_seeds = len(result.seeds)
        sampled = (
            f"Means of {n_seeds} seeds, differences paired by seed; no interval is printed below {LEAST_SEEDS} seeds."
        )
    elif len(result.seeds) > 1:
        sampled = f"± half of the 95% t-interval over {len(result.seeds)} seeds, differences paired by seed."
    else:
        parts = ", ".join(f"{q.sampled} ({q.title})" for q in QUANTITIES if q.sampled)
        sampled = (
            f"One seed: ± half of the 95% interval, or its ends in brackets, over {parts}, which says nothing of other "
            f"trainings; SEEDS=5 does. Differences of APE have none over fewer than {LEAST_IMAGES} mini-batches: they are skewed."
        )
    return (
        f"{result.labels['convnet']} and {result.labels['vit']}; less is flatter; "
        "? where the interval holds zero, or there is none; "
        f"no minimum: the loss falls around the model (a negative rise), which is not flatness. {sampled} "
        "Both trainings are measured on the same images, augmented ones by the strong recipe. "
        "APE under wd Σ‖w‖ is not measured: that term curves a tensor by wd/‖w‖ of itself."
    )


def _verdicts(result: FactorialResult | None) -> str:
    if result is None:
        return "No runs."
    pairs = dict.fromkeys((e.quantity, e.l2) for e in result.effects)
    sentences = [verdict_sentence(result, *pair) for pair in pairs]
    return (
        "Effect of switching one factor: mean over the four pairs of conditions that differ in nothing else, for each model and "
        "for the difference (negative: the switch makes ViT look flatter against ConvNet). What the three shares lack of 100% "
        "are interactions. " + " ".join(filter(None, sentences))
    )
