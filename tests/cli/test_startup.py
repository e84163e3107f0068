"""Commands that print help or refuse an override load none of the libraries that a training needs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.programs.processes import ENVIRONMENT, ROOT
from tests.fixtures.runs.report_runs import spectrum, write_run

#: libraries that take from tenths of a second to seconds to import
HEAVY = {"torch", "torchvision", "torchmetrics", "pytorch_lightning", "lightning_fabric", "timm", "numpy", "scipy", "pandas",
         "sklearn", "skimage", "matplotlib", "plotly", "wandb", "PIL"}  # fmt: skip

#: runs a command of vitscope in this process and prints its exit code and the libraries in sys.modules as the last line
PROGRAM = """
import json, sys
from vitscope.cli import main
code = 0
try:
    main.main()
except SystemExit as end:
    code = end.code
print()
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def libraries_of(*arguments: str) -> tuple[int, set[str], str]:
    """Return the exit code of a command, the libraries that its process imported, and what it printed on stderr."""
    process = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True,
                             text=True, check=True)  # fmt: skip
    code, names = json.loads(process.stdout.splitlines()[-1])
    return code, set(names), process.stderr


def slow(*case: Any) -> Any:
    """Return a case that is one more of a kind: a process of a second."""
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["train", "--help"], 0, ""),
        (["train", "model=alternett"], 2, "error: model=alternett: no such choice; did you mean alternet"),
        (["train", "nokey=1"], 2, "error: nokey: no such key"),
        slow(["train", "seed=x"], 2, "error: seed=x: not a whole number"),
        pytest.param(
            ["train", "optimizer.lr=abc"], 2, "error: optimizer.lr=abc: not of type float", marks=pytest.mark.slow
        ),
        (["train", "optimizer.lr=-1"], 2, "error: optimizer.lr=-1: not greater than 0"),
        slow(["train", "model.depth=0"], 2, "error: model.depth=0: not at least 1"),
        slow(["train", "data.fraction=2"], 2, "error: data.fraction=2: not in (0, 1]"),
        pytest.param(
            ["train", "analysis.hessian.n_top=0"],
            2,
            "error: analysis.hessian.n_top=0: not at least 1",
            marks=pytest.mark.slow,
        ),
        (["analyze", "data=photo"], 2, "error: data=photo: no such choice; did you mean photos"),
        (["report", "tabel=models"], 2, "error: tabel: no such key; did you mean table"),
        (["reproduce", "fig44"], 2, "error: target=fig44: no such figure or table"),
        (["sweep", "--help"], 0, ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_answer_that_needs_no_training_library(arguments: Sequence[str], code: int, error: str) -> None:
    actual_code, libraries, stderr = libraries_of(*arguments)
    assert (actual_code, libraries & HEAVY) == (code, set()), stderr
    assert stderr.startswith(error)
    assert stderr.count("\n") == bool(error)


def test_a_list_of_runs_loads_no_training_library(tmp_path: Path) -> None:
    write_run(tmp_path, "vit", name="vit-run", measured={"hessian": spectrum()})
    code, libraries, stderr = libraries_of("runs", "list", str(tmp_path), "json=true")
    assert (code, libraries & HEAVY, stderr) == (0, {"numpy"}, "")


def test_the_package_itself_imports_no_library() -> None:
    program = "import sys, vitscope; print(*{name.partition('.')[0] for name in sys.modules})"
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
                             check=True)  # fmt: skip
    assert not set(process.stdout.split()) & (HEAVY | {"hydra", "omegaconf"})
