"""Who may import whom: the walls that keep the house easy to see."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "vitscope"
FILES = sorted(SRC.rglob("*.py"))
PURE = {"objective.py", "evaluate.py", "probe.py", "guard.py", "card.py", "eager.py", "checks.py"}
HEAVY = {"pytorch_lightning", "lightning", "wandb", "hydra", "omegaconf", "matplotlib", "plotly", "seaborn"}


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def tops(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(file)}


def name(file: Path) -> str:
    return file.relative_to(SRC).as_posix()


@pytest.mark.parametrize("file", FILES, ids=name)
def test_measures_and_models_are_pure(file: Path) -> None:
    part = file.relative_to(SRC).parts
    measure = part[0] == "diagnostics" and not file.stem.startswith("plot")
    if measure or part[0] in ("linalg", "models") or name(file) in PURE:
        assert not tops(file) & HEAVY


@pytest.mark.parametrize("file", [f for f in FILES if f.stem.startswith("plot") and "diagnostics" in f.parts], ids=name)
def test_plots_draw_and_never_compute(file: Path) -> None:
    assert not tops(file) & {"torch", "scipy", "sklearn", "timm", "wandb", "hydra", "pytorch_lightning"}
    room = ".".join(file.relative_to(SRC).parts[:2])
    ours = {n for n in imported(file) if n.startswith("vitscope")}
    assert all(n == "vitscope" or n.startswith(f"vitscope.{room}") or room.startswith(n) for n in ours), ours


@pytest.mark.parametrize("file", [f for f in FILES if "diagnostics" in f.parts], ids=name)
def test_rooms_do_not_know_each_other(file: Path) -> None:
    parts = file.relative_to(SRC).parts
    if len(parts) < 3:
        return
    other = {n for n in imported(file) if n.startswith("vitscope.diagnostics.") and n.split(".")[2] != parts[1]}
    assert not other


def test_wandb_is_imported_in_one_file() -> None:
    assert [name(f) for f in FILES if "wandb" in tops(f)] == ["tracking.py"]


def test_no_dumping_grounds() -> None:
    assert not [name(f) for f in FILES if f.stem in ("utils", "util", "helpers", "common", "misc")]
