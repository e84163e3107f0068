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


class LoggedRun:
    """A W&B run that keeps the artifacts it gets."""

    id, url = "x", None

    def __init__(self) -> None:
        self.artifacts: dict[str, tuple[str, dict[str, bytes]]] = {}
        self.exit_code: int | None = None

    def log_artifact(self, artifact: Any) -> None:
        files = {name: Path(entry.local_path).read_bytes() for name, entry in artifact.manifest.entries.items()}
        self.artifacts[artifact.name] = (artifact.type, files)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.mark.parametrize(
    ("artifacts", "job_type", "exit_code", "kinds"),
    [
        ([], "train", 0, set()),
        (None, "train", 0, set()),
        (["results", "checkpoints"], "train", 0, {"results", "checkpoints"}),
        (["checkpoints", "results"], "analyze", 0, {"results"}),
        (["results"], "train", 5, set()),
    ],
)
def test_artifacts_are_uploaded_on_request_and_without_secrets(
    artifacts: list[str] | None, job_type: str, exit_code: int, kinds: set[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("WANDB_API_KEY", secret := "5ecret0" * 6)
    logged = LoggedRun()
    monkeypatch.setattr(wandb_mirror.wandb, "init", lambda **arguments: logged)
    logger = {"project": "p"} if artifacts is None else {"project": "p", "artifacts": artifacts}
    run = run_dir.create(OmegaConf.create({"paths": {"runs": str(tmp_path)}, "seed": 0, "logger": logger}), "train")
    contents = {
        "results/cka/end-0a.npz": b"arrays", "results/cka/end-0a.json": f'{{"card": {{"data": "{secret}"}}}}'.encode(),
        "results/cka/end-0a.partial": b"unfinished", "checkpoints/last.ckpt": b"weights", "checkpoints/manifest.json": b"{}",
    }  # fmt: skip
    for name, content in contents.items():
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_bytes(content)
    mirror = wandb_mirror.start(run.config(), run, job_type)
    mirror.finish(exit_code)
    assert logged.exit_code == exit_code
    assert logged.artifacts.keys() == {f"{run.id}-{kind}" for kind in kinds}
    if "results" in kinds:
        kind, files = logged.artifacts[f"{run.id}-results"]
        assert (kind, files.keys()) == ("results", {"cka/end-0a.npz", "cka/end-0a.json"})
        assert files["cka/end-0a.npz"] == b"arrays"
        assert b"redacted" in files["cka/end-0a.json"]
        assert secret.encode() not in files["cka/end-0a.json"]
    if "checkpoints" in kinds:
        kind, files = logged.artifacts[f"{run.id}-checkpoints"]
        assert (kind, files) == ("model", {"last.ckpt": b"weights", "manifest.json": b"{}"})
