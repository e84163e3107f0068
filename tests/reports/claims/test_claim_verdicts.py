from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from scipy import stats

from vitscope.reports.claims import claim_verdicts
from vitscope.reports.claims.claims import CLAIMS, Claim, ClaimStatistic
from vitscope.reports.claims.effect_sizes import Effect, ReportRuns
from vitscope.reports.model_costs import Costs
from vitscope.reports.value_lookup import Selection
from vitscope.stats import location_tests

NOTHING = ReportRuns(Selection([]), Costs())
CLEAR = {0: 1.0, 1: 1.1, 2: 0.9, 3: 1.05, 4: 0.95, 5: 1.02}
SEVEN = CLEAR | {6: 0.97}
FIVE = {seed: CLEAR[seed] for seed in range(5)}
WEAK_FIVE = {0: 1.0, 1: 2.0, 2: 0.4, 3: 2.4, 4: 0.7}  # p = 0.03 by t
UNCLEAR = {0: 1.0, 1: -1.1, 2: 0.9, 3: -0.9, 4: 0.2}


def part(
    values: Mapping[int, float], sign: int = 1, *, blocked: str = "", decides_nothing: bool = False
) -> ClaimStatistic:
    effect = Effect(values, "a − b", "" if values else "runs", blocked, decides_nothing=decides_nothing)
    return ClaimStatistic(f"part {sign} {values}", sign, lambda bench: effect, "nats")


def claim(*parts: ClaimStatistic, name: str = "x") -> Claim:
    return Claim(name, f"Statement {name}", "1", "statistic", "runs", parts)


def judge(*parts: ClaimStatistic) -> claim_verdicts.ClaimVerdict:
    (found,) = claim_verdicts.judge(NOTHING, [claim(*parts)])
    return found


def test_the_sign_decides_between_supported_and_contradicted() -> None:
    assert judge(part(CLEAR)).verdict == "supported"
    against = judge(part(CLEAR, -1))
    assert against.verdict == "contradicted"
    assert "part -1" in against.reason
    negative = {seed: -value for seed, value in CLEAR.items()}
    assert judge(part(negative, -1)).verdict == "supported"
    assert judge(part(CLEAR)).p == 2 / 64  # of the sign-flip test: all six seeds have one sign
    t = judge(part(CLEAR)).p_t_holm
    assert t == pytest.approx(stats.ttest_1samp(list(CLEAR.values()), 0).pvalue, rel=1e-12)


def test_an_interval_that_crosses_zero_decides_nothing() -> None:
    found = judge(part(UNCLEAR))
    assert found.verdict == "inconclusive"
    assert "crosses zero" in found.reason


def test_statistics_of_one_reason_are_named_where_they_are_few_and_counted_where_they_are_many() -> None:
    few = {seed: CLEAR[seed] for seed in range(2)}
    a, b, c = (part({seed: value + shift for seed, value in few.items()}) for shift in (0.0, 0.1, 0.2))
    assert judge(a, b).reason == f"{a.name} and {b.name}: 2 of 5 seeds"
    assert judge(a, b, c).reason == "all 3 statistics: 2 of 5 seeds"
    unclear = part(UNCLEAR)
    reason = judge(a, b, c, unclear).reason
    assert reason == f"3 of 4 statistics: 2 of 5 seeds; {unclear.name}: the interval crosses zero"


def test_fewer_than_five_seeds_decide_nothing_however_clear() -> None:
    few = {seed: CLEAR[seed] for seed in range(4)}
    for sign in (1, -1):
        found = judge(part(few, sign))
        assert (found.verdict, found.p_holm) == ("inconclusive", pytest.approx(math.nan, nan_ok=True))
        assert "4 of 5 seeds" in found.reason


def test_nothing_measured_says_what_is_lacking() -> None:
    found = judge(part({}))
    assert (found.verdict, found.reason) == ("not measured", "needs runs")


def test_a_claim_needs_all_its_parts_and_falls_with_one() -> None:
    assert judge(part(CLEAR), part(CLEAR, 1)).verdict == "supported"
    assert judge(part(CLEAR), part({})).verdict == "inconclusive"
    assert judge(part(CLEAR), part(UNCLEAR)).verdict == "inconclusive"
    assert judge(part(SEVEN), part(SEVEN, -1)).verdict == "contradicted"


def test_parts_against_a_claim_are_counted_against_its_number_of_parts() -> None:
    p = judge(part(CLEAR, -1)).p
    assert judge(part(CLEAR, -1), part(CLEAR), part({})).p == pytest.approx(3 * p, rel=1e-12)


def test_what_blocks_an_effect_blocks_support_and_not_contradiction() -> None:
    found = judge(part(CLEAR, blocked="not monotone"))
    assert found.verdict == "inconclusive"
    assert "not monotone" in found.reason
    assert judge(part(CLEAR, -1, blocked="not monotone")).verdict == "contradicted"


def test_what_decides_nothing_is_no_contradiction_either() -> None:
    """An AlterNet that was tried in one recipe loses to the best of several ConvNets, which says nothing of the claim."""
    for sign in (1, -1):
        found = judge(part(CLEAR, sign, blocked="not each at its best", decides_nothing=True))
        assert (found.verdict, found.p) == ("inconclusive", 1.0)
        assert "not each at its best" in found.reason


