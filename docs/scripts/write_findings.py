"""Fill the numbers of docs/findings.md from a committed study; the prose of the page is written by hand.

Usage: python docs/scripts/write_findings.py [--study FOLDER] [--page FILE] [--figures FOLDER] [--check]

The page has a block ``<!-- study: NAME -->`` ... ``<!-- end of study -->`` for ``summary`` and for each claim. The script
replaces what stands between the two comments and draws a figure for each claim. Run it again when the study has more seeds.
``--check`` writes nothing and ends with exit code 1 where the page is not what the study gives. The default study is
``results/cifar10_small``; where it is missing, the blocks say so.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from vitscope.reports.claims import claim_verdicts
from vitscope.reports.claims.claim_verdicts import (
    ALPHA,
    INCONCLUSIVE,
    MIN_SEEDS,
    NOT_MEASURED,
    ClaimVerdict,
    StatisticResult,
)
from vitscope.reports.claims.claims import CLAIMS
from vitscope.reports.claims.effect_sizes import ReportRuns
from vitscope.reports.exports import study_export, study_files
from vitscope.reports.figures import claims_figure
from vitscope.reports.model_costs import Costs
from vitscope.reports.run_entry import Entry
from vitscope.reports.value_lookup import Selection
from vitscope.stats.location_tests import fewest_values

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from docs.scripts.findings_figures import draw_claim
from docs.scripts.page_images import save_webp

PAGE = ROOT / "docs" / "findings.md"
FIGURES = ROOT / "docs" / "findings"
STUDY = ROOT / "results" / "cifar10_small"
TARGET = "table-claims"
_BLOCK = re.compile(r"(?P<open><!-- study: (?P<name>[a-z_]+) -->\n).*?(?P<close><!-- end of study -->)", re.DOTALL)
_HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
_SIGN = {1: "above 0", -1: "below 0"}


def fill(text: str, blocks: Mapping[str, str]) -> str:
    """Return the page with each block's content replaced.

    Raises:
        ValueError: The page lacks a block, or has one that is unknown.
    """
    names = [match["name"] for match in _BLOCK.finditer(text)]
    if sorted(names) != sorted(blocks):
        raise ValueError(f"Expected the blocks {sorted(blocks)}, each once, received {sorted(names)}.")
    return _BLOCK.sub(lambda match: f"{match['open']}\n{blocks[match['name']].strip()}\n\n{match['close']}", text)


def section_links(text: str) -> dict[str, str]:
    """Return the anchor of the section that each block stands in, as GitHub and the site make it from the heading."""
    links: dict[str, str] = {}
    for match in _BLOCK.finditer(text):
        headings = _HEADING.findall(text[: match.start()])
        links[match["name"]] = re.sub(r"[^a-z0-9 -]", "", headings[-1].lower()).replace(" ", "-") if headings else ""
    return links


def missing_study(study: str) -> dict[str, str]:
    """Return the blocks of a page without a study."""
    text = (
        f"No numbers yet: the study `{study}` is not in the repository. "
        f"`make table-claims PROFILE=cifar10_small EXPORT={study}` makes it."
    )
    return {"summary": text, **{claim.name: "Not measured yet." for claim in CLAIMS}}


def write_blocks(
    text: str, judged: Sequence[ClaimVerdict], entries: Sequence[Entry], study: str, figures: str
) -> dict[str, str]:
    """Return the text of each block.

    Args:
        text: The page.
        judged: The verdicts.
        entries: Runs of the study.
        study: Name of the study's folder in the text.
        figures: Path of the figures' folder from the page.
    """
    blocks = {"summary": _summary(section_links(text), judged, entries, study, figures)}
    verdicts = verdict_texts(judged)
    return blocks | {j.claim.name: _claim_block(j, len(judged), figures, verdicts[j.claim.name]) for j in judged}


def seed_count(verdict: ClaimVerdict) -> str:
    """Return the numbers of seeds of a claim's statistics, such as ``3`` or ``2 to 3``; empty where there are none."""
    counts = [f.interval.n for f in verdict.findings if f.interval is not None]
    return "" if not counts else str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def sign_count(verdict: ClaimVerdict) -> str:
    """Return how many of a claim's measured statistics have the claimed sign, such as ``3 of 4``; empty without any."""
    measured = [f for f in verdict.findings if f.interval is not None]
    n_agreeing = sum(f.interval.mean * f.part.sign > 0 for f in measured if f.interval is not None)
    return f"{n_agreeing} of {len(measured)}" if measured else ""


