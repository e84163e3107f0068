"""The tables of docs/survival.md and SECURITY.md name tests that exist, and every case of the table has one."""

from __future__ import annotations

import ast
import fnmatch
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["docs/survival.md", "SECURITY.md"]


def defined(file: Path) -> set[str]:
    """Return the names of a file's tests, ``Class::test`` for those in a class."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {f"{prefix}{n.name}" for n in inner if isinstance(n, ast.FunctionDef) and n.name.startswith("test")}
    return found


def rows(document: str) -> list[tuple[str, str]]:
    """Return the first and the last cell of each row of a document's tables, headings of parts left out."""
    cells = [
        line.strip().strip("|").split("|")
        for line in (ROOT / document).read_text().splitlines()
        if line.startswith("|")
    ]
    kept = [(row[0].strip(), row[-1].strip()) for row in cells]
    return [row for row in kept if not re.fullmatch(r"-+", row[0]) and row[0] not in ("case", "threat") and row[1]]


CASES = [(document, *row) for document in DOCUMENTS for row in rows(document)]


def test_there_are_cases() -> None:
    assert len(CASES) > 40


@pytest.mark.parametrize(("document", "case", "tests"), CASES, ids=[case for _, case, _ in CASES])
def test_every_case_names_tests_that_exist(document: str, case: str, tests: str) -> None:
    named = re.findall(r"`([^`]+)`", tests)
    assert named, f"{document}: {case}: no test is named"
    file: Path | None = None
    for name in named:
        if name.startswith("benchmarks/"):
            script, _, part = name.partition(" ")
            assert f"def {part}(" in (ROOT / script).read_text(), name
            continue
        place, _, test = name.partition("::") if ".py" in name else ("", "", name)
        if place:
            file = ROOT / "tests" / place.removeprefix("tests/")
            files = sorted(file.parent.glob(file.name))
            assert files, f"{document}: {case}: no file {place}"
        assert file is not None, f"{document}: {case}: {name} has no file before it"
        if test:
            known = {found for f in sorted(file.parent.glob(file.name)) for found in defined(f)}
            assert fnmatch.filter(known, test), f"{document}: {case}: no test {test} in {file.name}"
