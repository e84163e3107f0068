"""Verdicts on the paper's claims: supported, contradicted, suggested, inconclusive or not measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vitscope.reports.claims.claims import CLAIMS, Claim, ClaimStatistic
from vitscope.reports.claims.effect_sizes import Effect, ReportRuns
from vitscope.reports.tables.table import Cell, Table
from vitscope.runtime.text_layout import count_text
from vitscope.stats.location_tests import LocationTests, fewest_values, location_tests, power, smallest_p
from vitscope.stats.t_tests import LEVEL, Interval, holm, t_interval

SUPPORTED, CONTRADICTED, INCONCLUSIVE, NOT_MEASURED = "supported", "contradicted", "inconclusive", "not measured"
#: verdicts of the t-test alone, where there are too few seeds for the exact tests
SUGGESTED, SUGGESTED_AGAINST = "suggested", "suggested against"

#: smallest number of seeds on which a claim is judged at all
MIN_SEEDS = 5

#: chance of any false verdict, over all claims
ALPHA = 1 - LEVEL

#: most statistics of one reason that a verdict names; more are counted, and the rows of the table name them
MAX_NAMED = 2

#: true effects, in standard deviations between seeds, whose power the table states
POWER_EFFECTS = (1.0, 2.0, 4.0)


@dataclass(frozen=True)
class StatisticResult:
    """A statistic of a claim with its measured effect.

    Attributes:
        part: The statistic.
        effect: Effect of each seed, with the compared experiments.
        interval: Mean over seeds with its t-interval; None where nothing was measured.
        verdict: Verdict of this statistic alone, before the correction over claims.
        reason: Reason why it is undecided; empty if it is decided.
        tests: p-values of the three tests; None where nothing was measured.
        disagreeing: Names of networks that have the opposite sign of the mean, which then decides nothing.
    """

    part: ClaimStatistic
    effect: Effect
    interval: Interval | None
    verdict: str
    reason: str = ""
    tests: LocationTests | None = None
    disagreeing: tuple[str, ...] = ()

    @property
    def is_usable(self) -> bool:
        """Whether there are enough seeds, which differ, to judge by."""
        return self.tests is not None and self.tests.n >= MIN_SEEDS and not math.isnan(self.tests.t)

    @property
    def is_opposite(self) -> bool:
        """Whether the mean has not the sign that the claim predicts."""
        return self.interval is not None and self.interval.mean * self.part.sign < 0


@dataclass(frozen=True)
class ClaimEvidence:
    """Joint evidence of the measured statistics of a claim.

    Attributes:
        direction: 1 for the claim, -1 against it, 0 for neither.
        p: Two-sided p-value by all three tests; NaN where nothing can be judged.
        p_t: That of the t-test alone.
        is_one_sign: Whether all seeds agree in the sign of every statistic that the direction rests on.
    """

    direction: int
    p: float
    p_t: float
    is_one_sign: bool = False


@dataclass(frozen=True)
class ClaimVerdict:
    """A claim with its verdict.

    Attributes:
        claim: The claim.
        findings: Results of the claim's statistics.
        verdict: ``supported``, ``contradicted``, ``suggested``, ``suggested against``, ``inconclusive`` or ``not measured``.
        p: Uncorrected two-sided p-value, the largest of the three tests'; NaN if undecided.
        p_holm: The p-value after Holm's correction over all claims.
        reason: Reason in words.
        p_t_holm: The p-value of the t-test alone after the correction.
    """

    claim: Claim
    findings: tuple[StatisticResult, ...]
    verdict: str
    p: float
    p_holm: float
    reason: str
    p_t_holm: float = math.nan


def judge(report_runs: ReportRuns, claims: Sequence[Claim] = CLAIMS) -> list[ClaimVerdict]:
    """Return every claim's verdict.

    A claim is the conjunction of its parts. The p-value of a part is the largest of three two-sided tests over seeds:
    Student's t-test, the exact sign-flip permutation test and the sign test (`vitscope.stats.location_tests`). A claim is
    supported where every part was measured on at least `MIN_SEEDS` seeds, has the predicted sign, and the largest of their
    p-values passes Holm's correction over the claims (an intersection-union test needs no correction within a claim). It is
    contradicted where one part has the opposite sign and its p-value, times the number of parts, passes. A part that is a mean
    over several networks is evidence for neither where one of them has the opposite sign of the mean by the t-test at 5%.

    Where the t-test alone passes, all seeds agree in sign, and there are too few seeds for the exact tests to pass whatever the
    effect, the claim is ``suggested`` (or ``suggested against``). Otherwise it is inconclusive, or not measured.

    The chance of any false verdict among all claims is at most 5% where, for each claim without an effect, the effects of seeds
    are normal, or symmetric about zero (as paired differences of equally distributed runs are), or have the median zero. It is
    not for a skewed effect whose mean alone is zero: no test is (Bahadur & Savage 1956).

    Numbers that a part sets against each other were measured under the same conditions, see
    `vitscope.core.objective_card`: operator, solver, batch size, objective, images. Those that were not, and those whose
    conditions were not recorded, are left out and named, also where the selection lets figures overlay them.
    """
    results = {
        claim.name: tuple(_finding(part, _measured_effect(part, report_runs)) for part in claim.parts)
        for claim in claims
    }
    evidence = {claim.name: _evidence(results[claim.name]) for claim in claims}
    adjusted = holm({name: e.p for name, e in evidence.items()})
    adjusted_t = holm({name: e.p_t for name, e in evidence.items()})
    n_tested = sum(not math.isnan(e.p) for e in evidence.values())
    verdicts = []
    for claim in claims:
        evidence_of_claim, p, p_t = evidence[claim.name], adjusted[claim.name], adjusted_t[claim.name]
        verdict, reason = _verdict(results[claim.name], evidence_of_claim, p, p_t, n_tested)
        verdicts.append(ClaimVerdict(claim, results[claim.name], verdict, evidence_of_claim.p, p, reason, p_t))
    return verdicts


def _measured_effect(part: ClaimStatistic, report_runs: ReportRuns) -> Effect:
    """Return the effect of a statistic, over results that share their conditions among the runs it compares."""
    recording_selection = report_runs.selection.fresh_copy(allow_different=True)
    part.measure(replace(report_runs, selection=recording_selection))
    shared_selection = recording_selection.sharing_among_requested()
    effect = part.measure(replace(report_runs, selection=shared_selection))
    return replace(effect, refused="; ".join(filter(None, (effect.refused, *shared_selection.refusals()))))


def _finding(part: ClaimStatistic, effect: Effect) -> StatisticResult:
    if not effect.values:
        reasons = [f"needs {effect.lacking}" if effect.lacking else "no values", effect.refused]
        return StatisticResult(part, effect, None, NOT_MEASURED, "; ".join(filter(None, reasons)))
    values = list(effect.values.values())
    interval, tests = t_interval(values), location_tests(values)
    agrees = interval.mean * part.sign > 0
    verdict, reason = _part_verdict(agrees, tests)
    if verdict != INCONCLUSIVE and (disagreeing := _disagreeing_parts(effect, interval.mean)):
        names = " and ".join(disagreeing)
        reason = f"the networks disagree: the opposite of the mean holds for {names}"
        return StatisticResult(part, effect, interval, INCONCLUSIVE, reason, tests, disagreeing)
    if (agrees or effect.decides_nothing) and effect.blocked and verdict != INCONCLUSIVE:
        verdict, reason = INCONCLUSIVE, effect.blocked
    return StatisticResult(part, effect, interval, verdict, reason, tests)


def _disagreeing_parts(effect: Effect, mean: float) -> tuple[str, ...]:
    """Return the experiments whose own sign is the opposite of their common mean's by the t-test, uncorrected.

    The more sensitive of the tests, since it can only withhold a verdict.
    """
    names = []
    for name, values_by_seed in effect.parts:
        values = list(values_by_seed.values())
        if sum(values) * mean < 0 and location_tests(values).t < ALPHA:
            names.append(name)
    return tuple(names)


def _part_verdict(agrees: bool, tests: LocationTests) -> tuple[str, str]:
    """Return the verdict on one statistic without a correction, and the reason where it is undecided."""
    if tests.n < MIN_SEEDS:
        return INCONCLUSIVE, f"{tests.n} of {MIN_SEEDS} seeds"
    if math.isnan(tests.t):
        return INCONCLUSIVE, "the seeds do not differ, so there is no interval"
    if tests.t >= ALPHA:
        return INCONCLUSIVE, "the interval crosses zero"
    if tests.largest < ALPHA:
        return (SUPPORTED if agrees else CONTRADICTED), ""
    if tests.attainable >= ALPHA and tests.largest <= tests.attainable:
        return (
            SUGGESTED if agrees else SUGGESTED_AGAINST
        ), f"{tests.n} of {fewest_values(ALPHA)} seeds for exact tests"
    name, p = ("sign-flip", tests.sign_flip) if tests.sign_flip >= ALPHA else ("sign", tests.sign)
    return INCONCLUSIVE, f"not by the {name} test (p {p:.2g})"


def _evidence(findings: Sequence[StatisticResult]) -> ClaimEvidence:
    """Return what the parts say together.

    Parts on too few seeds, those whose networks disagree and those that decide nothing are evidence for neither direction.
    """
    usable = [f for f in findings if f.is_usable]
    if not usable:
        return ClaimEvidence(0, math.nan, math.nan)
    agreeing = [f for f in usable if not f.disagreeing]
    tests = [f.tests for f in agreeing if f.tests is not None]
    opposite = [f.tests for f in agreeing if f.is_opposite and f.tests is not None and not f.effect.decides_nothing]
    if opposite:
        # the least p-value of the opposite parts, corrected for the number of all
        p = min(1.0, len(findings) * min(t.largest for t in opposite))
        p_t = min(1.0, len(findings) * min(t.t for t in opposite))
        return ClaimEvidence(-1, p, p_t, min(opposite, key=lambda t: t.t).is_one_sign)
    if len(agreeing) < len(findings) or any(f.effect.blocked for f in agreeing):
        return ClaimEvidence(0, 1.0, 1.0)
    return ClaimEvidence(1, max(t.largest for t in tests), max(t.t for t in tests), all(t.is_one_sign for t in tests))


def _verdict(
    findings: Sequence[StatisticResult], evidence_of_claim: ClaimEvidence, p_holm: float, p_t_holm: float, n_tested: int
) -> tuple[str, str]:
    if all(f.interval is None for f in findings):
        return NOT_MEASURED, "; ".join(dict.fromkeys(f.reason for f in findings))
    against = "; ".join(f.part.name for f in findings if f.is_usable and f.is_opposite and f.verdict != INCONCLUSIVE)
    if evidence_of_claim.direction and p_holm < ALPHA:
        return (SUPPORTED, "") if evidence_of_claim.direction > 0 else (CONTRADICTED, against)
    if evidence_of_claim.direction and p_t_holm < ALPHA:
        needed = _needed_seeds(findings, evidence_of_claim.direction, n_tested)
        n = min(f.tests.n for f in findings if f.is_usable and f.tests is not None)
        if n < needed and evidence_of_claim.is_one_sign:
            seeds = f"by the t-test alone: {n} seeds, and exact tests decide from {needed} on"
            return (SUGGESTED, seeds) if evidence_of_claim.direction > 0 else (SUGGESTED_AGAINST, f"{seeds}; {against}")
    if all(f.verdict == SUPPORTED for f in findings):
        return INCONCLUSIVE, f"not after the correction over claims (p {p_holm:.2g})"
    return INCONCLUSIVE, _undecided_text(findings)


def _undecided_text(findings: Sequence[StatisticResult]) -> str:
    """Return why statistics do not support a claim; those of one reason are counted, or named where they are few."""
    names: dict[str, list[str]] = {}
    for finding in findings:
        if finding.verdict != SUPPORTED:
            names.setdefault(finding.reason or finding.verdict, []).append(finding.part.name)
    return "; ".join(f"{_named_or_counted(group, len(findings))}: {reason}" for reason, group in names.items())


def _named_or_counted(names: Sequence[str], total: int) -> str:
    if len(names) <= MAX_NAMED:
        return " and ".join(names)
    return f"all {total} statistics" if len(names) == total else f"{len(names)} of {total} statistics"


def _needed_seeds(findings: Sequence[StatisticResult], direction: int, n_tested: int) -> int:
    """Return the number of seeds from which on exact tests can decide a claim at any step of Holm's correction."""
    n_parts = 1 if direction > 0 else len(findings)
    return fewest_values(ALPHA / (n_tested * n_parts))


