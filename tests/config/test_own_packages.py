"""Targets in a package of the user's own: what is wrong with the name or with the package is said in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vitscope.config import factories, target_allowlist
from vitscope.runtime.errors import ConfigError

MODULES = {
    "__init__": "",
    "good": "class Net:\n    pass\n",
    "raises": "class Net:\n    def __init__(self):\n        self.width = {}['width']\n",
    "lacks": "import os\nimport package_that_nobody_has\n",
    "divides": "x = 1\ny = x / 0\n",
    "attribute": "import os\nos.no_such_attribute\n",
    "unclosed": "x = 1\ny = (\n",
    "chained": "from {name} import divides\n",
    "deep": "from {name}.good import NoSuchNet\n",
}

#: what follows the package in a target, and the line without its beginning
CASES = {
    "none.Net": "no such name; check the spelling",
    "good.Nett": "no such name; did you mean Net?",
    "lacks.Net": "importing it raised ModuleNotFoundError: No module named 'package_that_nobody_has' ({name}.lacks, line 2); ",
    "divides.Net": "importing it raised ZeroDivisionError: division by zero ({name}.divides, line 2); correct that module",
    "attribute.Net": "importing it raised AttributeError: module 'os' has no attribute 'no_such_attribute' ({name}.attribute",
    "unclosed.Net": "importing it raised SyntaxError: '(' was never closed (unclosed.py, line 2)",
    "chained.Net": "importing it raised ZeroDivisionError: division by zero ({name}.divides, line 2)",
    "deep.Net": "importing it raised ImportError: cannot import name 'NoSuchNet' from '{name}.good'",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"lab_{tmp_path.name.replace('-', '_')}"
    (tmp_path / name).mkdir()
    for module, text in MODULES.items():
        (tmp_path / name / f"{module}.py").write_text(text.replace("{name}", name))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("VITSCOPE_TRUST", f"{name},absent_lab")
    return name


@pytest.fixture
def refusal() -> Callable[[str], str]:
    def of(target: str) -> str:
        with pytest.raises(ConfigError) as error:
            target_allowlist.resolve(target, "model")
        assert str(error.value).startswith(f"model._target_={target}: ")
        return str(error.value)

    return of


@pytest.mark.parametrize("target", CASES)
def test_what_is_wrong_is_said(target: str, package: str, refusal: Callable[[str], str]) -> None:
    assert CASES[target].replace("{name}", package) in refusal(f"{package}.{target}")


def test_a_package_that_is_not_there(package: str, refusal: Callable[[str], str]) -> None:
    text = "Python finds no package absent_lab; install it, or set PYTHONPATH to the folder it is in"
    assert text in refusal("absent_lab.Net")
    assert text in refusal("absent_lab.nets.Net")


def test_a_package_that_is_not_trusted_is_not_imported(
    package: str, refusal: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITSCOPE_TRUST", "")
    assert f"set VITSCOPE_TRUST={package} if it is your own" in refusal(f"{package}.divides.Net")


def test_a_good_name_is_resolved(package: str) -> None:
    assert target_allowlist.resolve(f"{package}.good.Net", "model").__name__ == "Net"


def test_an_error_of_a_constructor_names_its_line(package: str) -> None:
    cfg = OmegaConf.create({"seed": 0, "model": {"_target_": f"{package}.raises.Net"}})
    with pytest.raises(ConfigError) as error:
        factories.model(cfg)
    assert str(error.value) == f"model: KeyError: 'width' ({package}.raises, line 3); check its keys"