def test_a_suggestion_needs_all_seeds_of_one_sign() -> None:
    clear = part({seed: 1.0 + 0.01 * seed for seed in range(10)})
    assert judge(part(FIVE), clear).verdict == "suggested"
    mixed = {seed: 1.0 + 0.01 * seed for seed in range(9)} | {9: -0.01}  # nine of ten: the sign test has p = 0.0215
    found = judge(part(FIVE), part(mixed))
    assert found.p == 0.0625  # that of five seeds of one sign
    assert found.p_t_holm < 0.05
    assert found.verdict == "inconclusive"
    assert judge(part(FIVE, -1)).verdict == "suggested against"


def test_networks_disagree_by_the_t_test_alone() -> None:
    """Five seeds cannot pass the exact tests; the t-test is the most sensitive, and a disagreement only withholds a verdict."""
    parts = tuple(
        (name, {seed: scale * x for seed, x in FIVE.items()}) for name, scale in (("one", 3.0), ("other", -1.0))
    )
    effect = Effect(FIVE, "both", parts=parts)
    found = judge(ClaimStatistic("mean", 1, lambda bench: effect, "nats"))
    assert found.verdict == "inconclusive"
    assert "the opposite of the mean holds for other" in found.reason


@pytest.mark.parametrize(("agreeing", "verdict"), [(FIVE, "suggested"), (WEAK_FIVE, "inconclusive")])
def test_every_part_must_pass_for_a_suggestion(agreeing: dict[int, float], verdict: str) -> None:
    """The p-value of a claim is the largest of its parts', by the t-test as well."""
    judged = claim_verdicts.judge(NOTHING, [claim(part(FIVE), part(agreeing)), claim(part(UNCLEAR), name="y")])
    assert judged[0].verdict == verdict
    assert judged[0].p_t_holm == pytest.approx(2 * stats.ttest_1samp(list(agreeing.values()), 0).pvalue, rel=1e-9)


@pytest.mark.parametrize("noise", [0.0, 2e-17, 1e-8])  # equal, and equal but for the rounding of float64 and of float32
@pytest.mark.parametrize("sign", [1, -1])
def test_seeds_that_do_not_differ_give_no_interval_and_no_verdict(sign: int, noise: float) -> None:
    found = judge(part({seed: 0.25 + seed * noise for seed in range(5)}, sign))
    assert found.verdict == "inconclusive"
    assert "do not differ" in found.reason
    assert math.isnan(found.p)
    table = claim_verdicts.table([found])
    assert table.rows[1][3].text == "0.25 nats"  # the mean without brackets
    assert judge(part(CLEAR), part({seed: 0.25 + seed * noise for seed in range(5)})).verdict == "inconclusive"


def test_the_correction_goes_over_the_claims_that_were_measured() -> None:
    (alone,) = claim_verdicts.judge(NOTHING, [claim(part(CLEAR))])
    assert alone.verdict == "supported"
    weak = {0: 1.0, 1: 2.0, 2: 0.4, 3: 2.4, 4: 0.7, 5: 1.9, 6: 0.05}  # p = 0.009 by t, 2 / 128 by signs
    claims = [claim(part(weak), name="a"), claim(part(UNCLEAR), name="b"), claim(part({}), name="c")]
    first, second, third = claim_verdicts.judge(NOTHING, claims)
    assert (first.verdict, first.p_holm) == ("supported", 4 / 128)
    assert second.p_holm >= first.p_holm
    assert math.isnan(third.p_holm)
    claims += [claim(part(UNCLEAR), name=name) for name in "defg"]
    first = claim_verdicts.judge(NOTHING, claims)[0]
    assert first.p_holm == pytest.approx(6 * 2 / 128)
    assert first.verdict == "inconclusive"  # 0.009 x 6 does not pass by t either
    assert "correction" in first.reason


@pytest.mark.parametrize(("sign", "verdict"), [(1, "suggested"), (-1, "suggested against")])
def test_few_seeds_of_one_sign_suggest_and_do_not_decide(sign: int, verdict: str) -> None:
    found = judge(part(FIVE, sign))
    assert found.verdict == verdict
    assert "5 seeds, and exact tests decide from 6 on" in found.reason
    assert (found.p, found.p_holm) == (2 / 32, 2 / 32)
    assert found.p_t_holm < 0.001
    eleven = [claim(part(values, sign), name=str(i)) for i, values in enumerate([CLEAR] * 11)]
    judged = claim_verdicts.judge(NOTHING, eleven)  # 2 / 64 passes alone, not at the first step of eleven
    assert {j.verdict for j in judged} == {verdict}
    assert "decide from 9 on" in judged[0].reason


def test_parts_against_a_claim_need_more_seeds_for_each_other_part() -> None:
    found = judge(part(CLEAR, -1), part(CLEAR), part(CLEAR))
    assert found.verdict == "suggested against"  # 3 x 2 / 64
    assert "exact tests decide from 7 on; part -1" in found.reason
    assert judge(part(SEVEN, -1), part(SEVEN), part(SEVEN)).verdict == "contradicted"


