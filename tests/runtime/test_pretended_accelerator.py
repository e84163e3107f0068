"""Measurements on an accelerator that is pretended: the numbers of the CPU, no tensor on the wrong device, few reads by the host.

See `tests.fixtures.accelerators.pretended_accelerator`. Its backend is registered for a whole process, so the cases run in one
of their own.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "fixtures" / "accelerators" / "pretended_measurements.py"

#: cases that run with every test: a training step, products, and a measure of feature maps
FAST = (
    "convnet: steps of SAM",
    "convnet: products",
    "transformer: relative_log_amplitude",
)
FAULTS = ("a start vector", "a product's vector", "directions")

#: relative difference of numbers: code for GPUs adds float32 numbers in another order (24 bits, some 10^3 terms), and small
#: eigenvalues and differences of losses lose two more digits by cancellation; Muon iterates in bfloat16
TOLERANCE = 1e-2

#: reads of the accelerator by the host for each product, beyond those that a measurement makes once
READS_A_PRODUCT = 4


def cases() -> list[str]:
    """Return the names of all cases, read from the program's source: to import it would register the backend here."""
    for node in ast.parse(PROGRAM.read_text()).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "CASES" and isinstance(node.value, ast.Dict):
            return [ast.literal_eval(key) for key in node.value.keys if key is not None]
    raise AssertionError("no CASES")


def results(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what the program prints of cases, by name."""
    command = [sys.executable, "-m", "tests.fixtures.accelerators.pretended_measurements", *names]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    return {row["name"]: row for row in map(json.loads, process.stdout.splitlines())}


@pytest.fixture(scope="module")
def fast() -> dict[str, dict[str, Any]]:
    return results([*FAST, FAULTS[0]])


@pytest.fixture(scope="module")
def slow() -> dict[str, dict[str, Any]]:
    return results([name for name in [*cases(), *FAULTS] if name not in FAST])


def check(row: dict[str, Any]) -> None:
    assert row["error"] == ""
    assert row["faults"] == []
    assert row["changed"] == []
    assert row["difference"] <= TOLERANCE


@pytest.mark.parametrize("name", FAST)
def test_it_gives_the_numbers_of_the_cpu(name: str, fast: dict[str, dict[str, Any]]) -> None:
    check(fast[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in cases() if name not in FAST])
def test_every_measure_gives_the_numbers_of_the_cpu(name: str, slow: dict[str, dict[str, Any]]) -> None:
    check(slow[name])


def test_a_tensor_that_stays_in_host_memory_is_found(fast: dict[str, dict[str, Any]]) -> None:
    assert "at least two devices" in fast[FAULTS[0]]["error"]
    assert fast[FAULTS[0]]["faults"][0].startswith("linalg/solvers.py:")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS[1:])
def test_other_planted_faults_are_found(name: str, slow: dict[str, dict[str, Any]]) -> None:
    assert "at least two devices" in slow[name]["error"]
    assert slow[name]["changed"] == []


def test_a_product_is_not_waited_for_more_than_a_few_times(fast: dict[str, dict[str, Any]]) -> None:
    """Reads that grow with the products: coefficients, a length, and the losses that are compared, of 12 over two batches."""
    reads = fast["convnet: products"]["reads"]
    in_loop = [count for _, line, count in reads if line.startswith("linalg/")]
    assert 12 <= sum(in_loop) <= 12 * READS_A_PRODUCT + 12