def _summary(
    links: Mapping[str, str], judged: Sequence[ClaimVerdict], entries: Sequence[Entry], study: str, figures: str
) -> str:
    n_seeds = len({entry.seed for entry in entries})
    trained = [entry for entry in entries if not entry.superseded]
    hours = sum(float(entry.facts.get("wall_s") or 0.0) for entry in trained) / 3600
    verdicts = verdict_texts(judged)
    rows = [
        f"| [{j.claim.statement}](#{links[j.claim.name]}) "
        f"| {verdicts[j.claim.name]} | {_p_text(j.p_holm)} | {seed_count(j)} | {sign_count(j)} |"
        for j in judged
    ]
    lines = [
        f"Study `{study}`: {', '.join(study_export.data_names(entries))}, {n_seeds} seed{'s' * (n_seeds != 1)}, "
        f"{len(trained)} trainings{_lengths(trained)}, {hours:.1f} hours of training without measuring. "
        f"{_what_follows(judged)}",
        "",
        "| claim | verdict | p (Holm) | seeds | signs as claimed |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "Signs as claimed: how many of the claim's statistics have a mean with the claimed sign. The count is a description and "
        "no test.",
        "",
        claim_verdicts.power_text(judged),
    ]
    if _has_spread(judged):
        lines += ["", f"![Effects of all statistics in standard deviations between seeds]({figures}/effects.webp)"]
    return "\n".join(lines)


def _lengths(entries: Sequence[Entry]) -> str:
    """Return in words how long the trainings were."""
    epochs = {(entry.config.get("trainer") or {}).get("max_epochs") for entry in entries}
    values = sorted(float(value) for value in epochs if value is not None and float(value) > 0)
    return f" of {', '.join(f'{value:g}' for value in values)} epochs or an equal number of steps" if values else ""


def verdict_texts(judged: Sequence[ClaimVerdict]) -> dict[str, str]:
    """Return each claim's verdict in words, with "provisional", or "networks disagree" where that leaves it open."""
    provisional = claim_verdicts.provisional_claims(judged)
    texts = {}
    for verdict in judged:
        disagree = verdict.verdict == INCONCLUSIVE and any(f.disagreeing for f in verdict.findings)
        addition = ", networks disagree" if disagree else ", provisional" if verdict.claim.name in provisional else ""
        texts[verdict.claim.name] = verdict.verdict + addition
    return texts


def _what_follows(judged: Sequence[ClaimVerdict]) -> str:
    """Return which verdicts the claims' numbers of seeds allow."""
    n_claims, needed = len(judged), fewest_values(ALPHA / len(judged))
    counts = [
        min(f.interval.n for f in verdict.findings if f.interval is not None)
        for verdict in judged
        if not np.isnan(verdict.p)
    ]
    most, n_tested = max(counts, default=0), len(counts)
    texts = []
    if most >= needed:
        n_enough = sum(n >= needed for n in counts)
        texts.append(
            f"{n_enough} of {n_claims} claims have {needed} seeds or more, the fewest with which the exact tests can pass the "
            f"correction over {n_claims} claims. A contradiction by one of several statistics needs more, as stated with each "
            "claim."
        )
    elif n_tested:
        texts.append(
            f"With {most} seeds a claim can be suggested at most, unless few claims are tested: the exact tests after the "
            f"correction over {n_claims} claims need {needed} seeds."
        )
    if n_few := n_claims - sum(n >= MIN_SEEDS for n in counts):
        texts.append(
            f"{n_few} of {n_claims} claims have a statistic with fewer than {MIN_SEEDS} seeds. From {MIN_SEEDS} seeds on a claim "
            f"can be suggested, from {needed} on it can be supported or contradicted."
        )
    if 0 < n_tested < n_claims and most >= needed:
        provisional = claim_verdicts.provisional_claims(judged)
        names = " and ".join(f'"{verdict.claim.statement}"' for verdict in judged if verdict.claim.name in provisional)
        texts.append(
            f"The correction is over the {n_tested} claims that are judged. "
            + (
                f"Over all {n_claims}, with p = 1 for those that are not, {names} would be undecided: the verdict is provisional."
                if provisional
                else f"Over all {n_claims}, with p = 1 for those that are not, the verdicts are the same."
            )
        )
    return " ".join(texts)


