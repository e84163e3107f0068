"""Verdicts on the paper's claims: supported, contradicted, inconclusive or not measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vitscope.reports.claims.claims import CLAIMS, Claim, ClaimStatistic
from vitscope.reports.claims.effect_sizes import Effect, ReportRuns
from vitscope.reports.tables.table import Cell, Table
from vitscope.stats.t_tests import LEVEL, Interval, holm, t_interval

SUPPORTED, CONTRADICTED, INCONCLUSIVE, NOT_MEASURED = "supported", "contradicted", "inconclusive", "not measured"

#: smallest number of seeds on which a claim is decided
MIN_SEEDS = 5


@dataclass(frozen=True)
class StatisticResult:
    """A statistic of a claim with its measured effect.

    Attributes:
        part: The statistic.
        effect: Effect of each seed, with the compared experiments.
        interval: Mean over seeds with its t-interval; None where nothing was measured.
        verdict: Verdict of this statistic alone, before the correction over claims; ``shown`` where it tests nothing.
        reason: Reason why it is undecided; empty if it is decided.
    """

    part: ClaimStatistic
    effect: Effect
    interval: Interval | None
    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class ClaimVerdict:
    """A claim with its verdict.

    Attributes:
        claim: The claim.
        findings: Results of the claim's statistics.
        verdict: ``supported``, ``contradicted``, ``inconclusive`` or ``not measured``.
        p: Uncorrected one-sided p-value; NaN if undecided.
        p_holm: The p-value after Holm's correction over all claims.
        reason: Reason in words.
    """

    claim: Claim
    findings: tuple[StatisticResult, ...]
    verdict: str
    p: float
    p_holm: float
    reason: str


def judge(report_runs: ReportRuns, claims: Sequence[Claim] = CLAIMS) -> list[ClaimVerdict]:
    """Return every claim's verdict.

    A claim is the conjunction of its tested parts. It is supported where every one of them was measured on at least
    `MIN_SEEDS` seeds, has the predicted sign, and the largest of their p-values passes Holm's correction over the claims
    (an intersection-union test needs no correction within a claim). It is contradicted where one part has the opposite
    sign and its p-value, times the number of parts, passes. Otherwise it is inconclusive, or not measured.

    Numbers that a part sets against each other were measured under the same conditions, see
    `vitscope.core.objective_card`; those that were not are left out and named, unless the selection allows them to differ.
    """
    results = {
        claim.name: tuple(_finding(part, _measured_effect(part, report_runs)) for part in claim.parts)
        for claim in claims
    }
    evidence = {claim.name: _evidence(results[claim.name]) for claim in claims}
    adjusted = holm({name: p for name, (_, p) in evidence.items()})
    verdicts = []
    for claim in claims:
        direction, p = evidence[claim.name]
        verdict, reason = _verdict(results[claim.name], direction, adjusted[claim.name])
        verdicts.append(ClaimVerdict(claim, results[claim.name], verdict, p, adjusted[claim.name], reason))
    return verdicts


def _measured_effect(part: ClaimStatistic, report_runs: ReportRuns) -> Effect:
    """Return the effect of a statistic, over results that share their conditions among the runs it compares."""
    if report_runs.selection.allow_different:
        return part.measure(report_runs)
    recording_selection = report_runs.selection.fresh_copy(allow_different=True)
    part.measure(replace(report_runs, selection=recording_selection))
    shared_selection = recording_selection.sharing_among_requested()
    effect = part.measure(replace(report_runs, selection=shared_selection))
    return replace(effect, refused="; ".join(shared_selection.refusals()))


def _finding(part: ClaimStatistic, effect: Effect) -> StatisticResult:
    if not effect.values:
        reasons = [f"needs {effect.lacking}" if effect.lacking else "no values", effect.refused]
        return StatisticResult(part, effect, None, NOT_MEASURED, "; ".join(filter(None, reasons)))
    interval = t_interval(list(effect.values.values()))
    if not part.tested:
        return StatisticResult(part, effect, interval, "shown")
    reason = _undecided(interval, effect)
    if reason:
        return StatisticResult(part, effect, interval, INCONCLUSIVE, reason)
    agrees = interval.mean * part.sign > 0
    if agrees and effect.blocked:
        return StatisticResult(part, effect, interval, INCONCLUSIVE, effect.blocked)
    return StatisticResult(part, effect, interval, SUPPORTED if agrees else CONTRADICTED)


def _undecided(interval: Interval, effect: Effect) -> str:
    if interval.n < MIN_SEEDS:
        return f"{interval.n} of {MIN_SEEDS} seeds"
    if math.isnan(interval.p):
        return "the seeds do not differ, so there is no interval"
    return "the interval crosses zero" if interval.p >= 1 - LEVEL else ""


def _evidence(findings: Sequence[StatisticResult]) -> tuple[int, float]:
    """Return the direction that the measured parts take (1 for the claim, -1 against it, 0 for neither) and its p-value.

    Parts on too few seeds are evidence for neither.
    """
    tested = [f for f in findings if f.part.tested]
    usable = [
        f for f in tested if f.interval is not None and f.interval.n >= MIN_SEEDS and not math.isnan(f.interval.p)
    ]
    if not usable:
        return 0, math.nan
    p_values_against = [f.interval.p for f in usable if f.interval and f.interval.mean * f.part.sign < 0]
    p_against = min(1.0, len(tested) * min(p_values_against)) if p_values_against else 1.0
    all_support = len(usable) == len(tested) and not p_values_against and not any(f.effect.blocked for f in usable)
    p_for = max(f.interval.p for f in usable if f.interval) if all_support else 1.0
    return (1, p_for) if p_for <= p_against and all_support else (-1, p_against) if p_values_against else (0, 1.0)


def _verdict(findings: Sequence[StatisticResult], direction: int, p_holm: float) -> tuple[str, str]:
    tested = [f for f in findings if f.part.tested]
    measured = [f for f in tested if f.interval is not None]
    if not measured:
        return NOT_MEASURED, "; ".join(dict.fromkeys(f.reason for f in tested))
    if direction and p_holm < 1 - LEVEL:
        contradicted = [f.part.name for f in tested if f.verdict == CONTRADICTED]
        return (SUPPORTED, "") if direction > 0 else (CONTRADICTED, "; ".join(contradicted))
    reasons = [f"{f.part.name}: {f.verdict if f.verdict == CONTRADICTED else f.reason}" for f in tested
               if f.verdict != SUPPORTED]  # fmt: skip
    if not reasons:
        reasons = [f"not after the correction over claims (p {p_holm:.2g})"]
    return INCONCLUSIVE, "; ".join(dict.fromkeys(reasons))


def table(judged: Sequence[ClaimVerdict]) -> Table:
    """Return the claims as a table: a row a claim, and a row for each part of those that were measured at all."""
    rows: list[tuple[Cell, ...]] = []
    for j in judged:
        p = "" if math.isnan(j.p_holm) else f"{j.p_holm:.2g}"
        rows.append(tuple(Cell(t) for t in (j.claim.statement, j.claim.figure, j.verdict, "", "", p, j.reason)))
        for f in j.findings if j.verdict != NOT_MEASURED else ():
            n = "" if f.interval is None else str(f.interval.n)
            rest = (Cell(t) for t in (n, "", _compared(f)))
            rows.append((Cell(f"– {f.part.name}"), Cell(""), Cell(f.verdict), Cell(effect_text(f), f.interval), *rest))
    return Table(
        name="claims",
        title="Claims of the paper",
        columns=("claim", "figure", "verdict", "effect [95% interval]", "seeds", "p (Holm)", "compared, or why not"),
        ids=("claim", "figure", "verdict", "effect", "seeds", "p_holm", "compared"),
        rows=tuple(rows),
        note=f"Effects are means over paired seeds with 95% t-intervals; a claim needs all its parts, {MIN_SEEDS} seeds of "
        "each, and Holm's correction over the claims. Verdicts of parts are before that correction.",
    )


def _compared(finding: StatisticResult) -> str:
    effect = finding.effect
    return (
        "; ".join(filter(None, (effect.compared, effect.refused)))
        if effect.values
        else effect.compared or finding.reason
    )


def effect_text(finding: StatisticResult) -> str:
    """Return an effect with its interval, such as ``-0.31 [-0.52, -0.10] ln``."""
    interval = finding.interval
    if interval is None:
        return ""
    ends = f" [{interval.low:.3g}, {interval.high:.3g}]" if interval.half_width >= 0 else ""
    return f"{interval.mean:.3g}{ends} {finding.part.unit}".strip()
