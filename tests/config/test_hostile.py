"""Hostile and mistaken configurations, run folders, checkpoints, names and secrets."""

from __future__ import annotations

import contextlib
import json
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from tests.fixtures.configs.configurations import composed
from vitscope.config import caps, error_translation, instantiate, target_allowlist
from vitscope.config.validation import validate
from vitscope.runs import result_store, run_dir, run_end, run_overrides
from vitscope.runs.checkpoints import checkpoint_content, checkpoint_io
from vitscope.runtime import redaction
from vitscope.runtime.errors import CheckpointError, ConfigError

#: may not be named anywhere, by whatever way they are reached
TARGETS = [
    "os.system", "functools.partial", "builtins.eval", "pickle.loads", "joblib.load", "subprocess.Popen",
    "torch.load", "torch.hub.load", "torch.jit.load", "torch.utils.cpp_extension.load", "torch.ops.load_library",
    "torch.ops.aten.add", "torch.classes.load_library", "torch.classes.a.b", "torch.utils.collect_env.run",
    "torch.distributed.run.main", "torch.nn.modules.module.functools.partial", "torch.nn.modules.functional.torch.load",
    "torch.optim.optimizer.functools.partial", "torch.optim.Adam.step", "torch.nn.Module.load_state_dict",
    "torch.nn.init.normal_", "torch.nn.utils.parametrize.register_parametrization", "torch.nn.utils.clip_grad_norm_",
    "torchvision.datasets.utils.download_url", "torchvision.datasets.utils.extract_archive",
    "torchvision.datasets.ImageFolder", "torchvision.io.write_file", "torchvision.models.get_model",
    "timm.models.load_checkpoint", "timm.models.load_state_dict_from_hf", "timm.create_model", "timm.models.create_model",
    "timm.models.resume_checkpoint", "timm.utils.CheckpointSaver", "timm.data.create_dataset",
    "pytorch_lightning.utilities.model_helpers.is_overridden", "pytorch_lightning.seed_everything",
    "pytorch_lightning.LightningModule.load_from_checkpoint", "pytorch_lightning.cli.LightningCLI",
    "pytorch_lightning.utilities.upgrade_checkpoint.main", "torchmetrics.functional.accuracy",
    "vitscope", "vitscope.runs.run_dir.create", "vitscope.runtime.atomic_write.write_atomically",
    "vitscope.runs.result_store.load",
    "vitscope.runs.checkpoints.checkpoint_io.read", "vitscope.runs.checkpoints.checkpoint_io.write",
    "vitscope.sweep.trial_process.start",
    "vitscope.cli.exit_codes.run",
    "vitscope.data.sources.cifar.urllib.request.urlopen", "vitscope.data.sources.cifar.check_integrity",
    "vitscope.diagnostics.corruption.corruption.archive", "vitscope.diagnostics.fourier.plot.relative_log_amplitude",
    "vitscope.models.load_official_state_dict", "vitscope.models.timm_model.checkpoint_gradients",
    "vitscope.models.torch.load", "vitscope.load_probe", "vitscope.plot", "vitscope.Probe",
    "", ".", "torch..nn", "torch.nn.Linear.", "torch.nn.Linear\n", "torch.nn._reduction", "__main__.main",
]  # fmt: skip