def _claim_block(verdict: ClaimVerdict, n_claims: int, figures: str, verdict_text: str) -> str:
    if verdict.verdict == NOT_MEASURED:
        return f"**Verdict: not measured.** {_sentence(verdict.reason)}".strip()
    p = _p_text(verdict.p_holm)
    p_text = f" (p = {p} after the correction over claims)" if p else ""
    n_parts = len(verdict.findings)
    lines = [
        f"**Verdict: {verdict_text}**{p_text}. {_sentence(verdict.reason)}".strip(),
        "",
        "| statistic | claimed | effect [95 % interval] | seeds | alone |",
        "|---|---|---|---|---|",
        *(_row(finding) for finding in verdict.findings),
        "",
        f"A verdict for the claim needs {fewest_values(ALPHA / n_claims)} seeds at the first step of the correction, "
        f"one against it {fewest_values(ALPHA / (n_claims * n_parts))}.",
        "",
        f"![Effect of each statistic by seed, with the mean and its 95 % interval]({figures}/{verdict.claim.name}.webp)",
    ]
    if repeated := repeated_text(verdict):
        lines[-2:-2] = ["", repeated]
    compared = _compared(verdict)
    if compared:
        lines += ["", "Compared:", "", *(f"- {_escaped(pair)}" for pair in compared)]
    left_out = dict.fromkeys(text for f in verdict.findings for text in f.effect.refused.split("; ") if text)
    if left_out:
        lines += ["", "Left out:", "", *(f"- {_escaped(text)}" for text in left_out)]
    return "\n".join(lines)


def repeated_text(verdict: ClaimVerdict) -> str:
    """Return in words how many statistics have the values of another one; empty without any."""
    values = [tuple(sorted(f.effect.values.items())) for f in verdict.findings if f.effect.values]
    n_repeated = len(values) - len(set(values))
    return (
        f"{n_repeated} of the {len(values)} statistics have the numbers of another one, because they compare the same results, "
        "and are no further evidence."
        if n_repeated
        else ""
    )


def _compared(verdict: ClaimVerdict) -> list[str]:
    """Return what a claim's statistics compare, each once; a mean over several experiments by its statistic's name."""
    effects = [(f.part.name, f.effect) for f in verdict.findings if f.effect.compared]
    means = [f"{name}: {effect.compared}" for name, effect in effects if effect.parts]
    alone = [pair for _, effect in effects if not effect.parts for pair in effect.compared.split("; ")]
    return [*means, *dict.fromkeys(alone)]


def _row(finding: StatisticResult) -> str:
    n = "" if finding.interval is None else str(finding.interval.n)
    alone = finding.verdict + (f": {finding.reason}" if finding.reason else "")
    effect = claim_verdicts.effect_text(finding)
    return f"| {finding.part.name} | {_SIGN[finding.part.sign]} | {effect} | {n} | {_escaped(alone)} |"


def _sentence(text: str) -> str:
    return f"{_escaped(text[0].upper() + text[1:])}." if text else ""


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _p_text(p: float) -> str:
    return "" if np.isnan(p) else f"{p:.2g}"


def _has_spread(judged: Sequence[ClaimVerdict]) -> bool:
    return any(f.interval is not None and f.interval.half_width > 0 for j in judged for f in j.findings)


def draw_figures(judged: Sequence[ClaimVerdict], data: Sequence[str], folder: Path) -> None:
    """Write the figures of the page, and remove those of claims that are no longer measured."""
    for file in folder.glob("*.webp"):
        file.unlink()
    texts = verdict_texts(judged)
    pictures = {j.claim.name: draw_claim(j, data, texts[j.claim.name]) for j in judged}
    if _has_spread(judged):
        pictures["effects"] = claims_figure.draw(judged, data)
    for name, figure in pictures.items():
        if figure is not None:
            print(save_webp(figure, folder / f"{name}.webp"), flush=True)


def judge_study(study: Path) -> tuple[list[ClaimVerdict], list[Entry]]:
    """Return the verdicts of a study and its runs."""
    entries = study_export.read(study, TARGET)
    return claim_verdicts.judge(ReportRuns(Selection(entries), Costs())), entries


def main(arguments: Sequence[str]) -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--study", type=Path, default=STUDY, help="a folder that export= has written")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is out of date")
    options = parser.parse_args(arguments)
    matplotlib.use("agg")
    text = options.page.read_text(encoding="utf-8")
    study = options.study.resolve()
    name = study.relative_to(ROOT).as_posix() if study.is_relative_to(ROOT) else study.name
    if (study / study_files.INDEX).is_file():
        judged, entries = judge_study(study)
        figures = Path(os.path.relpath(options.figures.resolve(), options.page.resolve().parent)).as_posix()
        blocks = write_blocks(text, judged, entries, name, figures)
    else:
        judged, entries, blocks = [], [], missing_study(name)
    filled = fill(text, blocks)
    if options.check:
        if filled != text:
            print(f"{options.page} is out of date: run python docs/scripts/write_findings.py", file=sys.stderr)
        return int(filled != text)
    options.page.write_text(filled, encoding="utf-8")
    print(options.page)
    if judged:
        draw_figures(judged, study_export.data_names(entries), options.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