def test_the_part_with_the_clearest_effect_against_a_claim_tells_whether_its_seeds_agree() -> None:
    """Two parts are against the claim; the seeds of one of them do not agree in sign, and its t-test is the weaker."""
    mixed = {0: 1.0, 1: 1.01, 2: 0.99, 3: 1.0, 4: -0.001}
    assert judge(part(FIVE, -1), part(mixed, -1)).verdict == "suggested against"
    assert judge(part(mixed, -1), part(FIVE, -1)).verdict == "suggested against"


def test_one_seed_of_the_other_sign_is_not_suggested_however_small_it_is() -> None:
    found = judge(part({0: 1.0, 1: 1.01, 2: 0.99, 3: 1.0, 4: -0.001, 5: 1.0}))
    assert found.verdict == "inconclusive"
    assert found.p_t_holm < 0.05
    assert "sign-flip test" in found.reason


def test_a_statistic_of_seeds_that_disagree_in_sign_is_not_suggested_either() -> None:
    """Of five seeds four of one sign pass the t-test; the exact tests would not pass with more such seeds either."""
    found = judge(part({0: 1.0, 1: 1.01, 2: 0.99, 3: 1.0, 4: -0.001}))
    assert found.findings[0].tests is not None
    assert found.findings[0].tests.t < 0.05
    assert found.findings[0].verdict == "inconclusive"
    assert found.findings[0].reason == "not by the sign-flip test (p 0.12)"


def test_a_skewed_effect_whose_median_lies_on_the_other_side_is_not_decided() -> None:
    values = {seed: -0.1 - 0.001 * seed for seed in range(12)} | {12: 3.0, 13: 3.1, 14: 2.9, 15: 3.2, 16: 3.3, 17: 2.8}
    found = judge(part(values))
    assert found.findings[0].interval is not None
    assert found.findings[0].interval.p < 0.05
    assert found.findings[0].tests is not None
    assert found.findings[0].tests.sign == 1.0
    assert found.verdict == "inconclusive"
    assert "sign test" in found.reason


def test_a_missing_part_leaves_a_clear_claim_undecided_and_says_which() -> None:
    found = judge(part(CLEAR), part({}))
    assert found.verdict == "inconclusive"
    assert "needs runs" in found.reason
    assert judge(part(CLEAR), part(FIVE)).verdict == "suggested"  # a seed is missing for one part


def test_the_table_states_the_power_of_the_design() -> None:
    ten = {seed: 1.0 + 0.01 * seed for seed in range(10)}
    claims = [claim(part(ten), name=str(i)) for i in range(11)]
    note = claim_verdicts.table(claim_verdicts.judge(NOTHING, claims)).note
    level = 0.05 / 11
    shares = [f"{100 * location_tests.power(10, level, effect):.0f}% for {effect:g}" for effect in (1, 2, 4)]
    assert f"correction over 11 claims: with 10 seeds {', '.join(shares)} standard deviations" in note
    few = claim_verdicts.table(claim_verdicts.judge(NOTHING, [claim(part(FIVE), name=str(i)) for i in range(2)]))
    assert "5 seeds can decide nothing at this step, 7 are needed" in few.note
    assert "no power" in claim_verdicts.table(claim_verdicts.judge(NOTHING)).note


def test_the_power_is_stated_for_the_fewest_and_the_most_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim_verdicts, "power", lambda n, level, effect: n * level * effect)
    parts = [part({seed: 1.0 + 0.01 * seed for seed in range(n)}) for n in (10, 7, 8)]
    text = claim_verdicts.power_text(
        claim_verdicts.judge(NOTHING, [claim(parts[0], parts[1], name="a"), claim(parts[2])])
    )
    assert (
        "over 2 claims: with 7 seeds 18% for 1, 35% for 2, 70% for 4 standard deviations" in text
    )  # 7 x 0.05 / 2 x effect
    assert "; with 10 seeds 25% for 1, 50% for 2, 100% for 4 standard deviations" in text
    assert "8 seeds" not in text


def test_without_runs_every_claim_of_the_paper_is_not_measured() -> None:
    found = claim_verdicts.judge(NOTHING)
    assert [j.verdict for j in found] == ["not measured"] * len(CLAIMS)
    assert all(f.reason.startswith("needs ") for j in found for f in j.findings)
    assert len({c.name for c in CLAIMS}) == len(CLAIMS)
    assert all(p.sign in (1, -1) for c in CLAIMS for p in c.parts)


def test_the_table_lists_parts_where_something_was_measured() -> None:
    table = claim_verdicts.table(
        claim_verdicts.judge(NOTHING, [claim(part(CLEAR), name="a"), claim(part({}), name="b")])
    )
    texts = [[cell.text for cell in row] for row in table.rows]
    assert [row[0] for row in texts] == ["Statement a", "– " + part(CLEAR).name, "Statement b"]
    assert texts[1][3] == "1 [0.929, 1.08] nats"  # 1.00333 ± 2.571 x 0.0712 / 6**.5 = 0.0747
    assert texts[2][2] == "not measured"
