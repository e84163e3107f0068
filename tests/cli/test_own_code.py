"""docs/own_code.md is executed: its files are written and its commands run in the order of the document."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vitscope as vs

DOCUMENT = Path(__file__).parents[2] / "docs" / "own_code.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
#: what keeps a training to seconds; a command's own values win
SMALL = {
    "trainer.max_epochs": "2", "trainer.limit_train_batches": "2", "trainer.limit_val_batches": "1",
    "trainer.limit_test_batches": "1", "trainer.accelerator": "cpu", "data.batch_size": "8", "data.eval_batch_size": "8",
    "logger": "none", "test": "false", "analysis": "[]",
}  # fmt: skip
SMALLER_MODELS = {"model=vit": ["model.depth=1", "model.patch_size=8"], "model=convnet": ["model.depth=18"]}


def with_small_sizes(arguments: list[str]) -> list[str]:
    if any(argument.startswith("run=") for argument in arguments):
        return arguments
    keys = {argument.partition("=")[0] for argument in arguments}
    sizes = [f"{key}={value}" for key, value in SMALL.items() if key not in keys]
    return [*arguments, *sizes, *(size for name in arguments for size in SMALLER_MODELS.get(name, ()))]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in an empty folder that Python searches for packages; forget what was imported from it."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "mylab"]:
            del sys.modules[name]

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield tmp_path
    forget()


@pytest.mark.slow  # its parts are tested one by one in test_own_networks.py and others
def test_the_document_runs(call, lab: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    n_commands = {"train": 0, "analyze": 0}
    for language, block in _BLOCK.findall(DOCUMENT.read_text()):
        path = re.search(r"\A(?:# @package .*\n)?# ([\w/]+\.(?:py|yaml))\n", block)
        if path is not None:
            file = lab / path[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block)
        elif language == "python":
            exec(compile(block, str(DOCUMENT), "exec"), {})
        else:
            for words in map(shlex.split, block.splitlines()):
                if words[0] == "export":
                    for variable in words[1:]:
                        monkeypatch.setenv(*variable.split("="))
                    continue
                command = words[1].removesuffix(".py")
                assert words[0] == "python"
                arguments = with_small_sizes(words[2:]) if command == "train" else [*words[2:], "device=cpu"]
                assert call(command, *arguments) == 0, (words, capsys.readouterr().err)
                n_commands[command] += 1
    assert n_commands == {"train": 10, "analyze": 3}
    assert "{'temperature': 2.0}" in capsys.readouterr().out
    _check_runs(lab)


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _check_runs(lab: Path) -> None:
    logged = {name for file in lab.glob("runs/*/metrics.jsonl") for row in _rows(file) for name in row}
    assert {"train/weight_norm", "val/f1"} <= logged
    steps = [row["step"] for row in _rows(lab / "runs/decay/metrics.jsonl")]
    assert max(steps) == 5  # the last of three epochs of two steps, the third of them after a resume
    provenance = json.loads((lab / "runs/first/provenance.json").read_text())
    assert provenance["model"]["parameters"] > 0
    assert vs.load_results(lab / "runs/first")["evaluation"]["end"].scalars()["n_classes"] == 10
