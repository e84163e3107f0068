"""Models: the paper's, timm's, and where their feature maps and residual branches are read.

A function is imported when it is first used: ``vitscope.models.vit`` is the function ``vit`` of the file ``vit.py``. The names
stand in ``__init__.pyi`` as well, for static checkers.
"""

from __future__ import annotations

import importlib
import re
import sys
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

#: public functions that share a file with another one
_SHARED_FILES = {
    "build_up": "alternet_layout",
    "convit": "vit",
    "load_official_state_dict": "official_checkpoints",
    "preresnet": "convnet",
    "resnext": "convnet",
}


@cache
def functions() -> dict[str, str]:
    """Return the module path of each public function by its name: those named like their file, and those that share one."""
    files = {file.stem: file.stem for file in Path(__file__).parent.glob("*.py") if _defines_its_name(file)}
    return {name: f"{__name__}.{file}" for name, file in sorted((files | _SHARED_FILES).items())}


def _defines_its_name(file: Path) -> bool:
    return re.search(rf"^def {file.stem}\(", file.read_text(encoding="utf-8"), re.MULTILINE) is not None


class _ModelPackage(ModuleType):
    """The package, in which a name is that of a function where a function and its module have the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Bind the function ``name`` in place of the module ``name``, which the import system binds after each import."""
        if isinstance(value, ModuleType) and isinstance(vars(value).get(name), FunctionType):
            value = vars(value)[name]
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _ModelPackage


def __getattr__(name: str) -> Any:
    """Import the file of a public function when the function is first used, and the package of structures."""
    if name == "structure":
        return importlib.import_module(f"{__name__}.structure")
    if name not in functions():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(functions()[name]), name)


def __dir__() -> list[str]:
    """List the functions that were not used yet too."""
    return sorted({*globals(), *functions()})
