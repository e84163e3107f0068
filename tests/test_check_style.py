"""The style check finds each kind of fault, accepts plain source and only ever lowers its allowance."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "check_style.py"


@pytest.fixture(scope="module")
def check_style() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_style", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a NamedTuple looks its module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("source", "kinds"),
    [
        ('"""What a run leaves."""', ["opening"]),
        ('"""How a command ends."""', ["opening"]),
        ('"""Whatever is opened here stays."""', []),
        ("found = 1", ["name"]),
        ("for kept in range(2): pass", ["name"]),
        ("if (known := 1): pass", ["name"]),
        ("def f(chosen): pass", ["name"]),
        ("made: int = 1", ["name"]),
        ("found_runs = [chosen_run for chosen_run in ()]", []),
        ("x.found = 1", []),
        ('def f():\n    """Return the measures of a room."""', ["word"]),
        ('"""A mushroom in a warehouse."""', []),
        ('"""Read runs."""\nruns = sorted(())', []),
        ('"""Normalised rows of a neighbour."""', ["spelling", "spelling"]),
        ('"""Normalized rows of a neighbor, analyses of precise promises."""', []),
        ('def f(a):\n    """F.\n\n    Args:\n        a: the number."""', ["entry"]),
        ('def f(a):\n    """F.\n\n    Args:\n        a: Of the run."""', ["entry"]),
        ('def f(a):\n    """F.\n\n    Raises:\n        ValueError: a negative number."""', ["entry"]),
        ('def f(a):\n    """F.\n\n    Args:\n        a: Number of\n            rows: five."""', []),
        ('def f(a):\n    """F.\n\n    Returns:\n        rows: five."""', []),
        ("x = 1  # noqa: B009", ["suppression"]),
        ("x = 1  # type: ignore[arg-type]  # fmt: skip", ["suppression"]),
        ("x = 1  # noqa: B009  declared at run time only", []),
        ("x = 1  # pyright: ignore[reportCallIssue]  the stub lacks it", []),
    ],
)
def test_each_kind_of_fault_is_found(check_style: ModuleType, source: str, kinds: list[str]) -> None:
    assert [fault.kind for fault in check_style.faults(source)] == kinds


def test_faults_beyond_the_allowance_are_reported(check_style: ModuleType) -> None:
    faults = check_style.faults("found = 1\nkept = 2\n")
    assert [fault.line for fault in check_style.excess(faults, {"name": 1})] == [1, 2]
    assert check_style.excess(faults, {"name": 2}) == []
    assert len(check_style.excess(faults, {"word": 5})) == 2


def test_the_allowance_only_falls(check_style: ModuleType) -> None:
    allowance = {"a.py": {"name": 3, "word": 1}, "b.py": {"name": 2}}
    counts = {"a.py": {"name": 5, "word": 0}, "c.py": {"name": 4}}
    assert check_style.lowered(allowance, counts) == {"a.py": {"name": 3}}


def test_the_script_prints_file_and_line_and_fails(
    check_style: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "bad.py").write_text("x = 1\nfound = 2\n")
    monkeypatch.setattr(check_style, "ROOT", tmp_path)
    monkeypatch.setattr(check_style, "ALLOWANCE", tmp_path / "allowance.json")
    check_style.ALLOWANCE.write_text("{}")
    assert check_style.main([]) == 1
    assert capsys.readouterr().out.startswith("src/bad.py:2: the name 'found'")
    check_style.ALLOWANCE.write_text('{"src/bad.py": {"name": 4}}')
    assert check_style.main(["--write"]) == 0
    assert json.loads(check_style.ALLOWANCE.read_text()) == {"src/bad.py": {"name": 1}}
