"""Every optional extra has a check that `make test-extras` runs in an environment of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_extra_has_a_check() -> None:
    spec = importlib.util.spec_from_file_location("check_extras", ROOT / ".ci" / "check_extras.py")
    assert spec is not None
    assert spec.loader is not None
    check_extras = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_extras)
    assert check_extras.declared_extras() == sorted(check_extras.CHECKS)
    for checks in check_extras.CHECKS.values():
        for arguments in checks:
            files = [argument for argument in arguments if argument.startswith("tests/")]
            assert all((ROOT / file).exists() for file in files), files
