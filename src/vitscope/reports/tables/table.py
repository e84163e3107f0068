"""A table: cells over seeds with intervals, and the same cells as Markdown, CSV, LaTeX and HTML."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pandas.io.formats.style import Styler

from vitscope.reports.value_lookup import FAILED, MISSING, Value
from vitscope.runtime import atomic_write
from vitscope.stats.t_tests import Interval, t_interval

#: characters of titles, notes and cells that LaTeX does not know in a text, and what stands for them
_LATEX = {
    "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "→": r"$\rightarrow$", "≤": r"$\leq$", "≥": r"$\geq$", "≈": r"$\approx$",
    "∞": r"$\infty$", "‖": r"$\|$", "½": r"$\frac{1}{2}$", "²": "$^2$", "³": "$^3$", "°": r"$^\circ$", "·": r"$\cdot$",
    "Γ": r"$\Gamma$", "Δ": r"$\Delta$", "Λ": r"$\Lambda$", "Σ": r"$\Sigma$", "Φ": r"$\Phi$", "Ω": r"$\Omega$",
    "α": r"$\alpha$", "β": r"$\beta$", "γ": r"$\gamma$", "δ": r"$\delta$", "ε": r"$\epsilon$", "η": r"$\eta$",
    "θ": r"$\theta$", "κ": r"$\kappa$", "λ": r"$\lambda$", "μ": r"$\mu$", "π": r"$\pi$", "ρ": r"$\rho$", "σ": r"$\sigma$",
    "τ": r"$\tau$", "φ": r"$\phi$", "ω": r"$\omega$",
}  # fmt: skip

#: number of seeds from which on a cell is a mean with an interval; below, it lists the seeds' values
LEAST_SEEDS = 3


#: characters from which on a cell without a number holds prose
PROSE = 45


@dataclass(frozen=True)
class Problem:
    """A missing number of a report.

    Attributes:
        kind: ``missing`` or ``failed``.
        run: The run, or the row where there is no run.
        metric: Name of the missing number.
        why: Reason in words.
    """

    kind: str
    run: str
    metric: str
    why: str

    def __str__(self) -> str:
        """Return the line that the command prints."""
        return f"{self.kind}: {self.run}: {self.metric}" + (f" ({self.why})" if self.why else "")


@dataclass(frozen=True)
class Cell:
    """A number of one row: text, or a mean over seeds.

    Attributes:
        text: The cell as it is printed.
        interval: Mean, half width and number of seeds; None for text.
        problem: ``missing`` or ``failed`` where no seed has a number, or where some lack one.
        values: The seeds' values where there are fewer than `LEAST_SEEDS`: then they are printed, and no interval.
    """

    text: str
    interval: Interval | None = None
    problem: str = ""
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Attributes:
        name: Stem of the table's files.
        title: Heading above the table.
        columns: Headings; the first column names the row.
        rows: One list of cells a row, the first being the name.
        note: Definition of the numbers and of the sample that they are taken over.
        problems: Every number that is missing or failed.
        ids: Keys of the columns for the CSV file.
        picture: File of the table's figure; None if it has none.
        runs: Values of each run behind the means, by the ids of the columns, with the run's ``model``, ``data``, ``run`` and
            ``seed``.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    ids: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    problems: tuple[Problem, ...] = ()
    picture: Path | None = None
    runs: tuple[Mapping[str, object], ...] = ()


def over_seeds(values: Mapping[str, Value], metric: str, style: str, expected: int) -> tuple[Cell, list[Problem]]:
    """Return the cell of one value per seed, and what is wrong with it.

    From `LEAST_SEEDS` seeds on it is their mean with its t-interval. Two seeds give an interval of 12.7 standard errors, which
    tells a reader nothing: fewer seeds give their values, ``0.31, 0.35``, equal ones once.

    Seeds without a number are named, left out of the mean and counted in the cell: ``0.81 ± 0.02 (2 of 3)``. Where the
    measure's definition gives no number, nothing is wrong: the cell says why, such as ``saturated``.

    Args:
        values: Value of each run, by the run's name.
        metric: Name of the number in problems.
        style: Format of a number, such as ``.3f``; ``si`` for counts such as 9.50M.
        expected: The number of seeds that there should be.
    """
    problems = [Problem(v.problem, run, metric, v.why) for run, v in values.items() if v.problem]
    numbers = [v.number for v in values.values() if v.number is not None]
    if not numbers and not problems:
        return Cell(next((v.why for v in values.values() if v.why), "–")), []
    if not numbers:
        kind = FAILED if any(p.kind == FAILED for p in problems) else MISSING
        return Cell(kind, None, kind), problems
    interval = t_interval(numbers)
    few = tuple(numbers) if len(numbers) < LEAST_SEEDS else ()
    texts = dict.fromkeys(number_text(value, style) for value in few)
    text = ", ".join(texts) if few else interval_text(interval, style)
    if len(numbers) < expected:
        text += f" ({len(numbers)} of {expected})"
    return Cell(text, interval, problems[0].kind if problems else "", few), problems


def seeds_text(counts: Sequence[int], has_few: bool = False) -> str:
    """Return a sentence on the seeds of a table's rows and what their numbers are.

    Args:
        counts: Number of seeds of each row.
        has_few: Whether some cell has fewer than `LEAST_SEEDS` numbers, such as one where a seed is missing.
    """
    fewest, most = min(counts), max(counts)
    if most == 1:
        return "One seed per row: values without interval"
    if most < LEAST_SEEDS:
        n_seeds = f"{most} seeds per row" if fewest == most else f"{fewest} to {most} seeds per row"
        return f"{n_seeds}: their values, equal ones once; no interval below {LEAST_SEEDS} seeds"
    n_seeds = str(most) if fewest == most else f"{fewest} to {most}"
    text = f"Means over seeds ({n_seeds} per row), ± half of the 95% t-interval where they differ"
    return (
        text
        if fewest >= LEAST_SEEDS and not has_few
        else f"{text}; fewer than {LEAST_SEEDS} seeds: their values, no interval"
    )


def interval_text(interval: Interval, style: str) -> str:
    """Return ``mean ± half width``, or ``mean [low, high]``; the mean alone where there is no interval or it has no width.

    General styles (``.4g``) give both as many decimals as the smaller needs for two digits. A half width that a style of fixed
    decimals (``.3f``) would round to 0 adds decimals to both up to its first digit, six at most.
    """
    if interval.ends is not None:
        return f"{number_text(interval.mean, style)} [{number_text(interval.low, style)}, {number_text(interval.high, style)}]"
    if not interval.half_width > 0:
        return number_text(interval.mean, style)
    if style.endswith("g") and 1e-4 < interval.half_width < 1e6:
        smaller = min(interval.half_width, abs(interval.mean)) or interval.half_width
        style = f".{min(6, max(0, 1 - math.floor(math.log10(smaller))))}f"
    elif style.endswith("f") and not float(number_text(interval.half_width, style)):
        style = f".{min(6, -math.floor(math.log10(interval.half_width)))}f"
    return f"{number_text(interval.mean, style)} ± {number_text(interval.half_width, style)}"


def number_text(value: float, style: str) -> str:
    """Return one number in a style: a format specification, or ``si`` for counts. What rounds to zero has no sign."""
    if style != "si":
        return format(value, f"z{style}")
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.999995 * size:  # of the smaller unit there would be 1000.00
            return f"{value / size:.2f}{suffix}"
    return f"{value:z.0f}"


def markdown(table: Table) -> str:
    """Return a table that is also readable as text."""
    grid = [list(table.columns), *[[_escaped(cell.text) for cell in row] for row in table.rows]]
    widths = [max(3, *(len(line[i]) for line in grid)) for i in range(len(table.columns))]
    left_columns = _left_columns(table)
    rule = ["-" * w if i in left_columns else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = [f"**{table.title}**", ""]
    lines += ["| " + " | ".join(_aligned(line, widths, left_columns)) + " |" for line in (grid[0], rule, *grid[1:])]
    if table.note:
        lines += ["", table.note]
    return "\n".join(lines) + "\n"


def frame(table: Table) -> pd.DataFrame:
    """Return the numbers: for each column the mean, ``<id>_half_width`` and ``<id>_n``, and problems as text.

    Fewer than `LEAST_SEEDS` seeds have no half width; several of them have ``<id>_values``, separated by spaces.
    An interval that does not lie evenly about its mean has ``<id>_low`` and ``<id>_high`` instead of a half width.
    """
    rows = []
    for cells in table.rows:
        row: dict[str, object] = {}
        for key, cell in zip(table.ids, cells):
            if cell.interval is None:
                row[key] = cell.text
                continue
            row[key] = cell.interval.mean
            if len(cell.values) > 1:
                row[f"{key}_values"] = " ".join(map(repr, cell.values))
            if cell.interval.half_width >= 0 and not cell.values:
                row[f"{key}_half_width"] = cell.interval.half_width
            if cell.interval.ends is not None:
                row[f"{key}_low"], row[f"{key}_high"] = cell.interval.ends
            row[f"{key}_n"] = cell.interval.n
        rows.append(row)
    return pd.DataFrame(rows)


def latex(table: Table) -> str:
    """Return a ``tabular`` with booktabs rules."""
    texts = pd.DataFrame([[cell.text for cell in row] for row in table.rows], columns=pd.Index(table.columns))
    styler = Styler(texts)
    styler.hide(axis="index")
    styler.format(escape="latex")
    styler.format_index(escape="latex", axis="columns")
    left_columns = _left_columns(table)
    columns = "".join("l" if i in left_columns else "r" for i in range(len(table.columns)))
    text = styler.to_latex(hrules=True, column_format=columns)
    return text.translate(str.maketrans(_LATEX))


def write(table: Table, folder: Path) -> list[Path]:
    """Write ``<name>.md``, ``.csv`` and ``.tex``, and ``<name>-runs.csv`` with the values of each run; return the paths.

    Raises:
        StorageError: The folder cannot be written.
    """
    texts = {"md": markdown(table), "csv": frame(table).to_csv(index=False), "tex": latex(table)}
    files = {f"{table.name}.{ending}": text for ending, text in texts.items()}
    if table.runs:
        files[f"{table.name}-runs.csv"] = pd.DataFrame(table.runs).to_csv(index=False)
    paths = []
    for name, text in files.items():
        paths.append(folder / name)
        atomic_write.write_atomically(paths[-1], text.encode())
    return paths


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")


def _left_columns(table: Table) -> set[int]:
    """Return the columns whose cells are at the left: the first one, and those with prose; numbers are at the right."""
    prose = {i for row in table.rows for i, cell in enumerate(row) if cell.interval is None and len(cell.text) > PROSE}
    return {0} | prose


def _aligned(line: Sequence[str], widths: Sequence[int], left_columns: Collection[int]) -> list[str]:
    return [text.ljust(w) if i in left_columns else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths))]
