"""Training and analysis record the model's facts, which reports read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from vitscope.analyses import analysis_run
from vitscope.runs.run_dir import Run


def test_training_and_analysis_record_the_model_s_facts(
    call: Callable[..., int], tiny: list[str], tmp_path: Path
) -> None:
    """A run without them (an older one) gets them when it is analyzed with its own model, not with another."""
    assert call("train", *tiny, "data=digits", "analysis=[]", "test=false", "trainer.max_epochs=1") == 0
    (file,) = (tmp_path / "runs").glob("*/provenance.json")
    facts = json.loads(file.read_text())
    recorded = facts.pop("model")
    assert recorded["family"] == "vit"
    assert recorded["parameters"] > 0
    assert recorded["flops"] > 0
    file.write_text(json.dumps(facts))
    run = Run(file.parent)
    cfg = run.config()
    assert analysis_run._is_own_model(cfg, run)
    assert call("analyze", f"run={file.parent}", "analysis=[taps]", "device=cpu", f"paths.runs={tmp_path}/runs") == 0
    assert json.loads(file.read_text())["model"] == recorded
    cfg.data.image_size = 64
    assert not analysis_run._is_own_model(cfg, run)
