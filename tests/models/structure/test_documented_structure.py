"""The example of docs/structure.md: a network with PyTorch's own attention, whose units are described."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

import vitscope as vs

PAGE = Path(__file__).parents[3] / "docs" / "structure.md"


def test_the_documented_network_is_measured(capsys) -> None:
    source = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert source is not None
    names: dict[str, Any] = {"__name__": "documented"}
    exec(source[1], names)
    table = capsys.readouterr().out
    assert table.splitlines()[1].split()[:3] == ["blocks.0.attention", "msa", "1"]
    probe = names["probe"]
    structure = vs.structure(probe.model)
    assert [(unit.name, unit.kind) for unit in structure.units] == [
        ("blocks.0.attention", "msa"),
        ("blocks.1.attention", "msa"),
    ]
    kinds = structure.parameter_kinds
    assert {key for key in kinds if kinds[key] == "msa"} == {key for key in kinds if key.startswith("blocks.")}
    assert {kinds[key] for key in kinds if key.startswith("patches")} == {"stem"}
    assert {kinds[key] for key in kinds if key.startswith("head")} == {"head"}
    fourier = vs.relative_log_amplitude(probe)
    assert fourier.taps == ("stem", "blocks.0.attention", "blocks.1.attention")
    by_kind = vs.hessian_eigenvalues(probe, k=1, parameters="kind:msa")
    assert np.isfinite(by_kind.eigenvalues).all()
    assert np.isfinite(vs.loss_landscape(probe, n=3).nll).all()


def test_every_module_of_timm_has_a_row() -> None:
    from tests.models.structure.timm_families import FAMILIES

    rows = [line.split("|")[1:3] for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    written = {(module.strip(), model.strip()) for module, model in rows}
    assert {(module, model) for module, (model, *_) in FAMILIES.items()} <= written