def table(judged: Sequence[ClaimVerdict], data: Sequence[str] = ()) -> Table:
    """Return the claims as a table: a row a claim, and a row for each part of those that were measured at all.

    Args:
        judged: The verdicts.
        data: Names of the data sets, which the note states.
    """
    rows: list[tuple[Cell, ...]] = []
    for j in judged:
        p = "" if math.isnan(j.p_holm) else f"{j.p_holm:.2g}"
        rows.append(tuple(Cell(t) for t in (j.claim.statement, j.claim.figure, j.verdict, "", "", p, j.reason)))
        if j.verdict == NOT_MEASURED:
            continue
        for f in j.findings:
            n = "" if f.interval is None else str(f.interval.n)
            rest = (Cell(t) for t in (n, "", _compared(f)))
            rows.append((Cell(f"– {f.part.name}"), Cell(""), Cell(f.verdict), Cell(effect_text(f), f.interval), *rest))
    return Table(
        name="claims",
        title="Claims of the paper",
        columns=("claim", "figure", "verdict", "effect [95% interval]", "seeds", "p (Holm)", "compared, or why not"),
        ids=("claim", "figure", "verdict", "effect", "seeds", "p_holm", "compared"),
        rows=tuple(rows),
        note=(f"Data: {', '.join(data)}. " if data else "")
        + "Effects are means over paired seeds with 95% t-intervals. A verdict needs all parts of a claim and "
        "three tests over seeds (Student's t, exact sign-flip permutations, sign test) after Holm's correction over the claims; "
        "p is the largest of the three. Suggested: by the t-test alone, all seeds of one sign, too few seeds for exact tests. "
        "Verdicts of parts are before that correction. " + _provisional_text(judged) + power_text(judged),
    )