@pytest.mark.parametrize("target", [*TARGETS, None, 5, ["torch.nn.Linear"]])
def test_no_way_leads_to_what_is_not_meant_to_be_configured(target: object) -> None:
    with pytest.raises(ConfigError) as caught:
        target_allowlist.resolve(target, "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["model", "data.source", "data", "optimizer", "trainer", "callbacks.x", "analysis.x"])
@pytest.mark.parametrize("target", ["torch.nn.ReLU", "torch.optim.SGD", "pytorch_lightning.Trainer", "vitscope.models.vit",
                                    "vitscope.data.sources.digits.load", "vitscope.cka", "pytorch_lightning.callbacks.Timer",
                                    "vitscope.data.DataModule"])  # fmt: skip
def test_a_target_stands_where_it_belongs(place: str, target: str) -> None:
    fits = {"model": ("torch.nn.ReLU", "vitscope.models.vit"), "data.source": ("vitscope.data.sources.digits.load",),
            "data": ("vitscope.data.DataModule",), "optimizer": ("torch.optim.SGD",),
            "trainer": ("pytorch_lightning.Trainer",), "callbacks.x": ("pytorch_lightning.callbacks.Timer",),
            "analysis.x": ("vitscope.cka",)}  # fmt: skip
    if target in fits[place]:
        target_allowlist.check_role({"_target_": target}, place)
        return
    with pytest.raises(ConfigError, match=rf"{place}\._target_={target}: not "):
        target_allowlist.check_role({"_target_": target}, place)


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"])
@pytest.mark.parametrize("target", ["vitscope.models.timm_model", "timm.models.resnet18"])
def test_no_file_of_weights_but_by_ckpt_path(key: str, target: str) -> None:
    node = {"_target_": target, "name": "resnet18", key: {"file": "evil.pth"}}
    with pytest.raises(ConfigError, match=f"model.{key}.*only ckpt_path may"):
        instantiate.instantiate(node, "model")


REFUSED = [
    "+foo=1", "+model.foo=1", "+objective.foo=1", "+logger.foo=1", "+paths.foo=1", "+caps.foo=1", "+optimizer.schedule.foo=1",
    "+callbacks.checkpoint.foo=1", "+callbacks.x=5", "+analysis.x=5",
    "seed=abc", "seed=1.5", "seed=null", "seed=-1", "seed=true", "seed=99999999999999999999", "seed=[1]", "compile=maybe",
    "compile=1", "test=5", "skip_finished=abc", "run_dir=[a]", "ckpt_path=5", "ckpt_path=true", "paths.runs=null",
    "paths.runs=5", "paths.data=[a]", "caps=smoke caps.epochs=abc", "caps=smoke caps.steps=0", "caps=smoke caps.n=-1",
    "caps=smoke caps.n=nan", "logger.tags=abc", "logger.tags=5", "logger.tags=[1]", "logger.project=5", "logger.group=[a]",
    "trainer.limit_train_batches=0", "trainer.limit_train_batches=-1", "trainer.limit_train_batches=1.5",
    "trainer.limit_val_batches=-1", "trainer.check_val_every_n_epoch=0", "trainer.log_every_n_steps=-1",
    "trainer.max_epochs=true", "trainer.max_epochs=1.5", "trainer.accumulate_grad_batches=0", "trainer.num_nodes=0",
    "+trainer.fast_dev_run=true", "+trainer.barebones=true", "+trainer.overfit_batches=2", "+trainer.logger=false",
    "+trainer.plugins=[]", "+trainer.default_root_dir=/x", "+trainer.enable_checkpointing=true",
    "callbacks.checkpoint.every_n_epochs=0", "callbacks.checkpoint.monitor=5", "callbacks.checkpoint.monitor=null",
    "callbacks=[early_stopping] callbacks.early_stopping.monitor=val/acc", "objective.weight_decay=abc",
    "objective.weight_decay=true", "objective.label_smoothing=null", "objective.l2=null", "objective.augment=5",
    "optimizer.lr=true", "optimizer.lr=[1]", "optimizer.lr=1e400", "optimizer.schedule.warmup_epochs=abc",
    "optimizer.schedule.min_factor=2", "optimizer.schedule.gamma=-1", "data.batch_size=true", "data.batch_size=1e9",
    "data.mean=5", "data.mean=[a,b,c]", "data.std=null", "data.flip=abc", "data.num_workers=1.5", "data.source=null",
    "data.source._target_=vitscope.models.vit", "model=5", "optimizer._target_=torch.nn.Linear",
    "analysis.fourier.probe.n_images=abc", "analysis.fourier.probe.augment=maybe", "analysis.fourier.when.start=abc",
    "analysis.fourier.when.every_n_epochs=1.5", "analysis.fourier.probe=5", "+analysis.fourier.on_error=ignore",
    "~model", "~data", "~objective", "~paths", "~model._target_", "~paths.runs", "model.depth=???", "seed=${seed}",
    "seed=${nothing}", "seed=${oc.env:NOT_SET_ANYWHERE}", "model.depth=${no_such_resolver:1}", "model.depth==3",
    "modell.depth=1", "data.btach_size=2", "objective.wieght_decay=1", "optimizer.lrr=1", "trainer.max_epoch=1",
    "logger.projct=x", "paths.run=x", "callbacks.checkpoint.monitr=x", "analysis.fourier.prob.n_images=1", "seeed=1",
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_refused_in_one_line(text: str, tmp_path: Path) -> None:
    """Wrong types, wrong ranges, unknown keys with and without plus, in every group: one line that names the key, exit 2."""
    given = text.split()
    with pytest.raises(Exception) as caught:  # noqa: PT011  Hydra's own errors are among them
        cfg = composed("train", *([] if "paths.runs" in text else [f"paths.runs={tmp_path}"]), *given)
        caps.apply_caps(cfg)
        validate(cfg)
    line = error_translation.explain(caught.value)
    assert line is not None, repr(caught.value)
    assert line.exit_code == 2
    assert "\n" not in str(line)
    parts = given[-1].lstrip("+~").partition("=")[0].split(".")
    assert any(part in str(line) for part in (*parts, "config")), str(line)  # Hydra does not say where a group got {}


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "a b", "a\nb", "x" * 101, ""])
def test_names_that_lead_out_of_the_run_s_folder(name: str) -> None:
    """The name of an analysis names a folder: a stranger's configuration must not choose where it is."""
    cfg = composed("train", "analysis=[fourier]")
    cfg.analysis = {name: cfg.analysis.fourier}
    with pytest.raises(ConfigError, match="not a name"):
        validate(cfg)


