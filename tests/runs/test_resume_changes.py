"""Overrides of a run that goes on: another experiment is refused by its key, what may change is written down."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests.fixtures.configs.configurations import composed
from tests.fixtures.runs.report_runs import write_run
from tests.fixtures.runs.run_folders import losses, only_run
from vitscope.config import experiment_identity
from vitscope.runs import metrics_log, resume_changes, run_dir
from vitscope.runs.checkpoints import checkpoint_io, checkpoint_weights
from vitscope.runtime import stop_flag
from vitscope.training.lightning_module import Classifier

SHORT = ["analysis=[]", "test=false", "trainer.limit_train_batches=2"]


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [row for row in capsys.readouterr().err.strip().splitlines() if not row.startswith("epoch ")]
    return line


def contents(run: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in run.rglob("*") if file.is_file()}


@pytest.fixture
def finished(trained) -> Path:
    """Return a finished run of one epoch of two steps."""
    return trained(*SHORT, "callbacks=[checkpoint,ema,lr_monitor]", "callbacks.ema.decay=0.5")


#: what each makes another experiment by, with the exit code and the stored value
REFUSED = [
    ("seed=1", 2, "0"), ("data.mixup=0.5", 2, "0.0"), ("objective.mixup=0.5", 2, "0.0"), ("data.fraction=0.5", 2, "1.0"),
    ("trainer.precision=bf16-mixed", 2, "32-true"),
    ("trainer.accumulate_grad_batches=2", 2, "1"), ("objective.label_smoothing=0.1", 2, "0.0"), ("data.split_seed=3", 2, "0"),
    ("trainer.limit_train_batches=3", 2, "2"), ("callbacks.ema.decay=0.9", 2, "0.5"), ("trainer.gradient_clip_val=1.0", 2, "5.0"),
    ("trainer.limit_val_batches=1.0", 2, "1"), ("data.augment=none", 2, "crop_flip"),
    ("model.drop_path=0.1", 2, ""), ("compile=true", 2, "False"), ("channels_last=true", 2, "False"),
    ("callbacks.checkpoint.monitor=val/nll", 2, "val/accuracy"), ("callbacks.checkpoint.mode=min", 2, "max"),
    ("trainer.check_val_every_n_epoch=2", 2, "1"), ("data.drop_last=true", 2, "False"), ("data.eval_batch_size=32", 2, "64"),
    ("trainer.limit_test_batches=2", 2, "1"), ("trainer.deterministic=true", 2, "False"), ("data.batch_size=8", 4, "16"),
    ("optimizer.lr=0.5", 4, "0.001"), ("optimizer.schedule.kind=constant", 4, "cosine"),
    ("optimizer.betas=[0.8,0.9]", 4, "[0.9, 0.999]"),
    ("++callbacks.stop={_target_:pytorch_lightning.callbacks.EarlyStopping,monitor:val/nll}", 2, "None"),
]  # fmt: skip


@pytest.mark.slow
def test_another_experiment_is_refused(call, finished, capsys) -> None:
    """Finished or stopped: the key, the stored and the received value are named, and no file of the run is touched."""
    for status, overrides in (("finished", REFUSED), ("stopped", REFUSED[::9])):
        run_dir.Run(finished).note(status=status)
        before = contents(finished)
        capsys.readouterr()
        for override, code, stored in overrides:
            assert call("train", f"run={finished}", "ckpt_path=last", override) == code, override
            line, key = error_line(capsys), override.lstrip("+").partition("=")[0]
            assert line.startswith(f"error: {key}"), line
            assert f"the run was made with {stored}" in line, line
            assert "or start a new run: " in line
        assert contents(finished) == before


def test_limits_below_what_is_done_are_refused(call, tiny, tmp_path, monkeypatch, capsys) -> None:
    begin, seen = Classifier.on_train_batch_start, []

    def stopping(self: Classifier, batch: object, batch_idx: int) -> None:
        seen.append(batch_idx)
        if len(seen) == 3:
            stop_flag.request(signal.SIGTERM)
        begin(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "on_train_batch_start", stopping)
        assert call("train", *tiny, *SHORT, "trainer.max_epochs=4") == 143
    run = only_run(tmp_path)
    capsys.readouterr()
    assert call("train", f"run={run}", "ckpt_path=last", "trainer.max_epochs=1") == 2
    assert error_line(capsys).startswith(
        "error: trainer.max_epochs=1: the run was made with 4, and 2 epochs have been started; give at least 2"
    )
    assert call("train", f"run={run}", "ckpt_path=last", "trainer.max_steps=2") == 2
    assert "3 steps have been started; give at least 3" in error_line(capsys)
    assert call("train", f"run={run}", "ckpt_path=last", "trainer.max_epochs=2") == 0  # downward, but not below
    assert len(losses(run)) == 4
    assert run_dir.Run(run).config().trainer.max_epochs == 2


def test_what_may_change_is_written_down(call, finished, tmp_path, capsys) -> None:
    """A finished run with more epochs goes on training; configuration and provenance say since which step."""
    stored = run_dir.Run(finished).config()
    changed = {
        "trainer.max_epochs": 2,
        "trainer.log_every_n_steps": 2,
        "callbacks.checkpoint.every_n_epochs": 2,
        "data.num_workers": 1,
    }
    assert (
        call("train", f"run={finished}", "ckpt_path=last", *(f"{key}={value}" for key, value in changed.items())) == 0
    )
    assert checkpoint_io.read(finished / "checkpoints" / "last.ckpt")["global_step"] == 4
    now, facts = run_dir.Run(finished).config(), run_dir.Run(finished).provenance()
    for key, value in changed.items():
        assert OmegaConf.select(now, key) == value
        OmegaConf.update(now, key, OmegaConf.select(stored, key))
    assert now == stored
    rows = {row["key"]: (row["step"], row["old"], row["new"]) for row in facts["changes"]}
    assert rows == {key: (2, OmegaConf.select(stored, key), value) for key, value in changed.items()}
    assert facts["status"] == "finished"
    assert facts["config_hash"] == experiment_identity.config_hash(run_dir.Run(finished).config())
    capsys.readouterr()
    assert (
        call("train", f"run={finished}", "ckpt_path=last", "trainer.log_every_n_steps=5") == 0
    )  # nothing left to train
    captured = capsys.readouterr()
    assert "nothing to do" in captured.out
    assert "no training step is left, so that these keys have no effect: trainer.log_every_n_steps" in captured.err
    assert len(run_dir.Run(finished).provenance()["changes"]) == len(changed)


def test_more_epochs_follow_their_own_schedule(call, tiny, finished) -> None:
    """The rates of the steps to come are those of the longer cosine, from the first of them on."""
    assert call("train", f"run={finished}", "ckpt_path=last", "trainer.max_epochs=3") == 0
    rates = {row["step"]: row["lr-AdamW"] for row in metrics_log.read(finished / "metrics.jsonl") if "lr-AdamW" in row}
    cfg = run_dir.Run(finished).config()
    schedule = dict(cfg.optimizer.schedule.items())
    for step in (2, 3, 4, 5):
        expected = cfg.optimizer.lr * runs_schedule(step, schedule)
        assert rates[step] == pytest.approx(expected, rel=1e-12), step
    assert rates[1] == pytest.approx(cfg.optimizer.lr * runs_schedule(1, schedule, epochs=1), rel=1e-12)


def runs_schedule(step: int, options: dict, epochs: int = 3) -> float:
    from vitscope.core import lr_schedule

    return lr_schedule.factor(step, steps_per_epoch=2, total_epochs=epochs, **options)


def test_a_new_run_from_the_weights_alone(call, finished, tmp_path, capsys) -> None:
    """The command that the error names works: other rates, the same weights, from step 0, in a folder of its own."""
    capsys.readouterr()
    assert call("train", f"run={finished}", "optimizer.lr=0.5") == 4
    line = error_line(capsys)
    command = shlex.split(line.partition("from its weights alone, python train.py ")[2])
    assert call("train", *command) == 0
    (other,) = [path for path in (tmp_path / "runs").iterdir() if path != finished]
    assert run_dir.Run(other).config().optimizer.lr == 0.5
    old, init = (
        checkpoint_io.read(path)
        for path in (finished / "checkpoints" / "last.ckpt", other / "checkpoints" / "init.ckpt")
    )
    assert init["global_step"] == 0
    for name, tensor in checkpoint_weights.model_state(old).items():
        assert torch.equal(tensor, checkpoint_weights.model_state(init)[name]), name
    started = run_dir.Run(other).provenance()["started_from"]
    assert started == {"checkpoint": str(finished / "checkpoints" / "last.ckpt"), "step": 0, "weights_only": True}


def test_weights_alone_need_a_new_run(call, finished, capsys) -> None:
    capsys.readouterr()
    assert call("train", f"run={finished}", "ckpt_weights_only=true") == 2
    assert error_line(capsys).startswith("error: ckpt_weights_only=True: ")


def test_a_seed_that_the_checkpoint_does_not_have(call, finished, capsys) -> None:
    """config.yaml changed by hand is refused too."""
    run = run_dir.Run(finished)
    cfg = run.config()
    cfg.seed = 7
    (finished / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    run.note(status="stopped")
    capsys.readouterr()
    assert call("train", f"run={finished}", "ckpt_path=last", "trainer.max_epochs=2") == 4
    assert error_line(capsys).startswith("error: seed=7: the checkpoint was made with 0")


def test_the_table_names_keys_that_there_are() -> None:
    cfg = composed("train", "trainer=ddp", "callbacks=[checkpoint,lr_monitor]")
    flat = {change.key for change in resume_changes._differences({}, OmegaConf.to_container(cfg, resolve=False), "")}
    leaves = set(every_key(OmegaConf.to_container(cfg, resolve=False))) | flat
    for pattern in resume_changes.CHANGEABLE:
        assert any(resume_changes.re.fullmatch(pattern, key) for key in leaves), pattern


def every_key(node: object, key: str = "") -> list[str]:
    if not isinstance(node, dict):
        return [key]
    return [
        key,
        *(leaf for name, value in node.items() for leaf in every_key(value, f"{key}.{name}" if key else str(name))),
    ]


def test_a_refused_resume_leaves_the_run_as_it_was(call, finished, tmp_path, capsys) -> None:
    """A finished run whose checkpoint was refused once counted as failed, and its results had other names."""
    run = run_dir.Run(finished)
    before = run.provenance()
    content = checkpoint_io.read(finished / "checkpoints" / "last.ckpt")
    content["vitscope"] = {**content["vitscope"], "seed": 9}
    torch.save(content, tmp_path / "other.ckpt")
    assert call("train", f"run={finished}", f"ckpt_path={tmp_path}/other.ckpt", "trainer.max_epochs=5") == 4
    assert "the checkpoint was made with 9" in capsys.readouterr().err
    assert run.provenance() == before
    assert run.provenance()["status"] == "finished"


def test_json_of_changes_can_be_read(finished) -> None:
    run = run_dir.Run(finished)
    cfg = run.config()
    resume_changes.record(run, cfg, [resume_changes.Change("trainer.devices", 1, "auto")], 2)
    resume_changes.record(run, cfg, [resume_changes.Change("trainer.devices", 1, "auto")], 2)  # killed in between
    assert json.loads((finished / "provenance.json").read_text())["changes"] == [
        {"step": 2, "key": "trainer.devices", "old": 1, "new": "auto"}
    ]


def test_what_is_stated_of_a_model_is_no_change() -> None:
    stored = OmegaConf.create({"model": {"_target_": "mylab.Net", "depth": 2}, "run_dir": "runs/a"})
    stated = OmegaConf.merge(stored, {"model": {"capabilities": {"residual_units": False}}})
    deeper = OmegaConf.merge(stated, {"model": {"depth": 3}})
    assert resume_changes.changes(stored, stated) == resume_changes.changes(stated, stored) == []
    assert resume_changes.changes(stored, deeper) == [resume_changes.Change("model.depth", 2, 3)]


def test_changes_of_several_resumes_are_all_kept(tmp_path: Path) -> None:
    """Whether the learning rates are another training's follows from the changes of the length, however early."""
    run = write_run(tmp_path, "vit")
    rows = [("trainer.max_epochs", 3, 9, 20), ("trainer.devices", 1, 2, 60)]
    for key, old, new, step in rows:
        resume_changes.record(run, run.config(), [resume_changes.Change(key, old, new)], step)
    assert [tuple(row[name] for name in ("key", "old", "new", "step")) for row in run.provenance()["changes"]] == rows
    assert experiment_identity.changed_lengths(run.config(), run.provenance()) == [["trainer.max_epochs", 3, 9]]


@pytest.mark.parametrize(("kind", "is_changeable"), [("LearningRateMonitor", True), ("EarlyStopping", False)])
def test_an_observer_is_not_replaced_by_what_may_stop_a_training(kind: str, is_changeable: bool) -> None:
    trees = [
        OmegaConf.create({"callbacks": {"watch": {"_target_": f"pytorch_lightning.callbacks.{name}"}}})
        for name in ("DeviceStatsMonitor", kind)
    ]
    for stored, cfg in (trees, reversed(trees)):
        assert resume_changes._is_changeable("callbacks.watch._target_", stored, cfg) == is_changeable