def provisional_claims(judged: Sequence[ClaimVerdict]) -> set[str]:
    """Return the names of decided claims that a correction over all claims, with p = 1 for undecided ones, would not decide."""
    over_all = holm({verdict.claim.name: 1.0 if math.isnan(verdict.p) else verdict.p for verdict in judged})
    return {
        verdict.claim.name
        for verdict in judged
        if verdict.verdict in (SUPPORTED, CONTRADICTED) and over_all[verdict.claim.name] >= ALPHA
    }


def _provisional_text(judged: Sequence[ClaimVerdict]) -> str:
    """Return a sentence on the provisional verdicts with a space after it; empty without any."""
    names = provisional_claims(judged)
    statements = "; ".join(verdict.claim.statement for verdict in judged if verdict.claim.name in names)
    return (
        f"Provisional, as a correction over all {len(judged)} claims would not decide: {statements}. " if names else ""
    )


def power_text(judged: Sequence[ClaimVerdict]) -> str:
    """Return in words the power of the design: the chance to decide a claim of one part by the seeds that were measured."""
    tested = [j for j in judged if not math.isnan(j.p)]
    counts = sorted({f.tests.n for j in tested for f in j.findings if f.is_usable and f.tests})
    if not counts:
        return "No claim has enough seeds to be judged, so the design has no power."
    level = ALPHA / len(tested)
    texts = [_power_of(n, level) for n in dict.fromkeys((counts[0], counts[-1]))]
    return (
        "Power for a claim of one part and normal noise, at the first step of the correction over "
        f"{count_text(len(tested), 'claim')}: {'; '.join(texts)}. Claims of several parts have less."
    )


def _power_of(n: int, level: float) -> str:
    if smallest_p(n) >= level:
        return f"{n} seeds can decide nothing at this step, {fewest_values(level)} are needed"
    shares = ", ".join(f"{100 * power(n, level, effect):.0f}% for {effect:g}" for effect in POWER_EFFECTS)
    return f"with {n} seeds {shares} standard deviations between seeds"


def _compared(finding: StatisticResult) -> str:
    effect = finding.effect
    if effect.values:
        return "; ".join(filter(None, (effect.compared, effect.refused)))
    return effect.compared or finding.reason


def effect_text(finding: StatisticResult) -> str:
    """Return an effect with its interval, such as ``-0.31 [-0.52, -0.10] ln``."""
    interval = finding.interval
    if interval is None:
        return ""
    ends = f" [{interval.low:z.3g}, {interval.high:z.3g}]" if interval.half_width >= 0 else ""
    return f"{interval.mean:z.3g}{ends} {finding.part.unit}".strip()
