"""Names of `vitscope.models`: functions found by file name, imported when they are first used, whatever imported their file."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vitscope import models

PACKAGE = Path(models.__file__).parent

#: prints whether the package imports no model by itself, then what `vit` is after each way to import its file
PROGRAM = """
import importlib, json, sys
import vitscope.models
lazy = "timm" not in sys.modules and "vitscope.models.vit" not in sys.modules
kinds = []
for statement in json.loads(sys.argv[1]):
    for name in [name for name in sys.modules if name.startswith("vitscope.models")]:
        del sys.modules[name]
    package = importlib.import_module("vitscope.models")
    exec(statement)
    kinds.append([type(package.vit).__name__, package.vit is sys.modules["vitscope.models.vit"].vit])
print(json.dumps([lazy, kinds]))
"""


def test_every_public_function_is_bound_by_its_name() -> None:
    for name, module in models.functions().items():
        function = getattr(models, name)
        assert inspect.isfunction(function)
        assert (function.__name__, function.__module__) == (name, module)
        assert name in dir(models)
    assert {"vit", "convit", "preresnet", "timm_model"} <= set(models.functions())
    assert not {"layers", "timm_internals", "token_grid"} & set(models.functions())


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'vitt'"):
        _ = models.vitt


@pytest.mark.slow  # a new interpreter
def test_a_name_is_the_function_however_its_file_was_imported() -> None:
    statements = [
        "pass",
        "importlib.import_module('vitscope.models.vit')",
        "from vitscope.models.vit import token_grid",
        "importlib.import_module('vitscope.models.mixer')  # which imports vit.py",
    ]
    command = [sys.executable, "-c", PROGRAM, json.dumps(statements)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True, [["function", True]] * len(statements)]


def test_static_checkers_see_every_public_function() -> None:
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    declared = {alias.asname: node.module for node in imports for alias in node.names if alias.asname == alias.name}
    missing = {name: module for name, module in models.functions().items() if declared.get(name) != module}
    lines = [f"from {module} import {name} as {name}" for name, module in missing.items()]
    assert not lines, f"Add to src/vitscope/models/__init__.pyi: {'; '.join(lines)}"
    assert set(declared) == set(models.functions())
