"""Killed anywhere, any number of times, and gone on with: the losses of an uninterrupted run, bit for bit."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fixtures.programs.kills import Killed
from tests.fixtures.runs.run_folders import losses
from vitscope.analyses import runner
from vitscope.runs import metrics_log, run_end
from vitscope.runs.checkpoints import checkpoint_io
from vitscope.training import checkpoint_callback
from vitscope.training.lightning_module import Classifier

#: what may be under way when the kill comes
PHASES = {
    "a step": (Classifier, "training_step"),
    "an update": (Classifier, "on_before_optimizer_step"),
    "a validation": (Classifier, "validation_step"),
    "the end of an epoch": (checkpoint_callback.Checkpoints, "on_train_epoch_end"),
    "a save": (checkpoint_io, "write"),
    "a file's way to the disk": (os, "fsync"),
    "a file's change of name": (os, "replace"),
    "a row": (metrics_log.Journal, "append"),
    "a diagnostic": (runner, "_measured"),
}
WATCHED = ["analysis=[fourier]", "analysis.fourier.when.every_n_epochs=1", "analysis.fourier.probe.n_images=8"]
#: one kill: which phase, at which of its calls, before or after what it does
KILLS = st.tuples(st.sampled_from(sorted(PHASES)), st.integers(1, 8), st.booleans())


def killed(call, phase: str, at: int, before: bool, arguments: list[str]) -> None:
    owner, name = PHASES[phase]
    original = getattr(owner, name)
    seen = []

    def deadly(*args, **kwargs):
        seen.append(None)
        if len(seen) >= at and before:
            raise Killed
        result = original(*args, **kwargs)
        if len(seen) >= at:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_end, "note_end", lambda run, code, **facts: None)  # nobody writes down that it was killed
        patch.setattr(owner, name, deadly)
        call("train", *arguments)


@settings(
    max_examples=max(3, int(os.environ.get("FUZZ", "0")) // 20),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@pytest.mark.slow  # tests/cli/test_whole_training.py and tests/runs/checkpoints kill at chosen writes
@given(kills=st.lists(KILLS, min_size=1, max_size=2))
@pytest.mark.filterwarnings("ignore:checkpoint .* is damaged")
def test_a_kill_at_any_point(call, tiny, tmp_path, tmp_path_factory, kills) -> None:
    shared = [*tiny, *WATCHED, "trainer.max_epochs=2", "model.drop_path=0.2", "objective=strong", "test=false"]
    whole = tmp_path / "whole"
    if not whole.exists():
        assert call("train", *shared, f"run_dir={whole}") == 0
    folder = tmp_path_factory.mktemp("killed") / "run"
    arguments = [*shared, f"run_dir={folder}"]
    for kill in kills:
        killed(call, *kill, arguments)
        if (folder / "provenance.json").exists():
            arguments = [f"run={folder}", "ckpt_path=auto"]
        elif folder.exists():  # killed before the run was one: a sweep makes it anew, so does this test
            (folder / "config.yaml").unlink(missing_ok=True)
    assert call("train", *arguments) == 0
    assert losses(folder) == losses(whole)
    content, expected = (checkpoint_io.read(run / "checkpoints" / "last.ckpt") for run in (folder, whole))
    for name, tensor in expected["state_dict"].items():
        assert tensor.equal(content["state_dict"][name]), name