@pytest.mark.parametrize("job", ["../../etc/pass wd", "\u4e2d \u00e9\n", "x" * 400, "..", "a/b"])
def test_names_of_jobs_are_contained(job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = run_dir.create(OmegaConf.create({"paths": {"runs": str(tmp_path / "r u n s \u00e9")}, "seed": 1}), "train")
    assert run.path.parent == tmp_path / "r u n s \u00e9"
    assert run.config().seed == 1


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "a: !!python/object/apply:os.mkdir [x]", "\x00\x01", "a: ${", "5",
                                  "a: &a [*a]"])  # fmt: skip
def test_a_damaged_configuration_of_a_run(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        validate(run_dir.find(tmp_path).config())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("content", ["[1]", "5", "null", '{"last.ckpt": 3}', '{"last.ckpt": {"sha256": 5}}',
                                     '{"../../x": {"sha256": "", "bytes": 0, "epoch": 0, "global_step": 9}}',
                                     '{"last.ckpt": {"sha256": "", "bytes": "0", "epoch": 0, "global_step": "9"}}',
                                     "[" * 100_000])  # fmt: skip
def test_a_damaged_manifest(content: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "x").write_bytes(b"")
    (tmp_path / "checkpoints" / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be trusted"):
        checkpoint_io.newest(tmp_path / "checkpoints")


@pytest.mark.parametrize("noted", [5, [1], "x", {"epoch": "0", "batch": 0}, {"epoch": 0}, {"epoch": -1, "batch": 0},
                                   {"epoch": 0, "batch": torch.zeros(2)}, {"epoch": 0, "batch": 1.5}])  # fmt: skip
def test_a_note_that_does_not_say_where_training_stood(noted: object) -> None:
    with pytest.raises(CheckpointError, match="training position"):
        checkpoint_content.facts({"vitscope": noted, "global_step": 1}, Path("x"))


def test_a_step_that_is_no_number_is_refused_in_a_file_of_ours_alone() -> None:
    with pytest.raises(CheckpointError, match="training position"):
        checkpoint_content.facts({"vitscope": {"epoch": 0, "batch": 0}, "global_step": "many"}, Path("x"))
    assert checkpoint_content.facts({"global_step": "many"}, Path("x")) == {}
    assert checkpoint_content.completed_steps({"global_step": "many"}) == 0


@pytest.mark.parametrize("key", [np.float64(1.0), np.str_("a"), (1, 2), None])
def test_keys_that_could_not_be_read_back(key: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a key of type"):
        checkpoint_io.write({"epoch": 0, "x": {key: 1}}, tmp_path / "last.ckpt")
    checkpoint_io.write({"epoch": 0, "x": OrderedDict({"a": 1, 2: True, 0.5: "b"})}, tmp_path / "last.ckpt")
    assert checkpoint_io.read(tmp_path / "last.ckpt")["x"] == {"a": 1, 2: True, 0.5: "b"}


def test_a_run_s_groups_are_not_chosen_anew() -> None:
    cfg = composed("train")
    for argument, why in (("model=vit", "cannot be changed"), ("--cfg", "saved configuration"), ("-m", "saved configuration"),
                          ("~seed", "cannot be removed"), ("seed=1,2", "several values"), ("sed=1", "no such key"),
                          ("callbacks=[ema]", "cannot be changed")):  # fmt: skip
        with pytest.raises(ConfigError, match=why):
            run_overrides.apply(cfg, [argument])
    run_overrides.apply(cfg, ["seed=3", "+trainer.deterministic=true", "model.heads=[1,2,3,4]"])
    assert (cfg.seed, cfg.trainer.deterministic, list(cfg.model.heads)) == (3, True, [1, 2, 3, 4])


SECRET = "hunter2-hunter2"


def test_secrets_reach_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their key, by the value that an interpolation brings in from the environment, in addresses, on the command line."""
    monkeypatch.setenv("MY_API_KEY", SECRET)
    monkeypatch.setattr("sys.argv", ["train.py", f"+model.hf_token={SECRET}", f"logger.name={SECRET}", "seed=1"])
    cfg = OmegaConf.create(
        {
            "paths": {"runs": str(tmp_path / "runs")}, "seed": 1, "logger": {"name": "${oc.env:MY_API_KEY}", "tokens": "kept"},
            "model": {"hf_token": "other", "auth": "other", "private_key": "other", "author": "kept"},
            "data": {"root": "https://me:other@host/x", "list": ["${oc.env:MY_API_KEY}"]},
        }
    )  # fmt: skip
    run = run_dir.create(cfg, "train")
    text = "".join(file.read_text() for file in run.path.iterdir())
    assert SECRET not in text
    assert "other" not in text
    assert text.count("kept") == 2
    error = ConfigError("model.hf_token", "other", f"not {SECRET}", "mend")
    assert str(error) == "model.hf_token=redacted: not redacted; mend"
    run_end.log_tracebacks_to(run)
    run_end.log_traceback(f"Traceback: {SECRET}")
    assert SECRET not in run.log.read_text()


def test_the_command_line_s_secrets() -> None:
    assert redaction.cleaned("+a.api_key=x y") == "+a.api_key=redacted"
    assert redaction.cleaned("model.tokenizer=bert") == "model.tokenizer=bert"
    assert redaction.cleaned("analysis=[cka]") == "analysis=[cka]"
    assert redaction.cleaned("https://a:b@c/d") == "https://redacted@c/d"


@pytest.mark.parametrize(
    "kind", ["os:system", "vitscope.runs.run_dir:Run", "vitscope.diagnostics.cka.cka:np.load", "x", 5, None]
)
def test_a_result_of_a_type_that_is_none(kind: object, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", __meta__=np.array(json.dumps({"type": kind, "fields": {"path": "/"}})))
    with pytest.raises(Exception, match="results="):
        result_store.load(tmp_path / "x.npz")


def test_no_checkpoint_file_makes_anything_but_exit_4(tmp_path: Path) -> None:
    """Without a manifest too, where nothing vouches for a file: prefixes of pickles, archives in archives, text."""
    good = tmp_path / "good.ckpt"
    torch.save({"state_dict": {"w": torch.ones(3)}}, good)
    whole = good.read_bytes()
    draws = np.random.default_rng(0)
    odd = [b"", b"\x80", b"\x80\x02", b"PK\x03\x04", whole[:-22], whole[:200], b"(" * 1000, b"\x80\x04\x95\xff" * 9, b"text",
           b"\x80\x02X\xff\xff\xff\x7f", whole + whole, whole[22:], os.urandom(100)]  # fmt: skip
    odd += [bytes(b ^ (draws.random() < 0.01) * 255 for b in whole) for _ in range(20)]
    for i, content in enumerate(odd):
        path = tmp_path / f"{i}.ckpt"
        path.write_bytes(content)
        with contextlib.suppress(CheckpointError):
            assert isinstance(checkpoint_io.read(path), dict)
