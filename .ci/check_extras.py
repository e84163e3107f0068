"""Install each optional extra of pyproject.toml into a fresh environment and run what it is for.

Usage: python .ci/check_extras.py FOLDER [EXTRA ...]

FOLDER receives one environment an extra, ``FOLDER/<extra>``, and its output, ``FOLDER/<extra>.txt``. Without names, all extras of
pyproject.toml are checked but ``dev``, which `make setup` installs. The exit code is 1 where one fails, and a skipped test counts
as a failure: it would mean that the package of the extra is missing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: the smallest training; every run of it ends in seconds
_TRAINING = ["train.py", "-m", "model=vit", "model.depth=1", "model.patch_size=8", "data=digits", "caps=smoke", "analysis=[]",
             "logger=none", "trainer=cpu"]  # fmt: skip

#: arguments of Python that use the packages of each extra; ``{folder}`` is one for runs
CHECKS: dict[str, list[list[str]]] = {
    "bench": [["-m", "pytest", "tests/diagnostics/test_hessian_peers.py", "tests/diagnostics/test_operators_of_others.py"]],
    "docs": [["-m", "pytest", "tests/docs"]],
    "hf": [["-m", "pytest", "tests/data/sources/test_huggingface.py"]],
    "hydra-optuna": [
        [*_TRAINING, "paths.runs={folder}", "hydra/sweeper=bayes", "hydra.sweeper.n_trials=2",
         "hydra.sweeper.params={optimizer.lr: 'tag(log, interval(1e-4, 1e-2))'}"],
    ],
    "joblib": [[*_TRAINING, "paths.runs={folder}", "hydra/launcher=parallel", "seed=0,1"]],
    "kfac": [["-m", "pytest", "tests/diagnostics/test_kronecker_factors.py"]],
    "loggers": [["-m", "pytest", "tests/runs/scalar_loggers"]],
    "optuna": [["-m", "pytest", "tests/sweep/test_local_runner.py", "tests/sweep/test_trial_choices.py"]],
    "report": [["-m", "pytest", "tests/cli/test_wandb_report.py"]],
    "submitit": [
        ["-m", "pytest", "tests/reproduce/test_trial_jobs.py"],
        [*_TRAINING, "paths.runs={folder}", "hydra/launcher=local", "seed=0,1"],
    ],
    "transformers": [
        ["-m", "pytest", "tests/models/test_transformers_measures.py", "tests/models/structure/test_transformers_models.py"],
    ],
}  # fmt: skip


def declared_extras() -> list[str]:
    """Return the names of the extras of pyproject.toml, ``dev`` left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return sorted(name for name in project["optional-dependencies"] if name != "dev")


def install(extra: str, environment: Path, log: Path) -> Path:
    """Make a fresh environment with vitscope and one extra, and return its Python.

    Raises:
        subprocess.CalledProcessError: The packages cannot be installed.
    """
    venv.create(environment, clear=True, with_pip=True)
    python = environment / "bin" / "python"
    uv = shutil.which("uv")
    installer = [uv, "pip", "install", "--python", str(python)] if uv else [str(python), "-m", "pip", "install"]
    with log.open("w") as file:
        packages = ["-e", f".[{extra}]", "pytest", "hypothesis"]
        subprocess.run([*installer, "--quiet", *packages], cwd=ROOT, stdout=file, stderr=file, check=True)
    return python


def fault(python: Path, arguments: list[str], folder: Path, log: Path) -> str:
    """Run Python with arguments and return in a phrase what is wrong; an empty text where nothing is."""
    command = [
        str(python),
        *(argument.format(folder=folder) if "{folder}" in argument else argument for argument in arguments),
    ]
    if "pytest" in arguments:
        command += ["-q", "-p", "no:cacheprovider", "-m", "slow or not slow"]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    output = ended.stdout + ended.stderr
    with log.open("a") as file:
        file.write(f"\n$ {' '.join(command)}\n{output}")
    if ended.returncode:
        return f"exit code {ended.returncode}: {output.strip().splitlines()[-1] if output.strip() else ''}"
    skipped = re.findall(r"^SKIPPED .*", ended.stdout, re.MULTILINE)
    return f"skipped: {skipped[0]}" if skipped else ""


def check(extra: str, folder: Path) -> str:
    """Install and use one extra, and return in a phrase what is wrong; an empty text where nothing is."""
    log = folder / f"{extra}.txt"
    if extra not in CHECKS:
        return "no check; add one to CHECKS in .ci/check_extras.py"
    try:
        python = install(extra, folder / extra, log)
    except subprocess.CalledProcessError:
        return f"not installed; see {log}"
    faults = (fault(python, arguments, folder / f"{extra}-runs", log) for arguments in CHECKS[extra])
    return next((phrase for phrase in faults if phrase), "")


def main() -> int:
    """Check the extras of the command line one after the other, a line each."""
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    folder = Path(sys.argv[1]).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    failures = 0
    for extra in sys.argv[2:] or declared_extras():
        start = time.monotonic()
        phrase = check(extra, folder)
        shutil.rmtree(folder / extra, ignore_errors=True)  # several GB
        failures += bool(phrase)
        print(
            f"{extra:14} {'failed: ' + phrase if phrase else 'passed'} ({time.monotonic() - start:.0f} s)", flush=True
        )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
