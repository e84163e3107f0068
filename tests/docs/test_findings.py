"""docs/findings.md: its blocks are what the script writes from a study, for any number of seeds, and prose is kept."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from docs.scripts import write_findings
from docs.scripts.findings_figures import draw_claim
from docs.scripts.page_images import LIMIT
from tests.fixtures.runs.report_runs import rise, spectrum, write_run
from vitscope.reports import run_index
from vitscope.reports.claims import claim_verdicts
from vitscope.reports.claims.claim_verdicts import ClaimVerdict, StatisticResult
from vitscope.reports.claims.claims import CLAIMS
from vitscope.reports.claims.effect_sizes import Effect
from vitscope.reports.exports import study_export
from vitscope.reports.figures import claims_figure
from vitscope.runs import run_search
from vitscope.stats.t_tests import t_interval

PAGE_TEXT = write_findings.PAGE.read_text()


def write_study(root: Path, n_seeds: int) -> Path:
    """Write a study in which local attention has more accuracy and NEP falls with the bias, and the other claims lack runs."""
    rng = np.random.default_rng(0)
    for seed in range(n_seeds):
        noise = 0.01 * rng.standard_normal(8)
        for i, model in enumerate(("vit", "pit", "swin", "convnet")):
            write_run(root / "runs", model, seed, measured={"hessian": spectrum(0.4 - 0.1 * i + noise[i])})
        for i, kernel in enumerate((3, 5, "global")):
            write_run(
                root / "runs", "convit", seed, model__kernel_size=kernel, measured={"hessian": spectrum(0.1 * i + noise[4 + i])},
                metrics={"test/accuracy": (0.5, 0.6, 0.4)[i] + noise[7 - i]},
            )  # fmt: skip
        write_run(root / "runs", "alternet", seed, measured={"sharpness": rise(0.1)})
    entries = run_index.collect(run_search.every(root / "runs"))
    study_export.write(root / "study", "smoke", {write_findings.TARGET: entries})
    return root / "study"


def run_script(page: Path, study: Path, *words: str) -> int:
    return write_findings.main(
        ["--study", str(study), "--page", str(page), "--figures", str(page.parent / "findings"), *words]
    )


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "docs" / "findings.md"
    path.parent.mkdir()
    path.write_text(write_findings.PAGE.read_text())
    return path


def block(text: str, name: str) -> str:
    match = re.search(rf"<!-- study: {name} -->\n(.*?)<!-- end of study -->", text, re.DOTALL)
    assert match is not None
    return match[1]


def test_the_page_is_what_the_script_writes_from_the_committed_study() -> None:
    assert write_findings.main(["--check"]) == 0, "run python docs/scripts/write_findings.py"


def test_every_claim_has_a_question_controls_limits_and_a_measurement() -> None:
    text = write_findings.PAGE.read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[2:]  # after the opening and the summary
    assert len(sections) == len(CLAIMS)
    for claim, section in zip(CLAIMS, sections, strict=True):
        places = [section.index(f"<!-- study: {claim.name} -->")] + [
            section.index(f"**{word}")
            for word in ("Question.", "Controls.", "What it does not show.", "Which measurement would show it.")
        ]
        assert places[1] < places[2] < places[0] < places[3] < places[4]


@pytest.mark.parametrize(
    ("n_seeds", "consequence", "bias_verdict"),
    [
        (1, "11 of 11 claims have a statistic with fewer than 5 seeds", "inconclusive"),
        pytest.param(6, "With 6 seeds a claim can be suggested at most", "suggested", marks=pytest.mark.slow),
        (9, "2 of 11 claims have 9 seeds or more", "supported"),
    ],
)
def test_numbers_figures_and_verdicts_come_from_the_study(
    n_seeds: int, consequence: str, bias_verdict: str, page: Path, tmp_path: Path
) -> None:
    before = page.read_text()
    (page.parent / "findings").mkdir()
    (page.parent / "findings" / "msa_variance.webp").touch()  # of an older study, which measured it
    study = write_study(tmp_path, n_seeds)
    assert run_script(page, study) == 0
    text = page.read_text()
    judged = {j.claim.name: j for j in write_findings.judge_study(study)[0]}
    assert judged["weak_bias_negatives"].verdict == bias_verdict
    assert judged["msa_variance"].verdict == claim_verdicts.NOT_MEASURED
    summary = block(text, "summary")
    assert f"photos, {n_seeds} seed" in summary
    assert consequence in summary
    assert ("The correction is over the 2 claims that are judged" in summary) == (n_seeds == 9)
    assert claim_verdicts.provisional_claims(list(judged.values())) == set()
    bias = (
        f"[{judged['weak_bias_negatives'].claim.statement}](#weak-inductive-bias-brings-negative-hessian-eigenvalues)"
    )
    assert f"| {bias} | {bias_verdict} |" in summary
    signs = [f.interval.mean * f.part.sign > 0 for f in judged["weak_bias_negatives"].findings if f.interval]
    assert re.search(rf"\| {re.escape(bias)} .*\| {sum(signs)} of {len(signs)} \|", summary)
    assert write_findings.sign_count(judged["msa_variance"]) == ""
    for name, verdict in judged.items():
        written = block(text, name)
        assert f"**Verdict: {verdict.verdict}" in written
        figure = page.parent / "findings" / f"{name}.webp"
        assert (
            figure.is_file() == (verdict.verdict != claim_verdicts.NOT_MEASURED) == (f"findings/{name}.webp" in written)
        )
        for finding in verdict.findings if figure.is_file() else ():
            assert f"| {finding.part.name} |" in written
            assert claim_verdicts.effect_text(finding) in written
    assert ("findings/effects.webp" in summary) == (n_seeds > 1) == (page.parent / "findings/effects.webp").is_file()
    for file in (page.parent / "findings").iterdir():
        assert file.stat().st_size <= LIMIT
        with Image.open(file) as image:
            assert np.asarray(image).std() > 10
    # prose is untouched, a second run changes nothing, and a changed number is noticed
    outside = write_findings._BLOCK.sub(r"\g<open>\g<close>", text)
    assert outside == write_findings._BLOCK.sub(r"\g<open>\g<close>", before)
    assert run_script(page, study, "--check") == 0
    assert run_script(page, study) == 0
    assert page.read_text() == text
    page.write_text(text.replace("**Verdict: inconclusive", "**Verdict: supported", 1).replace("seeds", "sees", 1))
    assert run_script(page, study, "--check") == 1


def test_statistics_with_the_numbers_of_another_one_are_counted() -> None:
    assert "7 of the 16 statistics have the numbers of another one" in block(PAGE_TEXT, "msa_flattens")
    assert "of another one" not in block(PAGE_TEXT, "alternet_wins")


def test_numbers_of_the_prose_are_those_of_the_study() -> None:
    runs = [json.loads(file.read_text()) for file in (write_findings.STUDY / "runs").iterdir()]

    def mean(read: str, family: str, **options: str) -> float:
        """Return a metric's mean over the weakly augmented trainings of two epochs on all images, of ten seeds."""
        values = [
            run["metrics"][read]
            for run in runs
            if run["config"]["model"]["_target_"].endswith(f".{family}")
            and options.items() <= run["config"]["model"].items()
            and run["config"]["objective"]["mixup"] == 0
            and run["config"]["data"]["fraction"] == 1
            and run["config"]["trainer"]["max_epochs"] == 2
            and run["config"]["seed"] < 10
        ]
        assert len(values) == 10
        return float(np.mean(values))

    text = " ".join(PAGE_TEXT.split())
    msa, conv, uniform, blur = (
        f"{mean('test/accuracy', 'alternet', mixer=mixer, placement='stage_end'):.1%}".replace("%", " %")
        for mixer in ("msa", "conv", "uniform", "blur")
    )
    assert f"in the place of attention: {msa} against {conv}" in text
    assert f"With uniform attention the accuracy is {uniform}, and with a blur {blur}" in text
    ape = {name: mean("hessian/average_positive_eigenvalue", name) for name in ("vit", "pit", "swin", "convnet")}
    values = "{vit:.0f} in the ViT, {pit:.0f} in the PiT, {swin:.0f} in Swin and {convnet:.0f} in the ConvNet"
    assert f"mean APE is {values.format(**ape)}" in text
    nep = {name: mean("hessian/negative_eigenvalue_proportion", name) for name in ape}
    values = "{vit:.2f} in the ViT, {pit:.2f} in the PiT, {swin:.2f} in Swin and {convnet:.0f} in the ConvNet"
    assert f"mean NEP is {values.format(**nep)}" in text


