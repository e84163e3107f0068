"""Sweeps of a small file that is sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vitscope.sweep.sweep_file import Sweep

GOOD = """
program: train.py
method: grid
metric: {name: val/accuracy, goal: maximize}
parameters:
  seed: {values: [0, 1]}
command: ["${env}", python, "${program}", "${args_no_hyphens}"]
"""


def sweep_of(parameters: dict[str, Any], **content: Any) -> Sweep:
    return Sweep(Path("x.yaml"), {**yaml.safe_load(GOOD), "parameters": parameters, **content})
