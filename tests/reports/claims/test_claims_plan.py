"""Every statistic of every claim finds its numbers in the runs that ``conf/reproduce.yaml`` lists for the claims' table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from tests.fixtures.runs.report_runs import CARD
from vitscope.config import experiment_identity, loading, model_facts
from vitscope.reports import run_index
from vitscope.reports.claims import claim_verdicts
from vitscope.reports.claims.effect_sizes import ReportRuns
from vitscope.reports.measured_results import Measured
from vitscope.reports.model_costs import Costs
from vitscope.reports.value_lookup import Selection
from vitscope.reproduce import plan
from vitscope.reproduce.trial import composed
from vitscope.runs import run_search
from vitscope.runs.metrics_log import Journal
from vitscope.runs.run_dir import Run

#: training images of each profile's data
IMAGES = {"smoke": 8192, "cifar10_small": 45_000, "cifar10": 45_000, "cifar100": 45_000, "imagenet": 1_281_167}

KINDS = ("msa", "conv", "mlp")
SCALARS = {
    "hessian_max_eigenvalue_spectrum": ["negative_eigenvalue_proportion", "average_positive_eigenvalue"],
    "sharpness": ["rise_r0.1", "nll_center"],
    "loss_slice": ["nll_center"],
    "branch_transfer": [f"contrast_{kind}" for kind in KINDS],
    "feature_map_variance": [f"log_variance_ratio_{kind}" for kind in KINDS],
    "frequency_noise_robustness": ["high_minus_low", "clean_accuracy"],
    "lesion": ["stage_end_msa_nll_excess"],
    "cka": ["block_structure"],
    "corruption": ["mean_accuracy"],
}  # fmt: skip


def recorded_facts(cfg: dict[str, Any], known: dict[str, Any] = {}) -> dict[str, Any]:  # noqa: B006  a cache
    """Return what training records of a model, counted once for each architecture."""
    key = loading.digest([cfg["model"], cfg["data"]["image_size"]])
    if key not in known:
        known[key] = model_facts.of_model(OmegaConf.create({"model": cfg["model"], "data": cfg["data"]}))
    return known[key]


def write(cfg: dict[str, Any], tags: tuple[str, ...], analyses: dict[str, Any], path: Path, images: int) -> None:
    """Write what training and measuring a trial leaves behind, with the cards that its probes would have."""
    run = Run(path)
    if not path.exists():
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(yaml.safe_dump(cfg))
        facts = {"command": "train", "status": "finished", model_facts.KEY: recorded_facts(cfg)}
        (path / "provenance.json").write_text(json.dumps(facts))
        journal = Journal(run.journal)
        journal.append(1, 0, {"val/accuracy": 0.4, "test/accuracy": 0.5})
        journal.close()
    fraction = cfg["data"]["fraction"]
    for name, node in analyses.items():
        probe, measure = node["probe"], node["_target_"].rpartition(".")[2]
        n = min(probe["n_images"], int(images * fraction) if probe["split"] == "train" else 10_000)
        card = dataclasses.replace(
            CARD, data=f"{cfg['data']['name']}, {fraction}", split=probe["split"], n_images=n,
            augmentation=cfg["objective"]["augment"] if probe["augment"] else "none",
            batch_size=min(n, probe["batch_size"]), solver={"construction": "equal_rms"},
        )  # fmt: skip
        record = {"measure": measure, "scalars": dict.fromkeys(SCALARS[measure], 0.5), "card": card.to_dict()}
        (run.results / name).mkdir(parents=True, exist_ok=True)
        for tag in tags:
            (run.results / name / f"{tag}-{loading.digest(node)}.json").write_text(json.dumps(record))


@pytest.mark.parametrize("profile", [pytest.param(p, marks=pytest.mark.slow) for p in IMAGES])
def test_no_part_of_a_claim_goes_without(profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Measured, "load", lambda self: SimpleNamespace(reference="initial"))
    # no claim is about costs, and a pass of each architecture takes half of this test's time
    monkeypatch.setattr(model_facts, "count", lambda model, image: model_facts.Cost(1, 1))
    for trial in plan.target("table-claims", plan.read(), profile).trials:
        if "seed=0" not in trial.overrides:
            continue
        composition = composed(trial, tmp_path)
        folder = tmp_path / experiment_identity.config_hash(
            composition
        )  # a run that several trials share is trained once
        cfg: Any = loading.plain(composition)
        write(cfg, trial.tags, cfg.pop("analysis"), folder, IMAGES[profile])
    found = Selection(run_index.collect(run_search.every(tmp_path)))
    lacking = {
        f"{judged.claim.name}: {finding.part.name}": finding.reason
        for judged in claim_verdicts.judge(ReportRuns(found, Costs()))
        for finding in judged.findings
        if finding.interval is None
    }
    assert lacking == {}
