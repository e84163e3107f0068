"""vitscope: a microscope for vision networks.

Every measure is a function of a `Probe`; names are looked up when they are first used, so that importing the package
costs nothing::

    import vitscope as vs

    probe = vs.Probe(model, [(x, y)], vs.Objective(weight_decay=0.05))
    vs.hessian_max_eigenvalue_spectrum(probe, n_top=5).eigenvalues
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any, cast

from vitscope.core.structure_lookup import StructureReader, register_structure_reader

__version__ = "0.2.0"

_HOME = {
    "Probe": "core.probe",
    "ObjectiveCard": "core.objective_card",
    "check_comparable": "core.objective_card",
    "Objective": "core.objective",
    "Tap": "core.tap",
    "align_weights": "models.permutations.weight_alignment",
    "taps": "models.structure.taps",
    "structure": "models.structure.structure_table",
    "one_pass": "core.feature_pass",
    "plot": "plotting.api",
    "style": "plotting.style",
    "CurvatureOptions": "linalg.curvature.curvature_options",
    "load_probe": "runs.api",
    "load_result": "runs.api",
    "load_results": "runs.api",
    "Result": "core.results.result",
    "hessian_operator": "linalg.interchange.scipy_operator",
    "eigenvalues_of": "diagnostics.hessian._operators_of_others",
    "spectral_density_of": "diagnostics.hessian._operators_of_others",
}

# core must not import models: the package as a whole connects them, and imports nothing heavy for it
register_structure_reader(lambda: cast(StructureReader, importlib.import_module("vitscope.models.structure")))


@cache
def measures() -> dict[str, str]:
    """Return the module path of each measure by its name: every public file of the topics but the plots."""
    folder = Path(__file__).parent / "diagnostics"
    files = (f for f in sorted(folder.glob("*/*.py")) if not f.stem.startswith(("_", "plot")))
    return {f.stem: f"vitscope.diagnostics.{f.parent.name}.{f.stem}" for f in files}


def __getattr__(name: str) -> Any:
    """Find a public name in its topic."""
    if name in _HOME:
        return getattr(importlib.import_module(f"vitscope.{_HOME[name]}"), name)
    if name == "models":
        return importlib.import_module("vitscope.models")
    if name in measures():
        module = importlib.import_module(measures()[name])
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module 'vitscope' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazily found names too."""
    return sorted({*globals(), *_HOME, *measures(), "models"})
