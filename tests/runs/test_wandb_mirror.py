"""A run's name and tags reach W&B as its group and tags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from vitscope.runs import run_dir, wandb_mirror


@pytest.mark.parametrize(
    ("keys", "logger", "group", "tags"),
    [
        ({"name": "vit", "tags": ["a", "b"]}, {}, "vit", ["a", "b"]),
        ({"name": "vit", "tags": ["a"]}, {"group": "mine", "tags": ["b", "a"]}, "mine", ["a", "b"]),
        ({"name": None, "tags": []}, {}, None, None),
        ({}, {}, None, None),
    ],
)
def test_name_and_tags(
    keys: dict[str, Any], logger: dict[str, Any], group: str | None, tags: list[str] | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    received: dict[str, Any] = {}

    class Started:
        id, url = "x", None

    def init(**arguments: Any) -> Started:
        received.update(arguments)
        return Started()

    monkeypatch.setattr(wandb_mirror.wandb, "init", init)
    cfg = OmegaConf.create({"paths": {"runs": str(tmp_path)}, "seed": 0, "logger": {"project": "p", **logger}, **keys})
    run = run_dir.create(cfg, "train")
    wandb_mirror.start(cfg, run, "train")
    assert (received["group"], received["tags"], received["name"]) == (group, tags, run.id)
