"""Arguments named as in other tools are refused with what to write instead, before torch is imported."""

from __future__ import annotations

import re
import tomllib

import pytest
from omegaconf import OmegaConf

import vitscope
from tests.cli.test_startup import HEAVY, libraries_of
from tests.fixtures.configs.configurations import composed
from tests.fixtures.programs.processes import ROOT
from vitscope.cli import main, other_tools
from vitscope.runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("command", "arguments", "text"),
    [
        ("train", "lr=0.1", "lr=0.1: no such key; write optimizer.lr=0.1"),
        ("train", "+lr=0.1 model=vit", "+lr=0.1: no such key; write optimizer.lr=0.1"),
        ("train", "batch_size=64 epochs=3", "batch_size=64 epochs=3: no such key; write data.batch_size=64 "
                                             "trainer.max_epochs=3"),
        ("train", "debug=default", "debug=default: no such key; write caps=smoke"),
        ("train", "task_name=vit_baseline", "task_name=vit_baseline: no such key; write name=vit_baseline"),
        ("train", "--resume runs/a", "--resume runs/a: arguments are key=value; write run=runs/<id> ckpt_path=last"),
        ("analyze", "--resume runs/a", "--resume runs/a: arguments are key=value; write run=runs/<id>"),
        ("analyze", "model.checkpoint_path=my.pth", "model.checkpoint_path=my.pth: no such key; write ckpt_path=my.pth"),
        ("analyze", "--model resnet18 --data-dir=im --checkpoint my.pth --seed 1",
         "--model resnet18 --data-dir=im --checkpoint my.pth --seed 1: arguments are key=value; write model=timm "
         "model.name=resnet18 data=folder data.root=im ckpt_path=my.pth seed=1"),
        ("analyze", "--model vit", "--model vit: arguments are key=value; write model=vit"),
        ("analyze", "split=val", "split=val: no such key; write probe.split=val"),
        ("analyze", "batch_size=8", "batch_size=8: no such key; write analysis.<name>.probe.batch_size=8"),
        ("analyze", "lr=0.1", "lr=0.1: analyze trains nothing; leave it out; train takes optimizer.lr=0.1"),
        ("analyze", "batch_size=8 lr=0.1",
         "batch_size=8 lr=0.1: no such key; write analysis.<name>.probe.batch_size=8, and leave out lr=0.1: analyze trains "
         "nothing, train takes optimizer.lr=0.1"),
        ("train", "dry=true", "dry=true: no such key; write --cfg job"),
        ("analyze", "dry=true out=a", "dry=true out=a: no such key; write cost=true run_dir=a"),
        ("train", "--pretrained --tensorboard",
         "--pretrained --tensorboard: arguments are key=value; write model.pretrained=true logger=tensorboard"),
    ],
)  # fmt: skip
def test_a_name_of_another_tool_is_answered_by_the_right_key(command: str, arguments: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        other_tools.refuse_foreign_names(command, arguments.split())


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", "model=vit seed=1 name=a tags=[b] optimizer.lr=0.1 -m --cfg job --resolve"),
        ("analyze", "ckpt=ema ckpt_path=x.pth device=cpu model.name=a --help --config-dir mine"),
        ("report", "epochs=3"),
    ],
)
def test_own_keys_and_options_pass(command: str, arguments: str) -> None:
    other_tools.refuse_foreign_names(command, arguments.split())


def test_every_replacement_is_a_key_that_there_is() -> None:
    configs = {"train": composed("train", "model=vit"), "analyze": composed("analyze", "model=vit")}
    for command, table in (("train", other_tools._REPLACEMENTS), ("analyze", other_tools._OF_ANALYZE)):
        for template in table.values():
            if template == other_tools._PRINT_ONLY:  # an option and no key
                continue
            for word in template.split():
                key, _, value = word.replace("<name>", "hessian").partition("=")
                config = (
                    composed("train", "model=vit", "optimizer=sgd") if key == "optimizer.momentum" else configs[command]
                )
                config = composed("train", "model=timm") if key in ("model.name", "model.pretrained") else config
                is_there = OmegaConf.select(config, key, default="absent") != "absent"
                assert is_there, f"{template}: no key {key}"
                if value and value not in ("{}", "true", "cuda", "bf16-mixed") and "<" not in value and value != "last":
                    composed(command, f"{key}={value}")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["train", "lr=0.1"], "error: lr=0.1: no such key; write optimizer.lr=0.1\n"),
        (["train", "run=runs/none", "epochs=5"], "error: epochs=5: no such key; write trainer.max_epochs=5\n"),
        (["train", "depth=18"], "error: depth: no such key; write model.depth=...\n"),
        (["analyze", "analysis=[hessian]", "n_top=2"], "error: n_top: no such key; write analysis.hessian.n_top=...\n"),
        (["analyze", "analysis=[hessian]", "k=2"], "error: k: no such key; write analysis.hessian.n_top=...\n"),
        (["analyze", "analysis=[hessian_eigenvalues]", "analysis.hessian_eigenvalues.n_top=2"],
         "error: analysis.hessian_eigenvalues.n_top: no such key; the number of eigenvalues is k here\n"),
        pytest.param(  # imports torch
            ["analyze", "analysis=[hessian]", "+analysis.hessian.k=2"],
            "error: analysis.hessian.k=2: no such key; the number of eigenvalues is n_top here\n",
            marks=pytest.mark.slow,
        ),
        (["train", "model=resnet18"], "error: model=resnet18: no such choice; did you mean resnext or preresnet or "
                                      "alternet? a model of timm is model=timm model.name=resnet18\n"),
    ],
)  # fmt: skip
def test_a_refused_name_is_one_line(arguments: list[str], error: str) -> None:
    code, libraries, stderr = libraries_of(*arguments)
    assert (code, stderr) == (2, error)
    if not any("analysis.hessian.k" in argument for argument in arguments):
        assert not libraries & HEAVY


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_the_program_alone_lists_its_commands(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["vitscope", *arguments])
    main.main()
    lines = capsys.readouterr().out.splitlines()
    for name, summary in main.COMMANDS.items():
        assert any(line.split(maxsplit=1) == [name, summary] for line in lines)
    assert max(map(len, lines)) <= 100


def test_the_version_is_the_package_s(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["vitscope", "--version"])
    main.main()
    assert capsys.readouterr().out == f"vitscope {vitscope.__version__}\n"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == vitscope.__version__