def test_figures_state_data_seeds_and_bars() -> None:
    claim = next(claim for claim in CLAIMS if claim.name == "blocks_by_stage")
    values = {seed: 1.0 + 0.1 * seed for seed in range(6)}
    effect = Effect(values, parts=(("vit", values), ("pit", values)))
    finding = StatisticResult(claim.parts[0], effect, t_interval(list(values.values())), claim_verdicts.SUPPORTED)
    verdict = ClaimVerdict(claim, (finding,), claim_verdicts.SUPPORTED, 0.01, 0.01, "")
    for figure in (draw_claim(verdict, ["photos"], "supported"), claims_figure.draw([verdict], ["photos"])):
        assert figure is not None
        texts = "\n".join(text.get_text() for text in figure.findobj(Text))
        assert "photos, 6 seeds" in texts
        assert "mean with 95 % t-interval over seeds; small: seeds" in texts
        assert "supported" in texts


def test_slopes_are_named_with_the_unit_of_what_rises() -> None:
    units = {part.name: part.unit for claim in CLAIMS for part in claim.parts if part.name.startswith("slope")}
    assert all(unit.partition(" per ")[0] == ("nats" if "NLL" in name else "share") for name, unit in units.items())


def test_a_page_without_a_block_is_refused(page: Path, tmp_path: Path) -> None:
    page.write_text(page.read_text().replace("<!-- study: msa_variance -->", ""))
    with pytest.raises(ValueError, match=r"^Expected the blocks .*'msa_variance'.*each once, received"):
        run_script(page, tmp_path / "nothing")


@pytest.fixture(autouse=True)
def _quiet(capsys: pytest.CaptureFixture[str]) -> Any:
    yield
    capsys.readouterr()


def test_verdicts_that_hang_on_how_many_claims_are_judged_are_provisional(tmp_path: Path) -> None:
    judged = write_findings.judge_study(write_study(tmp_path, 9))[0]
    weaker = [
        dataclasses.replace(j, p=2 * j.p) if j.claim.name == "weak_bias_negatives" else j for j in judged
    ]  # 2/256 is below 0.05 over two claims and above it over eleven
    assert claim_verdicts.provisional_claims(weaker) == {"weak_bias_negatives"}
    statement = next(j.claim.statement for j in weaker if j.claim.name == "weak_bias_negatives")
    assert f"over all 11 claims would not decide: {statement}." in claim_verdicts.table(weaker, ["photos"]).note
    assert "Provisional" not in claim_verdicts.table(judged, ["photos"]).note
