"""A training bounded by steps is the one bounded by as many epochs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.fixtures.runs.run_folders import losses
from vitscope.runs import metrics_log


def test_a_training_of_steps_alone_has_the_schedule_of_as_many_epochs(
    call: Callable[..., int], tiny: list[str], tmp_path: Path
) -> None:
    shared = [*tiny, "analysis=[]", "trainer.limit_train_batches=4", "callbacks=[checkpoint,lr_monitor]", "test=false"]
    assert call("train", *shared, "trainer.max_epochs=2", f"run_dir={tmp_path}/epochs") == 0
    steps = ["trainer.max_epochs=-1", "trainer.max_steps=8"]
    assert call("train", *shared, *steps, f"run_dir={tmp_path}/steps") == 0
    assert len(losses(tmp_path / "steps")) == 8
    assert losses(tmp_path / "steps") == losses(tmp_path / "epochs")
    rates = [row["lr-AdamW"] for row in metrics_log.read(tmp_path / "steps" / "metrics.jsonl") if "lr-AdamW" in row]
    assert max(rates) > 1e-5
