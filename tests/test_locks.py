"""The locks have the packages of ``pyproject.toml`` with the versions of ``constraints.txt``, hashes, and no server's address."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def make_locks() -> ModuleType:
    specification = importlib.util.spec_from_file_location("make_locks", ROOT / ".ci" / "make_locks.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


LOCKS = make_locks()
CONSTRAINTS = {
    canonicalize_name(name): version
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
    for name, _, version in [line.partition("==")]
}


def entries(extra: str) -> dict[str, str]:
    return LOCKS.entries((LOCKS.LOCKS / f"{extra}.txt").read_text())


@pytest.mark.parametrize("extra", LOCKS.EXTRAS)
def test_a_lock_is_made_from_the_requirements_of_today(extra: str) -> None:
    first = (LOCKS.LOCKS / f"{extra}.txt").read_text().partition("\n")[0] + "\n"
    assert first == LOCKS.header(extra), f"locks/{extra}.txt is out of date: run `make locks`"


@pytest.mark.parametrize("extra", LOCKS.EXTRAS)
def test_each_package_has_hashes_and_the_version_of_the_constraints(extra: str) -> None:
    for name, entry in entries(extra).items():
        lines = [line.strip().rstrip("\\").strip() for line in entry.splitlines()]
        assert re.fullmatch(rf"{re.escape(name)}==\S+( ; .+)?", lines[0])
        assert lines[1:]
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line) for line in lines[1:])
        version = lines[0].split(" ;")[0].partition("==")[2]
        assert CONSTRAINTS.get(canonicalize_name(name), version) == version


@pytest.mark.parametrize("extra", LOCKS.EXTRAS)
def test_no_requirement_is_missing(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {canonicalize_name(name) for name in {**entries("dev"), **entries(extra)}}
    for text in [*project["dependencies"], *project["optional-dependencies"][extra]]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in locked
        assert requirement.specifier.contains(CONSTRAINTS[name], prereleases=True), f"{text} and constraints.txt"


@pytest.mark.parametrize("file", ["constraints.txt", *(f"locks/{extra}.txt" for extra in LOCKS.EXTRAS)])
def test_no_server_and_no_path_is_named(file: str) -> None:
    assert not re.search(r"://|--(extra-)?index|--find-links|--trusted|@ |/home|/opt|/root", (ROOT / file).read_text())


@pytest.mark.parametrize(
    ("uv", "words"),
    [("uv", "--require-hashes -r locks/dev.txt -r locks/docs.txt"), ("", "-c constraints.txt -e '.[docs]'")],
)
def test_make_installs_from_the_lock_with_uv_and_from_the_constraints_without(uv: str, words: str) -> None:
    words_of_make = ["make", "-n", "docs", f"UV={uv}"]
    printed = subprocess.run(words_of_make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert words in " ".join(printed.replace("\\\n", " ").split())
